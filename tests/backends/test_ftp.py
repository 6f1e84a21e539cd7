"""The ftp and ftps backends against pyftpdlib, fetched whole."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.web_server import PASSWORD, USER, FtpServer, make_disk
from tests.harness import Daemon, eventually, leftovers, mounted, refuses, run

WHOLE = {"fetch": "whole"}
pytestmark = pytest.mark.timeout(100)


def started(place: Path, mode: str) -> FtpServer:
    found = FtpServer(place, mode)
    make_disk(found.root, place)
    found.start()
    return found


@pytest.fixture
def server(place: Path) -> Iterator[FtpServer]:
    found = started(place, "plain")
    yield found
    found.kill()


@pytest.fixture
def explicit(place: Path) -> Iterator[FtpServer]:
    """TLS where the client asks for it, which it has to."""
    found = started(place, "explicit")
    yield found
    found.kill()


@pytest.fixture
def implicit(place: Path) -> Iterator[FtpServer]:
    """TLS from the first byte on."""
    found = started(place, "implicit")
    yield found
    found.kill()


def is_read(daemon: Daemon, source: str, disk: Path, **options: str) -> None:
    """Attach, look at all of it, detach."""
    run("cmp", daemon.device("a", source, read_only=True, options={**WHOLE, **options}), disk)
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def test_an_empty_file_is_refused(server: FtpServer, daemon: Daemon) -> None:
    """The server's size of 0 does not come through libcurl, and nobody knows then whether that was all."""
    os.truncate(server.root / "disk.raw", 0)
    refuses(daemon, ErrorCode.UNSUPPORTED, f"{server.url}/disk.raw", read_only=True, options=WHOLE)


def test_a_file_of_an_ftp_server(server: FtpServer, daemon: Daemon, place: Path) -> None:
    disk = server.root / "a b;type=a?#[x]"
    (server.root / "disk.raw").rename(disk)
    source = f"{server.url}/{quote(disk.name)}"
    is_read(daemon, source, disk)
    device = daemon.device("a", source, snapshot=True, options=WHOLE)
    before = disk.read_bytes()
    with mounted(device, place / "mnt") as directory:
        (directory / "new").write_bytes(before[:4096])
    daemon.detach("a")
    assert disk.read_bytes() == before


def test_a_password(server: FtpServer, daemon: Daemon, place: Path) -> None:
    secret = place / "secret"
    secret.write_text(PASSWORD)
    options = {**WHOLE, "user": USER, "password-file": str(secret)}
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=options)
    run("cmp", device, server.root / "disk.raw")
    assert f"{USER}@" not in daemon.cli("show", "a").stdout
    secret.chmod(0o600)
    secret_is_nowhere(daemon, PASSWORD)
    daemon.detach("a")
    secret.write_text("Tr0ub4dor")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options=options)
    assert "password-file" in error.hint
    assert "Tr0ub4dor" not in f"{error}{daemon.log.read_text()}"


def test_tls_from_the_first_byte_on(implicit: FtpServer, daemon: Daemon) -> None:
    source = f"{implicit.url}/disk.raw"
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=WHOLE)
    assert "certificate" in error.message
    is_read(daemon, source, implicit.root / "disk.raw", **{"tls-verify": "off"})


def test_tls_on_request_is_refused_by_both(explicit: FtpServer, daemon: Daemon) -> None:
    source = f"{explicit.url}/disk.raw"
    refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=WHOLE)
    refuses(daemon, ErrorCode.OPEN_FAILED, source.replace("ftp:", "ftps:"), read_only=True, options=WHOLE)


def test_what_is_not_there(server: FtpServer, daemon: Daemon) -> None:
    refuses(daemon, ErrorCode.SOURCE_MISSING, f"{server.url}/other", read_only=True, options=WHOLE)
    server.kill()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    assert "nobody listens" in error.message


def test_a_server_that_stops_is_given_up(server: FtpServer, daemon: Daemon) -> None:
    with ThreadPoolExecutor() as pool:
        server.signal(signal.SIGSTOP)
        options = {**WHOLE, "request-timeout": "2"}
        wait = pool.submit(
            refuses, daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options=options
        )
        assert "does not answer" in wait.result(30).message
    server.signal(signal.SIGCONT)
    is_read(daemon, f"{server.url}/disk.raw", server.root / "disk.raw")


def test_a_qsd_dies_and_its_successor_serves_the_copy(server: FtpServer, daemon: Daemon) -> None:
    daemon.attach("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    server.kill()
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD is there")
    run("cmp", str(daemon.show("a")["device"]), server.root / "disk.raw")
