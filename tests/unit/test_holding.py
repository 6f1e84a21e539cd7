"""The record is written while other things are done, and is on the disk before anything that needs it there."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.model.plan import Device, Qsd
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.served import ServedQsd
from storaged.supervisor import records, serving
from storaged.supervisor.adoption import read_record
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.holding import Told
from storaged.transports import TRANSPORTS
from storaged.transports.base import HostDevice, Seen, Site
from tests.contract.memory_store import MemoryStore


class Fake(HostDevice):
    """A transport that needs nothing, and has no device yet."""

    name = "fake"

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        return Seen(reachable=True, device=Device.NONE, remains=False)

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        return {"id": "export"}

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        pass


class Session:
    """QSD answers, and looks into the record when it is told to export."""

    def __init__(self, site: Site) -> None:
        self.questions = 0
        self.exported_with: Record | None = None
        self._site = site

    async def add_export(self, options: dict[str, Any], *, timeout: float) -> None:
        self.exported_with, _ = read_record(self._site)

    async def has_export(self, export: str) -> bool:
        self.questions += 1
        return False

    async def node_names(self) -> dict[str, int]:
        self.questions += 1
        return {"disk": 1 << 20}


@pytest.fixture
def held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[Attachment, Session]]:
    """Makes a volume whose QSD lives, and the session with it, within a running loop."""
    monkeypatch.setitem(TRANSPORTS, "fake", Fake())
    spec = VolumeSpec(name="a", source="/a.raw", transport="fake")
    environment = Environment(
        layout=Layout.below(str(tmp_path)), config=Config(), persistent=MemoryStore(), volatile=MemoryStore(),
        events=EventHub(), lock_directory=str(tmp_path / "locks"),
    )
    os.makedirs(environment.layout.volume_dir("a"))
    monkeypatch.setattr(ServedQsd, "alive", True)

    def make() -> tuple[Attachment, Session]:
        made = Attachment(spec, environment, lambda: None)
        made.record = Record(spec=spec, transport="fake", transport_reason="", binary="/qsd", settled=True)
        session = Session(made.site)

        async def connected(_: ServedQsd) -> Session:
            return session

        monkeypatch.setattr(ServedQsd, "session", connected)
        return made, session

    return make


Held = Callable[[], tuple[Attachment, Session]]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What becomes of the next writes: ``slow``, ``full``; all others work."""
    fates: list[str] = []
    write = records.write_record

    def work(directory: str, record: Record) -> None:
        fate = fates.pop(0) if fates else ""
        if fate == "slow":
            time.sleep(0.2)
        if fate == "full":
            raise StoragedError(ErrorCode.NO_SPACE, "the disk is full")
        write(directory, record)

    monkeypatch.setattr(records, "write_record", work)
    return fates


def on_disk(held: Attachment) -> Record:
    record, damage = read_record(held.site)
    assert record is not None, damage
    return record


def test_nothing_is_exported_before_the_record_is_on_the_disk(held: Held, disk: list[str]) -> None:
    async def work() -> None:
        ours, session = held()
        await ours.note()
        disk.append("slow")
        ours.note_meanwhile(size=4096, settled=False)
        assert ours.known().size == 4096, "it is known at once"
        assert on_disk(ours).settled
        await serving.export(ours, 5)
        assert session.exported_with == ours.record
        assert not ours.known().settled

    asyncio.run(work())


def test_nothing_is_exported_when_the_record_cannot_be_written(held: Held, disk: list[str]) -> None:
    async def work() -> None:
        ours, session = held()
        # It is tried again by who needs it.
        disk.extend(["full", "full"])
        ours.note_meanwhile(size=4096, settled=False)
        await ours.wait_for_writing()
        with pytest.raises(StoragedError) as refusal:
            await serving.export(ours, 5)
        assert refusal.value.code is ErrorCode.NO_SPACE
        assert session.exported_with is None
        await serving.export(ours, 5)
        assert session.exported_with == ours.record

    asyncio.run(work())


def test_a_slow_write_does_not_come_after_a_later_one(held: Held, disk: list[str]) -> None:
    async def work() -> None:
        ours, _ = held()
        disk.append("slow")
        ours.note_meanwhile(size=512)
        await asyncio.sleep(0.01)
        await ours.note(size=1024)
        assert on_disk(ours).size == 1024
        await asyncio.sleep(0.3)
        assert on_disk(ours).size == 1024

    asyncio.run(work())


def test_who_is_given_up_leaves_the_write_to_end(held: Held, disk: list[str]) -> None:
    async def work() -> None:
        ours, _ = held()
        disk.append("slow")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await ours.note(size=512)
        await ours.written()
        assert on_disk(ours).size == 512

    asyncio.run(work())


def test_what_qsd_has_just_answered_it_is_not_asked_again(held: Held) -> None:
    async def work() -> None:
        ours, session = held()
        ours.told = Told(opened=True, exported=False)
        seen = await ours.observe()
        assert (seen.qsd, seen.opened, seen.exported) == (Qsd.RUNNING, True, False)
        assert session.questions == 0
        await ours.observe()
        assert session.questions, "it may be otherwise by now"

    asyncio.run(work())


def test_what_a_dead_qsd_has_answered_counts_for_nothing(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        ours, session = held()
        ours.told = Told(opened=True, exported=False)
        monkeypatch.setattr(ServedQsd, "alive", False)
        seen = await ours.observe()
        assert (seen.qsd, seen.opened, seen.exported) == (Qsd.NONE, False, False)
        monkeypatch.setattr(ServedQsd, "alive", True)
        await ours.observe()
        assert session.questions, "this is another one"

    asyncio.run(work())
