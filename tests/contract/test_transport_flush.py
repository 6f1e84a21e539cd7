"""What a flush promises when its qemu-storage-daemon is not the one that acknowledged the writes.

QEMU leaves out a flush of a disk that it has not written to. So a successor must be made to flush what its predecessor
acknowledged, and a server that fails everything must fail a flush, too, be it the first request that it gets.
"""

from __future__ import annotations

import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from storaged.host.process import thread_states as process_states
from tests.harness import Daemon, eventually, image, run, writes
from tests.trouble import PATTERN

#: Says when it has opened the device, waits for a word, flushes.
FLUSHER = """
import os, sys
device = os.open(sys.argv[1], os.O_RDWR)
print("open", flush=True)
sys.stdin.readline()
os.fsync(device)
"""


def flusher(device: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", FLUSHER, device], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "open\n"
    return process


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def waits(process: subprocess.Popen[str]) -> bool:
    """It waits in the kernel (a flush is no request in flight on every device)."""
    return " D " in Path(f"/proc/{process.pid}/stat").read_text()


@pytest.mark.parametrize("keep", [True, False])
def test_a_flush_that_waits_fails_by_a_rescue_though_nothing_is_written_any_more(
    daemon: Daemon, place: Path, transport: str, keep: bool
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    writes(device, 0, PATTERN)
    process = flusher(device)
    qsd = daemon.qsd("a")
    os.kill(qsd, signal.SIGSTOP)
    eventually(lambda: set(process_states(qsd)) == {"T"}, "all its threads stand still")
    go(process)
    eventually(lambda: waits(process), "it waits")
    daemon.call("Rescue", name="a", keep=keep and transport != "fuse", timeout=45)
    assert process.wait(20) != 0
    if keep and transport != "fuse":
        later = flusher(device)
        go(later)
        assert later.wait(20) != 0
    assert daemon.call("Resume", name="a")["volume"]["state"] == "online"
    daemon.detach("a")


def flushes(device: str) -> int:
    """How many flushes a block device has done (Documentation/block/stat.rst in the kernel)."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[15])


def test_a_successor_flushes_what_its_predecessor_acknowledged(daemon: Daemon, place: Path, transport: str) -> None:
    disk = image(place / "disk", "raw")
    source = run("losetup", "--find", "--show", disk).stdout.strip()
    try:
        device = daemon.device("a", source, transport=transport)
        run("dd", "if=/dev/urandom", f"of={device}", "bs=4k", "count=1", "oflag=direct")
        former = daemon.kill_qsd("a")
        before = flushes(source)
        eventually(lambda: daemon.replaced("a", former), "replaced")
        process = flusher(str(daemon.show("a")["device"]))
        go(process)
        assert process.wait(20) == 0
        assert flushes(source) > before
        daemon.detach("a")
    finally:
        run("losetup", "--detach", source)


def test_a_write_that_has_to_be_on_the_disk_is_though_it_comes_right_after_a_flush(
    daemon: Daemon, place: Path, transport: str
) -> None:
    """So does the journal of a filesystem commit: a flush, and a write with FUA (O_DSYNC, without the page cache)."""
    disk = image(place / "disk", "raw")
    source = run("losetup", "--find", "--show", disk).stdout.strip()
    try:
        device = daemon.device("a", source, transport=transport)
        with mmap.mmap(-1, 4096) as page:
            fd = os.open(device, os.O_RDWR | os.O_DIRECT | os.O_DSYNC)
            try:
                for round in range(4):
                    page[:4] = bytes([round]) * 4
                    os.fsync(fd)
                    before = flushes(source)
                    os.pwrite(fd, page, 0)
                    assert flushes(source) > before, f"write {round}"
            finally:
                os.close(fd)
        daemon.detach("a")
    finally:
        run("losetup", "--detach", source)
