"""A D-Bus system bus with a systemd on it, as far as the tests want it to answer."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from jeepney import DBusAddress, HeaderFields, Message, Parser, new_error, new_method_return, new_signal

#: What answers a call: messages. An empty one ends the connection.
Answer = Callable[[Message], Iterable[bytes]]


def member(message: Message) -> str:
    """The method or signal."""
    return str(message.header.fields[HeaderFields.member])


def returns(call: Message, signature: str | None = None, *values: Any) -> bytes:
    """A reply."""
    return bytes(new_method_return(call, signature, values).serialise(1))


def fails(call: Message, name: str, text: str) -> bytes:
    """An error reply."""
    return bytes(new_error(call, name, "s", (text,)).serialise(1))


def signals(member: str, signature: str | None = None, *values: Any) -> bytes:
    """A signal."""
    return bytes(new_signal(DBusAddress("/x", interface="x.y"), member, signature, values).serialise(1))


def welcome(call: Message) -> list[bytes]:
    """What Hello is answered."""
    return [returns(call, "s", ":1.7")]


@contextlib.contextmanager
def fake_bus(
    path: Path, answer: Answer, greeting: bytes = b"OK 0123\r\n", hello: Answer = welcome
) -> Iterator[list[Message]]:
    """Serve one connection on ``path`` after the other; yields the calls but for Hello. Looks that all were closed."""
    calls: list[Message] = []

    def serve(connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as file:
            assert file.readline().startswith(b"\0AUTH EXTERNAL ")
            connection.sendall(greeting)
            assert file.readline() == b"BEGIN\r\n"
            parser = Parser()
            while data := file.read1():
                for call in parser.feed(data):
                    if member(call) != "Hello":
                        calls.append(call)
                    for reply in (hello if member(call) == "Hello" else answer)(call):
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
    assert not thread.is_alive(), "a connection is still open"
