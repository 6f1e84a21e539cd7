"""What an attachment knows of its device after a step that did not end as it should; the transport is a fake."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, links, worker
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.model.plan import Device, Goal, Qsd, Step, plan
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.served import ServedQsd
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.records import load_record
from storaged.transports import TRANSPORTS
from storaged.transports.base import Availability, Connected, HostDevice, Seen, Site
from tests.contract.memory_store import MemoryStore


class Stuck(HostDevice):
    """A device whose requests do not end while its server hangs, as VDUSE's."""

    name = "stuck"
    needs_server = True
    bridges = True

    def probe(self, build: object) -> Availability:
        return Availability(True, "it is there")

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        known = record is not None and record.device is not None
        device = (Device.HEALTHY if alive else Device.UNSERVED) if known else Device.NONE
        return Seen(reachable=True, device=device, remains=not known)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        return Connected(record.device, record.diskseq) if record is not None else None

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        return Connected("/dev/vda", 8)

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        raise StoragedError(ErrorCode.DEVICE_IN_USE, "somebody opened it in the last moment", users=["dd"])

    async def disconnect_by_force(self, site: Site, record: Record, timeout: float, *, flush: bool) -> list[str]:
        raise StoragedError(ErrorCode.HOST_STUCK, "its requests do not end")


@pytest.fixture
def attachment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Attachment]:
    """Makes one with a device, within a running loop; its QSD is dead."""
    monkeypatch.setitem(TRANSPORTS, "stuck", Stuck())
    spec = VolumeSpec(name="a", source="/a.raw", transport="stuck")
    environment = Environment(
        layout=Layout.below(str(tmp_path)), config=Config(), persistent=MemoryStore(), volatile=MemoryStore(),
        events=EventHub(), lock_directory=str(tmp_path / "locks"),
    )
    os.makedirs(environment.layout.volume_dir("a"))

    def make() -> Attachment:
        made = Attachment(spec, environment, lambda: None)
        made.record = Record(
            spec=spec, transport="stuck", transport_reason="as asked for", binary="/qsd", device="/dev/vda", diskseq=7
        )
        return made

    return make


@dataclass
class Kernel:
    """The queue of a device: what is set, and what becomes of a try to set it."""

    values: dict[str, str] = field(default_factory=lambda: {"queue/nr_requests": "128"})
    error: OSError | None = None
    written: list[str] = field(default_factory=list)
    recorded: Callable[[], Record | None] = lambda: None

    def write(self, path: str, text: str) -> None:
        self.written.append(text)
        known = self.recorded()
        assert known is not None
        assert known.device == "/dev/vda"
        assert (known.queue, known.queue_due) == ({"queue/nr_requests": "128"}, True), "noted before anything is done"
        if self.error is not None:
            raise self.error
        self.values["queue/nr_requests"] = text


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """In the place of sysfs."""
    made = Kernel()
    monkeypatch.setattr(disk, "attribute", lambda path, name: made.values.get(name))
    monkeypatch.setattr(disk, "counters", lambda device: [1])
    monkeypatch.setattr(worker, "write", made.write)
    return made


def with_queue(made: Attachment, kernel: Kernel, **changes: Any) -> Attachment:
    """A volume that wants 64 requests in its queue; the kernel looks at its record on the disk."""
    made.spec = msgspec.structs.replace(made.spec, options={"nr-requests": "64"})
    made.record = msgspec.structs.replace(made.known(), spec=made.spec, **changes)
    kernel.recorded = lambda: load_record(made.directory)
    return made


REFUSED = OSError(errno.EINVAL, "Invalid argument")
PASSING = OSError(errno.EOWNERDEAD, "the process was killed")


def test_a_queue_is_noted_with_its_device_in_one_write_before_it_is_set(
    attachment: Callable[[], Attachment], kernel: Kernel
) -> None:
    async def work() -> None:
        made = with_queue(attachment(), kernel, device=None)
        made.first = True
        await made.perform(Step.CONNECT, timeout=5, force=False)
        assert kernel.written == ["64"]
        assert load_record(made.directory) == made.record
        assert made.record is not None
        assert (made.record.device, made.record.queue_due) == ("/dev/vda", False)

    asyncio.run(work())


def test_what_the_kernel_refuses_fails_the_first_attach_and_no_recovery(
    attachment: Callable[[], Attachment], kernel: Kernel
) -> None:
    kernel.error = REFUSED

    async def work() -> None:
        made = with_queue(attachment(), kernel, device=None)
        made.first = True
        with pytest.raises(StoragedError) as caught:
            await made.perform(Step.CONNECT, timeout=5, force=False)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT

        made = with_queue(attachment(), kernel, device=None)
        await made.perform(Step.CONNECT, timeout=5, force=False)
        (note,) = made.notes
        assert "nr-requests=64" in note
        assert not made.known().queue_due
        made.notes.clear()
        await made.finish_queue(5)
        assert len(kernel.written) == 2, "it is not asked again"

    asyncio.run(work())


def test_what_was_cut_short_is_due_until_it_is_done_and_told_once(
    attachment: Callable[[], Attachment], kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.error = PASSING

    async def work() -> None:
        made = with_queue(attachment(), kernel, device=None)
        await made.perform(Step.CONNECT, timeout=5, force=False)
        assert len(made.notes) == 1
        monkeypatch.setattr(ServedQsd, "alive", property(lambda self: True))
        monkeypatch.setattr(links, "links_are_there", lambda *_: True)
        assert not made.looks_well(), "somebody has to come back to it"
        made.notes.clear()
        await made.finish_queue(5)
        assert made.notes == []
        kernel.error = None
        await made.finish_queue(5)
        assert kernel.values["queue/nr_requests"] == "64"
        assert made.looks_well()

    asyncio.run(work())


@pytest.mark.parametrize("given_back", [True, False])
def test_a_detach_that_was_refused_after_the_queue_was_given_back_makes_it_due(
    attachment: Callable[[], Attachment], kernel: Kernel, given_back: bool
) -> None:
    async def work() -> None:
        made = with_queue(attachment(), kernel, queue={"queue/nr_requests": "128"})
        # Else somebody has set it to something of his own.
        kernel.values["queue/nr_requests"] = "128" if given_back else "17"
        with pytest.raises(StoragedError):
            await made.perform(Step.DISCONNECT, timeout=5, force=False)
        assert made.known().queue_due == given_back

    asyncio.run(work())


def test_a_device_that_does_not_go_by_force_gets_a_rescue_server(attachment: Callable[[], Attachment]) -> None:
    async def work() -> None:
        stuck = attachment()
        await stuck.perform(Step.DISCONNECT, timeout=5, force=True)
        assert any("errors" in note for note in stuck.notes), "the user is told"
        seen = await stuck.observe()
        assert (seen.qsd, seen.device) == (Qsd.NONE, Device.UNSERVED)
        assert plan(Goal.ABSENT, seen, force=True) is Step.RESCUE

    asyncio.run(work())
