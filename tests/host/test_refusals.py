"""What a host lacks, and who may not ask: refused with a code, a cause and a hint, with nothing left behind."""

from __future__ import annotations

import os
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image, refuses, run, with_config

# What the host lacks -------------------------------------------------------------------------------------------------


def test_a_missing_qsd_is_said(stopped: Daemon, place: Path) -> None:
    with_config(stopped, '[qsd]\nbinary = "/nonexistent/qemu-storage-daemon"\n')
    stopped.start()
    refuses(stopped, ErrorCode.QSD_MISSING, image(place / "a.raw", "raw"))


@pytest.mark.parametrize("script", ["exit 3", "echo 'out of cheese' >&2; exit 1", "kill -9 $$"])
def test_a_qsd_that_dies_at_its_start_is_said_with_its_last_words(
    stopped: Daemon, place: Path, script: str
) -> None:
    binary = place / "qsd"
    # What it is it tells; then it dies.
    binary.write_text(
        f"#!/bin/sh\ncase $1 in --version|--help) exec qemu-storage-daemon $1;; esac\n{script}\n"
    )
    binary.chmod(0o755)
    with_config(stopped, f'[qsd]\nbinary = "{binary}"\n')
    stopped.start()
    error = refuses(stopped, ErrorCode.QSD_DIED, image(place / "a.raw", "raw"))
    if "cheese" in script:
        assert "out of cheese" in error.cause
        assert "status 1" in error.cause


def test_a_qsd_that_never_answers_ends_at_the_deadline(stopped: Daemon, place: Path) -> None:
    binary = place / "qsd"
    binary.write_text("#!/bin/sh\nexec sleep 1000\n")
    binary.chmod(0o755)
    with_config(stopped, f'[qsd]\nbinary = "{binary}"\n')
    stopped.start()
    error = refuses(stopped, ErrorCode.TIMEOUT, image(place / "a.raw", "raw"), timeout=1.0)
    assert error.step == "start"


def test_an_attach_waits_as_long_as_the_user_wants(stopped: Daemon, place: Path) -> None:
    binary = place / "qsd"
    binary.write_text('#!/bin/sh\nsleep 3\nexec qemu-storage-daemon "$@"\n')
    binary.chmod(0o755)
    with_config(stopped, f'attach_timeout = 1.0\n[qsd]\nbinary = "{binary}"\n')
    stopped.start()
    source = image(place / "a.raw", "raw")
    refuses(stopped, ErrorCode.TIMEOUT, source)
    assert stopped.attach("a", source, timeout=30.0)["state"] == "online"
    qsd = stopped.qsd("a")
    stopped.kill()
    stopped.start()
    eventually(lambda: stopped.online("a"), "adopted, though a script started it")
    assert stopped.qsd("a") == qsd


@pytest.mark.parametrize(
    ("hidden", "code"),
    [("/dev/fuse", ErrorCode.TRANSPORT_UNAVAILABLE), ("/dev/loop-control", ErrorCode.TRANSPORT_UNAVAILABLE)],
)
def test_a_host_without_fuse_or_loop_says_so(
    stopped: Daemon, place: Path, hidden: str, code: ErrorCode
) -> None:
    hide = f"mount --bind {place}/nothing {hidden} && exec \"$@\""
    (place / "nothing").touch()
    stopped.start(command=["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"])
    source = image(place / "a.raw", "raw")
    for transport in ("auto", "fuse"):
        error = refuses(stopped, code, source, transport=transport)
        assert hidden in error.cause
    stopped.stop()


def test_no_free_loop_device_is_said_and_all_is_taken_back(stopped: Daemon, place: Path) -> None:
    # The device that the kernel would give next cannot be opened: what a container without /dev/loopN sees.
    next_free = run("losetup", "-f").stdout.strip()
    hide = (
        f"mount -t tmpfs none {place}/dev && cp -a /dev/fuse /dev/loop-control /dev/null {place}/dev && "
        f'mount --bind {place}/dev /dev && exec "$@"'
    )
    (place / "dev").mkdir()
    stopped.start(command=["unshare", "-m", "--propagation", "private", "sh", "-c", hide, "sh"])
    error = refuses(stopped, ErrorCode.NO_FREE_DEVICE, image(place / "a.raw", "raw"))
    assert next_free in error.cause
    stopped.stop()


