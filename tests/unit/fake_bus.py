"""A D-Bus system bus with a systemd on it, as far as the tests want it to answer."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from storaged.host.dbus import ERROR, RETURN, SIGNAL, Message, Variant, decode, encode

#: What answers a call: messages, each but for its serial.
Answer = Callable[[Message], list[bytes]]


def returns(call: Message, signature: str = "", *values: Any) -> bytes:
    """A reply."""
    return encode(RETURN, 1, {5: Variant("u", call.serial)}, signature, *values)


def fails(call: Message, name: str, text: str) -> bytes:
    """An error reply."""
    return encode(ERROR, 1, {5: Variant("u", call.serial), 4: Variant("s", name)}, "s", text)


def signals(member: str, signature: str, *values: Any) -> bytes:
    """A signal."""
    fields = {1: Variant("o", "/x"), 2: Variant("s", "x.y"), 3: Variant("s", member)}
    return encode(SIGNAL, 1, fields, signature, *values)


@contextlib.contextmanager
def fake_bus(path: Path, answer: Answer, greeting: bytes = b"OK 0123\r\n") -> Iterator[list[Message]]:
    """Serve one connection on ``path`` after the other; yields the calls, Hello is answered here."""
    calls: list[Message] = []

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            assert file.readline().startswith(b"\0AUTH EXTERNAL ")
            assert file.readline() == b"BEGIN\r\n"
            connection.sendall(greeting)
            while head := file.read(16):
                body, fields = struct.unpack_from("<I", head, 4)[0], struct.unpack_from("<I", head, 12)[0]
                call = decode(head + file.read(-(-fields // 8) * 8 + body))
                if call.member == "Hello":
                    replies = [returns(call, "s", ":1.7")]
                else:
                    calls.append(call)
                    replies = answer(call)
                for reply in replies:
                    connection.sendall(reply)
                    if not reply:
                        return

    def accept() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                with contextlib.suppress(OSError, AssertionError):
                    serve(connection)

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield calls
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join(5)
