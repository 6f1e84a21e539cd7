"""The gluster backend against a real glusterd and its brick. QSD is outside their network."""

from __future__ import annotations

import errno
import os
import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.gluster_server import VOLUME, GlusterServer
from tests.backends.servers import Load, network
from tests.backends.within import opened_within
from tests.benching import WRITES, bench, report_of, short
from tests.harness import Daemon, eventually, reads, refuses, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def server() -> Iterator[GlusterServer]:
    """One cluster for all tests: QEMU waits for 10 seconds whenever it closes a volume."""
    with (
        tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name,
        network(f"sg{os.getpid()}", "203.0.113") as (address, _),
    ):
        found = GlusterServer(Path(name), f"sg{os.getpid()}", address)
        try:
            found.start()
            yield found
        finally:
            found.end()


@pytest.fixture
def disk(server: GlusterServer) -> Path:
    """The file as it lies in the brick, empty. Gluster gives it an id: it must stay the same file."""
    os.truncate(server.disk, 0)
    os.truncate(server.disk, 32 * MIB)
    return server.disk


def of(server: GlusterServer) -> str:
    return f"gluster://{server.address}/{VOLUME}/{quote(server.disk.name)}"


def by_socket(server: GlusterServer) -> str:
    return f"gluster+unix:///{VOLUME}//{quote(server.disk.name)}?socket={quote(str(server.socket))}"


def nobody_at() -> str:
    """An address where nobody listens."""
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{nobody.getsockname()[1]}"


def test_a_benchmark_reaches_it_by_the_engine_of_fio_too(
    server: GlusterServer, daemon: Daemon, place: Path, disk: Path
) -> None:
    done = bench(daemon, of(server), "--transports", "direct,fuse", *short(place, WRITES), "--destructive")
    assert done.status == 0, done
    assert "direct: fio's engine gfapi_async" in done.stdout
    assert {(run.way, run.job) for run in report_of(place).runs if run.is_good} == {
        (way, job) for way in ("direct", "fuse") for job in ("reads", "writes")
    }


def test_a_file_is_used_and_lies_in_the_brick_which_may_be_stopped_meanwhile(
    server: GlusterServer, daemon: Daemon, place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", of(server)), place, seconds=3)
    refuses(daemon, ErrorCode.SOURCE_IN_USE, by_socket(server), "b")
    time.sleep(1)
    server.signal_brick(signal.SIGSTOP)
    time.sleep(4)
    assert load.runs
    server.signal_brick(signal.SIGCONT)
    load.succeeded()
    # QEMU closes the volume within 10 seconds.
    daemon.detach("a")
    load.is_in(disk)


def test_an_empty_file_is_refused(server: GlusterServer, daemon: Daemon, disk: Path) -> None:
    os.truncate(disk, 0)
    refuses(daemon, ErrorCode.INVALID_SIZE, of(server))


def test_the_brick_is_killed_and_the_volume_comes_back_with_it(
    server: GlusterServer, daemon: Daemon, disk: Path
) -> None:
    device = daemon.device("a", by_socket(server))
    writes(device, 0, PATTERN)
    former = daemon.qsd("a")
    server.kill_brick()
    try:
        # A flush that cannot be done is an error, and after that QEMU opens the volume no more.
        with pytest.raises(OSError) as caught:  # noqa: PT011
            writes(device, MIB, PATTERN)
    finally:
        server.start_brick()
    # EINVAL: the daemon was first, and the device has no size any more.
    assert caught.value.errno in (errno.EIO, errno.EINVAL), caught.value
    eventually(lambda: daemon.replaced("a", former), "a successor serves it", 60)
    device = str(daemon.show("a")["device"])
    assert reads(device, 0, len(PATTERN)) == PATTERN
    writes(device, 2 * MIB, PATTERN)
    assert disk.read_bytes()[2 * MIB:2 * MIB + len(PATTERN)] == PATTERN


def test_while_only_reads_come_libgfapi_finds_the_brick_again(
    server: GlusterServer, daemon: Daemon, disk: Path
) -> None:
    writes(str(disk), 0, PATTERN)
    # The first of the servers need not be there.
    away = of(server).replace(server.address, nobody_at())
    device = daemon.device("a", away, options={"servers": server.address}, read_only=True)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)
    former = daemon.qsd("a")
    server.kill_brick()
    try:
        assert not readable(device)
    finally:
        server.start_brick()
    eventually(lambda: readable(device), "it can be read again", 40)
    assert daemon.qsd("a") == former


def readable(device: str) -> bool:
    try:
        reads(device, 8 * MIB, 4096)
    except OSError:
        return False
    return True


def test_while_the_brick_is_stopped_an_attach_is_given_up_and_a_detach_by_force_ends(
    server: GlusterServer, daemon: Daemon, place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", of(server)), place, seconds=4)
    time.sleep(1)
    server.signal_brick(signal.SIGSTOP)
    try:
        time.sleep(1)
        daemon.detach("a", force=True, timeout=30)
        assert daemon.names() == []
        begin = time.monotonic()
        error = refuses(daemon, ErrorCode.TIMEOUT, of(server), timeout=3)
        assert time.monotonic() - begin < 20
        assert error.hint
    finally:
        server.signal_brick(signal.SIGCONT)
        load.kill()


def test_what_is_not_there(server: GlusterServer, daemon: Daemon, disk: Path) -> None:
    refuses(daemon, ErrorCode.OPEN_FAILED, of(server).replace(server.address, nobody_at()))
    refuses(daemon, ErrorCode.OPEN_FAILED, f"gluster://nobody.invalid/{VOLUME}/x")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"gluster://{server.address}/nothing/x")
    assert "nothing" in error.cause
    refuses(daemon, ErrorCode.SOURCE_MISSING, f"gluster://{server.address}/{VOLUME}/nothing")
    refuses(daemon, ErrorCode.UNSUPPORTED, f"gluster+rdma://{server.address}/{VOLUME}/x")
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, of(server), options={"servers": "a b"})


def test_a_volume_that_was_stopped_is_told(server: GlusterServer, daemon: Daemon, disk: Path) -> None:
    server.stop_volume()
    try:
        error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server))
        assert "started" in error.hint
    finally:
        server.start_brick()


def test_all_but_its_user_is_taken_from_it(server: GlusterServer, daemon: Daemon, disk: Path) -> None:
    opened_within(daemon, of(server), "NET_BIND_SERVICE", root=True, all_files=True)
    opened_within(daemon, by_socket(server), "NET_BIND_SERVICE", root=True, all_files=True)
