"""As much of D-Bus as it takes to ask systemd: calls on the system bus, and signals.

The D-Bus specification, dbus.freedesktop.org/doc/dbus-specification.html. Little-endian, no descriptors.
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SYSTEM_BUS = "/run/dbus/system_bus_socket"
#: Destination, path and interface of the bus itself.
BUS = ("org.freedesktop.DBus", "/org/freedesktop/DBus", "org.freedesktop.DBus")

CALL, RETURN, ERROR, SIGNAL = 1, 2, 3, 4
#: Codes of header fields.
_PATH, _INTERFACE, _MEMBER, _ERROR_NAME, _REPLY_SERIAL, _DESTINATION, _SIGNATURE = 1, 2, 3, 4, 5, 6, 8
#: What systemd and the bus send to us is far below the protocol's 128 MiB.
_LONGEST = 1 << 20
_NUMBERS = {"y": "<B", "b": "<I", "u": "<I", "i": "<i", "t": "<Q"}
_ALIGNMENT = {"y": 1, "g": 1, "v": 1, "t": 8, "(": 8}  # all others: 4


class BusError(Exception):
    """An error reply. ``name`` is D-Bus's, such as org.freedesktop.DBus.Error.AccessDenied."""

    def __init__(self, name: str, text: str) -> None:
        super().__init__(text or name)
        self.name = name


@dataclass(frozen=True)
class Variant:
    """A value with its type."""

    signature: str
    value: Any


@dataclass(frozen=True)
class Message:
    """One message. ``fields`` are the header's, by their code."""

    kind: int
    serial: int
    fields: dict[int, Any]
    body: list[Any]

    @property
    def member(self) -> str:
        """The method or signal."""
        return str(self.fields.get(_MEMBER, ""))


