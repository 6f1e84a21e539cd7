"""What a review found in what an attachment makes of its record; QSD is dead, the transport is a fake."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.model.plan import Device, Step
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.transports import TRANSPORTS
from storaged.transports.base import Connected, HostDevice, Seen, Site
from tests.contract.memory_store import MemoryStore


class Fake(HostDevice):
    """A device with a name that all of the host share."""

    name = "fake"

    def __init__(self) -> None:
        self.device = Device.UNSERVED
        self.taken_away = False

    def claims(self, site: Site) -> tuple[str, ...]:
        return ("fake:a",)

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        return Seen(reachable=True, device=self.device, remains=False)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        return None

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        self.taken_away = True
        return []

    async def disconnect_by_force(self, site: Site, record: Record, timeout: float, *, flush: bool) -> list[str]:
        self.taken_away = True
        return []


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Fake:
    made = Fake()
    monkeypatch.setitem(TRANSPORTS, "fake", made)
    return made


def attachment(place: Path, *, lost: bool = False) -> Attachment:
    """One whose QSD is dead; in a running loop."""
    spec = VolumeSpec(name="a", source="/a.raw", transport="fake")
    environment = Environment(
        layout=Layout.below(str(place)), config=Config(), persistent=MemoryStore(), volatile=MemoryStore(),
        events=EventHub(), lock_directory=str(place / "locks"),
    )
    os.makedirs(environment.layout.volume_dir("a"))
    made = Attachment(spec, environment, lambda: None)
    made.record = Record(
        spec=spec, transport="fake", transport_reason="", binary="/qsd", device="/dev/none", lost=lost
    )
    return made


@pytest.mark.parametrize("step", [Step.CLEAR, Step.DISCONNECT])
def test_what_has_our_name_is_left_alone_while_another_daemon_holds_the_name(
    tmp_path: Path, fake: Fake, step: Step
) -> None:
    async def work() -> None:
        ours = attachment(tmp_path)
        other = locks.take_lock(str(tmp_path / "locks"), "fake:a", exclusive=True, owner="another daemon")
        with pytest.raises(StoragedError) as refusal:
            await ours.perform(step, timeout=5, force=True)
        assert refusal.value.code is ErrorCode.NAME_TAKEN
        assert not fake.taken_away
        locks.let_go([other])
        await ours.perform(step, timeout=5, force=True)
        assert fake.taken_away
        # It was given back.
        locks.let_go([locks.take_lock(str(tmp_path / "locks"), "fake:a", exclusive=True, owner="another daemon")])

    asyncio.run(work())


def test_a_device_that_went_by_itself_takes_its_loss_with_it(tmp_path: Path, fake: Fake) -> None:
    async def work() -> None:
        ours = attachment(tmp_path, lost=True)
        assert (await ours.observe()).lost
        fake.device = Device.NONE
        assert not (await ours.observe()).lost
        assert ours.record is not None
        assert not ours.record.lost

    asyncio.run(work())
