"""The tftp backend against tftpd-hpa, and against servers that lie. The file is fetched, the copy is served."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from storaged.host.download import Request, fetch
from tests.backends.web_server import TftpServer, make_disk
from tests.harness import Daemon, error_of, eventually, leftovers, mounted, refuses, run

MIB = 1 << 20
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def server(place: Path) -> Iterator[TftpServer]:
    found = TftpServer(place)
    make_disk(found.root, place)
    found.start()
    yield found
    found.kill()


@contextmanager
def a_liar(data: bytes, *, size: int | None, blocks: int) -> Iterator[str]:
    """A server that says ``size`` (or nothing), and sends ``blocks`` blocks of 512 bytes of ``data``; yields its URL.

    A block that is not full is the last one, to TFTP.
    """
    with socket.socket(type=socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        server.settimeout(0.2)
        end = threading.Event()

        def serve() -> None:
            while not end.is_set():
                try:
                    packet, client = server.recvfrom(2048)
                except TimeoutError:
                    continue
                number = struct.unpack("!H", packet[2:4])[0] if packet[:2] == b"\0\4" else -1
                if number < 0 and size is not None:
                    server.sendto(b"\0\6tsize\0" + str(size).encode() + b"\0", client)
                elif max(number, 0) < blocks:
                    number = max(number, 0)
                    server.sendto(
                        struct.pack("!HH", 3, number + 1) + data[number * 512:(number + 1) * 512], client
                    )

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"tftp://127.0.0.1:{server.getsockname()[1]}/disk"
        finally:
            end.set()
            thread.join()


def test_a_file_of_a_tftp_server(server: TftpServer, daemon: Daemon, place: Path) -> None:
    disk = server.root / "disk ä.raw"
    (server.root / "disk.raw").rename(disk)
    device = daemon.device("a", f"{server.url}/{quote(disk.name)}", read_only=True)
    run("cmp", device, disk)
    with mounted(device, place / "mnt", "-o", "ro,noload") as directory:
        assert (directory / "file").read_bytes() == (place / "content/file").read_bytes()
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def test_an_empty_file_is_refused(server: TftpServer, daemon: Daemon) -> None:
    """By curl, which fails where the first block is the last."""
    os.truncate(server.root / "disk.raw", 0)
    refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True)


def test_what_is_written_with_snapshot_stays_here(server: TftpServer, daemon: Daemon, place: Path) -> None:
    disk = server.root / "disk.raw"
    before = disk.read_bytes()
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{server.url}/disk.raw")
    device = daemon.device("a", f"{server.url}/disk.raw", snapshot=True)
    with mounted(device, place / "mnt") as directory:
        (directory / "new").write_bytes(before[:MIB])
    copy = Path(daemon.layout.state_dir) / "copies/a.raw"
    assert copy.read_bytes() == before
    daemon.detach("a")
    assert disk.read_bytes() == before


def test_an_image_of_a_format(server: TftpServer, daemon: Daemon) -> None:
    disk = server.root / "disk.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, server.root / "disk.qcow2")
    os.chmod(server.root / "disk.qcow2", 0o644)
    run("cmp", daemon.device("a", f"{server.url}/disk.qcow2", format="qcow2", read_only=True), disk)


def test_the_server_goes_away_and_nobody_notices(server: TftpServer, daemon: Daemon) -> None:
    disk = server.root / "disk.raw"
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True)
    server.kill()
    run("cmp", device, disk)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD is there")
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    run("cmp", str(daemon.show("a")["device"]), disk)


def test_a_copy_that_is_lost_is_not_fetched_again_below_a_volume(server: TftpServer, daemon: Daemon) -> None:
    """The server may have another file by now."""
    daemon.attach("a", f"{server.url}/disk.raw", snapshot=True)
    for file in Path(f"{daemon.layout.state_dir}/copies").iterdir():
        file.unlink()
    assert error_of(lambda: daemon.call("Upgrade", name="a")).code is ErrorCode.SOURCE_CHANGED
    daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["state"] == "failed", "it is refused")
    assert daemon.show("a")["failure"]["code"] == ErrorCode.SOURCE_CHANGED
    daemon.detach("a", force=True)


def test_more_blocks_than_can_be_counted(daemon: Daemon, place: Path) -> None:
    """65536 blocks of 1428 bytes are 90 MiB; then the number begins anew."""
    server = TftpServer(place)
    disk = server.root / "disk.raw"
    with open(disk, "wb") as file:
        for _ in range(92):
            file.write(os.urandom(MIB))
    server.start()
    try:
        run("cmp", daemon.device("a", f"{server.url}/disk.raw", read_only=True), disk)
    finally:
        server.kill()


def test_a_server_that_does_not_tell_the_size(daemon: Daemon, place: Path) -> None:
    """It knows no options at all (RFC 1350)."""
    data = os.urandom(64 * 1024)
    with a_liar(data, size=None, blocks=129) as source:
        error = refuses(daemon, ErrorCode.UNSUPPORTED, source, read_only=True)
        assert "size=" in error.hint
        refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options={"size": "128K"})
        device = daemon.device("a", source, read_only=True, options={"size": "64K"})
        assert Path(device).read_bytes() == data


@pytest.mark.parametrize("blocks", [0, 1, 128, 129])
def test_what_ends_too_early_is_found_out(daemon: Daemon, blocks: int) -> None:
    """The last block is empty: to TFTP, that is a good end."""
    with a_liar(os.urandom(max(blocks - 1, 0) * 512), size=1024 * 1024, blocks=blocks) as source:
        refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options={"request-timeout": "2"})


def test_what_does_not_end_is_found_out(daemon: Daemon) -> None:
    with a_liar(os.urandom(64 * 1024), size=4096, blocks=128) as source:
        error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True)
        assert "whole" in error.message


def test_a_size_that_is_another(server: TftpServer, daemon: Daemon) -> None:
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options={"size": "1G"}
    )
    assert "1073741824" in error.cause


def test_what_is_not_there(server: TftpServer, daemon: Daemon) -> None:
    refuses(daemon, ErrorCode.SOURCE_MISSING, f"{server.url}/other", read_only=True)
    os.chmod(server.root / "disk.raw", 0o600)
    refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True)
    refuses(daemon, ErrorCode.OPEN_FAILED, "tftp://nobody.invalid/x", read_only=True)


def test_a_server_that_is_down_is_given_up_at_the_deadline(server: TftpServer, daemon: Daemon) -> None:
    server.kill()
    begin = time.monotonic()
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options={"request-timeout": "2"}
    )
    assert 2 <= time.monotonic() - begin < 8
    assert "does not answer" in error.message


# fetch() by itself


def progress_of(url: str, path: Path, stop: threading.Event | None = None) -> list[tuple[int, int | None]]:
    seen: list[tuple[int, int | None]] = []
    fetch(
        Request(url), str(path), deadline=time.monotonic() + 30, stop=stop or threading.Event(),
        progress=lambda done, total: seen.append((done, total)),
    )
    return seen


def test_a_copy_that_is_there_is_taken_and_another_is_not(server: TftpServer, place: Path) -> None:
    url, path = f"{server.url}/disk.raw", place / "copies/a.raw"
    size = (server.root / "disk.raw").stat().st_size
    assert progress_of(url, path)[-1] == (size, size)
    server.kill()
    assert progress_of(url, path) == []
    assert error_of(lambda: progress_of(f"{url}2", path)).code is ErrorCode.SOURCE_CHANGED
    os.truncate(path, 512)
    assert error_of(lambda: progress_of(url, path)).code is ErrorCode.SOURCE_CHANGED
    (place / "copies/a.raw.json").unlink()
    error = error_of(lambda: progress_of(url, path))
    assert error.code is ErrorCode.SOURCE_CHANGED
    assert error.hint
    assert path.stat().st_size == 512


def test_it_can_be_stopped_and_leaves_nothing(place: Path) -> None:
    stop = threading.Event()
    with a_liar(b"", size=MIB, blocks=0) as url, ThreadPoolExecutor() as pool:
        wait = pool.submit(error_of, lambda: progress_of(url, place / "copies/a.raw", stop))
        eventually(lambda: (place / "copies/a.raw.part").exists(), "it has begun")
        stop.set()
        assert wait.result(5).code is ErrorCode.TIMEOUT
    assert list((place / "copies").iterdir()) == []


def test_a_full_disk_is_said_and_nothing_stays(server: TftpServer, place: Path) -> None:
    small = place / "small"
    small.mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=1M", "none", small)
    try:
        error = error_of(lambda: progress_of(f"{server.url}/disk.raw", small / "a.raw"))
        assert error.code is ErrorCode.NO_SPACE
        assert list(small.iterdir()) == []
    finally:
        run("umount", small)
