"""The NBD handshake with a real qemu-storage-daemon, and what the kernel finds on the socket afterwards."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host.nbd import Negotiated
from storaged.host.nbdhandshake import negotiate
from storaged.host.unixsock import connect_unix
from tests.harness import error_of, eventually

SIZE = 8 << 20
#: NBD_FLAG_ and NBD_CMD_ of the protocol (doc/proto.md of the NBD project).
HAS_FLAGS, READ_ONLY, FLUSH, FUA, ROTATIONAL, TRIM, ZEROES, MULTI_CONN = 1, 2, 4, 8, 16, 32, 64, 256
CMD_READ, CMD_WRITE, CMD_DISC = 0, 1, 2
#: What the kernel's client would ask for a multiple connections' and other features' sake, and must not be told.
UNKNOWN_TO_THE_KERNEL = ~(HAS_FLAGS | READ_ONLY | FLUSH | FUA | ROTATIONAL | TRIM | ZEROES | MULTI_CONN)


@pytest.fixture
def server(place: Path) -> Iterator[Path]:
    """A socket on which QSD serves the exports ``rw`` and ``ro``."""
    disk, path = place / "disk.raw", place / "nbd.sock"
    with open(disk, "wb") as file:
        file.truncate(SIZE)
        file.write(b"first block".ljust(512, b"."))
    qsd = subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk},discard=unmap",
        "--nbd-server", f"addr.type=unix,addr.path={path},max-connections=0",
        "--export", "type=nbd,id=rw,node-name=d,name=rw,writable=on",
        "--export", "type=nbd,id=ro,node-name=d,name=ro",
    ])
    try:
        eventually(path.exists, "QSD listens")
        yield path
    finally:
        qsd.kill()
        qsd.wait()


def handshake(path: Path, export: str) -> tuple[socket.socket, Negotiated]:
    sock = connect_unix(str(path))
    try:
        return sock, negotiate(sock, export)
    except BaseException:
        sock.close()
        raise


def ask(sock: socket.socket, command: int, offset: int, length: int, data: bytes = b"", *, handle: int = 1) -> None:
    """Send a request as the kernel does: magic, flags, type, handle, offset, length."""
    sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, handle, offset, length) + data)


def receive(sock: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        part = sock.recv(length - len(data))
        assert part, "the server closed the connection"
        data += part
    return data


def answer(sock: socket.socket) -> tuple[int, int, int]:
    """A simple reply: magic, error, handle."""
    magic, error, handle = struct.unpack(">IIQ", receive(sock, 16))
    return magic, error, handle


SIMPLE_REPLY = 0x67446698


def test_size_and_flags_are_those_of_the_export_but_for_fua_which_qemu_does_not_keep(server: Path) -> None:
    sock, told = handshake(server, "rw")
    with sock:
        assert told.size == SIZE
        assert told.flags & (HAS_FLAGS | READ_ONLY | FLUSH | FUA | TRIM | ZEROES) == HAS_FLAGS | FLUSH | TRIM | ZEROES
        assert told.flags & UNKNOWN_TO_THE_KERNEL == 0


def test_an_export_that_is_not_writable_is_read_only_and_can_be_flushed(server: Path) -> None:
    sock, told = handshake(server, "ro")
    with sock:
        assert told.size == SIZE
        assert told.flags & (HAS_FLAGS | READ_ONLY | FLUSH) == HAS_FLAGS | READ_ONLY | FLUSH
        assert not told.flags & TRIM


def test_the_socket_is_then_in_the_transmission_phase_and_ours_alone(server: Path) -> None:
    sock, _ = handshake(server, "rw")
    with sock:
        # The descriptor that libnbd had is closed, and has left no flag behind that the kernel cannot do with.
        assert os.get_blocking(sock.fileno())
        ask(sock, CMD_READ, 0, 512, handle=0x0123456789ABCDEF)
        assert answer(sock) == (SIMPLE_REPLY, 0, 0x0123456789ABCDEF)
        assert receive(sock, 512) == b"first block".ljust(512, b".")


def test_replies_are_simple_for_what_is_written_and_for_errors_too(server: Path) -> None:
    sock, _ = handshake(server, "rw")
    with sock:
        ask(sock, CMD_WRITE, 4096, 512, b"w" * 512, handle=2)
        assert answer(sock) == (SIMPLE_REPLY, 0, 2)
        ask(sock, CMD_READ, 4096, 512, handle=3)
        assert answer(sock) == (SIMPLE_REPLY, 0, 3)
        assert receive(sock, 512) == b"w" * 512
        ask(sock, CMD_READ, SIZE, 512, handle=4)
        magic, error, handle = answer(sock)
        assert (magic, handle) == (SIMPLE_REPLY, 4)
        assert error != 0


def test_several_connections_to_one_export_are_possible(server: Path) -> None:
    first, told = handshake(server, "rw")
    second, same = handshake(server, "rw")
    with first, second:
        assert told == same
        for sock in (first, second):
            ask(sock, CMD_READ, 0, 512)
            assert answer(sock) == (SIMPLE_REPLY, 0, 1)


def test_a_wrong_name_is_a_failure_with_the_servers_words(server: Path) -> None:
    before = os.listdir("/proc/self/fd")
    error = error_of(lambda: handshake(server, "other"))
    assert error.code is ErrorCode.DEVICE_FAILED
    assert "other" in error.cause
    assert os.listdir("/proc/self/fd") == before


def test_a_server_that_goes_in_the_middle_is_a_failure(place: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        assert error_of(lambda: negotiate(ours, "rw")).code is ErrorCode.DEVICE_FAILED


def test_a_server_that_does_not_answer_is_waited_for_no_longer_than_asked(place: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        error = error_of(lambda: negotiate(ours, "rw", 0.2))
        assert error.code is ErrorCode.QSD_SILENT
        assert error.hint
