"""What every transport that gives a host device promises after an accident: no write is lost in silence."""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.contract.conftest import HERE
from tests.harness import Daemon, error_of, eventually, image, leftovers, reads, size_of, writes

PATTERN = b"reviewed" * 8192


def test_a_snapshot_whose_qsd_died_is_usable_again(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source, transport=transport, snapshot=True)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced", timeout=40)
    writes(str(daemon.show("a")["device"]), 0, PATTERN)
    daemon.detach("a", timeout=60)
    assert source.read_bytes()[: len(PATTERN)] == bytes(len(PATTERN))


def test_a_snapshot_that_waits_can_be_detached_by_force(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport, snapshot=True)
    os.kill(daemon.qsd("a"), signal.SIGSTOP)
    with subprocess.Popen(
        ["dd", f"if={device}", "of=/dev/null", "bs=4k", "iflag=direct"], stderr=subprocess.DEVNULL
    ) as reader:
        eventually(lambda: " D " in Path(f"/proc/{reader.pid}/stat").read_text(), "the reader waits")
        daemon.detach("a", force=True, timeout=45)
        assert reader.wait(20) != 0
    eventually(lambda: leftovers(daemon.root) == [], "nothing is left")


def test_who_has_it_open_in_a_chroot_is_a_user(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    (place / "chroot/dev").mkdir(parents=True)
    node = place / "chroot/dev/disk"
    os.mknod(node, 0o600 | 0o060000, os.stat(device).st_rdev)
    with open(node, "r+b") as file, subprocess.Popen(["sleep", "600"], stdin=file) as process:
        error = error_of(lambda: daemon.detach("a"))
        process.kill()
        assert error.code is ErrorCode.DEVICE_IN_USE
        assert any(f"process {process.pid}" in line for line in error.users), error.users
    eventually(lambda: "a" not in daemon.names() or daemon.detach("a") == [], "free again")


def test_the_longest_name(daemon: Daemon, place: Path, transport: str) -> None:
    name = "a" + ".b-_" * 15 + "xy"
    assert len(name) == 63
    source = image(place / "a.raw", "raw")
    device = daemon.device(name, source, transport=transport)
    writes(device, 0, PATTERN)
    assert os.path.realpath(daemon.layout.link(name)) == device
    former = daemon.kill_qsd(name)
    eventually(lambda: daemon.replaced(name, former), "replaced", timeout=40)
    daemon.detach(name)
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def test_a_source_that_shrank_does_not_go_on_below_its_old_device(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source, device, former = unserved(daemon, place, transport, -(1 << 20))
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] not in ("starting", "recovering"), "settled", timeout=40)
    seen = daemon.show("a")
    assert seen["state"] == "failed", seen
    assert "source-changed" in str(seen), seen
    os.truncate(source, source.stat().st_size + (1 << 20))
    eventually(lambda: daemon.replaced("a", former), "it goes on", timeout=60)
    assert transport == "fuse" or daemon.show("a")["device"] == device
    daemon.detach("a", timeout=60)


def test_a_source_that_grew_while_nobody_served_it_keeps_its_size_below_the_device(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source, _, former = unserved(daemon, place, transport, 1 << 20)
    daemon.start()
    eventually(lambda: daemon.replaced("a", former), "served", timeout=40)
    seen = daemon.show("a")
    assert seen["source_size"] == source.stat().st_size
    assert size_of(seen["device"]) == seen["source_size"] - (1 << 20)
    daemon.detach("a", timeout=60)


def unserved(daemon: Daemon, place: Path, transport: str, change: int) -> tuple[Path, str, int]:
    """Attach, end daemon and QSD, and change the size of the source: it, the device, and QSD's former pid."""
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    former = daemon.qsd("a")
    daemon.kill()
    os.kill(former, signal.SIGKILL)
    os.truncate(source, source.stat().st_size + change)
    return source, device, former


FAULTS = {
    "fuse": ("after export", "connect: made"),
    "vduse": (
        "before rescue", "after rescue", "after export", "before disconnect", "after disconnect", "after stop",
        "connect: made",
    ),
    "nbd": ("before disconnect", "after disconnect", "connect: made", "after connect"),
}


@pytest.mark.parametrize(("transport", "fault"), [(name, fault) for name in HERE for fault in FAULTS[name]])
def test_the_daemon_dies_while_it_ends_a_device_that_lost_writes(
    daemon: Daemon, place: Path, transport: str, fault: str
) -> None:
    device = daemon.device("a", image(place / "a", "qcow2"), format="qcow2", transport=transport)
    former = daemon.qsd("a")
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, 4096) as buffer:
            buffer[:] = b"x" * 4096
            os.pwritev(fd, [buffer], 8 << 20)
        daemon.kill()
        os.kill(former, signal.SIGKILL)
        daemon.start(fault=fault, wait=False)
        daemon.wait_dead()
        daemon.start()
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
        with pytest.raises(OSError, match="error"):
            os.fsync(fd)
    finally:
        os.close(fd)
    writes(str(daemon.show("a")["device"]), 0, PATTERN)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
    daemon.detach("a", timeout=60)
    eventually(lambda: leftovers(daemon.root) == [], f"nothing is left; there is {leftovers(daemon.root)}")
