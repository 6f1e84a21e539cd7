"""One source has one writer, an image opens only what was allowed, and what cannot be a disk is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from tests.harness import Daemon, error_of, eventually, image, leftovers, luks_image, mounted, refuses, run, with_config

# Sources -----------------------------------------------------------------------------------------------------------


def test_a_source_in_use_is_refused_by_any_name(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.attach("first", source, format="qcow2")
    (place / "link").symlink_to(source)
    os.link(source, place / "hard")
    (place / "dir").mkdir()
    for spelling in (source, f"{place}/dir/../a.qcow2", f"file:{source}", place / "link", place / "hard"):
        error = refuses(daemon, ErrorCode.SOURCE_IN_USE, spelling, format="qcow2")
        assert any("first" in user for user in error.users)
        refuses(daemon, ErrorCode.SOURCE_IN_USE, spelling, format="qcow2", read_only=True)
    daemon.detach("first")
    daemon.attach("a", source, format="qcow2")


def test_readers_share_a_source(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    for name in ("a", "b", "c"):
        daemon.attach(name, source, format="qcow2", read_only=name != "c", snapshot=name == "c")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, name="d", format="qcow2")


def test_a_second_daemon_cannot_take_a_source(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.attach("a", source, format="qcow2")
    other = Daemon(place / "other")
    other.root.mkdir()
    other.start()
    try:
        error = refuses(other, ErrorCode.SOURCE_IN_USE, source, format="qcow2")
        assert str(daemon.root) in error.cause
    finally:
        other.end()


def test_the_lock_lives_as_long_as_the_process_that_can_write(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.attach("a", source, format="qcow2")
    qsd = daemon.qsd("a")
    daemon.kill()
    other = Daemon(place / "other")
    other.root.mkdir()
    other.start()
    try:
        refuses(other, ErrorCode.SOURCE_IN_USE, source, format="qcow2")
        os.kill(qsd, 9)
        eventually(lambda: not Path(f"/proc/{qsd}/fd").exists() or not list(Path(f"/proc/{qsd}/fd").iterdir()), "gone")
        other.attach("a", source, format="qcow2")
        daemon.start()
        eventually(lambda: daemon.show("a")["state"] == "failed", "the first daemon does not write to it again")
        assert daemon.show("a")["failure"]["code"] == "source-in-use"
    finally:
        other.end()
    eventually(lambda: daemon.online("a"), "it is taken up again when it is free")


def test_a_foreign_writer_of_the_file_is_found(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    loop = run("losetup", "-f", "--show", source).stdout.strip()
    try:
        error = refuses(daemon, ErrorCode.SOURCE_IN_USE, source)
        assert loop in error.cause
        daemon.attach("dev", loop)
        refuses(daemon, ErrorCode.SOURCE_IN_USE, source)
        daemon.detach("dev")
    finally:
        run("losetup", "-d", loop)


def test_an_image_that_a_qemu_has_open_is_refused(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    held = subprocess.Popen(
        ["qemu-io", "-f", "qcow2", str(source)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert held.stdin is not None
    held.stdin.write("read 0 512\n")
    held.stdin.flush()
    assert held.stdout is not None
    held.stdout.readline()
    error = refuses(daemon, ErrorCode.SOURCE_IN_USE, source, format="qcow2")
    assert "lock" in error.cause
    held.communicate("quit\n", timeout=10)


def test_sources_that_cannot_be_disks(daemon: Daemon, place: Path) -> None:
    os.mkfifo(place / "fifo")
    (place / "empty").touch()
    (place / "odd").write_bytes(bytes(1000))
    refuses(daemon, ErrorCode.SOURCE_MISSING, place / "missing")
    refuses(daemon, ErrorCode.INVALID_SOURCE, place)
    refuses(daemon, ErrorCode.INVALID_SOURCE, place / "fifo")
    refuses(daemon, ErrorCode.INVALID_SOURCE, "/dev/null")
    refuses(daemon, ErrorCode.INVALID_SOURCE, "")
    refuses(daemon, ErrorCode.INVALID_SOURCE, "rdb:pool/image")
    refuses(daemon, ErrorCode.INVALID_SOURCE, "relative.img")
    refuses(daemon, ErrorCode.INVALID_SIZE, place / "empty")
    refuses(daemon, ErrorCode.INVALID_SIZE, place / "odd")
    refuses(daemon, ErrorCode.INVALID_SIZE, image(place / "zero.qcow2", size="0"), format="qcow2")
    refuses(daemon, ErrorCode.WRONG_FORMAT, image(place / "a.qcow2"), format="vmdk")
    refuses(daemon, ErrorCode.WRONG_FORMAT, image(place / "a.raw", "raw"), format="qcow2")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "x" * 300, ".hidden", "-x", "a b", "a\n", "a-part1", "ä", "a\0b"])
def test_names_that_are_refused(daemon: Daemon, place: Path, name: str) -> None:
    refuses(daemon, ErrorCode.INVALID_NAME, image(place / "a.raw", "raw"), name=name)


def test_wishes_that_make_no_sense(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    for wishes in (
        {"format": "floppy"}, {"transport": "pigeon"}, {"options": {"colour": "red"}}, {"options": {"aio": "x"}},
        {"options": {"aio": "native"}}, {"options": {"cache": "x"}}, {"options": {"logical-block-size": "1000"}},
        {"format": "luks"}, {"options": {"key-file": "/x"}}, {"snapshot": True, "read_only": True},
        {"snapshot_dir": "/tmp"}, {"options": {"backing": "/tmp"}}, {"options": {"backing": "allow:"}},
        {"timeout": -1.0},
    ):
        refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, **wishes)
    refuses(daemon, ErrorCode.INVALID_SIZE, source, snapshot=True, options={"snapshot-size": "0"})


def test_a_disk_that_is_no_multiple_of_its_logical_blocks_is_refused(daemon: Daemon, place: Path) -> None:
    (place / "a").write_bytes(bytes(512 * 9))
    refuses(daemon, ErrorCode.INVALID_SIZE, place / "a", options={"logical-block-size": "4096"})


def test_a_wrong_passphrase_is_said(daemon: Daemon, place: Path) -> None:
    for name, text in (("key", "right"), ("wrong", "wrong"), ("empty", "")):
        (place / name).write_text(text)
    luks_image(place / "a", place / "key")
    for name in ("wrong", "empty", "missing"):
        refuses(
            daemon, ErrorCode.OPEN_FAILED, place / "a", format="luks", options={"key-file": f"{place}/{name}"}
        )


def test_a_partition_and_its_disk_and_its_file_are_one_source(daemon: Daemon, place: Path) -> None:
    source = image(place / "disk.raw", "raw")
    run("sfdisk", "-q", source, stdin="label: gpt\n,16M\n,16M\n")
    loop = run("losetup", "-f", "--show", "-P", source).stdout.strip()
    try:
        if not os.path.exists(f"{loop}p1"):
            run("partx", "-a", loop)
        for first, second in ((f"{loop}p1", source), (f"{loop}p1", loop), (loop, f"{loop}p1")):
            daemon.attach("first", first)
            refuses(daemon, ErrorCode.SOURCE_IN_USE, second)
            refuses(daemon, ErrorCode.SOURCE_IN_USE, second, snapshot=True)
            daemon.detach("first")
        daemon.attach("first", loop, snapshot=True)
        refuses(daemon, ErrorCode.SOURCE_IN_USE, f"{loop}p1")
        daemon.attach("reader", f"{loop}p1", read_only=True)
        daemon.detach("reader")
        daemon.detach("first")
    finally:
        run("losetup", "-d", loop)


def test_what_somebody_else_can_write_to_is_not_read_either(daemon: Daemon, place: Path) -> None:
    source = image(place / "disk.raw", "raw")
    run("mkfs.ext4", "-q", source)
    loop = run("losetup", "-f", "--show", source).stdout.strip()
    try:
        for snapshot in (True, False):
            refuses(daemon, ErrorCode.SOURCE_IN_USE, source, snapshot=snapshot, read_only=not snapshot)
            with mounted(loop, place / "mnt"):
                refuses(daemon, ErrorCode.SOURCE_IN_USE, loop, snapshot=snapshot, read_only=not snapshot)
    finally:
        run("losetup", "-d", loop)


def test_a_source_that_hangs_does_not_keep_its_volume_from_being_detached(stopped: Daemon, place: Path) -> None:
    """The source is a file of a filesystem whose server hangs: QSD's own FUSE export of another image."""
    with_config(stopped, "attach_timeout = 2.0\n")
    stopped.start()
    lower = Daemon(place / "lower")
    lower.root.mkdir()
    lower.start()
    lower.attach("base", image(place / "base.raw", "raw"))
    server = lower.qsd("base")
    # By another path than the one that the loop device of "base" stands on, which would be found in use.
    exported = place / "exported"
    exported.touch()
    run("mount", "--bind", lower.mountpoint("base"), exported)
    try:
        stopped.attach("a", exported)
        pid = stopped.qsd("a")
        stopped.kill()
        os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{pid}").exists(), "gone")
        os.kill(server, signal.SIGSTOP)
        stopped.start()
        eventually(lambda: stopped.show("a")["state"] == "failed", "it cannot come up")
        error_of(lambda: stopped.attach("a", exported))
        error_of(lambda: stopped.attach("a", exported))
        stopped.detach("a", force=True)
        assert stopped.names() == []
    finally:
        os.kill(server, signal.SIGCONT)
        # The calls that hung have it open until they end.
        eventually(lambda: run("umount", exported, check=False).returncode == 0, "unmounted")
        lower.end()


