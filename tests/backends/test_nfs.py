"""The nfs backend against nfs-ganesha, behind a cable. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.accidents import Backed, ServerAccidents
from tests.backends.nfs_server import NfsServer
from tests.backends.servers import Load, network
from tests.backends.within import opened_within
from tests.harness import Daemon, as_json, error_of, image, mounted, reads, refuses, run, size_of, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(100)


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[str, str]]:
    """A network of its own: the server's address, and the cable."""
    with network(f"sd{os.getpid()}") as found:
        yield found


@pytest.fixture
def disk(place: Path) -> Path:
    (place / "exported").mkdir()
    return image(place / "exported" / "disk 1ä.raw", "raw")


@pytest.fixture
def server(wire: tuple[str, str], place: Path, disk: Path) -> Iterator[NfsServer]:
    """A server that exports the directory of the disk to everybody."""
    found = NfsServer(place, disk.parent, netns=f"sd{os.getpid()}")
    try:
        found.start()
        yield found
    finally:
        found.end()


@pytest.fixture
def source(wire: tuple[str, str], disk: Path) -> str:
    return f"nfs://{wire[0]}{quote(str(disk))}"


def test_a_filesystem_in_a_file(server: NfsServer, daemon: Daemon, source: str, place: Path, disk: Path) -> None:
    device = daemon.device("a", source)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    copy = place / "copy.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", source, copy)
    for path in (disk, copy):
        run("debugfs", "-R", f"dump /file {place}/file", path)
        assert (place / "file").read_bytes() == PATTERN


def test_read_only_is_read_only(server: NfsServer, daemon: Daemon, source: str, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    device = daemon.device("a", source, read_only=True)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)


def test_what_libnfs_keeps_and_reads_ahead_is_what_was_written(
    server: NfsServer, daemon: Daemon, source: str, place: Path, disk: Path
) -> None:
    device = daemon.device("a", f"{source}?readahead=65536", options={"page-cache-size": "64", "debug": "1"})
    load = Load(device, place, seconds=1)
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_the_server_sees_the_user_that_was_said(
    server: NfsServer, daemon: Daemon, source: str, place: Path, disk: Path
) -> None:
    os.chown(disk, 4711, 4712)
    disk.chmod(0o600)
    writes(daemon.device("a", source, options={"uid": "4711", "gid": "4712"}), 0, PATTERN)
    daemon.detach("a")
    assert disk.read_bytes()[:len(PATTERN)] == PATTERN
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options={"uid": "1000"})
    assert "uid" in error.hint


# What is refused


def test_a_path_that_is_not_there_or_not_exported(
    server: NfsServer, daemon: Daemon, source: str, wire: tuple[str, str]
) -> None:
    refuses(daemon, ErrorCode.SOURCE_MISSING, f"{source}x")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"nfs://{wire[0]}/etc/passwd")
    assert "export" in error.hint


def test_a_link_out_of_what_is_exported_is_not_followed(
    server: NfsServer, daemon: Daemon, source: str, disk: Path
) -> None:
    (disk.parent / "link").symlink_to("/etc/passwd")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source.rpartition("/")[0] + "/link")
    assert "outside" in error.cause


def test_a_server_that_is_down(server: NfsServer, daemon: Daemon, source: str) -> None:
    server.kill()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source)
    assert "rpcinfo" in error.hint
    server.end()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source)
    assert "port mapper" in error.hint
    error = refuses(daemon, ErrorCode.OPEN_FAILED, "nfs://nobody.invalid/x")
    assert "nobody.invalid" in error.cause


def test_an_address_that_swallows_everything_is_given_up(daemon: Daemon, wire: tuple[str, str]) -> None:
    run("ip", "neigh", "replace", wire[0], "lladdr", "02:00:00:00:00:01", "dev", wire[1])
    try:
        begin = time.monotonic()
        refuses(daemon, ErrorCode.OPEN_FAILED, f"nfs://{wire[0]}/x", options={"tcp-syn-count": "1"})
        assert 2 <= time.monotonic() - begin < 10
    finally:
        run("ip", "neigh", "del", wire[0], "dev", wire[1])


