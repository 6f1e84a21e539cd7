"""What an attachment knows of its device after a step that did not end as it should; the transport is a fake."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.model.plan import Device, Goal, Qsd, Step, plan
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
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


def test_a_device_that_does_not_go_by_force_gets_a_rescue_server(attachment: Callable[[], Attachment]) -> None:
    async def work() -> None:
        stuck = attachment()
        await stuck.perform(Step.DISCONNECT, timeout=5, force=True)
        assert any("errors" in note for note in stuck.notes), "the user is told"
        seen = await stuck.observe()
        assert (seen.qsd, seen.device) == (Qsd.NONE, Device.UNSERVED)
        assert plan(Goal.ABSENT, seen, force=True) is Step.RESCUE

    asyncio.run(work())
