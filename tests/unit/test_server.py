"""The server with clients that mean it ill, on a real socket: memory is bounded, and other clients are served."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvloop

from storaged.api import server as module
from storaged.api.access import Access, Gate
from storaged.api.server import Server
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from tests.contract.memory_store import MemoryStore

#: Seconds without any progress after which a side is taken to have stopped.
STILL = 0.5
#: What a client may get rid of before the server must have stopped reading: much more than all socket buffers.
MUCH = 8 << 20


class Listener(socket.socket):
    """Fails to accept as long as ``failures`` says so, and counts the tries."""

    failures = 0
    tries = 0

    def accept(self) -> tuple[socket.socket, Any]:
        self.tries += 1
        if self.failures > 0:
            self.failures -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


@dataclass
class Place:
    """A running server without volumes."""

    server: Server
    listener: Listener
    path: str
    hub: EventHub
    bugs: list[dict[str, Any]] = field(default_factory=list)
    """What nobody caught."""

    @contextlib.asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(self.path)
        sock.setblocking(False)
        try:
            yield Client(sock)
        finally:
            sock.close()

    async def serves(self, seconds: float = 3) -> None:
        """Another client is served."""
        async with asyncio.timeout(seconds), self.client() as client:
            assert await client.call("io.storaged.List") == {"parameters": {"volumes": []}}

    @property
    def watchers(self) -> int:
        return len(self.hub._watchers)


class Client:
    """Speaks Varlink, or does not."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._received = b""

    async def send(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> dict[str, Any] | None:
        """The next message, None at the end."""
        while b"\0" not in self._received:
            try:
                data = await asyncio.get_running_loop().sock_recv(self.sock, 65536)
            except ConnectionResetError:
                return None
            if not data:
                return None
            self._received += data
        message, _, self._received = self._received.partition(b"\0")
        reply: dict[str, Any] = json.loads(message)
        return reply

    async def call(self, method: str, **more: Any) -> dict[str, Any] | None:
        await self.send(request(method, **more))
        return await self.receive()

    async def pushes(self, data: bytes, most: int) -> tuple[int, bool]:
        """Send again and again what ``data`` is, until nothing goes any more.

        Returns how many bytes went, and whether the server has closed the connection.
        """
        sent, last = 0, time.monotonic()
        while sent < most and time.monotonic() - last < STILL:
            try:
                sent += self.sock.send(data[sent % len(data):])
            except BlockingIOError:
                await asyncio.sleep(0.01)
            except (BrokenPipeError, ConnectionResetError):
                return sent, True
            else:
                last = time.monotonic()
                await asyncio.sleep(0)
        return sent, False


def request(method: str, *, length: int = 0, **more: Any) -> bytes:
    """A request, made ``length`` bytes long by blanks."""
    return json.dumps({"method": method, **more}).encode().ljust(length - 1) + b"\0"


def with_server(directory: Path, work: Callable[[Place], Awaitable[None]]) -> None:
    """Run ``work`` with a server, which has no bug afterwards that only the event loop knows of."""

    async def run() -> None:
        store = MemoryStore()
        environment = Environment(
            layout=Layout.below(str(directory / "root")), config=Config(), persistent=store, volatile=store,
            events=EventHub(), lock_directory=str(directory / "locks"),
        )
        with Listener(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "s"))
            listener.listen()
            async with asyncio.timeout(60), asyncio.TaskGroup() as tasks:
                server = Server(Manager(environment, tasks), listener, os.getgid())
                place = Place(server, listener, str(directory / "s"), environment.events)
                asyncio.get_running_loop().set_exception_handler(lambda _, context: place.bugs.append(context))
                server.start()
                try:
                    await work(place)
                finally:
                    if listener.fileno() >= 0:
                        await server.close()
            assert place.bugs == []

    uvloop.run(run())


async def eventually(condition: Callable[[], object], seconds: float = 3) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 -- it is set from no coroutine of ours
            await asyncio.sleep(0.005)


def queued(place: Place) -> int:
    """Replies that wait for the clients: chunks in the transports' queues."""
    return sum(len(data) for transport in place.server._clients for data, _, _ in transport._sendqueue)


