"""A scrape asks the event loop for what is in memory, and nobody for anything else."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config, MetricsConfig
from storaged.model.layout import Layout
from storaged.model.record import Record
from storaged.model.spec import Desired, VolumeSpec
from storaged.model.states import State
from storaged.observe import exporter as exporting
from storaged.observe.exporter import Exporter
from storaged.observe.facts import facts_of
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.volume import Volume
from tests.contract.memory_store import MemoryStore


@pytest.fixture
def loop() -> Iterator[asyncio.AbstractEventLoop]:
    """An event loop in a thread of its own."""
    made = asyncio.new_event_loop()
    thread = threading.Thread(target=made.run_forever)
    thread.start()
    yield made
    if not made.is_closed():
        made.call_soon_threadsafe(made.stop)
    thread.join(10)
    assert not thread.is_alive()
    made.close()


def environment(place: Path) -> Environment:
    return Environment(
        layout=Layout.below(str(place)), config=Config(), persistent=MemoryStore(), volatile=MemoryStore(),
        events=EventHub(), lock_directory=str(place),
    )


def made(place: Path, loop: asyncio.AbstractEventLoop, *volumes: Volume) -> Exporter:
    manager: Any = SimpleNamespace(environment=environment(place), volumes=lambda: list(volumes))
    return Exporter(MetricsConfig(listen="127.0.0.1:1"), manager, loop)


def volume(place: Path, name: str, source: str = "/a.raw") -> Volume:
    async def make() -> Volume:
        return Volume(Desired(spec=VolumeSpec(name=name, source=source)), environment(place))

    return asyncio.run(make())


def test_all_volumes_are_there_however_many(tmp_path: Path, loop: asyncio.AbstractEventLoop) -> None:
    volumes = [volume(tmp_path, f"v{number}") for number in range(45)]
    _, text = made(tmp_path, loop, *volumes).scrape("")
    for number in range(45):
        assert f'storaged_volume_state{{volume="v{number}",state="starting"}} 1\n'.encode() in text
    assert text.count(b"storaged_volume_deaths_total{") == 45


def test_what_is_known_of_a_volume_is_told(tmp_path: Path) -> None:
    found = volume(tmp_path, "v", "rbd:pool/image")
    bare = facts_of(found)
    assert (bare.backend, bare.transport, bare.device, bare.process, bare.code) == ("rbd", "auto", None, None, "")
    found.state = State.FAILED
    found.failure = StoragedError(ErrorCode.OPEN_FAILED, "cannot open it", cause="the secret is hunter2")
    found.attachment.record = Record(
        spec=found.spec, transport="nbd", transport_reason="", binary="", size=5, device="/dev/nbd9", counted=[1],
        open_seconds=0.5,
    )
    found.history.waited = 3.0
    told = facts_of(found)
    assert (told.state, told.code, told.transport, told.size) == ("failed", "open-failed", "nbd", 5)
    assert (told.device, told.counted, told.open_seconds, told.waited) == ("/dev/nbd9", [1], 0.5, 3.0)
    assert "hunter2" not in str(told)


def test_a_source_that_nothing_here_knows_is_of_no_backend(tmp_path: Path) -> None:
    assert facts_of(volume(tmp_path, "v", "teleport:x")).backend == "unknown"


def test_an_event_loop_that_stands_still_is_not_waited_for(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_PATIENCE", 0.2)
    exporter, goes_on = made(tmp_path, loop), threading.Event()
    loop.call_soon_threadsafe(goes_on.wait, 20)
    try:
        with pytest.raises(TimeoutError):
            exporter.scrape("")
    finally:
        goes_on.set()
    assert exporter.scrape("")[1]


def test_after_the_end_of_the_daemon_there_is_nothing_to_tell(tmp_path: Path) -> None:
    closed = asyncio.new_event_loop()
    exporter = made(tmp_path, closed)
    closed.close()
    with pytest.raises(TimeoutError):
        exporter.scrape("")


def test_after_a_scrape_comes_a_rest(
    tmp_path: Path, loop: asyncio.AbstractEventLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "_REST", 1000)
    monkeypatch.setattr(exporting, "_LONGEST_REST", 0.3)
    exporter = made(tmp_path, loop)
    began = time.monotonic()
    exporter.scrape("")
    exporter.scrape("")
    assert time.monotonic() - began >= 0.3
