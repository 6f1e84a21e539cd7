"""What is refused: with a code, a cause and a hint, and with nothing changed or left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from tests.harness import Daemon, error_of, eventually, image, leftovers, luks_image, mounted, run


def refuses(daemon: Daemon, code: ErrorCode, source: object, name: str = "a", **wishes: object) -> StoragedError:
    """Attach, expect a clear refusal, and that nothing is left of it."""
    before = leftovers(daemon.root)
    error = error_of(lambda: daemon.attach(name, source, **wishes))
    assert error.code is code, error
    assert error.message
    assert error.hint, f"no hint: {error}"
    assert name not in daemon.names()
    assert sorted(leftovers(daemon.root)) == sorted(before)
    return error


# A device that is in use -----------------------------------------------------------------------------------------


@contextmanager
def mounted_here(device: str, place: Path) -> Iterator[str]:
    """A mount in our own namespace."""
    with mounted(device, place / "mnt"):
        yield f"mounted on {place}/mnt"


@contextmanager
def mounted_elsewhere(device: str, place: Path) -> Iterator[str]:
    """A mount in another mount namespace."""
    (place / "mnt").mkdir()
    script = f"mount {device} {place}/mnt && echo ready && exec sleep 60"
    with subprocess.Popen(
        ["unshare", "-m", "--propagation", "private", "sh", "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield f"in the mount namespace of process {process.pid}"
        process.kill()


@contextmanager
def swap(device: str, place: Path) -> Iterator[str]:
    """Swap on the device."""
    run("mkswap", device)
    run("swapon", device)
    try:
        yield "used as swap"
    finally:
        run("swapoff", device)


@contextmanager
def open_in_a_process(device: str, place: Path) -> Iterator[str]:
    """A process that has it open, without O_EXCL."""
    script = f"exec 3<{device}; echo ready; exec sleep 60"
    with subprocess.Popen(["sh", "-c", script], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield f"open in process {process.pid} (sleep)"
        process.kill()


@contextmanager
def loop_on_top(device: str, place: Path) -> Iterator[str]:
    """Another loop device stands on it."""
    upper = run("losetup", "-f", "--show", device).stdout.strip()
    try:
        yield ""
    finally:
        run("losetup", "-d", upper)


USERS = [mounted_here, mounted_elsewhere, swap, open_in_a_process, loop_on_top]


@pytest.mark.parametrize("user", USERS, ids=lambda user: user.__name__)
def test_detach_refuses_while_the_device_is_used_and_names_the_user(
    daemon: Daemon, place: Path, user: object
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    run("mkfs.ext4", "-q", device)
    before = daemon.show("a")
    with user(device, place) as named:  # type: ignore[operator]  # one of USERS
        error = error_of(lambda: daemon.detach("a"))
        assert error.code is ErrorCode.DEVICE_IN_USE
        assert any(named in line for line in error.users) or not named, error.users
        after = daemon.show("a")
        assert {**after, "since": 0} == {**before, "since": 0}
        assert os.readlink(daemon.layout.link("a")) == device
        refused = daemon.cli("detach", "a", check=False)
        assert refused.returncode == 1
        assert "device-in-use" in refused.stderr
        assert "hint:" in refused.stderr
    eventually(lambda: daemon.detach("a") == [], "free again")


def test_a_mount_point_of_any_name_is_named_and_keeps_nobody_from_detaching(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    run("mkfs.ext4", "-q", device)
    odd = os.fsencode(place) + b"/m\xff \xc3\xa4\\n"
    os.mkdir(odd)
    subprocess.run([b"mount", device, odd], check=True)
    try:
        error = error_of(lambda: daemon.detach("a"))
        assert error.code is ErrorCode.DEVICE_IN_USE
        assert error.users[0] == f"mounted on {place}/m\\xff ä\\n"
        assert daemon.online("a")
        assert "ä" in daemon.cli("detach", "a", "--force").stderr
    finally:
        subprocess.run([b"umount", odd], check=True)


def test_a_request_that_is_refused_says_nothing_about_the_volume(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    before = daemon.attach("a", source)
    error_of(lambda: daemon.call("Resize", name="a", size=1 << 20))
    assert daemon.show("a") == before


def test_detach_refuses_while_something_holds_the_device_exclusively(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    if has_device_mapper():
        run("dmsetup", "create", f"sd-{os.getpid()}", "--table", f"0 2048 linear {device} 0")
        take_away = ["dmsetup", "remove", f"sd-{os.getpid()}"]
    else:
        # A kernel without device-mapper: an exclusive opener is what a holder is to the guard.
        script = f"import os,time; os.open({device!r}, os.O_RDWR|os.O_EXCL); print(1,flush=True); time.sleep(60)"
        holder = subprocess.Popen(["python3", "-c", script], stdout=subprocess.PIPE)
        assert holder.stdout is not None
        holder.stdout.readline()
        take_away = ["kill", str(holder.pid)]
    error = error_of(lambda: daemon.detach("a"))
    assert error.code is ErrorCode.DEVICE_IN_USE
    assert error.users
    run(*take_away)
    eventually(lambda: "a" not in daemon.names() or daemon.detach("a") == [], "free again")


def has_device_mapper() -> bool:
    """Whether this kernel has device-mapper."""
    return run("dmsetup", "version", check=False).returncode == 0 and Path("/dev/mapper/control").exists()


# By force --------------------------------------------------------------------------------------------------------


def test_detach_by_force_keeps_what_was_flushed_and_says_what_stays(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(b"kept" * 1000)
        run("sync", directory / "file")
        done = daemon.cli("detach", "a", "--force")
        assert str(directory) in done.stderr
        assert daemon.names() == []
        assert daemon.attach("a", source)["device"] != device
        daemon.detach("a")
    eventually(lambda: leftovers(daemon.root) == [], "the old device is gone with its last user")
    run("fsck.ext4", "-fy", source, check=False)
    with mounted(str(source), place / "mnt", "-o", "ro,loop") as directory:
        assert (directory / "file").read_bytes() == b"kept" * 1000


@pytest.mark.parametrize("user", [None, "reader"])
def test_detach_by_force_does_not_hang_on_a_stopped_qsd(daemon: Daemon, place: Path, user: str | None) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    qsd = daemon.qsd("a")
    os.kill(qsd, 19)
    reader = (
        subprocess.Popen(["dd", f"if={device}", "of=/dev/null", "bs=4k", "iflag=direct"], stderr=subprocess.PIPE)
        if user else None
    )
    if reader is not None:
        eventually(lambda: " D " in Path(f"/proc/{reader.pid}/stat").read_text(), "the reader waits")
    done = daemon.cli("detach", "a", "--force", "--timeout", "40")
    assert daemon.names() == []
    assert done.returncode == 0
    assert not Path(f"/proc/{qsd}").exists()
    if reader is not None:
        assert reader.wait(10) != 0
        assert reader.stderr is not None
        reader.stderr.close()
    eventually(lambda: leftovers(daemon.root) == [], "nothing is left")


def test_list_and_show_answer_while_a_volume_hangs(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"))
    daemon.attach("b", image(place / "b.raw", "raw"))
    os.kill(daemon.qsd("a"), 19)
    with subprocess.Popen([*daemon.cli_command(), "detach", "a"], stderr=subprocess.PIPE) as waiting:
        assert set(daemon.names()) == {"a", "b"}
        daemon.show("a")
        daemon.detach("b")
        daemon.detach("a", force=True)
        waiting.wait(30)
    assert daemon.names() == []


def test_a_volume_whose_qsd_hangs_is_shown_as_hung_until_it_goes_on(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    before = daemon.attach("a", source)
    os.kill(before["qsd_pid"], signal.SIGSTOP)
    assert error_of(lambda: daemon.attach("a", source)).code is ErrorCode.QSD_SILENT
    seen = daemon.show("a")
    assert seen["state"] == "hung"
    assert seen["failure"]["code"] == "qsd-silent"
    assert seen["device"] == before["device"]
    os.kill(before["qsd_pid"], signal.SIGCONT)
    eventually(lambda: daemon.online("a"), "online again", 40)
    assert daemon.show("a")["qsd_pid"] == before["qsd_pid"]
    assert daemon.show("a")["failure"] is None


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
    run("mount", "--bind", Path(lower.layout.volume_dir("base")) / "disk", exported)
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
    assert error_of(lambda: daemon.detach("a", timeout=7.0)).code in (ErrorCode.TIMEOUT, ErrorCode.HOST_STUCK)
    assert error_of(lambda: daemon.detach("a", timeout=7.0)).code in (ErrorCode.TIMEOUT, ErrorCode.HOST_STUCK)
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


# What the host lacks -------------------------------------------------------------------------------------------------


def with_config(daemon: Daemon, text: str) -> None:
    """Write storaged.toml."""
    Path(daemon.layout.config_dir).mkdir(parents=True, exist_ok=True)
    Path(daemon.layout.config_file).write_text(text)


def test_a_missing_qsd_is_said(stopped: Daemon, place: Path) -> None:
    with_config(stopped, '[qsd]\nbinary = "/nonexistent/qemu-storage-daemon"\n')
    stopped.start()
    refuses(stopped, ErrorCode.QSD_MISSING, image(place / "a.raw", "raw"))


@pytest.mark.parametrize("script", ["exit 3", "echo 'out of cheese' >&2; exit 1", "kill -9 $$"])
def test_a_qsd_that_dies_at_its_start_is_said_with_its_last_words(
    stopped: Daemon, place: Path, script: str
) -> None:
    binary = place / "qsd"
    binary.write_text(f"#!/bin/sh\n{script}\n")
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
