"""A blocking Varlink client for the command line, of the standard library alone.

``storaged list`` has to start and answer in a few Python start-up times. Importing asyncio and asyncvarlink
takes longer than that, and a command asks one question at a time.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import time
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from storaged.errors import ErrorCode, StoragedError

#: The same as storaged.api.interface.INTERFACE, which cannot be had without importing asyncvarlink.
INTERFACE = "io.storaged"
#: Methods that change nothing: when their answer is lost, nothing is in doubt.
_READ_ONLY = frozenset({f"{INTERFACE}.{name}" for name in ("List", "Show", "QemuArguments", "Watch")})
#: sun_path holds 108 bytes with its NUL.
_MAX_SOCKET_PATH = 107
#: No answer of the daemon comes near this; more is garbage.
_MAX_MESSAGE = 64 << 20
_CONNECT_TIMEOUT = 10

JSONObject = dict[str, Any]


class _Lost(StoragedError):
    """A daemon had the connection, and went away before it answered."""


class Client:
    """One connection to the daemon, made at the first request. One request at a time.

    ``command`` is how the user calls storaged (with --root, where one was given); the hints quote it.
    """

    def __init__(self, socket_path: str, *, command: str = "storaged") -> None:
        self._path = socket_path
        self.command = command
        self._socket: socket.socket | None = None
        self._buffer = bytearray()
        self._scanned = 0
        self._method = ""
        self._volume = ""

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; a request that is still running goes on in the daemon."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._buffer.clear()
        self._scanned = 0

    def fileno(self) -> int:
        """The descriptor to poll while a request is running."""
        return self._connected().fileno()

    def call(
        self, method: str, parameters: JSONObject | None = None, timeout: float | None = None
    ) -> JSONObject:
        """Ask, wait for the one answer and return its parameters.

        ``method`` without an interface is one of io.storaged. Raises StoragedError: what the daemon said,
        DAEMON_UNREACHABLE, PERMISSION_DENIED, or TIMEOUT when nothing came within ``timeout`` seconds.
        A question is asked once more where the daemon went away with it: what systemd's socket has not handed out yet
        waits for the next daemon, but the one that ends takes along what it had accepted.
        """
        begin = time.monotonic()
        try:
            self.send(method, parameters)
            return self.receive(timeout)[0]
        except _Lost:
            if not self._only_asks():
                raise
        self.send(method, parameters)
        return self.receive(None if timeout is None else max(0.0, round(begin + timeout - time.monotonic(), 1)))[0]

    def stream(self, method: str, parameters: JSONObject | None = None) -> Iterator[JSONObject]:
        """Ask for a stream and yield the parameters of each answer, until the daemon ends it."""
        self.send(method, parameters, more=True)
        more = True
        while more:
            answer, more = self.receive()
            yield answer

    def send(self, method: str, parameters: JSONObject | None = None, *, more: bool = False) -> None:
        """Send a request; ``receive`` takes the answers."""
        self._method = method if "." in method else f"{INTERFACE}.{method}"
        self._volume = str((parameters or {}).get("name") or "")
        request: JSONObject = {"method": self._method, "parameters": parameters or {}}
        if more:
            request["more"] = True
        try:
            connection = self._connected()
            connection.settimeout(_CONNECT_TIMEOUT)
            connection.sendall(json.dumps(request).encode() + b"\0")
        except TimeoutError as error:
            self.close()
            raise self._late(_CONNECT_TIMEOUT) from error
        except OSError as error:
            self.close()
            raise self._lost(error) from error

    def wait(self, timeout: float | None) -> bool:
        """Whether ``receive`` would return at once; waits for that up to ``timeout`` seconds."""
        try:
            return self._fill(timeout)
        except StoragedError:
            self.close()
            raise

    def receive(self, timeout: float | None = None) -> tuple[JSONObject, bool]:
        """Return the parameters of the next answer, and whether more will follow."""
        if not self.wait(timeout):
            self.close()
            raise self._late(timeout or 0)
        end = self._buffer.find(b"\0", self._scanned)
        message = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._scanned = 0
        try:
            reply = json.loads(message)
            error, parameters = reply.get("error"), reply.get("parameters") or {}
            if not isinstance(parameters, dict):
                raise TypeError("the parameters are no object")
        except (ValueError, TypeError, AttributeError) as why:
            self.close()
            raise self._failure(
                ErrorCode.INTERNAL, "the daemon's answer cannot be understood", str(why)
            ) from why
        if error is not None:
            raise self._translated(str(error), parameters)
        return parameters, reply.get("continues") is True

    def _fill(self, timeout: float | None) -> bool:
        """Read until a whole message is there; False when ``timeout`` ran out before."""
        connection = self._connected()
        deadline = None if timeout is None else time.monotonic() + timeout
        poller = select.poll()
        poller.register(connection, select.POLLIN)
        while (end := self._buffer.find(b"\0", self._scanned)) < 0:
            self._scanned = len(self._buffer)
            left = None if deadline is None else max(0.0, deadline - time.monotonic()) * 1000
            if not poller.poll(left):
                return False
            try:
                data = connection.recv(1 << 18)
            except OSError as error:
                raise self._lost(error) from error
            if not data:
                raise self._lost(None)
            self._buffer += data
            if len(self._buffer) > _MAX_MESSAGE:
                raise self._failure(ErrorCode.INTERNAL, "the daemon's answer is too long to be one", "")
        self._scanned = end
        return True

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            # A blocking connect() to a full backlog waits this long; a non-blocking one fails at once.
            timeval = struct.pack("@ll", _CONNECT_TIMEOUT, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeval)
            _connect(connection, self._path)
        except OSError as error:
            connection.close()
            raise self._unreachable(error) from error
        except BaseException:
            connection.close()
            raise
        self._socket = connection
        return connection

    def _unreachable(self, error: OSError) -> StoragedError:
        if isinstance(error, PermissionError):
            return StoragedError(
                ErrorCode.PERMISSION_DENIED,
                "the daemon's socket is not yours to use",
                volume=self._volume,
                cause=f"{self._path}: {error.strerror}",
                hint="run this as root, or as a member of the group that owns the socket",
            )
        hint = f"start it with: {self.command} daemon"
        if self.command == "storaged":
            hint = "start it with: systemctl start storaged (or by hand: storaged daemon)"
        if error.errno == errno.EAGAIN:
            cause = f"{self._path} accepts no connection within {_CONNECT_TIMEOUT} s"
            hint = "the daemon hangs or is overloaded; look at its log: journalctl -u storaged"
        elif error.errno in (errno.ENOENT, errno.ENOTDIR):
            cause = f"there is no socket {self._path}"
        elif error.errno == errno.ECONNREFUSED:
            cause = f"nothing listens on {self._path}"
        else:
            cause = f"{self._path}: {error.strerror}"
        return self._failure(ErrorCode.DAEMON_UNREACHABLE, "the daemon cannot be reached", cause, hint)

    def _lost(self, error: OSError | None) -> StoragedError:
        cause = "the daemon closed the connection before it answered"
        if error is not None and not isinstance(error, BrokenPipeError | ConnectionResetError):
            cause = f"the connection to the daemon broke: {error.strerror}"
        message, hint = "the outcome is unknown", f"look with: {self._look()}"
        if self._only_asks():
            message = "the daemon went away"
            hint = "try again; if it stays away, look at its log: journalctl -u storaged"
        return _Lost(ErrorCode.DAEMON_UNREACHABLE, message, volume=self._volume, cause=cause, hint=hint)

    def _only_asks(self) -> bool:
        """Whether the request changes nothing."""
        return not self._method.startswith(f"{INTERFACE}.") or self._method in _READ_ONLY

    def _late(self, timeout: float) -> StoragedError:
        hint = "look at the daemon's log: journalctl -u storaged"
        if self._method not in _READ_ONLY:
            hint = f"it may still be at work; look with: {self._look()}"
        return self._failure(ErrorCode.TIMEOUT, f"the daemon did not answer within {timeout:g} s", "", hint)

    def _look(self) -> str:
        return f"{self.command} show {self._volume}" if self._volume else f"{self.command} list"

    def _failure(self, code: ErrorCode, message: str, cause: str, hint: str = "") -> StoragedError:
        return StoragedError(code, message, volume=self._volume, cause=cause, hint=hint)

    def _translated(self, error: str, parameters: JSONObject) -> StoragedError:
        """Turn a Varlink error into ours."""
        if error.startswith(f"{INTERFACE}."):
            failure = failure_of(parameters, f"the daemon answered {error}")
            failure.volume = failure.volume or self._volume
            return failure
        if error == "org.varlink.service.PermissionDenied":
            return self._failure(
                ErrorCode.PERMISSION_DENIED, "the daemon refuses to do this for you", "", "run this as root"
            )
        detail = f": {json.dumps(parameters)}" if parameters else ""
        return self._failure(
            ErrorCode.INTERNAL,
            f"the daemon does not take {self._method}",
            f"{error}{detail}",
            "command and daemon may be of different versions: systemctl restart storaged",
        )


def failure_of(parameters: JSONObject, otherwise: str) -> StoragedError:
    """Return the failure that the daemon tells of; ``otherwise`` is its message where it has none.

    The daemon may be newer than we are: tolerate what it says.
    """

    def text(key: str) -> str:
        value = parameters.get(key)
        return value if isinstance(value, str) else ""

    users = parameters.get("users")
    message = text("message") or otherwise
    try:
        code = ErrorCode(text("code"))
    except ValueError:
        code = ErrorCode.INTERNAL
        if text("code"):
            message += f" (with the code {text('code')}, which this version does not know)"
    return StoragedError(
        code, message, volume=text("volume"), step=text("step"), cause=text("cause"), hint=text("hint"),
        users=[str(user) for user in users] if isinstance(users, list) else (),
    )


def _connect(connection: socket.socket, path: str) -> None:
    """Connect to ``path``, also where it is too long for a socket address."""
    if len(os.fsencode(path)) <= _MAX_SOCKET_PATH:
        connection.connect(path)
        return
    directory, name = os.path.split(path)
    fd = os.open(directory or ".", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{fd}/{name}")
    finally:
        os.close(fd)
