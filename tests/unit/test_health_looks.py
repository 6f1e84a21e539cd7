"""How often a volume is looked at: waiting I/O is found out soon, and a busy one is not looked at all the time."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from storaged.host import disk
from storaged.model.health import Progress
from storaged.supervisor.health import Health
from storaged.supervisor.holding import Holding


@pytest.fixture
def health(monkeypatch: pytest.MonkeyPatch) -> Health:
    held = SimpleNamespace(
        tell_stderr=lambda: None, record=SimpleNamespace(device="a device", rescue=True), stalled=False,
        spec=SimpleNamespace(on_stall=None),
    )
    return Health(cast(Holding, held), lambda: None)


def looks(health: Health, monkeypatch: pytest.MonkeyPatch, *seen: Progress) -> list[bool]:
    """Whether each look asks for another one soon."""
    asked = []
    for progress in seen:
        monkeypatch.setattr(disk, "progress", lambda _, found=progress: found)
        health.glance()
        asked.append(health.look_again)
    return asked


def test_only_another_look_soon_tells_whether_requests_move(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(health, monkeypatch, Progress(0, 5), Progress(3, 5)) == [False, True]


def test_a_busy_volume_is_looked_at_twice_as_often_and_not_all_the_time(
    health: Health, monkeypatch: pytest.MonkeyPatch
) -> None:
    busy = [Progress(3, ended) for ended in range(6)]
    assert looks(health, monkeypatch, *busy) == [True, False, True, False, True, False]


def test_an_idle_volume_costs_no_look_more(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(health, monkeypatch, *[Progress(0, 5)] * 4) == [False] * 4


def test_another_server_begins_anew(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    assert looks(health, monkeypatch, Progress(3, 5)) == [True]
    health.begin_anew()
    assert looks(health, monkeypatch, Progress(3, 5)) == [True]