class Connection:
    """A connection to the bus. Everything has to end within ``timeout`` seconds of its making, or raises TimeoutError.

    Other than that it raises OSError where the bus cannot be reached or ends it.
    """

    def __init__(self, timeout: float, path: str = SYSTEM_BUS) -> None:
        self._deadline = time.monotonic() + timeout
        self._serial = 0
        self._waiting: list[Message] = []
        self._received = bytearray()
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._limit()
            self._socket.connect(path)
            # Who we are the bus knows by SO_PEERCRED; this says whom we take ourselves for.
            self._socket.sendall(b"\0AUTH EXTERNAL " + str(os.geteuid()).encode().hex().encode() + b"\r\nBEGIN\r\n")
            answer = b""
            while not answer.endswith(b"\r\n"):
                answer += self._read(1)
            if not answer.startswith(b"OK "):
                raise ConnectionError(f"the system bus refuses us: {answer.decode(errors='replace').strip()}")
            self.call(BUS, "Hello")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End it."""
        self._socket.close()

    def call(self, where: tuple[str, str, str], member: str, signature: str = "", *arguments: Any) -> list[Any]:
        """Call a method of (destination, path, interface) and return what it returns. Raises BusError."""
        self._serial += 1
        destination, path, interface = where
        fields = {
            _PATH: Variant("o", path), _DESTINATION: Variant("s", destination), _INTERFACE: Variant("s", interface),
            _MEMBER: Variant("s", member),
        }
        self._limit()
        self._socket.sendall(encode(CALL, self._serial, fields, signature, *arguments))
        while True:
            message = self._receive()
            if message.kind == SIGNAL:
                self._waiting.append(message)
            elif message.fields.get(_REPLY_SERIAL) == self._serial:
                if message.kind == ERROR:
                    text = message.body[0] if message.body else ""
                    raise BusError(str(message.fields.get(_ERROR_NAME, "")), str(text))
                return message.body

    def signals(self) -> Iterator[Message]:
        """Yield the signals that have come and those that come."""
        while True:
            message = self._waiting.pop(0) if self._waiting else self._receive()
            if message.kind == SIGNAL:
                yield message

    def _receive(self) -> Message:
        head = self._read(16)
        body, fields = struct.unpack_from("<I", head, 4)[0], struct.unpack_from("<I", head, 12)[0]
        if head[:1] != b"l" or body > _LONGEST or fields > _LONGEST:
            raise ConnectionError("the system bus sends what is no message for us")
        return decode(head + self._read(-(-fields // 8) * 8 + body))

    def _read(self, count: int) -> bytes:
        while len(self._received) < count:
            self._limit()
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionError("the system bus has closed the connection")
            self._received += more
        data = bytes(self._received[:count])
        del self._received[:count]
        return data

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer over the system bus")
        self._socket.settimeout(left)


def encode(kind: int, serial: int, fields: dict[int, Variant], signature: str = "", *arguments: Any) -> bytes:
    """Return a message."""
    body = bytearray()
    for part, value in zip(split(signature), arguments, strict=True):
        _put(body, part, value)
    if signature:
        fields = {**fields, _SIGNATURE: Variant("g", signature)}
    message = bytearray(struct.pack("<cBBBII", b"l", kind, 0, 1, len(body), serial))
    _put(message, "a(yv)", list(fields.items()))
    _align(message, 8)
    return bytes(message + body)


def decode(data: bytes) -> Message:
    """Return what a complete message says. Raises ConnectionError if it is none."""
    try:
        kind, serial = data[1], struct.unpack_from("<I", data, 8)[0]
        listed, end = _get(data, 12, "a(yv)")
        fields = {code: value.value for code, value in listed}
        body, position = [], -(-end // 8) * 8
        for part in split(fields.get(_SIGNATURE, "")):
            # Its alignment counts from the beginning of the message, which is a multiple of 8 before the body's.
            value, position = _get(data, position, part)
            body.append(value)
    except (struct.error, IndexError, KeyError, ValueError) as error:
        raise ConnectionError("the system bus sends what cannot be read") from error
    return Message(kind, serial, fields, body)


def split(signature: str) -> list[str]:
    """Return the complete types that a signature consists of."""
    parts, begin = [], 0
    while begin < len(signature):
        end = _end(signature, begin)
        parts.append(signature[begin:end])
        begin = end
    return parts


def _end(signature: str, begin: int) -> int:
    if signature[begin] == "a":
        return _end(signature, begin + 1)
    if signature[begin] not in "({":
        return begin + 1
    depth = 0
    for place in range(begin, len(signature)):
        depth += (signature[place] in "({") - (signature[place] in ")}")
        if depth == 0:
            return place + 1
    raise ValueError(signature)


def _align(data: bytearray, size: int) -> None:
    data.extend(bytes(-len(data) % size))


def _size(signature: str) -> int:
    return _ALIGNMENT.get(signature[0], 4)


def _put(data: bytearray, signature: str, value: Any) -> None:
    kind = signature[0]
    _align(data, _size(signature))
    if kind in _NUMBERS:
        data += struct.pack(_NUMBERS[kind], value)
    elif kind in "so":
        encoded = value.encode()
        data += struct.pack("<I", len(encoded)) + encoded + b"\0"
    elif kind == "g":
        data += struct.pack("<B", len(value)) + value.encode() + b"\0"
    elif kind == "v":
        _put(data, "g", value.signature)
        _put(data, value.signature, value.value)
    elif kind == "(":
        for part, one in zip(split(signature[1:-1]), value, strict=True):
            _put(data, part, one)
    elif kind == "a":
        place = len(data)
        data += bytes(4)
        # The padding before the first element does not count.
        _align(data, _size(signature[1:]))
        begin = len(data)
        for one in value:
            _put(data, signature[1:], one)
        struct.pack_into("<I", data, place, len(data) - begin)
    else:
        raise ValueError(signature)


def _get(data: bytes, position: int, signature: str) -> tuple[Any, int]:
    kind = signature[0]
    position += -position % _size(signature)
    if kind in _NUMBERS:
        value = struct.unpack_from(_NUMBERS[kind], data, position)[0]
        return (bool(value) if kind == "b" else value), position + struct.calcsize(_NUMBERS[kind])
    if kind in "sog":
        length, begin = (data[position], position + 1) if kind == "g" else (
            struct.unpack_from("<I", data, position)[0], position + 4
        )
        if begin + length >= len(data):
            raise ValueError("too short")
        return data[begin:begin + length].decode(), begin + length + 1
    if kind == "v":
        inner, position = _get(data, position, "g")
        value, position = _get(data, position, inner)
        return Variant(inner, value), position
    if kind == "(":
        values = []
        for part in split(signature[1:-1]):
            value, position = _get(data, position, part)
            values.append(value)
        return tuple(values), position
    if kind == "a":
        end = struct.unpack_from("<I", data, position)[0]
        position += 4
        position += -position % _size(signature[1:])
        end += position
        values = []
        while position < end:
            value, position = _get(data, position, signature[1:])
            values.append(value)
        return values, position
    raise ValueError(signature)
