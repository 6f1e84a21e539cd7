"""What the daemon tells its service manager, and takes over from it; and when it feeds the watchdog."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import pytest

from storaged.host.servicemanager import ServiceManager
from storaged.model.states import State
from storaged.supervisor import watchdog
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume


@pytest.fixture
def inbox(tmp_path: Path) -> Iterator[socket.socket]:
    """Where the service manager listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(str(tmp_path / "notify"))
        inbox.settimeout(10)
        yield inbox


def manager_at(inbox: socket.socket, **variables: str) -> ServiceManager:
    return ServiceManager({"NOTIFY_SOCKET": inbox.getsockname(), **variables})


def said(inbox: socket.socket) -> list[str]:
    """All that has come."""
    found = []
    inbox.setblocking(False)
    try:
        while True:
            found.append(inbox.recv(4096).decode())
    except BlockingIOError:
        return found


def test_assignments_arrive_in_one_message_and_a_reload_with_its_time(inbox: socket.socket) -> None:
    service = manager_at(inbox)
    service.tell("READY=1", "STATUS=fine")
    before = time.monotonic_ns() // 1000
    service.tell_reloading()
    ready, reloading = said(inbox)
    assert ready == "READY=1\nSTATUS=fine"
    line, moment = reloading.split("\n")
    assert line == "RELOADING=1"
    assert before <= int(moment.removeprefix("MONOTONIC_USEC=")) <= time.monotonic_ns() // 1000


def test_an_abstract_address_is_reached() -> None:
    name = f"storaged-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox:
        inbox.bind(f"\0{name}")
        ServiceManager({"NOTIFY_SOCKET": f"@{name}"}).tell("READY=1")
        assert said(inbox) == ["READY=1"]


def test_nobody_who_listens_is_no_error(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ServiceManager({}).tell("READY=1")
    assert caplog.records == []
    ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).tell("READY=1")
    assert "READY=1" in caplog.text


def test_what_the_daemon_starts_inherits_nothing_of_it(inbox: socket.socket) -> None:
    variables = {"NOTIFY_SOCKET": inbox.getsockname(), "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "LISTEN_FDS": "1",
                 "LISTEN_PID": "1", "LISTEN_FDNAMES": "x", "PATH": "/bin"}
    ServiceManager(variables)
    assert variables == {"PATH": "/bin"}


@pytest.mark.parametrize(("variables", "seconds"), [
    ({"WATCHDOG_USEC": "3000000"}, 3.0), ({"WATCHDOG_USEC": "500000", "WATCHDOG_PID": str(os.getpid())}, 0.5),
    ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, None), ({"WATCHDOG_USEC": "0"}, None),
    ({"WATCHDOG_USEC": "x"}, None), ({}, None),
])
def test_the_watchdog_is_ours_only_where_it_says_so(variables: dict[str, str], seconds: float | None) -> None:
    assert ServiceManager(variables).watchdog == seconds


#: Takes over descriptor 3 in a process of its own, as it comes from a service manager.
TAKE = """
import os, sys
from storaged.host.servicemanager import ServiceManager
os.dup2(int(sys.argv[3]), 3)
listener = ServiceManager({"LISTEN_FDS": sys.argv[2], "LISTEN_PID": str(os.getpid())}).take_listener(sys.argv[1])
print(listener is not None and not listener.get_inheritable() and listener.getsockname() == sys.argv[1])
"""


def take(sock: socket.socket, path: Path, count: int = 1) -> str:
    """What comes of it when a process gets ``sock`` as descriptor 3."""
    words = [sys.executable, "-c", TAKE, str(path), str(count), str(sock.fileno())]
    done = subprocess.run(words, pass_fds=[sock.fileno()], capture_output=True, text=True)
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_listening_socket_is_taken_over_and_another_thing_refused(tmp_path: Path) -> None:
    path = tmp_path / "api"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(path))
        assert "listens" in take(listener, path)
        listener.listen()
        assert take(listener, path) == "True"
        assert "not at" in take(listener, tmp_path / "elsewhere")
        assert "2 sockets" in take(listener, path, 2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.bind(str(tmp_path / "datagrams"))
        assert "no unix stream socket" in take(other, path)


def test_another_process_s_descriptors_are_not_ours(tmp_path: Path) -> None:
    assert ServiceManager({"LISTEN_FDS": "1", "LISTEN_PID": "1"}).take_listener(str(tmp_path)) is None
    assert ServiceManager({}).take_listener(str(tmp_path)) is None


@dataclass
class FakeVolume:
    """What the watchdog looks at."""

    name: str
    due: float
    state: State = State.ONLINE


@dataclass
class FakeManager:
    """Some volumes, and the names of those whose actor has ended."""

    found: list[FakeVolume]
    ended: list[str] = field(default_factory=list)

    def volumes(self) -> list[Volume]:
        return cast("list[Volume]", self.found)

    def is_abandoned(self, volume: Volume) -> bool:
        return volume.name in self.ended


def judged(fake: FakeManager, now: float) -> str:
    return watchdog.illness(cast("Manager", fake), now)


def test_an_actor_that_has_ended_or_is_late_is_an_illness_and_a_volume_that_hangs_is_none() -> None:
    hangs = FakeVolume("a", due=100.0, state=State.HUNG)
    assert judged(FakeManager([hangs, FakeVolume("b", 100.0, State.FAILED)]), 100.0 + watchdog.PATIENCE) == ""
    assert "a is late" in judged(FakeManager([hangs]), 101.0 + watchdog.PATIENCE)
    assert "b has ended" in judged(FakeManager([hangs, FakeVolume("b", 100.0)], ["b"]), 0.0)


def test_the_watchdog_is_fed_by_a_loop_that_turns_and_starves_when_an_actor_ends(inbox: socket.socket) -> None:
    fake = FakeManager([FakeVolume("a", due=time.monotonic() + 1000), FakeVolume("b", 1e12, State.STALLED)])

    async def feed() -> None:
        task = asyncio.create_task(watchdog.watch(cast("Manager", fake), manager_at(inbox, WATCHDOG_USEC="60000")))
        await asyncio.sleep(0.2)
        meanwhile = said(inbox)
        assert meanwhile.count("WATCHDOG=1") >= 3
        assert "STATUS=2 volumes, 1 online; b stalled" in meanwhile
        time.sleep(0.2)  # noqa: ASYNC251  # the loop stands still
        assert said(inbox) == []
        await asyncio.sleep(0.05)
        assert "WATCHDOG=1" in said(inbox)
        fake.ended.append("a")
        await asyncio.sleep(0.1)
        said(inbox)
        await asyncio.sleep(0.1)
        assert said(inbox) == []
        task.cancel()

    asyncio.run(feed())
