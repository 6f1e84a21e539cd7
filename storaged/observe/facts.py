"""What a scrape needs to know of a volume: taken on the event loop, without a call that could wait; the rest, from
sysfs and /proc, in the thread of the scrape.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storaged.backends import find_backend
from storaged.errors import StoragedError
from storaged.host import disk, process
from storaged.model.history import Happening
from storaged.model.record import ProcessIdentity
from storaged.supervisor.volume import Volume

#: Volumes that are asked in one go: some 0.1 ms of the event loop.
_AT_ONCE = 20
#: The field of /sys/block/X/stat, from 0, that counts nothing.
_IN_FLIGHT = 8


@dataclass(frozen=True, slots=True)
class Facts:
    """What the daemon knows of one volume by itself. Times in seconds."""

    name: str
    transport: str
    backend: str
    state: str
    since: float
    code: str
    """Of the failure that it has now, empty where it has none."""
    size: int
    device: str | None
    counted: Sequence[int]
    process: ProcessIdentity | None
    """Its QSD, None where there is none."""
    open_seconds: float
    waiting: float
    waited: float
    deaths: int
    hangs: int
    stalls: int
    recoveries: int
    rescues: int
    pauses: Sequence[int]
    pause_seconds: float


@dataclass(frozen=True, slots=True)
class Sample:
    """What the kernel says of a volume's device and QSD at the moment."""

    disk: Sequence[int] | None
    """As /sys/block/X/stat, counted since the device became the volume's."""
    qsd: process.Usage | None


def facts_of(volume: Volume) -> Facts:
    """Return what is known of a volume; touches nothing but memory. On the event loop only."""
    spec, record, history = volume.spec, volume.attachment.record, volume.history
    try:
        backend = find_backend(spec.source).name
    except StoragedError:
        backend = "unknown"  # what another version of the daemon has attached
    return Facts(
        name=spec.name, transport=record.transport if record else spec.transport, backend=backend,
        state=volume.state.value, since=volume.since, code=volume.failure.code.value if volume.failure else "",
        size=record.size if record else 0, device=record.device if record else None,
        counted=record.counted if record else (),
        process=record.process if record and volume.attachment.qsd.alive else None,
        open_seconds=record.open_seconds if record else 0.0,
        waiting=volume.waiting, waited=volume.waited,
        deaths=history.count(Happening.DEATH), hangs=history.count(Happening.HANG),
        stalls=history.count(Happening.STALL), recoveries=history.count(Happening.RECOVERED),
        rescues=history.count(Happening.RESCUE),
        pauses=history.pauses, pause_seconds=history.pause_seconds,
    )


async def gather(volumes: Callable[[], list[Volume]]) -> list[Facts]:
    """Return the facts of all volumes, by name; the event loop does other things in between."""
    found = []
    for number, volume in enumerate(volumes()):
        if number % _AT_ONCE == 0:
            await asyncio.sleep(0)
        found.append(facts_of(volume))
    return found


def sample(facts: Facts) -> Sample:
    """Look at the volume's device and process. Never blocks, whatever hangs: see ``disk.counters``, ``process.usage``.

    The device is that of the record; one that somebody else has by now is counted until the next look finds that out.
    """
    raw = disk.counters(facts.device) if facts.device is not None else None
    return Sample(
        disk=since(raw, facts.counted) if raw is not None else None,
        qsd=process.usage(facts.process) if facts.process is not None else None,
    )


def since(raw: Sequence[int], counted: Sequence[int]) -> list[int]:
    """Return what was counted after ``counted``; what is in flight is no count, and stays as it is."""
    if len(counted) != len(raw):
        return list(raw)  # the record of an older version
    counts = [now - before for now, before in zip(raw, counted, strict=True)]
    counts[_IN_FLIGHT] = 0
    if min(counts) < 0:
        return list(raw)  # the device was made anew meanwhile
    counts[_IN_FLIGHT] = raw[_IN_FLIGHT]
    return counts