# Who does not read

REQUESTS = {
    "a method": request("io.storaged.List", length=1024),
    "a method, said to be a stream": request("io.storaged.List", more=True, length=1024),
    "a method that fails": request("io.storaged.Show", parameters={"name": "nosuch"}, length=1024),
    "a wrong parameter": request("io.storaged.Show", parameters={"name": 1}, length=1024),
    "no such method": request("io.storaged.NoSuch", length=1024),
    "no such interface": request("no.such.Method", length=1024),
    "about the service": request("org.varlink.service.GetInfo", length=1024),
    "no request": b'{"nothing": 1}'.ljust(1023) + b"\0",
    "a stream": request("io.storaged.Watch", more=True, length=1024),
}
every_request = pytest.mark.parametrize("data", REQUESTS.values(), ids=REQUESTS.keys())


@every_request
def test_who_sends_requests_and_reads_no_replies_is_not_read_from_any_more(tmp_path: Path, data: bytes) -> None:
    async def work(place: Place) -> None:
        async with place.client() as client:
            sent, closed = await client.pushes(data, MUCH)
            assert closed or sent < MUCH, "all was read"
            assert queued(place) <= 2 * module._MOST_REPLIES
            await place.serves()

    with_server(tmp_path, work)


def test_who_may_not_ask_and_reads_no_replies_is_not_read_from_either(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(place: Place) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Gate, "access_of", lambda *_: Access.NOTHING)
            async with place.client() as client:
                reply = await client.call("io.storaged.List")
                assert reply is not None
                assert reply["error"] == "org.varlink.service.PermissionDenied"
                sent, closed = await client.pushes(REQUESTS["a method"], MUCH)
                assert closed or sent < MUCH, "all was read"
                assert queued(place) <= 2 * module._MOST_REPLIES

    with_server(tmp_path, work)


