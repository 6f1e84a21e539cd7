"""The end of another process's connection is told at once, and what a dead process had sent does not arrive late."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterator

import pytest

from storaged.host import tcp
from storaged.host.process import identify
from storaged.host.tcpwatch import ConnectionWatch, reset_at_death
from storaged.model.record import ProcessIdentity

#: Connects, and does nothing.
_CLIENT = "import socket, sys; s = socket.create_connection(('127.0.0.1', int(sys.argv[1]))); print(flush=True); "
_IDLES = _CLIENT + "sys.stdin.read()"
_FILLS = _CLIENT + "s.setblocking(False)\ntry:\n while True: s.send(bytes(65536))\nexcept BlockingIOError: pass\n" \
    "print(flush=True); sys.stdin.read()"


class Pair:
    """Another process, and the server's end of its connection."""

    def __init__(self, program: str) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, str(self.listener.getsockname()[1])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )
        self.peer, _ = self.listener.accept()
        assert self.process.stdout is not None
        self.said = self.process.stdout
        self.said.readline()
        found = identify(self.process.pid)
        assert found is not None
        self.identity: ProcessIdentity = found

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.peer.close()
        self.listener.close()


@pytest.fixture
def pair() -> Iterator[Pair]:
    found = Pair(_IDLES)
    yield found
    found.end()


def watched(pair: Pair, talk: Callable[[ConnectionWatch, asyncio.Event], Awaitable[None]]) -> None:
    async def run() -> None:
        woken = asyncio.Event()
        watch = ConnectionWatch(woken.set)
        watch.watch(pair.identity)
        try:
            assert watch.active
            await talk(watch, woken)
        finally:
            watch.close()
        assert not watch.active

    asyncio.run(run())


def test_the_servers_end_is_told_at_once(pair: Pair) -> None:
    assert tcp.is_connected(pair.process.pid)

    async def talk(watch: ConnectionWatch, woken: asyncio.Event) -> None:
        pair.peer.close()
        await asyncio.wait_for(woken.wait(), 5)
        assert not watch.active
        assert not tcp.is_connected(pair.process.pid)
        woken.clear()
        await asyncio.sleep(0.1)
        assert not woken.is_set(), "it is told once"

    watched(pair, talk)


def test_a_reset_is_told_as_well(pair: Pair) -> None:
    async def talk(_: ConnectionWatch, woken: asyncio.Event) -> None:
        pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, bytes([1, 0, 0, 0, 0, 0, 0, 0]))
        pair.peer.close()
        await asyncio.wait_for(woken.wait(), 5)
        assert not tcp.is_connected(pair.process.pid)

    watched(pair, talk)


def test_what_arrives_wakes_nobody(pair: Pair) -> None:
    async def talk(watch: ConnectionWatch, woken: asyncio.Event) -> None:
        pair.peer.sendall(b"a reply")
        await asyncio.sleep(0.2)
        assert not woken.is_set()
        assert watch.active
        assert tcp.is_connected(pair.process.pid)

    watched(pair, talk)


def test_it_does_not_keep_the_connection_of_a_dead_process_nor_what_is_in_its_queue() -> None:
    pair = Pair(_FILLS)
    pair.said.readline()

    async def talk(watch: ConnectionWatch, woken: asyncio.Event) -> None:
        pair.process.kill()
        await asyncio.to_thread(pair.process.wait)
        await asyncio.sleep(0.2)
        assert not watch.active
        assert not woken.is_set()

    try:
        watched(pair, talk)
        # Of a close it would get all that is in the queue, and then the end.
        with pytest.raises(ConnectionResetError):
            [None for _ in iter(lambda: pair.peer.recv(1 << 20), b"")]
    finally:
        pair.end()


def test_a_process_that_is_gone_is_not_watched(pair: Pair) -> None:
    pair.end()

    async def run() -> None:
        watch = ConnectionWatch(lambda: None)
        watch.watch(pair.identity)
        assert not watch.active
        watch.close()

    asyncio.run(run())


def test_where_it_may_not_be_watched_that_is_said(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storaged.host.tcpwatch._PIDFD_GETFD", 100000)  # no kernel has it

    async def run() -> None:
        watch = ConnectionWatch(lambda: None)
        watch.watch(pair.identity)
        assert not watch.active
        watch.close()

    asyncio.run(run())


@pytest.mark.parametrize("reset", [True, False])
def test_what_a_process_had_sent_before_it_was_killed_is_dropped_if_its_connections_are_reset(reset: bool) -> None:
    pair = Pair(_FILLS)
    try:
        pair.said.readline()  # it has filled all buffers
        pidfd = os.pidfd_open(pair.process.pid)
        if reset:
            reset_at_death(pidfd)
        os.close(pidfd)
        pair.process.kill()
        pair.process.wait(20)
        received = 0
        try:
            while data := pair.peer.recv(1 << 20):
                received += len(data)
        except ConnectionResetError:
            assert reset
        else:
            assert not reset
            assert received > 0
    finally:
        pair.end()


def test_a_process_that_is_gone_has_no_connections() -> None:
    pair = Pair(_IDLES)
    pidfd = os.pidfd_open(pair.process.pid)
    pair.end()
    reset_at_death(pidfd)
    os.close(pidfd)
