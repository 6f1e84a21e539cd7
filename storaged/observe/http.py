"""Serves /metrics over HTTP, in threads of its own: nothing of it runs on the event loop.

It is meant for a few scrapers. Clients are bounded in number, in what they may send and in time, so that a bad one
costs no more than the others' patience; each connection serves one request.
"""

from __future__ import annotations

import logging
import os
import select
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from storaged.observe.passwords import Passwords
from storaged.observe.webconfig import WebConfig, WebConfigError, load, names_of

log = logging.getLogger("storaged.metrics")

#: Clients at a time. One more, and the one that has been sending its request for longest is dropped.
MOST_CLIENTS = 8
#: Seconds for the handshake and the request, and then for the answer.
REQUEST_TIME = 5.0
ANSWER_TIME = 30.0
#: Seconds for the client to hang up, once it has its answer.
_FAREWELL = 1.0
#: Bytes of a request.
_LONGEST = 16384
#: Bytes that are sent at once.
_PIECE = 1 << 16
#: Seconds between two tries to listen where the address cannot be had (the network may come up late).
_RETRY = 5.0
_REASONS = {
    200: "OK", 400: "Bad Request", 401: "Unauthorized", 404: "Not Found", 405: "Method Not Allowed",
    503: "Service Unavailable",
}

#: Given the header ``Accept``: the content type and the content. Raises TimeoutError.
Scrape = Callable[[str], tuple[str, bytes]]


class _BadRequest(Exception):
    """What came is no request."""


@dataclass(frozen=True)
class _Request:
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True)
class _Answer:
    status: int
    content: bytes
    content_type: str = "text/plain; charset=utf-8"
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(eq=False)
class _Client:
    socket: socket.socket
    since: float | None
    """Since when it has been sending its request (monotonic), None once that is there."""


class Protection:
    """The web configuration, read again when one of its files has changed."""

    def __init__(self, path: str | None) -> None:
        self._path = path
        self._config: WebConfig | None = None
        self._told = ""
        self._reading = threading.Lock()
        self.passwords = Passwords() if path is not None else None

    def now(self) -> WebConfig | None:
        """Return what holds now; None where it cannot be read, which is logged once: then nobody is served."""
        if self._path is None:
            return WebConfig()
        with self._reading:
            if self._config is None or self._config.is_outdated():
                try:
                    self._config = load(self._path)
                except WebConfigError as error:
                    self._config = None
                    if str(error) != self._told:
                        log.error("nobody is given metrics until this is mended: %s", error)
                    self._told = str(error)
                else:
                    self._told = ""
            return self._config


