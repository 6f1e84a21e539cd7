"""Rescue, Resume and Upgrade over a real socket, and what List and Show tell of a volume's trouble and history."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from storaged.api.client import Client
from storaged.api.server import Server
from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.health import WAIT, Condition, Policy, Reaction, Trouble
from storaged.model.history import Happening, History
from storaged.model.layout import Layout
from storaged.model.spec import Desired, VolumeSpec
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume
from tests.contract.memory_store import MemoryStore

NOW = 1_700_000_000.0


AWAY = Condition(trouble=Trouble.NETWORK_AWAY, since=NOW, detail="no answer from 192.0.2.7", policy=WAIT)


class Patient(Volume):
    """Has what a test says."""

    condition: Condition | None = None
    history: History = History()


class Supervisor(Manager):
    """Has the volumes a and b, and writes down what is asked of it."""

    def __init__(self, environment: Environment, tasks: asyncio.TaskGroup) -> None:
        super().__init__(environment, tasks)
        self.asked: list[tuple[Any, ...]] = []
        for name in ("a", "b"):
            self._volumes[name] = Patient(Desired(spec=VolumeSpec(name=name, source="/x")), environment)

    def has(self, name: str, condition: Condition | None, history: History) -> None:
        patient = self._volumes[name]
        assert isinstance(patient, Patient)
        patient.condition, patient.history = condition, history

    async def rescue(self, name: str, *, keep: bool, timeout: float | None) -> list[str]:
        self.asked.append(("rescue", self.get(name).spec.name, keep, timeout))
        return ["/dev/loop3 is still open"]

    async def resume(self, name: str, timeout: float | None) -> Volume:
        self.asked.append(("resume", name, timeout))
        return self.get(name)

    async def upgrade(self, name: str, timeout: float | None) -> Volume:
        self.asked.append(("upgrade", name, timeout))
        raise StoragedError(ErrorCode.UNSUPPORTED, "it is in use", volume=name, hint="unmount it", users=["pid 7"])


def with_supervisor(place: Path, work: Callable[[Supervisor, Client], None]) -> None:
    """Run ``work`` in a thread, as a client of a server."""

    async def run() -> None:
        store = MemoryStore()
        environment = Environment(
            layout=Layout.below(str(place / "root")), config=Config(), persistent=store, volatile=store,
            events=EventHub(), lock_directory=str(place / "locks"),
        )
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place / "s"))
            listener.listen()
            async with asyncio.timeout(30), asyncio.TaskGroup() as tasks:
                supervisor = Supervisor(environment, tasks)
                server = Server(supervisor, listener, os.getgid())
                server.start()
                with Client(str(place / "s")) as client:
                    await asyncio.to_thread(work, supervisor, client)
                await server.close()

    asyncio.run(run())


def test_rescue_resume_and_upgrade_reach_the_supervisor_with_what_was_said(tmp_path: Path) -> None:
    def work(supervisor: Supervisor, client: Client) -> None:
        assert client.call("Rescue", {"name": "a"}, 5) == {"notes": ["/dev/loop3 is still open"]}
        client.call("Rescue", {"name": "a", "keep": True, "timeout": 2.5}, 5)
        assert client.call("Resume", {"name": "a"}, 5)["volume"]["name"] == "a"
        client.call("Resume", {"name": "a", "timeout": 3}, 5)
        assert supervisor.asked == [
            ("rescue", "a", False, None), ("rescue", "a", True, 2.5), ("resume", "a", None), ("resume", "a", 3.0),
        ]

    with_supervisor(tmp_path, work)


def test_what_the_supervisor_refuses_comes_back_with_code_hint_and_users(tmp_path: Path) -> None:
    def work(supervisor: Supervisor, client: Client) -> None:
        with pytest.raises(StoragedError) as caught:
            client.call("Upgrade", {"name": "a", "timeout": 4}, 5)
        assert supervisor.asked == [("upgrade", "a", 4.0)]
        error = caught.value
        assert (error.code, error.volume, error.hint, error.users) == (
            ErrorCode.UNSUPPORTED, "a", "unmount it", ("pid 7",)
        )
        with pytest.raises(StoragedError) as caught:
            client.call("Rescue", {"name": "nosuch"}, 5)
        assert caught.value.code is ErrorCode.NO_SUCH_VOLUME

    with_supervisor(tmp_path, work)


@pytest.mark.parametrize("method", ["Rescue", "Resume", "Upgrade"])
@pytest.mark.parametrize("timeout", [0, -1, 86401])
def test_a_timeout_that_is_none_is_refused_before_the_supervisor_is_asked(
    tmp_path: Path, method: str, timeout: float
) -> None:
    def work(supervisor: Supervisor, client: Client) -> None:
        with pytest.raises(StoragedError) as caught:
            client.call(method, {"name": "a", "timeout": timeout}, 5)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert supervisor.asked == []

    with_supervisor(tmp_path, work)


def test_show_and_list_tell_the_condition(tmp_path: Path) -> None:
    def work(supervisor: Supervisor, client: Client) -> None:
        supervisor.has("a", replace(AWAY, policy=Policy(Reaction.RESTART, 30)), History())
        told = {
            "trouble": "network-away", "since": NOW, "detail": "no answer from 192.0.2.7",
            "policy": "restart-after:30", "acts_at": NOW + 30,
        }
        assert client.call("Show", {"name": "a"}, 5)["volume"]["condition"] == told
        assert [each.get("condition") for each in client.call("List", {}, 5)["volumes"]] == [told, None]
        supervisor.has("a", AWAY, History())
        quiet = client.call("Show", {"name": "a"}, 5)["volume"]["condition"]
        assert quiet["policy"] == "wait"
        assert quiet.get("acts_at") is None

    with_supervisor(tmp_path, work)


def test_show_tells_the_history_and_list_only_deaths_and_the_last_pause(tmp_path: Path) -> None:
    def work(supervisor: Supervisor, client: Client) -> None:
        history = History()
        for number in range(200):
            history.add(Happening.DEATH, f"number {number}", now=NOW + number)
        history.add(Happening.RECOVERED, "served again \x1b \udcff", now=NOW + 300, seconds=1.25)
        history.add(Happening.RECOVERED, "served again \x1b \udcff", now=NOW + 301, seconds=0.25)
        supervisor.has("a", None, history)
        shown = client.call("Show", {"name": "a"}, 5)["volume"]
        listed, other = client.call("List", {}, 5)["volumes"]
        assert listed.get("history") is None
        assert (other["deaths"], other.get("paused"), other.get("history")) == (0, None, None)
        for volume in (shown, listed):
            assert (volume["deaths"], volume["paused"]) == (200, 0.25)
        assert len(shown["history"]) == 100
        assert shown["history"][-1] == {
            "time": NOW + 300, "kind": "recovered", "message": "served again \x1b \\udcff", "seconds": 1.25,
            "times": 2, "last": NOW + 301,
        }
        assert shown["history"][0]["message"] == "number 101"
        assert shown["history"][0].get("seconds") is None
        assert client.call("Show", {"name": "b"}, 5)["volume"]["history"] == []

    with_supervisor(tmp_path, work)