def test_an_export_that_is_read_only_is_attached_read_only_or_not(
    server: NfsServer, daemon: Daemon, source: str
) -> None:
    server.kill()
    server.start(access="RO")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source)
    assert "--read-only" in error.hint
    daemon.attach("a", source, read_only=True)


def test_root_is_nobody_where_the_server_says_so(
    server: NfsServer, daemon: Daemon, source: str, disk: Path
) -> None:
    disk.chmod(0o600)
    server.kill()
    server.start(squash="Root_Squash")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source)
    assert "no_root_squash" in error.hint


def test_an_empty_file_is_refused(server: NfsServer, daemon: Daemon, source: str, disk: Path) -> None:
    os.truncate(disk, 0)
    refuses(daemon, ErrorCode.INVALID_SIZE, source)


def test_a_file_that_has_grown_is_served_at_its_old_size_until_a_resize(
    server: NfsServer, daemon: Daemon, source: str, disk: Path
) -> None:
    daemon.attach("a", source)
    size = disk.stat().st_size
    os.truncate(disk, 2 * size)
    device = daemon.replace_qsd("a")
    assert size_of(device) == size
    daemon.cli("resize", "a")
    assert size_of(device) == 2 * size
    os.truncate(disk, 3 * size)
    assert error_of(lambda: daemon.call("Resize", name="a", size=2 * size + MIB)).code is ErrorCode.INVALID_SIZE
    assert disk.stat().st_size == 3 * size
    daemon.cli("resize", "a")
    assert size_of(device) == 3 * size


def test_nothing_is_kept_without_a_cache(server: NfsServer, daemon: Daemon, source: str) -> None:
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{source}?readahead=4096", options={"cache": "none"})
    daemon.attach("a", source, options={"cache": "none"})


def test_nobody_writes_twice(
    server: NfsServer, daemon: Daemon, source: str, wire: tuple[str, str], disk: Path
) -> None:
    first = daemon.attach("a", source)
    other = source.replace(str(disk.parent), f"/{disk.parent}//")
    assert other != source
    assert daemon.attach("a", other) == first
    refuses(daemon, ErrorCode.SOURCE_IN_USE, f"{other}?uid=0", "b")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b", read_only=True)


def test_readers_share(server: NfsServer, daemon: Daemon, source: str) -> None:
    daemon.attach("a", source, read_only=True)
    daemon.attach("b", source, read_only=True)


# Accidents


@pytest.fixture
def backed(server: NfsServer, source: str) -> Backed:
    """For the accidents that befall all servers."""
    return Backed(server, source)


class TestAccidents(ServerAccidents):
    """Those that befall all servers."""


def test_the_network_is_cut_for_eight_seconds(
    server: NfsServer, daemon: Daemon, source: str, wire: tuple[str, str], place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", source), place, seconds=3)
    time.sleep(1)
    run("ip", "link", "set", wire[1], "down")
    time.sleep(8)
    assert load.runs
    run("ip", "link", "set", wire[1], "up")
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_what_qemu_args_prints_opens_it(server: NfsServer, daemon: Daemon, source: str, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    daemon.attach("a", source)
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    daemon.detach("a")
    drive = found["drive"][found["drive"].index("-drive") + 1]
    options = drive.removeprefix("if=none,id=sd-a,")
    assert options != drive
    run("qemu-img", "compare", "--image-opts", options, f"driver=raw,file.filename={disk}")


def test_it_needs_no_root_and_is_root_to_the_server(server: NfsServer, daemon: Daemon, source: str, disk: Path) -> None:
    disk.chmod(0o600)
    opened_within(daemon, source, "NET_BIND_SERVICE")
