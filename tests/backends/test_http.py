"""The http and https backends against nginx, fetched whole. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from storaged.qsd.version import curl_loses_requests, parse_version
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.web_server import COOKIE, PASSWORD, USER, Nginx, make_disk
from tests.backends.within import opened_within
from tests.harness import Daemon, eventually, leftovers, mounted, refuses, run, writes

MIB = 1 << 20
WHOLE = {"fetch": "whole"}
QUICK = {**WHOLE, "request-timeout": "2"}
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


def secret(place: Path, text: str) -> str:
    path = place / "secret"
    path.write_text(text + "\n")
    path.chmod(0o600)
    return str(path)


def is_read(daemon: Daemon, source: str, disk: Path, **options: str) -> None:
    """Attach, look at all of it, detach."""
    said = {**WHOLE, **{key.replace("_", "-"): value for key, value in options.items()}}
    run("cmp", daemon.device("a", source, read_only=True, options=said), disk)
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def test_a_file_of_a_web_server(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    with mounted(device, place / "mnt", "-o", "ro,noload") as directory:
        assert (directory / "file").read_bytes() == (place / "content/file").read_bytes()
    run("cmp", device, disk)
    daemon.detach("a")


def test_an_empty_file_is_refused(server: Nginx, daemon: Daemon, disk: Path) -> None:
    os.truncate(disk, 0)
    refuses(daemon, ErrorCode.INVALID_SIZE, f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    assert leftovers(daemon.root) == []


def test_a_name_that_has_to_be_escaped(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    name = "a b%2f?#ä;[x]"
    disk.rename(server.root / name)
    is_read(daemon, f"{server.url}/{quote(name)}", server.root / name)


def test_what_is_written_with_snapshot_stays_here(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    before = disk.read_bytes()
    device = daemon.device("a", f"{server.url}/disk.raw", snapshot=True, options=WHOLE)
    with mounted(device, place / "mnt") as directory:
        (directory / "new").write_bytes(before[:MIB])
    run("e2fsck", "-fn", device)
    daemon.detach("a")
    assert disk.read_bytes() == before


def test_without_it_nothing_can_be_written(server: Nginx, daemon: Daemon) -> None:
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{server.url}/disk.raw", options=WHOLE)
    assert "--snapshot" in error.hint
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)


def test_an_image_of_a_format(server: Nginx, daemon: Daemon, disk: Path) -> None:
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", disk, server.root / "disk.qcow2")
    device = daemon.device("a", f"{server.url}/disk.qcow2", format="qcow2", read_only=True, options=WHOLE)
    run("cmp", device, disk)


def test_it_is_followed_elsewhere_but_to_no_file_of_this_host(
    server: Nginx, daemon: Daemon, place: Path, disk: Path
) -> None:
    is_read(daemon, f"{server.url}/moved/disk.raw", disk)
    refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/away/", read_only=True, options=WHOLE)


def test_a_query_that_is_no_secret(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    source = f"{server.url}/query/disk.raw?a=%2f&b"
    error = refuses(daemon, ErrorCode.INVALID_SOURCE, source, read_only=True, options=WHOLE)
    assert "a=%2f" not in str(error)
    is_read(daemon, source, disk, query="public")


# Secrets


def test_a_password_in_a_file(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    options = {**WHOLE, "user": USER, "password-file": secret(place, PASSWORD)}
    device = daemon.device("a", f"{server.url}/private/disk.raw", read_only=True, options=options)
    run("cmp", device, disk)
    secret_is_nowhere(daemon, PASSWORD)


def test_a_password_in_the_url(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    source = f"{server.url}/private/disk.raw".replace("//", f"//{USER}:{quote(PASSWORD, safe='')}@")
    device = daemon.device("a", source, read_only=True, options=WHOLE)
    assert f"{USER}@" in daemon.cli("show", "a").stdout
    secret_is_nowhere(daemon, PASSWORD)
    secret_is_nowhere(daemon, quote(PASSWORD, safe=""))
    # A successor needs it again.
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD is there")
    device = str(daemon.show("a")["device"])
    run("cmp", device, disk)


def test_a_wrong_password_and_none(server: Nginx, daemon: Daemon, place: Path) -> None:
    source = f"{server.url}/private/disk.raw"
    wrong = {**WHOLE, "user": USER, "password-file": secret(place, "Tr0ub4dor")}
    for options in (wrong, {**WHOLE, "user": USER}, WHOLE):
        error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=options)
        assert "401" in error.cause
        assert PASSWORD not in f"{error}{error.hint}"
        assert "password-file" in error.hint
    assert "Tr0ub4dor" not in daemon.log.read_text()


def test_a_cookie(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    source = f"{server.url}/cookie/disk.raw"
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=WHOLE)
    assert "cookie-file" in error.hint
    is_read(daemon, source, disk, cookie_file=secret(place, COOKIE))


def test_a_cookie_is_given_to_nobody_else(server: Nginx, daemon: Daemon, place: Path) -> None:
    options = {**WHOLE, "cookie-file": secret(place, COOKIE)}
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/moved/disk.raw", read_only=True, options=options)
    assert "redirection" in error.hint


def test_a_proxy(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    """nginx answers for a name that nobody else could resolve."""
    source = "http://disk.invalid/proxied/disk.raw"
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=WHOLE)
    assert "disk.invalid" in error.cause
    options = {**WHOLE, "proxy": server.url}
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=options)
    assert "proxy-password-file" in error.hint
    is_read(
        daemon, source, disk, proxy=server.url, proxy_user=USER, proxy_password_file=secret(place, "open"),
    )


# TLS


def test_a_certificate_that_nobody_knows(server: Nginx, daemon: Daemon, place: Path, disk: Path) -> None:
    source = f"{server.tls_url}/disk.raw"
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=WHOLE)
    assert "certificate" in error.message
    assert "tls-verify=off" in error.hint
    is_read(daemon, source, disk, tls_verify="off")


def test_a_certificate_that_this_host_trusts(server: Nginx, stopped: Daemon, place: Path, disk: Path) -> None:
    """In a mount namespace with another /etc/ssl/certs."""
    trusted = place / "trusted"
    trusted.mkdir()
    (trusted / "ca-certificates.crt").write_text((place / "cert.pem").read_text())
    run("openssl", "rehash", trusted)
    stopped.start(command=["unshare", "-m", "sh", "-c", f'mount --bind {trusted} /etc/ssl/certs && exec "$@"', "sh"])
    device = stopped.device("a", f"{server.tls_url}/disk.raw", read_only=True, options=WHOLE)
    run("cmp", device, disk)
    stopped.detach("a")
    # It is of 127.0.0.1.
    wrong = f"https://localhost:{server.tls_port}/disk.raw"
    error = refuses(stopped, ErrorCode.OPEN_FAILED, wrong, read_only=True, options=WHOLE)
    assert "tls-verify=off" in error.hint


def test_no_tls_on_that_port(server: Nginx, daemon: Daemon) -> None:
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, f"https://127.0.0.1:{server.port}/disk.raw", read_only=True, options=WHOLE
    )
    assert "no TLS" in error.message


# What is refused


def test_what_is_not_there(server: Nginx, daemon: Daemon) -> None:
    refuses(daemon, ErrorCode.SOURCE_MISSING, f"{server.url}/other", read_only=True, options=WHOLE)
    error = refuses(daemon, ErrorCode.OPEN_FAILED, "http://nobody.invalid/x", read_only=True, options=WHOLE)
    assert "nobody.invalid" in error.cause


def test_a_server_that_is_down(server: Nginx, daemon: Daemon) -> None:
    server.kill()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    assert "nobody listens" in error.message


def test_a_silent_server_is_given_up_at_the_deadline(daemon: Daemon) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        source = f"http://127.0.0.1:{silent.getsockname()[1]}/x"
        begin = time.monotonic()
        error = refuses(daemon, ErrorCode.OPEN_FAILED, source, read_only=True, options=QUICK)
        assert 2 <= time.monotonic() - begin < 10
    assert "does not answer" in error.message


def test_a_server_that_cannot_send_parts(server: Nginx, daemon: Daemon, disk: Path) -> None:
    is_read(daemon, f"{server.url}/norange/disk.raw", disk)


def test_a_qsd_that_loses_requests_is_not_asked_for_parts(server: Nginx, daemon: Daemon, disk: Path) -> None:
    """Where it does not, test_http_parts.py asks it."""
    version = parse_version(run("qemu-storage-daemon", "--version").stdout)
    assert version is not None
    if not curl_loses_requests(version):
        run("cmp", daemon.device("a", f"{server.url}/disk.raw", read_only=True), disk)
        return
    error = refuses(daemon, ErrorCode.UNSUPPORTED, f"{server.url}/disk.raw", read_only=True)
    assert "fetch=whole" in error.hint


def test_readers_share_and_spellings_are_one(server: Nginx, daemon: Daemon) -> None:
    first = daemon.attach("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    assert daemon.attach("a", f"{server.url}/%64isk.raw", read_only=True, options=WHOLE) == first
    daemon.attach("b", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    daemon.attach("c", f"{server.url}/disk.raw", snapshot=True, options=WHOLE)


# Accidents


def test_a_server_that_goes_away_and_a_file_that_changes_are_not_noticed(
    server: Nginx, daemon: Daemon, place: Path, disk: Path
) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    disk.rename(place / "before")
    disk.write_bytes(b"x" * MIB)
    server.kill()
    run("cmp", device, place / "before")
    # A successor serves the same copy.
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD is there")
    run("cmp", str(daemon.show("a")["device"]), place / "before")


def test_a_server_that_dies_in_the_middle(server: Nginx, daemon: Daemon, disk: Path) -> None:
    slow = f"{server.url}/slow/disk.raw"
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(refuses, daemon, ErrorCode.OPEN_FAILED, slow, read_only=True, options=WHOLE)
        part = Path(daemon.layout.state_dir) / "copies/a.raw.part"
        eventually(lambda: part.exists() and part.stat().st_size, "something has come")
        server.kill()
        assert "whole" in wait.result(30).message


def test_a_server_that_stops_in_the_middle_and_goes_on(server: Nginx, daemon: Daemon, disk: Path) -> None:
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(
            daemon.device, "a", f"{server.url}/slow/disk.raw", read_only=True,
            options={**WHOLE, "request-timeout": "15"},
        )
        part = Path(daemon.layout.state_dir) / "copies/a.raw.part"
        eventually(lambda: part.exists() and part.stat().st_size, "something has come")
        server.signal(signal.SIGSTOP)
        time.sleep(3)
        assert not wait.done()
        server.signal(signal.SIGCONT)
        run("cmp", wait.result(30), disk)


def test_a_server_that_stops_in_the_middle_is_given_up(server: Nginx, daemon: Daemon, disk: Path) -> None:
    with ThreadPoolExecutor() as pool:
        wait = pool.submit(
            refuses, daemon, ErrorCode.OPEN_FAILED, f"{server.url}/slow/disk.raw", read_only=True, options=QUICK
        )
        part = Path(daemon.layout.state_dir) / "copies/a.raw.part"
        eventually(lambda: part.exists() and part.stat().st_size, "something has come")
        server.signal(signal.SIGSTOP)
        assert "any more" in wait.result(30).message


def test_the_time_that_was_said_is_over(server: Nginx, daemon: Daemon, disk: Path) -> None:
    refuses(daemon, ErrorCode.TIMEOUT, f"{server.url}/slow/disk.raw", read_only=True, options=WHOLE, timeout=2)


def test_a_copy_goes_with_its_volume_even_when_the_daemon_was_killed(
    server: Nginx, daemon: Daemon, disk: Path
) -> None:
    device = daemon.device("a", f"{server.url}/disk.raw", read_only=True, options=WHOLE)
    daemon.kill()
    daemon.start()
    server.kill()
    run("cmp", device, disk)
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def test_a_copy_is_all_that_it_reads(server: Nginx, daemon: Daemon, disk: Path) -> None:
    opened_within(daemon, f"{server.url}/disk.raw", "DAC_READ_SEARCH", read_only=True, options=WHOLE)
