"""The rescue server's disk fails every request at once, in a real qemu-storage-daemon."""

from __future__ import annotations

import errno
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.model.blockdev import DISK, failing_node
from tests.harness import eventually
from tests.host.test_nbd_handshake import SIMPLE_REPLY, SIZE, answer, ask, handshake

READ, WRITE, FLUSH, TRIM, WRITE_ZEROES = 0, 1, 3, 4, 6


@pytest.fixture
def server(place: Path) -> Iterator[Path]:
    path = place / "nbd.sock"
    qsd = subprocess.Popen([
        "qemu-storage-daemon", "--blockdev", json.dumps(failing_node(SIZE)),
        "--nbd-server", f"addr.type=unix,addr.path={path}",
        "--export", f"type=nbd,id=e,node-name={DISK},name=failing,writable=on",
    ])
    try:
        eventually(path.exists, "QSD listens")
        yield path
    finally:
        qsd.kill()
        qsd.wait()


def test_every_request_fails_and_goes_on_failing(server: Path) -> None:
    sock, told = handshake(server, "failing")
    with sock:
        sock.settimeout(20)
        assert told.size == SIZE
        for round in range(2):
            for number, command in enumerate((READ, WRITE, FLUSH, TRIM, WRITE_ZEROES)):
                length = 0 if command == FLUSH else 4096
                data = b"w" * 4096 if command == WRITE else b""
                ask(sock, command, 0, length, data, handle=10 * round + number)
                assert answer(sock) == (SIMPLE_REPLY, errno.EIO, 10 * round + number), f"command {command}"
