"""NBD with TLS, against qemu-nbd and nbdkit: certificates, pre-shared keys, and all that can be wrong with them.

Under load the server is at a socket: over TCP, qemu-nbd 7.2 waits 40 ms with an answer now and then (Nagle).
"""

from __future__ import annotations

import signal
import socket
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.servers import EXPORT, Load, NbdServer
from tests.backends.tls import Authority, key_file, with_certificates, with_keys
from tests.backends.within import opened_within
from tests.harness import Daemon, eventually, image, reads, refuses, run, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
HOST = "127.0.0.1"
USER = "alice"
#: The attach fails only after it.
SOON = {"open-timeout": "1"}
pytestmark = pytest.mark.timeout(100)


@dataclass(frozen=True)
class Pki:
    """Who trusts whom: directories, each with the certificates of one party."""

    trust: Path
    stranger: Path
    server: Path
    other_server: Path
    expired: Path
    client: Path


@pytest.fixture(scope="module")
def pki() -> Iterator[Pki]:
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name:
        place = Path(name)
        ours, stranger = Authority(place / "ours"), Authority(place / "stranger")
        yield Pki(
            trust=ours.trust,
            stranger=stranger.trust,
            server=ours.issue(place / "server", "server", f"ip_address = {HOST}", "dns_name = here.example"),
            other_server=ours.issue(place / "other", "server", "dns_name = other.example"),
            expired=ours.issue(place / "expired", "server", f"ip_address = {HOST}", expired=True),
            client=ours.issue(place / "client", "client"),
        )


@pytest.fixture
def disk(place: Path) -> Path:
    return image(place / "disk.raw", "raw")


@pytest.fixture
def server(disk: Path) -> Iterator[NbdServer]:
    """A server that is not started yet, on a port of this host."""
    with socket.socket() as found_free:
        found_free.bind((HOST, 0))
        at = HOST, found_free.getsockname()[1]
    found = NbdServer(disk, at=at)
    yield found
    found.kill()


@pytest.fixture
def near(place: Path, disk: Path) -> Iterator[NbdServer]:
    """A server that is not started yet, at a socket."""
    found = NbdServer(disk, socket_path=place / "nbd sock")
    yield found
    found.kill()


@pytest.fixture
def near_source(place: Path) -> str:
    return f"nbds+unix:///{quote(EXPORT)}?socket={quote(str(place / 'nbd sock'))}"


def of(server: NbdServer, scheme: str = "nbds") -> str:
    assert server.at is not None
    return f"{scheme}://{server.at[0]}:{server.at[1]}/{quote(EXPORT)}"


def trusting(directory: Path, **further: str) -> dict[str, str]:
    return {"tls-certificates": str(directory), **{key.replace("_", "-"): text for key, text in further.items()}}


def named(pki: Pki) -> dict[str, str]:
    """Options for the server at the socket."""
    return trusting(pki.trust, tls_hostname="here.example")


def content(source: str, file: Path) -> bytes:
    """Read a whole disk with NBD's own client."""
    run("nbdcopy", source, file)
    return file.read_bytes()


def test_a_server_with_a_certificate(
    server: NbdServer, daemon: Daemon, pki: Pki, place: Path, disk: Path
) -> None:
    server.start(*with_certificates(pki.server))
    device = daemon.device("a", of(server), options=trusting(pki.trust))
    writes(device, MIB, PATTERN)
    assert reads(device, MIB, len(PATTERN)) == PATTERN
    daemon.detach("a")
    assert disk.read_bytes()[MIB:MIB + len(PATTERN)] == PATTERN
    assert content(f"{of(server)}?tls-certificates={pki.trust}", place / "copy") == disk.read_bytes()


def test_a_socket_has_no_name_that_a_certificate_could_bear(
    near: NbdServer, near_source: str, daemon: Daemon, pki: Pki, place: Path, disk: Path
) -> None:
    near.start(*with_certificates(pki.server))
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, near_source, options=trusting(pki.trust))
    assert "tls-hostname" in error.hint
    load = Load(daemon.device("a", near_source, options=named(pki)), place, seconds=1)
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_a_server_that_asks_for_a_certificate_of_ours(server: NbdServer, daemon: Daemon, pki: Pki) -> None:
    server.start(*with_certificates(pki.server, ask=True))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.trust)})
    assert "client-cert.pem" in error.hint
    daemon.attach("a", of(server), options=trusting(pki.client))


def test_a_server_of_another_name(server: NbdServer, daemon: Daemon, pki: Pki) -> None:
    server.start(*with_certificates(pki.other_server))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.trust)})
    assert HOST in error.cause
    assert "tls-hostname" in error.hint
    wrong = {**SOON, **trusting(pki.trust, tls_hostname="third.example")}
    assert "third.example" in refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options=wrong).cause
    daemon.attach("a", of(server), options=trusting(pki.trust, tls_hostname="other.example"))


def test_a_server_that_a_stranger_vouches_for(server: NbdServer, daemon: Daemon, pki: Pki) -> None:
    server.start(*with_certificates(pki.server))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.stranger)})
    assert "ca-cert.pem" in error.hint
    daemon.attach("a", of(server), options=trusting(pki.stranger, tls_verify="off"))


def test_a_certificate_that_has_expired(server: NbdServer, daemon: Daemon, pki: Pki, disk: Path) -> None:
    assert server.at is not None
    server.run(
        "nbdkit", "-f", "-i", HOST, "-p", str(server.at[1]), "--tls=require", f"--tls-certificates={pki.expired}",
        "file", str(disk),
    )
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.trust)})
    assert "expired" in error.hint