def test_who_reads_again_gets_every_reply_and_is_served_on(tmp_path: Path) -> None:
    data = REQUESTS["a method"]

    async def work(place: Place) -> None:
        async with place.client() as client:
            sent, closed = await client.pushes(data, MUCH)
            assert not closed
            rest = asyncio.create_task(client.send(data[sent % len(data):]))
            async with asyncio.timeout(10):
                for _ in range(sent // len(data) + 1):
                    assert await client.receive() == {"parameters": {"volumes": []}}
                await rest
                assert await client.call("io.storaged.List") == {"parameters": {"volumes": []}}

    with_server(tmp_path, work)


def test_who_goes_away_without_reading_leaves_nothing(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        async with place.client() as client:
            await client.pushes(REQUESTS["a method"], MUCH)
        await eventually(lambda: not place.server._clients)
        await place.serves()

    with_server(tmp_path, work)


_FLOOD = """
import socket, sys, time
end = time.monotonic() + float(sys.argv[2])
data = sys.stdin.buffer.read()
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect(sys.argv[1])
    sock.settimeout(0.1)
    print(flush=True)
    while time.monotonic() < end:
        try:
            sock.send(data)
        except TimeoutError:
            pass
        except OSError:
            break
"""


@contextlib.contextmanager
def flood(path: str, data: bytes, seconds: float) -> Iterator[None]:
    """A client that sends as fast as it can, and never reads. A process: a thread would wait for the server's GIL."""
    command = [sys.executable, "-c", _FLOOD, path, str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write(data)
            process.stdin.close()
            process.stdout.readline()
            yield
        finally:
            process.kill()


@pytest.mark.parametrize(
    "data", [request("io.storaged.List") * 20_000, b"x" * (1 << 20)], ids=["requests", "a message without an end"]
)
def test_a_client_that_sends_without_a_pause_does_not_keep_the_server_from_others(tmp_path: Path, data: bytes) -> None:
    """Without a pause: the server must end a read although more is there already."""

    async def work(place: Place) -> None:
        with flood(place.path, data, seconds=4):
            end = time.monotonic() + 1.5
            while time.monotonic() < end:
                before = time.monotonic()
                await place.serves()
                assert time.monotonic() - before < 1
                await asyncio.sleep(0.05)

    with_server(tmp_path, work)


def test_a_client_that_is_always_faster_than_the_server_does_not_keep_it_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same without chance: whenever the server has read a request, the next one is there."""
    received, turns = 0, list[int]()
    real = module._Protocol.message_received
    one = request("io.storaged.List")

    async def work(place: Place) -> None:
        async with place.client() as client:

            def faster(protocol: module._Protocol, data: bytes, fds: Any) -> None:
                nonlocal received
                received += 1
                if received == 1:
                    asyncio.get_running_loop().call_soon(lambda: turns.append(received))
                # The server may still have something to read when the client has been closed.
                if received < 20_000 and client.sock.fileno() >= 0:
                    with contextlib.suppress(BlockingIOError):
                        client.sock.send(one)
                real(protocol, data, fds)

            monkeypatch.setattr(module._Protocol, "message_received", faster)
            await client.send(one * 10)
            await eventually(lambda: turns, 10)
            assert turns[0] < 10_000

    with_server(tmp_path, work)


# What is no Varlink


def test_a_message_without_an_end_closes_its_connection_and_no_other(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        async with place.client() as other, place.client() as client:
            sent, closed = await client.pushes(b"x" * 65536, MUCH)
            assert closed
            assert sent < 2 * module._LONGEST_MESSAGE
            await eventually(lambda: len(place.server._clients) == 1)
            assert await other.call("io.storaged.List") == {"parameters": {"volumes": []}}

    with_server(tmp_path, work)


def test_an_end_that_comes_now_and_then_makes_no_message_too_long(tmp_path: Path) -> None:
    length = module._LONGEST_MESSAGE // 2

    async def work(place: Place) -> None:
        async with place.client() as client, asyncio.timeout(10):
            for _ in range(4):
                assert await client.call("io.storaged.List", length=length) == {"parameters": {"volumes": []}}

    with_server(tmp_path, work)


DEEP = 200_000
GARBAGE = {
    "deep arrays": b"[" * DEEP,
    "deep and closed": b"[" * DEEP + b"]" * DEEP,
    "deep objects": b'{"a":' * (DEEP // 2),
    "deep parameters": b'{"method":"io.storaged.List","parameters":{"x":' + b"[" * DEEP + b"]" * DEEP + b"}}",
    "less deep parameters": b'{"method":"io.storaged.List","parameters":{"x":' + b"[" * 700 + b"]" * 700 + b"}}",
    "no UTF-8": b'{"method":"\xff\xfe"}',
    "a huge number": b'{"method":"io.storaged.List","parameters":{"x":' + b"9" * 10_000 + b"}}",
    "half a surrogate": b'{"method":"io.storaged.Show","parameters":{"name":"\\ud800"}}',
    "nonsense": b"GET / HTTP/1.1\r\n\r\n",
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a method that is none": b'{"method":1}',
    "a method without an interface": b'{"method":"List"}',
    "a hidden method": b'{"method":"io.storaged._describe"}',
    "parameters that are none": b'{"method":"io.storaged.List","parameters":[]}',
    "not a number": b'{"method":"io.storaged.Detach","parameters":{"name":"a","timeout":NaN}}',
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE.keys())
def test_what_is_no_request_harms_nobody_and_leaves_no_one_waiting(tmp_path: Path, data: bytes) -> None:
    """Its sender is answered, or told by the end of the connection; or at least what it asks next is answered."""

    async def work(place: Place) -> None:
        async with place.client() as other, place.client() as client:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                await client.send(data + b"\0" + request("io.storaged.List"))
            async with asyncio.timeout(3):
                reply = await client.receive()
                assert reply is None or reply.keys() & {"parameters", "error"}
            assert await other.call("io.storaged.List") == {"parameters": {"volumes": []}}
            await place.serves()

    with_server(tmp_path, work)


# Too many clients


def test_without_descriptors_it_pauses_and_then_takes_who_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_ACCEPT_PAUSE", 0.2)

    async def work(place: Place) -> None:
        async with place.client() as served:
            assert await served.call("io.storaged.List")
            before, place.listener.failures = place.listener.tries, 2
            began = time.monotonic()
            async with place.client() as late, asyncio.timeout(3):
                waiting = asyncio.create_task(late.call("io.storaged.List"))
                await eventually(lambda: place.listener.tries > before)
                assert await served.call("io.storaged.List")  # who is there already is served meanwhile
                assert await waiting == {"parameters": {"volumes": []}}
            assert time.monotonic() - began > 0.35
            assert place.listener.tries - before <= 4

    with_server(tmp_path, work)


def test_it_can_be_closed_in_that_pause(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_ACCEPT_PAUSE", 0.1)

    async def work(place: Place) -> None:
        place.listener.failures = 1000
        async with place.client():
            await eventually(lambda: place.listener.tries)
            await place.server.close()
            tries = place.listener.tries
            await asyncio.sleep(0.3)
            assert place.listener.tries == tries

    with_server(tmp_path, work)


# Streams


async def watches(place: Place) -> Client:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(place.path)
    sock.setblocking(False)
    client = Client(sock)
    ready = await client.call("io.storaged.Watch", more=True)
    assert ready is not None
    assert ready["parameters"]["event"]["kind"] == "ready"
    assert place.watchers == 1
    return client


async def closes(_: Place, client: Client) -> None:
    client.sock.close()


async def shuts_down(_: Place, client: Client) -> None:
    client.sock.shutdown(socket.SHUT_WR)


async def closes_with_unread_events(place: Place, client: Client) -> None:
    for number in range(5000):
        place.hub.publish("a", "step", "starting", "x" * 100 + str(number))
        if number % 100 == 0:
            await asyncio.sleep(0)
    client.sock.close()


async def closes_with_unread_replies(_: Place, client: Client) -> None:
    await client.pushes(REQUESTS["a method"], MUCH)
    client.sock.close()


@pytest.mark.parametrize("goes", [closes, shuts_down, closes_with_unread_events, closes_with_unread_replies])
def test_a_stream_ends_when_its_client_goes_and_not_only_at_the_next_event(
    tmp_path: Path, goes: Callable[[Place, Client], Awaitable[None]]
) -> None:
    async def work(place: Place) -> None:
        client = await watches(place)
        try:
            await goes(place, client)
            await eventually(lambda: place.watchers == 0)
            await eventually(lambda: not place.server._clients)
        finally:
            client.sock.close()

    with_server(tmp_path, work)


def test_a_client_that_asks_for_a_stream_and_says_that_this_was_all_ends_cleanly(tmp_path: Path) -> None:
    """Its end comes while the first event is on its way: with_server looks for what nobody caught."""

    async def work(place: Place) -> None:
        for _ in range(100):
            async with place.client() as client:
                await client.send(request("io.storaged.Watch", more=True))
                client.sock.shutdown(socket.SHUT_WR)
                while await client.receive():
                    pass
        await eventually(lambda: place.watchers == 0 and not place.server._clients)

    with_server(tmp_path, work)


def test_a_client_that_watches_can_ask_and_hears_of_events_meanwhile(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        client = await watches(place)
        async with asyncio.timeout(3):
            assert await client.call("io.storaged.List") == {"parameters": {"volumes": []}}
            place.hub.publish("a", "state", "online", "")
            event = await client.receive()
            assert event is not None
            assert event["parameters"]["event"]["volume"] == "a"
            assert event["continues"] is True
        client.sock.close()
        await eventually(lambda: place.watchers == 0)

    with_server(tmp_path, work)


def test_a_watcher_that_does_not_read_costs_a_bounded_amount(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        client = await watches(place)
        for number in range(20_000):
            place.hub.publish("a", "step", "starting", "x" * 100)
            if number % 100 == 0:
                await asyncio.sleep(0)
        assert queued(place) <= 2
        (watcher,) = place.hub._watchers
        assert watcher.lost
        await place.serves()
        client.sock.close()
        await eventually(lambda: place.watchers == 0)

    with_server(tmp_path, work)