def test_a_full_disk_under_the_state_directory_is_said(stopped: Daemon, place: Path) -> None:
    state = Path(stopped.layout.state_dir)
    state.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=64k", "none", state)
    try:
        stopped.start()
        filler = state / "filler"
        with suppress(OSError):
            filler.write_bytes(bytes(1 << 20))
        source = image(place / "a.raw", "raw")
        refuses(stopped, ErrorCode.NO_SPACE, source, persist=True)
        assert stopped.attach("b", source)["state"] == "online"  # needs no state directory
        stopped.detach("b")
        filler.unlink()
        stopped.attach("a", source, persist=True)
        with suppress(OSError):
            filler.write_bytes(bytes(1 << 20))
        stopped.detach("a", force=True)
        stopped.stop()
    finally:
        run("umount", state)


def test_who_may_not_ask_is_told_so(daemon: Daemon) -> None:
    denied = subprocess.run(
        [*daemon.cli_command(), "list"], user="nobody", group="nogroup", capture_output=True, text=True,
        extra_groups=[], timeout=30,
    )
    assert denied.returncode == 1
    assert "permission-denied" in denied.stderr


def test_the_peer_is_checked_even_where_the_socket_lets_it_in(daemon: Daemon) -> None:
    os.chmod(daemon.layout.socket, 0o666)
    denied = subprocess.run(
        [*daemon.cli_command(), "list"], user="nobody", group="nogroup", capture_output=True, text=True,
        extra_groups=[], timeout=30,
    )
    assert denied.returncode == 1
    assert "permission-denied" in denied.stderr


def test_members_of_the_socket_group_may_ask(stopped: Daemon) -> None:
    with_config(stopped, 'socket_group = "nogroup"\n')
    stopped.start()
    allowed = subprocess.run(
        [*stopped.cli_command(), "list"], user="nobody", group="daemon", extra_groups=["nogroup"],
        capture_output=True, text=True, timeout=30,
    )
    assert allowed.returncode == 0, allowed.stderr


@pytest.mark.parametrize(
    "text", ["[qsd", "colour = 1", 'attach_timeout = "long"', "attach_timeout = -1", 'socket_group = "no such group"']
)
def test_a_wrong_configuration_is_refused_at_the_start(stopped: Daemon, text: str) -> None:
    with_config(stopped, text)
    done = stopped.cli("daemon", check=False)
    assert done.returncode == 1
    assert "storaged.toml" in done.stderr
    with_config(stopped, "")


def test_usage_errors_end_with_2_and_unknown_volumes_with_1(daemon: Daemon) -> None:
    assert daemon.cli("attach", "a", check=False).returncode == 2
    assert daemon.cli("frobnicate", check=False).returncode == 2
    for arguments in (["show", "nope"], ["detach", "nope"], ["resize", "nope", "1G"]):
        done = daemon.cli(*arguments, check=False)
        assert done.returncode == 1
        assert "no-such-volume" in done.stderr


def test_a_write_that_cannot_be_flushed_keeps_the_device_unless_forced(daemon: Daemon, place: Path) -> None:
    (place / "small").mkdir()
    run("mount", "-t", "tmpfs", "-o", "size=4m", "none", place / "small")
    try:
        source = image(place / "small" / "a.raw", "raw", "64M")
        device = daemon.device("a", source)
        writer = subprocess.run(["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=8"], capture_output=True)
        assert writer.returncode == 0  # it is in the page cache of the device
        error = error_of(lambda: daemon.detach("a"))
        assert error.code in (ErrorCode.FLUSH_FAILED, ErrorCode.DEVICE_IN_USE), error
        daemon.detach("a", force=True)
    finally:
        run("umount", place / "small")