def test_a_detach_by_force_does_not_wait_behind_others(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    with open(device, "r+b", buffering=0) as file:
        file.write(bytes(4096))
    os.kill(daemon.qsd("a"), signal.SIGSTOP)
    waiting = [
        subprocess.Popen([*daemon.cli_command(), "detach", "a", "--timeout", "3600"], stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    begin = time.monotonic()
    daemon.cli("detach", "a", "--force")
    assert time.monotonic() - begin < 25
    for client in waiting:
        assert client.wait(20) in (0, 1)
        assert client.stderr is not None
        client.stderr.close()


def test_a_flush_that_ends_late_does_not_take_the_device_away(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    with open(device, "r+b", buffering=0) as file:
        file.write(b"late" * 1024)
    qsd = daemon.qsd("a")
    os.kill(qsd, signal.SIGSTOP)
    for _ in range(2):
        error = error_of(lambda: daemon.detach("a", timeout=7.0))
        assert error.code in (ErrorCode.TIMEOUT, ErrorCode.HOST_STUCK), (error.message, error.cause, error.users)
    os.kill(qsd, signal.SIGCONT)
    # What was asked for last was a detach: now that the storage answers, it is finished, in order.
    eventually(lambda: daemon.names() == [], "detached", 60)
    assert leftovers(daemon.root) == []
    assert source.read_bytes()[:4096] == b"late" * 1024


def test_an_attach_right_after_a_detach_is_a_new_attach(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    for _ in range(20):
        daemon.attach("a", source)
        with subprocess.Popen([*daemon.cli_command(), "detach", "a"], stderr=subprocess.DEVNULL) as detaching:
            done = daemon.cli("attach", "a", str(source))
            assert done.stdout.startswith("/dev/loop")
            detaching.wait(20)
        with suppress(StoragedError):
            daemon.detach("a")


def test_the_same_wishes_in_other_words_are_the_same(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    (place / "sub").mkdir()
    device = daemon.device("a", source)
    for spelling in (f"file:{source}", f"{place}/sub/../a.raw"):
        assert daemon.device("a", spelling) == device
    assert daemon.device("a", source, options={"cache": "writeback"}) == device
    assert daemon.device("a", source, transport="fuse") == device
    assert error_of(lambda: daemon.attach("a", place / "missing")).code is ErrorCode.VOLUME_EXISTS


def test_a_source_whose_name_is_no_utf8_is_refused(daemon: Daemon, place: Path) -> None:
    odd = os.fsencode(place) + b"/odd\xff.raw"
    with open(odd, "wb") as file:
        file.truncate(1 << 20)
    done = subprocess.run([*daemon.cli_command(), "attach", "a", odd], capture_output=True, text=True, timeout=30)
    assert done.returncode == 1
    assert "invalid-argument" in done.stderr
    assert "UTF-8" in done.stderr


# Backing files -----------------------------------------------------------------------------------------------------


def overlay_of(path: Path, base: Path, *, format: str = "raw") -> Path:
    """A qcow2 over another image."""
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", format, path)
    return path


def test_backing_files_open_only_where_the_user_allowed_it(daemon: Daemon, place: Path) -> None:
    (place / "images").mkdir()
    base = image(place / "images" / "base.raw", "raw")
    writes_at(base, b"from the base")
    upper = overlay_of(place / "upper.qcow2", base)
    error = refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, upper, format="qcow2")
    assert f"-o backing=allow:{place / 'images'}" in error.hint
    refuses(
        daemon, ErrorCode.BACKING_NOT_ALLOWED, upper, format="qcow2", options={"backing": f"allow:{place}/elsewhere"}
    )
    device = daemon.device("a", upper, format="qcow2", options={"backing": f"allow:{place / 'images'}"})
    with open(device, "rb") as file:
        assert file.read(13) == b"from the base"
    refuses(daemon, ErrorCode.SOURCE_IN_USE, base, name="b")
    daemon.detach("a")
    base.rename(place / "images" / "other")
    refuses(
        daemon, ErrorCode.BACKING_MISSING, upper, format="qcow2", options={"backing": f"allow:{place / 'images'}"}
    )


def writes_at(path: Path, data: bytes) -> None:
    """Write to the begin of a file in place."""
    with open(path, "r+b") as file:
        file.write(data)


def test_an_image_that_points_to_a_secret_shows_nothing_of_it(daemon: Daemon, place: Path) -> None:
    secret = place / "shadow"
    secret.write_bytes(b"secret" * 1000 + bytes(6 * 1024 - 6000 % 1024))
    os.truncate(secret, 64 << 10)
    hostile = overlay_of(place / "hostile.qcow2", secret)
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, hostile, format="qcow2")
    data = place / "data.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={secret},data_file_raw=on", data, "64k")
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, data, format="qcow2")
