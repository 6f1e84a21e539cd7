"""The iscsi backend against tgtd. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.backends.accidents import Backed, ServerAccidents
from tests.backends.iscsi_server import SECRET, TARGET, USER, IscsiServer
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.servers import Load
from tests.backends.within import opened_within
from tests.harness import Daemon, as_json, error_of, eventually, image, mounted, reads, refuses, run, size_of, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def disk(place: Path) -> Path:
    return image(place / "disk.raw", "raw")


@pytest.fixture
def server(place: Path, disk: Path) -> Iterator[IscsiServer]:
    """A target that lets everybody in; its LUN 1 is the disk."""
    yield from started(IscsiServer(place, {1: disk}))


@pytest.fixture
def guarded(place: Path, disk: Path) -> Iterator[IscsiServer]:
    """A target that wants a user and a secret."""
    yield from started(IscsiServer(place, {1: disk}, user=USER))


@pytest.fixture
def key(place: Path) -> str:
    path = place / "key"
    path.write_text(f"{SECRET}\n")
    return str(path)


def started(found: IscsiServer) -> Iterator[IscsiServer]:
    try:
        found.start()
        yield found
    finally:
        found.kill()


def test_a_filesystem_on_a_lun(server: IscsiServer, daemon: Daemon, place: Path, disk: Path) -> None:
    device = daemon.device("a", server.source())
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    copy = place / "copy.raw"
    run("qemu-img", "convert", "-f", "raw", "-O", "raw", server.source(), copy)
    for path in (disk, copy):
        run("debugfs", "-R", f"dump /file {place}/file", path)
        assert (place / "file").read_bytes() == PATTERN


def test_everything_is_said_by_options(server: IscsiServer, daemon: Daemon, disk: Path) -> None:
    said = {"portal": server.portal, "target": TARGET, "lun": "1", "header-digest": "crc32c"}
    writes(daemon.device("a", "iscsi:", options=said), MIB, PATTERN)
    daemon.detach("a")
    assert disk.read_bytes()[MIB:MIB + len(PATTERN)] == PATTERN


def test_read_only_is_read_only(server: IscsiServer, daemon: Daemon, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    device = daemon.device("a", server.source(), read_only=True)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)


def test_a_lun_above_255_is_that_lun(daemon: Daemon, place: Path, disk: Path) -> None:
    other = image(place / "other.raw", "raw", "32M")
    for server in started(IscsiServer(place, {1: disk, 300: other})):
        refuses(daemon, ErrorCode.INVALID_SOURCE, server.source(300))
        writes(daemon.device("a", server.source(16384 + 300)), 0, PATTERN)
        daemon.detach("a")
    assert other.read_bytes()[:len(PATTERN)] == PATTERN


# Users


def test_a_user_with_a_secret(guarded: IscsiServer, daemon: Daemon, key: str, disk: Path) -> None:
    said = {"user": USER, "password-file": key}
    writes(daemon.device("a", guarded.source(), options=said), 0, PATTERN)
    guarded.kill()
    guarded.start()
    writes(str(daemon.show("a")["device"]), MIB, PATTERN)  # the new session needs the secret again
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor, which needs it too, serves it", 40)
    daemon.detach("a")
    assert disk.read_bytes()[MIB:MIB + len(PATTERN)] == PATTERN


def test_a_secret_in_the_source_is_shown_nowhere(guarded: IscsiServer, daemon: Daemon) -> None:
    whole = guarded.source().replace("//", f"//{USER}%{SECRET}@")
    daemon.attach("a", whole)
    secret_is_nowhere(daemon, SECRET)
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)


def test_a_wrong_secret_and_none(guarded: IscsiServer, daemon: Daemon, place: Path, key: str) -> None:
    wrong = place / "wrong"
    wrong.write_text("no such secret")
    for options in ({}, {"user": USER, "password-file": str(wrong)}, {"user": "eve", "password-file": key}):
        error = refuses(daemon, ErrorCode.OPEN_FAILED, guarded.source(), options=options)
        assert "password-file" in error.hint
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, guarded.source(), options={"user": USER})
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, guarded.source(), options={"password-file": key})


def test_a_target_that_lets_in_by_name(server: IscsiServer, daemon: Daemon) -> None:
    name = "iqn.2026-01.test:this-host"
    server.let_in_only(name)
    error = refuses(daemon, ErrorCode.SOURCE_MISSING, server.source())
    assert "initiator-name" in error.hint
    daemon.attach("a", server.source(), options={"initiator-name": name})
    assert name in server.sessions()


# What is refused


def test_lun_0_of_tgtd_has_no_data(server: IscsiServer, daemon: Daemon) -> None:
    refuses(daemon, ErrorCode.INVALID_SIZE, server.source(0))


def test_a_lun_that_has_grown_is_served_at_its_old_size_until_a_resize(
    server: IscsiServer, daemon: Daemon, disk: Path
) -> None:
    size, device = disk.stat().st_size, daemon.device("a", server.source())
    for times in (2, 3):
        server.kill()  # tgtd looks at the file when it starts
        os.truncate(disk, times * size)
        server.start()
        if times == 2:
            device = daemon.replace_qsd("a")
        # The third time QSD goes on, and asks for the size when it is told to grow.
        assert size_of(device) == (times - 1) * size
        daemon.cli("resize", "a")
        assert size_of(device) == times * size


def test_a_target_and_a_lun_that_are_not_there(server: IscsiServer, daemon: Daemon) -> None:
    refuses(daemon, ErrorCode.SOURCE_MISSING, server.source().replace(TARGET, f"{TARGET}x"))
    refuses(daemon, ErrorCode.SOURCE_MISSING, server.source(2))
    error = refuses(daemon, ErrorCode.INVALID_SOURCE, f"iscsi://{server.portal}/{TARGET}")
    assert "LUN" in error.cause


def test_a_server_that_is_down(server: IscsiServer, daemon: Daemon) -> None:
    server.kill()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, server.source())
    assert "port" in error.hint
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"iscsi://nobody.invalid/{TARGET}/1")
    assert "nobody.invalid" in error.cause


def test_a_silent_server_is_given_up_at_the_deadline(daemon: Daemon) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        source = f"iscsi://127.0.0.1:{silent.getsockname()[1]}/{TARGET}/1"
        begin = time.monotonic()
        error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options={"request-timeout": "2"})
        assert 1 <= time.monotonic() - begin < 10
    assert "request-timeout" in error.hint


def test_a_protected_lun_is_attached_read_only_or_not(server: IscsiServer, daemon: Daemon) -> None:
    server.protect(1)
    error = refuses(daemon, ErrorCode.OPEN_FAILED, server.source())
    assert "--read-only" in error.hint
    daemon.attach("a", server.source(), read_only=True)


def test_nobody_writes_twice(server: IscsiServer, daemon: Daemon) -> None:
    daemon.attach("a", server.source())
    other = f"iscsi://localhost:{server.port}/{TARGET}/01"
    # The target's name is one all over the world; whether the other portal leads to the same disk is not known.
    assert error_of(lambda: daemon.attach("a", other)).code is ErrorCode.VOLUME_EXISTS
    refuses(daemon, ErrorCode.SOURCE_IN_USE, other, "b")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, server.source(), "b", read_only=True)
    server.kill()
    server.start()
    refuses(daemon, ErrorCode.SOURCE_IN_USE, other, "b")


def test_readers_share_and_have_sessions_of_their_own(server: IscsiServer, daemon: Daemon, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    devices = [daemon.device(name, server.source(), read_only=True) for name in "ab"]
    assert server.sessions().count("Session:") == 2
    assert [reads(device, 0, len(PATTERN)) for device in devices] == [PATTERN] * 2


# Accidents


@pytest.fixture
def backed(server: IscsiServer) -> Backed:
    """For the accidents that befall all servers."""
    return Backed(server, server.source())


class TestAccidents(ServerAccidents):
    """Those that befall all servers."""


def test_a_silent_server_costs_no_request_when_they_are_done_again(
    server: IscsiServer, daemon: Daemon, place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", server.source(), options={"request-timeout": "1"}), place, seconds=3)
    time.sleep(1)
    server.signal(signal.SIGSTOP)
    time.sleep(8)
    assert load.runs
    server.signal(signal.SIGCONT)
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_a_disk_that_shrinks_fails_what_is_behind_its_end(server: IscsiServer, daemon: Daemon, disk: Path) -> None:
    device = daemon.device("a", server.source())
    writes(device, 0, PATTERN)
    server.kill()
    os.truncate(disk, 8 * MIB)
    server.start()
    with pytest.raises(OSError, match=os.strerror(5)):
        reads(device, 32 * MIB, 4096)
    assert reads(device, 0, len(PATTERN)) == PATTERN


def test_what_qemu_args_prints_opens_it(server: IscsiServer, daemon: Daemon, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    daemon.attach("a", server.source())
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    daemon.detach("a")
    drive = found["drive"][found["drive"].index("-drive") + 1]
    options = drive.removeprefix("if=none,id=sd-a,")
    assert options != drive
    run("qemu-img", "compare", "--image-opts", options, f"driver=raw,file.filename={disk}")


def test_it_needs_no_root(guarded: IscsiServer, daemon: Daemon, key: str) -> None:
    opened_within(daemon, guarded.source(), options={"user": USER, "password-file": key})
