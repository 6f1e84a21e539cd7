"""A device is never taken away from under its user, unless the user wants it; and then at once."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image, leftovers, mounted, run

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
    daemon.attach("a", source)
    before = daemon.show("a")
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
