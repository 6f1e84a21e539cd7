"""The http backend against nginx, what is read fetched as it is read: only where QSD can (conftest.py)."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.backends.web_server import Nginx, make_disk
from tests.harness import Daemon, eventually, reads, refuses, run, size_of

MIB = 1 << 20
#: Nothing of one request is there for the next, and a request that is not answered fails soon.
QUICK = {"request-timeout": "2", "read-ahead": "0"}
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def server(place: Path) -> Iterator[Nginx]:
    found = Nginx(place)
    make_disk(found.root, place)
    found.start()
    yield found
    found.kill()


@pytest.fixture
def disk(server: Nginx) -> Path:
    return server.root / "disk.raw"


@pytest.mark.parametrize("read_ahead", ["0", "512", "256K", "64M"])
def test_every_read_ahead_reads_the_same(server: Nginx, daemon: Daemon, disk: Path, read_ahead: str) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options={"read-ahead": read_ahead})
    run("cmp", device, disk)


def test_a_server_that_cannot_send_parts(server: Nginx, daemon: Daemon) -> None:
    error = refuses(daemon, ErrorCode.UNSUPPORTED, f"{server.url}/norange/disk.raw", read_only=True)
    assert "range" in error.cause


# Accidents


def fails(device: str, offset: int) -> bool:
    try:
        reads(device, offset, 4096)
    except OSError:
        return True
    return False


def test_a_server_that_was_killed_is_an_error_until_it_is_back(
    server: Nginx, daemon: Daemon, disk: Path
) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=QUICK)
    pid = daemon.qsd("a")
    reads(device, 0, 4096)
    server.kill()
    begin = time.monotonic()
    assert fails(device, 3 * MIB)
    assert time.monotonic() - begin < 2
    server.start()
    eventually(lambda: not fails(device, 3 * MIB), "the device works again")
    # Not all of it, with the kernel's read-ahead: that QEMU 10.0.13 hangs then is in docs/backends/http.md.
    assert daemon.qsd("a") == pid


def test_a_stopped_server_is_waited_for_as_long_as_said(server: Nginx, daemon: Daemon, disk: Path) -> None:
    device = daemon.device(
        "a", f"{server.url}/disk.raw", read_only=True, options={**QUICK, "request-timeout": "15"}
    )
    server.signal(signal.SIGSTOP)
    reader = os.fork()
    if not reader:
        # Another process: the read cannot be interrupted.
        os._exit(int(fails(device, 3 * MIB)))
    time.sleep(3)
    assert os.waitpid(reader, os.WNOHANG) == (0, 0)
    server.signal(signal.SIGCONT)
    assert os.waitpid(reader, 0)[1] == 0
    run("cmp", device, disk)


def test_a_stopped_server_is_an_error_at_the_deadline(server: Nginx, daemon: Daemon, disk: Path) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=QUICK)
    server.signal(signal.SIGSTOP)
    begin = time.monotonic()
    assert fails(device, 3 * MIB)
    assert time.monotonic() - begin >= 2
    server.signal(signal.SIGCONT)
    eventually(lambda: not fails(device, 3 * MIB), "the device works again")
    run("cmp", device, disk)


def test_a_file_that_grew_keeps_its_size(server: Nginx, daemon: Daemon, disk: Path) -> None:
    size = disk.stat().st_size
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True)
    with open(disk, "ab") as file:
        file.write(os.urandom(MIB))
    run("cmp", "-n", size, device, disk)
    assert size_of(device) == size


def test_a_file_that_shrank_ends_qsd_and_not_the_daemon(server: Nginx, daemon: Daemon, disk: Path) -> None:
    """Reads past its end fail; one across it aborts QSD (an assertion in block/curl.c)."""
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=QUICK)
    pid = daemon.qsd("a")
    os.truncate(disk, 4 * MIB + 512)
    assert fails(device, 6 * MIB)
    assert daemon.qsd("a") == pid
    assert fails(device, 4 * MIB)
    eventually(lambda: daemon.show("a")["qsd_pid"] != pid, "QSD has ended")


def test_a_detach_by_force_ends_while_the_server_is_away(server: Nginx, daemon: Daemon) -> None:
    device = daemon.device(
        "a", f"{server.url}/disk.raw", read_only=True, options={**QUICK, "request-timeout": "60"}
    )
    server.signal(signal.SIGSTOP)
    reader = os.fork()
    if not reader:
        os._exit(int(fails(device, 3 * MIB)))
    time.sleep(1)
    daemon.detach("a", force=True, timeout=30)
    assert daemon.names() == []
    assert os.waitpid(reader, 0)[1] != 0


def test_qsd_dies_while_the_server_is_away_and_the_volume_comes_back_with_it(
    server: Nginx, daemon: Daemon, disk: Path
) -> None:
    daemon.attach("a", f"{server.url}/disk.raw", read_only=True, options=QUICK)
    server.kill()
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["failure"] is not None, "the volume says that it failed")
    server.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    run("cmp", str(daemon.show("a")["device"]), disk)
