"""Inside the machine: runs commands for who connects. Of the standard library alone, because it starts at the boot.

One connection is one command. After the greeting the client sends a request, a line of JSON:
``{"command": [...], "environment": {...}, "directory": "...", "terminal": [rows, columns] or null}``.
Frames follow in both directions, each with a kind (one byte) and a length (four, big endian):

====  =========  ==============================================================
kind  from       what
====  =========  ==============================================================
i     client     the command's standard input; of no length: its end
s     client     a signal's number, sent to the command's group of processes
w     client     a terminal's rows and columns
o, e  agent      its standard output and error
x     agent      its exit status, as a shell would tell it; the last frame
====  =========  ==============================================================

A client that goes away takes its command with it, but not what that has put into a session of its own.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import select
import signal
import socket
import struct
import subprocess
import termios
import threading
import time
from typing import Any

PORT = 5000
GREETING = b"storaged-vm\n"
_HEAD = struct.Struct("!cI")
_CHUNK = 65536


def send_frame(sock: socket.socket, kind: bytes, data: bytes = b"") -> None:
    """Send one frame."""
    sock.sendall(_HEAD.pack(kind, len(data)) + data)


def receive(sock: socket.socket, length: int) -> bytes:
    """Receive so many bytes; fewer at the connection's end."""
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        if not part:
            break
        data += part
    return data


def receive_frame(sock: socket.socket) -> tuple[bytes, bytes] | None:
    """Receive one frame; nothing at the connection's end."""
    head = receive(sock, _HEAD.size)
    if len(head) < _HEAD.size:
        return None
    kind, length = _HEAD.unpack(head)
    data = receive(sock, length)
    return (kind, data) if len(data) == length else None


def _receive_line(sock: socket.socket) -> bytes:
    line = b""
    while not line.endswith(b"\n"):
        byte = sock.recv(1)
        if not byte:
            break
        line += byte
    return line


def set_size(terminal: int, rows: int, columns: int) -> None:
    """Tell a terminal its size."""
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


class Command:
    """One command, and the descriptors to it."""

    def __init__(self, request: dict[str, Any]) -> None:
        self.stdin: int | None
        self.outputs: dict[int, bytes]
        arguments: dict[str, Any] = {
            "cwd": request["directory"], "env": {**os.environ, **request["environment"]},
        }
        self.terminal = request["terminal"] is not None
        if self.terminal:
            ours, theirs = pty.openpty()
            set_size(ours, *request["terminal"])
            # setsid: the terminal has to control the session, or else there is no job control.
            self.process = subprocess.Popen(
                ["setsid", "--ctty", *request["command"]], stdin=theirs, stdout=theirs, stderr=theirs, **arguments
            )
            os.close(theirs)
            self.stdin, self.outputs = ours, {ours: b"o"}
            return
        (theirs, self.stdin), (out, out_theirs), (error, error_theirs) = os.pipe(), os.pipe(), os.pipe()
        self.process = subprocess.Popen(
            request["command"], stdin=theirs, stdout=out_theirs, stderr=error_theirs, start_new_session=True,
            **arguments,
        )
        for descriptor in (theirs, out_theirs, error_theirs):
            os.close(descriptor)
        self.outputs = {out: b"o", error: b"e"}

    def kill(self, number: int) -> None:
        """Send a signal to the command and all that is in its group."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def feed(self, data: bytes) -> None:
        """Give it input; of no length: the end of its input."""
        if self.stdin is None:
            return
        try:
            while data:
                data = data[os.write(self.stdin, data):]
            return
        except OSError:
            pass  # it reads no more
        self.end_input()

    def end_input(self) -> None:
        """End its input."""
        if self.stdin is not None and not self.terminal:
            os.close(self.stdin)
            self.stdin = None

    def forward(self, sock: socket.socket, *others: int) -> bool:
        """Send what it has written; return whether there was something. Wait for that, or for ``others``."""
        ready = select.select([*self.outputs, *others], [], [], None if others else 0)[0]
        for descriptor in set(ready) - set(others):
            try:
                data = os.read(descriptor, _CHUNK)
            except OSError:
                data = b""  # a terminal that nobody has open any more
            if data:
                send_frame(sock, self.outputs[descriptor], data)
            elif self.outputs.pop(descriptor) and not self.terminal:
                os.close(descriptor)
        return bool(ready)

    def close(self) -> None:
        """Let go of everything."""
        for descriptor in {*self.outputs, *([] if self.stdin is None else [self.stdin])}:
            os.close(descriptor)
        self.outputs, self.stdin = {}, None


def _inputs(sock: socket.socket, command: Command) -> None:
    """Obey the client's frames until it goes away, in a thread of its own: input may block."""
    with contextlib.suppress(OSError):
        while frame := receive_frame(sock):
            kind, data = frame
            if kind == b"i" and data:
                command.feed(data)
            elif kind == b"i":
                command.end_input()
            elif kind == b"s":
                command.kill(int(data))
            elif kind == b"w" and command.stdin is not None:
                set_size(command.stdin, *json.loads(data))
    if command.process.poll() is None:
        command.kill(signal.SIGHUP)
        with contextlib.suppress(subprocess.TimeoutExpired):
            command.process.wait(5)
        command.kill(signal.SIGKILL)


def serve(sock: socket.socket) -> None:
    """One connection."""
    with sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.sendall(GREETING)
        line = _receive_line(sock)
        if not line:
            return
        try:
            command = Command(json.loads(line))
        except (OSError, ValueError, KeyError) as error:
            send_frame(sock, b"e", f"agent: {error}\n".encode())
            send_frame(sock, b"x", b"127")
            return
        thread = threading.Thread(target=_inputs, args=(sock, command), daemon=True)
        thread.start()
        with contextlib.suppress(OSError):
            # It has ended when its first process has; what that left behind may hold the pipes for ever.
            ended = os.pidfd_open(command.process.pid)
            while command.process.poll() is None:
                command.forward(sock, ended)
            os.close(ended)
            deadline = time.monotonic() + 1
            while command.forward(sock) and time.monotonic() < deadline:
                pass
            status = command.process.wait()
            send_frame(sock, b"x", str(status if status >= 0 else 128 - status).encode())
            sock.shutdown(socket.SHUT_WR)
        thread.join()
        command.close()


def main() -> None:
    """Serve for ever."""
    with socket.create_server(("0.0.0.0", PORT), backlog=16) as server:
        while True:
            sock, _ = server.accept()
            threading.Thread(target=serve, args=(sock,), daemon=True).start()


if __name__ == "__main__":
    main()
