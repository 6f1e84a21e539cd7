"""One command in the machine: sends it, passes on what it writes, and returns its exit status."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import BinaryIO

from tests.vm.machine.agent import GREETING, receive, receive_frame, send_frame

CHECKOUT = "/srv/storaged"
ENVIRONMENT = {
    "PATH": f"{CHECKOUT}/.venv/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
    "HOME": "/root", "LANG": "C.UTF-8", "SHELL": "/bin/bash", "STORAGED_VM": "1",
}


class MachineError(Exception):
    """The machine, or a command in it, did not do what was asked."""


class MachineGone(MachineError):
    """The connection ended before the command did."""


class DeadlinePassed(MachineError):
    """The command took too long."""


def connect(port: int, alive: Callable[[], bool], timeout: float) -> socket.socket:
    """Connect to the agent, waiting until the machine is up."""
    deadline = time.monotonic() + timeout
    while alive():
        if time.monotonic() > deadline:
            raise DeadlinePassed(f"the machine is not up after {timeout:.0f} seconds")
        # QEMU accepts at once; it is the greeting that tells that the agent has.
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(2)
        with contextlib.suppress(OSError):
            sock.connect(("127.0.0.1", port))
            if receive(sock, len(GREETING)) == GREETING:
                sock.settimeout(None)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return sock
        sock.close()
        time.sleep(0.1)
    raise MachineGone("the machine ended before it was up")


def run(
    sock: socket.socket,
    command: list[str],
    *,
    stdin: BinaryIO | None = None,
    output: Callable[[bytes], object],
    error: Callable[[bytes], object],
    environment: dict[str, str] | None = None,
    terminal: bool = False,
    deadline: float | None = None,
) -> int:
    """Run a command over a connection, which is closed afterwards; ``deadline`` is a time of time.monotonic()."""
    with sock, _interrupts(sock), _raw_terminal(sock) if terminal else contextlib.nullcontext():
        request = {
            "command": command, "directory": CHECKOUT, "environment": {**ENVIRONMENT, **(environment or {})},
            "terminal": list(_size()) if terminal else None,
        }
        sock.sendall(json.dumps(request).encode() + b"\n")
        if stdin is None:
            send_frame(sock, b"i")
        else:
            threading.Thread(target=_feed, args=(sock, stdin), daemon=True).start()
        try:
            while True:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                if not select.select([sock], [], [], left)[0]:
                    raise DeadlinePassed("the deadline has passed")
                frame = receive_frame(sock)
                if frame is None:
                    raise MachineGone("the connection to the machine ended before the command")
                kind, data = frame
                if kind == b"x":
                    return int(data)
                (error if kind == b"e" else output)(data)
        except ConnectionError as reason:
            raise MachineGone(f"the connection to the machine ended before the command: {reason}") from reason


def _feed(sock: socket.socket, stdin: BinaryIO) -> None:
    """Send our standard input."""
    with contextlib.suppress(OSError, ValueError):
        while data := os.read(stdin.fileno(), 65536):
            send_frame(sock, b"i", data)
        send_frame(sock, b"i")


def _size() -> tuple[int, int]:
    size = shutil.get_terminal_size()
    return size.lines, size.columns


@contextmanager
def _interrupts(sock: socket.socket) -> Iterator[None]:
    """Pass the first Ctrl-C on to the command; the second is ours."""
    former = signal.getsignal(signal.SIGINT)

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, former)
        send_frame(sock, b"s", str(int(signal.SIGINT)).encode())

    if threading.current_thread() is not threading.main_thread() or former is signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, former)


@contextmanager
def _raw_terminal(sock: socket.socket) -> Iterator[None]:
    """Every key goes to the machine; so do changes of the window's size."""
    descriptor = sys.stdin.fileno()
    former = termios.tcgetattr(descriptor)
    signal.signal(signal.SIGWINCH, lambda *_: send_frame(sock, b"w", json.dumps(_size()).encode()))
    tty.setraw(descriptor)
    try:
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, former)
        signal.signal(signal.SIGWINCH, signal.SIG_DFL)