def test_certificates_that_are_not_there(server: NbdServer, daemon: Daemon, pki: Pki, place: Path) -> None:
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options=trusting(place / "nothing"))
    assert f"{place}/nothing/ca-cert.pem" in error.cause
    (place / "bad").mkdir()
    (place / "bad/ca-cert.pem").write_text("no certificate")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options=trusting(place / "bad"))
    assert "ca-cert.pem" in error.hint


def test_a_server_that_demands_tls_is_told_from_one_that_has_none(
    server: NbdServer, daemon: Daemon, pki: Pki
) -> None:
    server.start(*with_certificates(pki.server))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server, "nbd"), options=SOON)
    assert "nbds://" in error.hint
    server.kill()
    server.start()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.trust)})
    assert "no TLS" in error.message
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, of(server))
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, of(server, "nbd"), options=trusting(pki.trust))


def test_nobody_writes_twice_with_tls_and_without(server: NbdServer, daemon: Daemon, pki: Pki) -> None:
    server.start()
    daemon.attach("a", of(server, "nbd"))
    refuses(daemon, ErrorCode.SOURCE_IN_USE, of(server), "b", options=trusting(pki.trust))


def test_it_needs_no_root(
    server: NbdServer, near: NbdServer, near_source: str, daemon: Daemon, pki: Pki, place: Path
) -> None:
    server.start(*with_certificates(pki.server, ask=True))
    # The key of the client is root's, and QEMU reads it itself.
    opened_within(daemon, of(server), "DAC_READ_SEARCH", options=trusting(pki.client))
    keys = key_file(place / "server/keys.psk", "bob", USER)
    near.start(*with_keys(keys.parent))
    # So is the socket; the keys are given to it.
    opened_within(
        daemon, near_source, "DAC_OVERRIDE", options={"tls-psk-file": str(keys), "tls-user": USER}
    )


# Keys


def test_a_server_with_a_key(
    near: NbdServer, near_source: str, daemon: Daemon, place: Path, disk: Path
) -> None:
    keys = key_file(place / "server/keys.psk", "bob", USER)
    near.start(*with_keys(keys.parent))
    load = Load(
        daemon.device("a", near_source, options={"tls-psk-file": str(keys), "tls-user": USER}), place, seconds=1
    )
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)
    source = near_source.replace("//", f"//{USER}@", 1)
    assert content(f"{source}&tls-psk-file={keys}", place / "copy") == disk.read_bytes()


def test_a_key_that_is_another_or_of_another_user(server: NbdServer, daemon: Daemon, place: Path) -> None:
    keys = key_file(place / "server/keys.psk", USER)
    server.start(*with_keys(keys.parent))
    ours = key_file(place / "keys", USER, "bob")
    for user in USER, "bob":
        error = refuses(
            daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, "tls-psk-file": str(ours), "tls-user": user}
        )
        assert "tls-psk-file" in error.hint
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, "tls-psk-file": str(ours)})
    assert "tls-user" in error.hint
    bad = place / "bad"
    bad.write_text(f"{USER}:this is no hex")
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, "tls-psk-file": str(bad), "tls-user": USER}
    )
    assert "this is" not in f"{error}{error.hint}"


def test_a_key_for_a_server_with_certificates_and_the_other_way_round(
    server: NbdServer, daemon: Daemon, pki: Pki, place: Path
) -> None:
    keys = key_file(place / "server/keys.psk", USER)
    with_key = {"tls-psk-file": str(keys), "tls-user": USER}
    server.start(*with_certificates(pki.server))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **with_key})
    assert "tls-certificates" in error.hint
    server.kill()
    server.start(*with_keys(keys.parent))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, of(server), options={**SOON, **trusting(pki.trust)})
    assert "tls-psk-file" in error.hint


def test_a_key_from_standard_input_is_nowhere_to_be_read(server: NbdServer, daemon: Daemon, place: Path) -> None:
    keys = key_file(place / "server/keys.psk", USER)
    server.start(*with_keys(keys.parent))
    done = daemon.cli(
        "attach", "a", of(server), "-o", "tls-psk-file=-", "-o", f"tls-user={USER}", stdin=keys.read_text()
    )
    key = keys.read_text().partition(":")[2].strip()
    pid = daemon.qsd("a")
    assert key not in done.stdout + done.stderr
    secret_is_nowhere(daemon, key)
    daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor has the key again")


# Accidents


def test_the_server_is_killed_under_load_and_comes_back_and_never_without_tls(
    near: NbdServer, near_source: str, daemon: Daemon, pki: Pki, place: Path, disk: Path
) -> None:
    near.start(*with_certificates(pki.server))
    load = Load(daemon.device("a", near_source, options=named(pki)), place, seconds=4)
    time.sleep(1)
    near.kill()
    # Whoever answers now is not the one that was asked for.
    near.start()
    time.sleep(3)
    assert load.runs
    near.kill()
    near.start(*with_certificates(pki.server))
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_the_server_is_stopped_under_load_and_goes_on(
    near: NbdServer, near_source: str, daemon: Daemon, pki: Pki, place: Path, disk: Path
) -> None:
    near.start(*with_certificates(pki.server))
    load = Load(daemon.device("a", near_source, options=named(pki)), place, seconds=3)
    time.sleep(1)
    near.signal(signal.SIGSTOP)
    time.sleep(3)
    assert load.runs
    near.signal(signal.SIGCONT)
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_a_successor_of_a_dead_qsd_has_the_certificates_again(
    near: NbdServer, near_source: str, daemon: Daemon, pki: Pki
) -> None:
    near.start(*with_certificates(pki.server))
    writes(daemon.device("a", near_source, options=named(pki)), 0, PATTERN)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "a successor serves it")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
