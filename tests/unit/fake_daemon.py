"""A null daemon: speaks Varlink on a unix socket from a thread, and answers what a test tells it to."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

JSON = dict[str, Any]
#: Yields whole replies; raising Hangup closes the connection instead.
Handler = Callable[[JSON], Iterator[JSON]]


class Hangup(Exception):
    """Close the connection without (another) answer."""


def volume(name: str, **changes: Any) -> JSON:
    """Return a volume as the API describes it."""
    return {
        "name": name,
        "source": f"/srv/images/{name}.qcow2",
        "format": "qcow2",
        "transport": "fuse",
        "transport_reason": "auto: this kernel has no vduse and no nbd",
        "read_only": False,
        "snapshot": False,
        "persist": False,
        "options": {},
        "state": "online",
        "since": 1_700_000_000.0,
        "device": "/dev/loop3",
        "link": f"/dev/storaged/{name}",
        "size": 10 << 30,
        "logical_block_size": 512,
        "qsd_pid": 4711,
        "qsd_version": "10.0.13",
        "overlay": None,
        "failure": None,
        "condition": None,
        "deaths": 0,
        "paused": None,
        "history": None,
        "layers": [],
    } | changes


def entry(kind: str, message: str, time: float = 1_700_000_000.0, **changes: Any) -> JSON:
    """Return an entry of a volume's history as the API describes it."""
    return {"time": time, "kind": kind, "message": message, "seconds": None, "times": 1, "last": time} | changes


def event(name: str, kind: str, message: str = "", state: str = "starting") -> JSON:
    """Return an event as the API describes it."""
    return {"time": 1_700_000_000.0, "volume": name, "kind": kind, "state": state, "message": message}


def failure(error: str = "Failed", **parameters: Any) -> JSON:
    """Return an error reply of io.storaged."""
    empty: JSON = dict.fromkeys(("code", "message", "volume", "step", "cause", "hint"), "")
    return {"error": f"io.storaged.{error}", "parameters": empty | {"users": []} | parameters}


class FakeDaemon:
    """Listens at ``path`` while the context lasts. ``handlers`` maps method names to what they answer."""

    def __init__(self, path: Path, handlers: dict[str, Handler] | None = None) -> None:
        self.path = path
        self.handlers = handlers or {}
        self.requests: list[JSON] = []
        self._listener = socket.socket(socket.AF_UNIX)
        self._connections: list[socket.socket] = []
        self._over = threading.Event()

    def __enter__(self) -> FakeDaemon:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        directory = os.open(self.path.parent, os.O_PATH)
        try:
            self._listener.bind(f"/proc/self/fd/{directory}/{self.path.name}")
        finally:
            os.close(directory)
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for connection in [self._listener, *self._connections]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()

    def answers(self, method: str, *replies: JSON) -> FakeDaemon:
        """Let ``method`` answer with these replies."""
        self.handlers[method] = lambda request: iter(replies)
        return self

    def hangs_up(self, method: str) -> FakeDaemon:
        """Let ``method`` end the connection."""

        def handler(request: JSON) -> Iterator[JSON]:
            raise Hangup
            yield

        self.handlers[method] = handler
        return self

    def pause(self, seconds: float) -> None:
        """Sleep in a handler, but not beyond the end of the test."""
        self._over.wait(seconds)

    def asked(self, method: str) -> list[JSON]:
        """Return the parameters of all requests for ``method``."""
        asked = [request for request in self.requests if request["method"].rpartition(".")[2] == method]
        return [request["parameters"] for request in asked]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            self._connections.append(connection)
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        try:
            while data := connection.recv(65536):
                received += data
                while b"\0" in received:
                    message, _, received = received.partition(b"\0")
                    request = json.loads(message)
                    self.requests.append(request)
                    for reply in self._replies(request):
                        connection.sendall(json.dumps(reply).encode() + b"\0")
        except (OSError, Hangup):
            pass
        finally:
            connection.close()

    def _replies(self, request: JSON) -> Iterator[JSON]:
        handler = self.handlers.get(request["method"].rpartition(".")[2])
        if handler is None:
            return iter([{"error": "org.varlink.service.MethodNotFound", "parameters": {}}])
        return handler(request)
