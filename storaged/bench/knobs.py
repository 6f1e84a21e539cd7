"""Which settings there are to be tried, for a transport, a source and a host. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass

from storaged.bench.jobs import Job
from storaged.bench.search import Knob

#: Settings that are faster at a price that no benchmark shows, and what the price is.
UNSAFE = {"connections": "with more than one a write may be done twice when QSD hangs (README, Transports)"}
#: From this size on (bytes) a request can be larger than a device takes at once.
_LARGE = 256 << 10


@dataclass(frozen=True)
class Host:
    """What the device of the defaults says of this host."""

    processors: int
    queue: Mapping[str, str]
    """/sys/block/X/queue, by the names of the attributes."""
    polls: bool = True
    """QSD has an I/O thread for the device."""
    several_threads: bool = True
    """QSD can serve a FUSE export by several threads."""


def knobs(
    options: Set[str], said: Mapping[str, str], host: Host, jobs: Sequence[Job], *, unsafe: bool
) -> tuple[list[Knob], list[str]]:
    """Return the settings to be tried, those that promise most first, and why others are not.

    ``options`` are those that transport and backend have; what was ``said`` stays as it is. Without ``unsafe`` those
    are left out that have a price.
    """
    found, notes = [], []
    for knob, why in _all(said, host, jobs):
        if knob.option not in options:
            continue
        if knob.option in said:
            notes.append(f"{knob.option} stays {said[knob.option]}, as it was said.")
        elif knob.option in UNSAFE and not unsafe:
            notes.append(f"{knob.option} was not tried: {UNSAFE[knob.option]}; --unsafe tries it.")
        elif why:
            notes.append(f"{knob.option} was not tried: {why}.")
        elif knob.values:
            found.append(knob)
    return found, notes


def pinned(options: Set[str], queue: Mapping[str, str], settings: Mapping[str, str]) -> dict[str, str]:
    """Return what has to be said so that a measurement differs from the first look in its ``settings`` alone.

    ``queue`` is what the device had then. A loop or NBD device has what its last user left, and the next attach may get
    another one; and the kernel computes the read-ahead anew when max_sectors_kb is set (blk_apply_bdi_limits).
    """
    found = {}
    for option in ("max-sectors-kb", "nr-requests", "read-ahead-kb"):
        value = queue.get(option.replace("-", "_"), "")
        if value.isdecimal():
            found[option] = value
    if (present := scheduler(queue)) and "[" in queue["scheduler"]:
        found["scheduler"] = present
    if settings.keys() & {"scheduler", "queue-size"}:
        # Each has a number of its own (for virtio_blk, that of the virtqueue).
        found.pop("nr-requests", None)
    return {key: value for key, value in found.items() if key in options} | dict(settings)


def scheduler(queue: Mapping[str, str]) -> str:
    """The scheduler that counts, of those that a device can have; empty where nothing is known."""
    text = queue.get("scheduler", "")
    return text.partition("[")[2].partition("]")[0] or text.strip()


def names() -> list[str]:
    """All settings that are known."""
    return [knob.option for knob, _ in _all({}, Host(1, {}), ())]


def _all(said: Mapping[str, str], host: Host, jobs: Sequence[Job]) -> list[tuple[Knob, str]]:
    """All settings that are known, and why one makes no difference here."""
    native = ("native",) if said.get("cache") in ("none", "directsync") else ()
    schedulers = host.queue.get("scheduler", "")
    # One that cannot be changed stands there alone, without brackets.
    others = tuple(word for word in schedulers.split() if not word.startswith("[")) if "[" in schedulers else ()
    no_buffered = "" if any(not job.is_direct for job in jobs) else "no job reads through the page cache"
    no_large = "" if any(job.block >= _LARGE for job in jobs) else "no job has large requests"
    read_ahead, largest = _number(host, "read_ahead_kb"), _number(host, "max_hw_sectors_kb")
    sectors = _number(host, "max_sectors_kb")
    return [
        (Knob("aio", "threads", ("io_uring", *native)), ""),
        (Knob("connections", "1", ("2", "4"), rising=True), ""),
        (Knob("queues", "1", tuple(str(count) for count in (2, 4, 8, 16) if count <= host.processors), rising=True),
         "" if host.processors > 1 else "there is one processor"),
        (Knob("iothreads", "0", tuple(str(count) for count in (1, 2, 4, 8) if count <= host.processors)),
         "" if host.several_threads else "this qemu-storage-daemon serves a FUSE export by its main thread alone"),
        (Knob("queue-size", "256", ("512", "1024", "128")), ""),
        (Knob("read-ahead-kb", str(read_ahead), _rising(read_ahead, (512, 2048, 8192, 32768)), rising=True),
         no_buffered),
        (Knob("read-ahead", "256K", ("1M", "4M", "16M"), rising=True), ""),
        (Knob("poll-max-ns", "32768", ("0", "200000")),
         "" if host.polls else "this qemu-storage-daemon has no I/O thread for the device"),
        (Knob("max-sectors-kb", str(sectors), tuple(
            str(size) for size in (128, 256, 512, 1024, 2048, 4096) if size != sectors and size <= largest
        )), no_large),
        (Knob("scheduler", scheduler(host.queue) or "none", others),
         "" if others else "the device has one alone"),
    ]


def _rising(present: int, values: Sequence[int]) -> tuple[str, ...]:
    return tuple(str(value) for value in values if value > present)


def _number(host: Host, name: str) -> int:
    text = host.queue.get(name, "0")
    return int(text) if text.isdecimal() else 0