class MetricsServer:
    """Listens on one address."""

    def __init__(self, host: str, port: int, protection: Protection, scrape: Scrape) -> None:
        self._address = (host, port)
        self._protection = protection
        self._scrape = scrape
        self._stop_reader, self._stop_writer = os.pipe2(os.O_CLOEXEC)
        self._stopped = False
        self._clients: set[_Client] = set()
        self._changing = threading.Lock()
        self.port = 0
        """Where it listens; 0 as long as it does not."""
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        """Listen and serve from now on, or as soon as the address can be had."""
        self._thread.start()

    def stop(self) -> None:
        """Listen no more, and drop all clients. Waits for the thread that listens, which takes no time."""
        if not self._stopped:
            self._stopped = True
            os.close(self._stop_writer)
        self._thread.join(5)
        with self._changing:
            for client in self._clients:
                _hang_up(client.socket)

    # Connections -------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        listener = self._listen()
        if listener is None:
            return
        with listener:
            while True:
                _wait_for([listener.fileno(), self._stop_reader], None)
                if self._is_stopping(0):
                    return
                try:
                    accepted, _ = listener.accept()
                except OSError as error:
                    # The client is gone; or no descriptors are left, and it stays in the backlog.
                    if self._is_stopping(0.5):
                        return
                    log.warning("cannot accept a client for metrics: %s", error.strerror)
                    continue
                client = _Client(accepted, time.monotonic())
                if self._admit(client):
                    threading.Thread(target=self._serve, args=(client,), name="metrics client", daemon=True).start()
                else:
                    accepted.close()

    def _is_stopping(self, seconds: float) -> bool:
        return _wait_for([self._stop_reader], seconds)

    def _listen(self) -> socket.socket | None:
        told = ""
        while True:
            try:
                listener = _listener(*self._address)
            except OSError as error:
                if str(error) != told:
                    told = str(error)
                    log.error(
                        "cannot listen on %s port %d for metrics, and goes on trying: %s", *self._address,
                        error.strerror or error,
                    )
                if self._is_stopping(_RETRY):
                    return None
            else:
                port = listener.getsockname()[1]
                log.info("metrics on %s port %d", self._address[0], port)
                self.port = port  # the last: who waits for it finds all of the start done
                return listener

    def _admit(self, client: _Client) -> bool:
        """Whether there is room for one more; who has been sending its request for longest makes it."""
        with self._changing:
            if len(self._clients) >= MOST_CLIENTS:
                waiting = [(other.since, other) for other in self._clients if other.since is not None]
                if not waiting:
                    return False
                slowest = min(waiting, key=lambda found: found[0])[1]
                slowest.since = None
                _hang_up(slowest.socket)
                self._clients.discard(slowest)
            self._clients.add(client)
        return True

    def _serve(self, client: _Client) -> None:
        try:
            with suppress(OSError, ValueError):  # it went away, was too slow, speaks no TLS, has no certificate
                self._talk(client)
        except Exception:
            log.exception("a bug in the answer to a scrape")
        finally:
            # Nobody else may touch its socket from here on.
            with self._changing:
                self._clients.discard(client)
                client.socket.close()

    def _talk(self, client: _Client) -> None:
        config = self._protection.now()
        if config is None:
            return
        deadline = time.monotonic() + REQUEST_TIME
        if config.tls is not None:
            client.socket.settimeout(_left(deadline))
            # Takes the descriptor away from the first socket.
            client.socket = encrypted = config.tls.wrap_socket(
                client.socket, server_side=True, do_handshake_on_connect=False
            )
            encrypted.do_handshake()  # the time-out is for all of it
            if config.sans and not config.sans & names_of(encrypted.getpeercert()):
                return
        try:
            request = _receive(client.socket, deadline)
        except _BadRequest as error:
            request, answer = _Request("GET", "", {}), _Answer(400, f"{error}\n".encode())
        else:
            client.since = None
            answer = self._answer(request, config)
        _send(client.socket, request, answer, config)

    # Requests ----------------------------------------------------------------------------------------------------

    def _answer(self, request: _Request, config: WebConfig) -> _Answer:
        passwords = self._protection.passwords
        if config.users and (
            passwords is None or not passwords.are_right(request.headers.get("authorization", ""), config.users)
        ):
            return _Answer(401, b"who are you?\n", headers={"WWW-Authenticate": 'Basic realm="storaged"'})
        if request.path.partition("?")[0] != "/metrics":
            return _Answer(404, b"the metrics are at /metrics\n")
        if request.method not in ("GET", "HEAD"):
            return _Answer(405, b"only GET and HEAD\n", headers={"Allow": "GET, HEAD"})
        try:
            content_type, content = self._scrape(request.headers.get("accept", ""))
        except TimeoutError:
            return _Answer(503, b"the daemon's event loop does not answer\n")
        return _Answer(200, content, content_type)


def _wait_for(descriptors: Iterable[int], seconds: float | None) -> bool:
    """Wait until there is something to read. Not by select(2), which knows no descriptor above 1023."""
    poll = select.poll()
    for descriptor in descriptors:
        poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(None if seconds is None else seconds * 1000))


def _listener(host: str, port: int) -> socket.socket:
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST | socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(MOST_CLIENTS)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _hang_up(client: socket.socket) -> None:
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _receive(connection: socket.socket, deadline: float) -> _Request:
    data = b""
    while b"\r\n\r\n" not in data:
        if len(data) > _LONGEST:
            raise _BadRequest("the request is too long")
        connection.settimeout(_left(deadline))
        received = connection.recv(4096)
        if not received:
            raise ConnectionAbortedError
        data += received
    first, *lines = data.partition(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    words = first.split(" ")
    if len(words) != 3 or not words[2].startswith("HTTP/1."):
        raise _BadRequest("this is no request of HTTP/1")
    headers = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if not colon:
            raise _BadRequest("this is no header")
        headers[name.lower()] = value.strip()
    return _Request(words[0], words[1], headers)


def _send(connection: socket.socket, request: _Request, answer: _Answer, config: WebConfig) -> None:
    headers = {
        "Content-Type": answer.content_type, "Content-Length": str(len(answer.content)), "Connection": "close",
        **config.headers, **answer.headers,
    }
    head = f"HTTP/1.1 {answer.status} {_REASONS[answer.status]}\r\n"
    head += "".join(f"{name}: {value}\r\n" for name, value in headers.items()) + "\r\n"
    data = memoryview(head.encode("latin-1") + (b"" if request.method == "HEAD" else answer.content))
    deadline = time.monotonic() + ANSWER_TIME
    while data:
        connection.settimeout(_left(deadline))
        data = data[connection.send(data[:_PIECE]):]
    _take_leave(connection)


def _take_leave(connection: socket.socket) -> None:
    """Let the client hang up first: a close with bytes unread is a reset, which may take the answer with it."""
    deadline = time.monotonic() + _FAREWELL
    connection.settimeout(_left(deadline))
    if isinstance(connection, ssl.SSLSocket):
        connection.unwrap()
        return
    connection.shutdown(socket.SHUT_WR)
    while connection.recv(_PIECE):
        connection.settimeout(_left(deadline))
