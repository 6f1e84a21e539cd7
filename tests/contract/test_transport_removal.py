"""What every transport that gives a host device promises about taking it away, by the user or by an accident."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host.loop import find_by_backing
from tests.contract.conftest import IN_MACHINE
from tests.harness import Daemon, error_of, eventually, image, leftovers, mounted, reads, run, writes

PATTERN = b"storaged" * 8192


# By the user -----------------------------------------------------------------------------------------------------


@contextmanager
def a_mount(device: str, place: Path) -> Iterator[str]:
    with mounted(device, place / "mnt") as directory:
        yield f"mounted on {directory}"


@contextmanager
def a_process(device: str, place: Path) -> Iterator[str]:
    """It has the device open, and claims nothing."""
    with open(device, "rb") as file, subprocess.Popen(["sleep", "600"], stdin=file) as process:
        yield f"open in process {process.pid}"
        process.kill()


@contextmanager
def a_loop_device(device: str, place: Path) -> Iterator[str]:
    upper = run("losetup", "-f", "--show", device).stdout.strip()
    try:
        yield f"held by {upper}"
    finally:
        run("losetup", "-d", upper)


@contextmanager
def swap(device: str, place: Path) -> Iterator[str]:
    run("mkswap", device)
    run("swapon", device)
    try:
        yield "used as swap"
    finally:
        run("swapoff", device)


User = Callable[[str, Path], AbstractContextManager[str]]


@pytest.mark.parametrize("user", [a_mount, a_process, a_loop_device, swap], ids=lambda user: user.__name__)
def test_detach_refuses_while_it_is_used_names_the_user_and_changes_nothing(
    daemon: Daemon, place: Path, transport: str, user: User
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    run("mkfs.ext4", "-q", device)
    before = daemon.show("a")
    with user(device, place) as named:
        error = error_of(lambda: daemon.detach("a"))
        assert error.code is ErrorCode.DEVICE_IN_USE, error
        assert any(named in line for line in error.users), error.users
        assert {**daemon.show("a"), "since": 0} == {**before, "since": 0}
        if user is a_mount:
            (place / "mnt/file").write_bytes(PATTERN)  # it works as before
            run("sync", place / "mnt/file")
    eventually(lambda: "a" not in daemon.names() or daemon.detach("a") == [], "free again")


def test_detach_by_force_ends_a_mounted_disk_and_keeps_what_was_flushed(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
        run("sync", directory / "file")
        daemon.detach("a", force=True)
        assert daemon.names() == []
        run("sh", "-c", f"echo 3 > /proc/sys/vm/drop_caches; ! cat {directory}/file")
    eventually(lambda: leftovers(daemon.root) == [], "the old device is gone with its last user")
    run("fsck.ext4", "-fy", source, check=False)
    with mounted(str(source), place / "mnt", "-o", "ro,loop") as directory:
        assert (directory / "file").read_bytes() == PATTERN
    eventually(lambda: find_by_backing(str(source)) == [], "the loop device of that mount is gone")
    assert daemon.device("a", source, transport=transport)


@pytest.mark.parametrize("qsd", ["stopped", "dead"])
def test_detach_by_force_frees_those_who_wait_for_a_server(
    daemon: Daemon, place: Path, transport: str, qsd: str
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    former = daemon.qsd("a")
    if qsd == "dead":
        # No successor comes: the source is not there any more.
        source.rename(place / "b.raw")
        os.kill(former, signal.SIGKILL)
        eventually(lambda: not daemon.online("a"), "it has noticed")
    else:
        os.kill(former, signal.SIGSTOP)
    with subprocess.Popen(
        ["dd", f"if={device}", "of=/dev/null", "bs=4k", "iflag=direct"], stderr=subprocess.DEVNULL
    ) as reader:
        waits = qsd == "stopped" or transport != "fuse"  # with FUSE, QSD's death ends I/O at once
        if waits:
            eventually(lambda: " D " in Path(f"/proc/{reader.pid}/stat").read_text(), "the reader waits")
        daemon.detach("a", force=True, timeout=60)
        assert reader.wait(20) != 0 or not waits
    assert daemon.names() == []
    assert not Path(f"/proc/{former}").exists()
    eventually(lambda: leftovers(daemon.root) == [], "nothing is left")


def test_what_was_written_is_flushed_by_a_successor_when_qsd_died_before_the_detach(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    writes(device, 0, PATTERN)
    daemon.kill_qsd("a")
    daemon.detach("a", timeout=60)
    assert source.read_bytes()[: len(PATTERN)] == PATTERN
    assert leftovers(daemon.root) == []


# Again and again -------------------------------------------------------------------------------------------------


def test_twenty_volumes_come_and_go_at_once(daemon: Daemon, place: Path, transport: str) -> None:
    names = [f"v{number}" for number in range(20)]
    for name in names:
        image(place / name)

    def attach(name: str) -> str:
        if IN_MACHINE:  # to start a command there takes longer than all that it asks for
            return daemon.device(name, place / name, format="qcow2", transport=transport, timeout=100)
        return daemon.cli("attach", name, str(place / name), "--format", "qcow2", "--transport", transport).stdout

    def detach(name: str) -> object:
        return daemon.detach(name, timeout=100) if IN_MACHINE else daemon.cli("detach", name)

    with ThreadPoolExecutor(len(names)) as pool:
        devices = set(pool.map(attach, names))
        assert len(devices) == 20
        assert daemon.states() == dict.fromkeys(names, "online")
        list(pool.map(detach, names))
    assert leftovers(daemon.root) == []


def test_attached_and_detached_again_and_again_nothing_is_left(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a.qcow2")
    assert daemon.process is not None
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")

    def attach_and_detach() -> None:
        daemon.device("a", source, format="qcow2", transport=transport)
        daemon.detach("a")

    def disks() -> list[str]:
        return sorted(entry.name for entry in Path("/sys/block").iterdir())

    attach_and_detach()
    before, disks_before = len(list(descriptors.iterdir())), disks()
    for _ in range(10 if IN_MACHINE else 200):
        attach_and_detach()
    eventually(lambda: len(list(descriptors.iterdir())) <= before, "the daemon's descriptors are closed")
    eventually(lambda: disks() == disks_before, "as many disks as before")
    assert leftovers(daemon.root) == []


# By an accident --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["before connect", "connect: made", "after connect"])
def test_the_daemon_dies_while_it_makes_the_device_and_the_next_one_finishes_it(
    stopped: Daemon, place: Path, transport: str, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault=fault)
    assert error_of(lambda: stopped.attach("a", source, transport=transport)).code is ErrorCode.DAEMON_UNREACHABLE
    stopped.wait_dead()
    stopped.start()
    device = stopped.device("a", source, transport=transport)
    writes(device, 0, PATTERN)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    stopped.detach("a")
    assert leftovers(stopped.root) == []
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


@pytest.mark.parametrize("fault", ["before disconnect", "after disconnect"])
def test_the_daemon_dies_while_it_takes_the_device_away_and_the_next_one_finishes_it(
    stopped: Daemon, place: Path, transport: str, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault=fault)
    writes(stopped.device("a", source, transport=transport), 0, PATTERN)
    assert error_of(lambda: stopped.detach("a")).code is ErrorCode.DAEMON_UNREACHABLE
    stopped.wait_dead()
    stopped.start()
    eventually(lambda: stopped.names() == [], "detached")
    assert leftovers(stopped.root) == []
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def test_daemon_and_qsd_die_together(daemon: Daemon, place: Path, transport: str) -> None:
    writes(daemon.device("a", image(place / "a.raw", "raw"), transport=transport), 0, PATTERN)
    former = daemon.qsd("a")
    daemon.kill()
    os.kill(former, signal.SIGKILL)
    daemon.start()
    eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_flush_that_succeeds_after_qsd_died_has_lost_nothing(
    daemon: Daemon, place: Path, transport: str, format: str
) -> None:
    device = daemon.device("a", image(place / "a", format, "256M"), format=format, transport=transport)
    blocks = {offset: os.urandom(4096) for offset in range(0, 256 << 20, 3 << 20)}
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            for offset, block in blocks.items():
                buffer[:] = block
                assert os.pwritev(fd, [buffer], offset) == 4096  # acknowledged, and not flushed
            former = daemon.kill_qsd("a")
            eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
            if transport == "fuse" or format == "qcow2":
                # It is told that something may be lost; a new device has what is there.
                with pytest.raises(OSError, match=r"Input/output error|No such device"):
                    os.fsync(fd)
                reads(str(daemon.show("a")["device"]), 0, 4096)
                return
            assert daemon.show("a")["device"] == device
            os.fsync(fd)
            for offset, block in blocks.items():
                assert os.preadv(fd, [buffer], offset) == 4096
                assert buffer[:] == block, f"the block at {offset} is lost"
    finally:
        os.close(fd)
