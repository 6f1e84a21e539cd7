"""A host without memory whose dirty pages go to storaged's own disks: it goes on, and nothing is lost.

Most of the machine's memory is taken away meanwhile, as huge pages: the pressure is that of the whole machine. A
deadlock would stop pytest, too. So a process that needs no memory gives the huge pages back when it has lasted too
long, and the test fails. The volumes are on a disk of their own: on the machine's, QSD would wait for a filesystem
whose journal waits for memory.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storaged.host import scope
from tests.harness import Daemon, eventually, image, leftovers, mounted, run

MIB = 1 << 20
#: What is left to all programs and the page cache.
LEFT = 320 * MIB
PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE = 0x80000, 0x100000  # include/linux/sched.h
SLICE = Path(__file__).parents[2] / "systemd" / "storaged.slice"

#: Takes memory, chunk by chunk, each with a content of its own, and looks at all of it in the end.
HOG = r"""
import sys
def content(number):
    return (b"%015d\n" % number) * 65536
chunks = []
for number in range(int(sys.argv[1])):
    chunks.append(content(number))
    print(number, flush=True)
sys.exit(any(chunk != content(number) for number, chunk in enumerate(chunks)))
"""

#: Ends a deadlock after a while, and has the kernel say who was in it. It opens nothing then.
WATCHDOG = r"""
import ctypes, os, sys, time
libc = ctypes.CDLL(None)
if libc.prctl(57, 1, 0, 0, 0) or libc.mlockall(3):  # PR_SET_IO_FLUSHER; MCL_CURRENT | MCL_FUTURE
    sys.exit("it cannot protect itself")
with open("/proc/self/oom_score_adj", "w") as file:
    file.write("-1000")
tell = os.open("/proc/sysrq-trigger", os.O_WRONLY)
pages = os.open("/proc/sys/vm/nr_hugepages", os.O_WRONLY)
print("ready", flush=True)
time.sleep(float(sys.argv[1]))
os.write(tell, b"w")
os.write(pages, b"0")
"""
SPARE = "/dev/vdb"  # tests/vm/machine/qemu.py

pytestmark = pytest.mark.timeout(240)  # the machine is emulated


@pytest.fixture(scope="module", autouse=True)
def slice_unit() -> Iterator[None]:
    """The unit file of the slice is installed."""
    installed = Path("/run/systemd/system") / SLICE.name
    run("systemctl", "stop", SLICE.name, check=False)
    shutil.copy(SLICE, installed)
    run("systemctl", "daemon-reload")
    yield
    installed.unlink()
    run("systemctl", "daemon-reload")


@pytest.fixture(scope="module")
def little_memory(slice_unit: None) -> Iterator[None]:
    """There is no more than LEFT."""
    pages, reserve = Path("/proc/sys/vm/nr_hugepages"), Path("/proc/sys/vm/min_free_kbytes")
    former = reserve.read_text()
    reserve.write_text("16384")  # as with little memory; it was chosen for all of it
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    pages.write_text(str((meminfo("MemAvailable") - LEFT) // meminfo("Hugepagesize")))
    try:
        assert meminfo("MemAvailable") < LEFT + 64 * MIB, "memory is fragmented"
        yield
    finally:
        pages.write_text("0")
        reserve.write_text(former)


@pytest.fixture
def daemon(stopped: Daemon) -> Daemon:
    """In a unit that is not swapped, as its service is: what a QSD has before it is in its own scope counts there."""
    stopped.start(command=["systemd-run", "-q", "--scope", "--collect", "-p", "MemorySwapMax=0"], wait=False)
    eventually(stopped.answers, "the daemon answers", timeout=60)
    return stopped


@contextmanager
def deadline(seconds: int) -> Iterator[None]:
    """Fail if the block takes longer; the machine gets its memory back then, so that it can end."""
    words = [sys.executable, "-IS", "-c", WATCHDOG, str(seconds)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as watchdog:
        assert watchdog.stdout is not None
        assert watchdog.stdout.readline() == "ready\n"
        try:
            yield
            assert watchdog.poll() is None, "it stood still; the kernel's log says where"
        finally:
            watchdog.kill()


def meminfo(key: str) -> int:
    """Bytes."""
    found = re.search(rf"^{key}: *(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def vmstat(key: str) -> int:
    return int(dict(line.split() for line in Path("/proc/vmstat").read_text().splitlines())[key])


def status(pid: int, key: str) -> int:
    """Bytes, of /proc/PID/status."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) << 10


def flags(pid: int) -> list[int]:
    """The PF_ flags of each thread."""
    return [
        int(path.read_text().rpartition(")")[2].split()[6]) for path in Path(f"/proc/{pid}/task").glob("*/stat")
    ]


def in_scope(daemon: Daemon, name: str) -> bool:
    pid = daemon.qsd(name)
    return scope.cgroup_of(pid) == f"/storaged.slice/{scope.unit_name(name, pid)}"


def main_pid(daemon: Daemon) -> int:
    assert daemon.process is not None
    return daemon.process.pid


@contextmanager
def hog(mebibytes: int) -> Iterator[subprocess.Popen[bytes]]:
    words = [sys.executable, "-IS", "-c", HOG, str(mebibytes)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("transport", ["vduse", "nbd", "fuse"])
def test_every_thread_of_qsd_is_an_io_flusher_and_none_is_killed_or_swapped(
    daemon: Daemon, place: Path, transport: str
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    # Threads that were made by the load, too.
    run("fio", "--name=x", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--direct=1", "--ioengine=libaio",
        "--iodepth=32", "--size=64M", "--io_size=4M")
    qsd, main = daemon.qsd("a"), main_pid(daemon)
    wanted = PF_MEMALLOC_NOIO | PF_LOCAL_THROTTLE
    assert len(flags(qsd)) > 4
    assert all(flag & wanted == wanted for flag in [*flags(qsd), *flags(main)])
    assert Path(f"/proc/{qsd}/oom_score_adj").read_text().strip() == "-1000"
    assert Path(f"/proc/{main}/oom_score_adj").read_text().strip() == "-900"
    assert status(main, "VmLck") >= status(main, "VmRSS")
    eventually(lambda: in_scope(daemon, "a"), "in its scope")
    group = Path(f"/sys/fs/cgroup{scope.cgroup_of(qsd)}")
    assert (group / "memory.swap.max").read_text().strip() == "0"
    assert (group / "memory.min").read_text().strip() == str(scope.MEMORY_MIN)
    eventually(lambda: int((group.parent / "memory.min").read_text()) >= scope.MEMORY_MIN, "the slice's minimum")


def test_scopes_of_two_volumes_and_of_a_successor_count_in_the_slice_and_stay_until_the_end_of_a_shutdown(
    daemon: Daemon, place: Path
) -> None:
    for name in ("a", "b-1_x.y"):
        daemon.attach(name, image(place / f"{name}.raw", "raw"), transport="nbd")
        eventually(lambda name=name: in_scope(daemon, name), "in its scope")  # type: ignore[misc]
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former) and in_scope(daemon, "a"), "the successor has a scope")
    minimum = Path("/sys/fs/cgroup/storaged.slice/memory.min")
    eventually(lambda: int(minimum.read_text()) >= 2 * scope.MEMORY_MIN, "the slice's minimum")
    units = [scope.unit_name(name, daemon.qsd(name)) for name in ("a", "b-1_x.y")]
    for unit in [SLICE.name, *units]:
        said = run("systemctl", "show", "-p", "Conflicts,ActiveState", unit).stdout
        assert "ActiveState=active" in said
        assert "shutdown.target" not in said
    # The daemon may go and come: its QSDs are not in its own group.
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    assert [scope.unit_name(name, daemon.qsd(name)) for name in ("a", "b-1_x.y")] == units
    for name in ("a", "b-1_x.y"):
        daemon.detach(name)
    eventually(lambda: "storaged-qsd" not in run("systemctl", "list-units", "--all", "storaged-qsd*").stdout, "gone")


@pytest.mark.parametrize(("transport", "cache"), [("vduse", "writeback"), ("nbd", "none")])
def test_more_dirty_pages_than_memory_are_written_though_qsd_dies_meanwhile(
    daemon: Daemon, place: Path, little_memory: None, transport: str, cache: str
) -> None:
    device = daemon.device("a", SPARE, transport=transport, options={"cache": cache})
    run("mkfs.ext4", "-q", device, "700M")
    block, digest = bytearray(os.urandom(MIB)), hashlib.sha256()
    count = LEFT // MIB + 100
    with deadline(100), mounted(device, place / "mnt") as directory:
        with open(directory / "file", "wb") as file:
            for number in range(count):
                block[:8] = number.to_bytes(8)
                digest.update(block)
                file.write(block)
                if number == count // 2:
                    former = daemon.kill_qsd("a")
            os.fsync(file.fileno())
        eventually(lambda: daemon.replaced("a", former), "replaced")
    with mounted(device, place / "mnt") as directory, open(directory / "file", "rb") as file:
        assert hashlib.file_digest(file, "sha256").digest() == digest.digest()
    run("fsck.ext4", "-fn", device)


@contextmanager
def others_spared(pids: set[int]) -> Iterator[None]:
    """The OOM killer takes any of ``pids`` before all other processes that are there now."""
    former: dict[Path, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        pid = int(entry.name)
        try:
            score = int((entry / "oom_score_adj").read_text())
            if pid not in pids and (entry / "cmdline").read_bytes() and score > -600:
                (entry / "oom_score_adj").write_text("-600")
                former[entry / "oom_score_adj"] = score
        except (FileNotFoundError, ProcessLookupError):
            continue
    try:
        yield
    finally:
        for path, score in former.items():
            if path.exists():
                path.write_text(str(score))


def test_the_oom_killer_takes_a_hog_and_neither_qsd_nor_the_daemon(
    daemon: Daemon, place: Path, little_memory: None
) -> None:
    pids = {main_pid(daemon)}
    for transport in ("vduse", "nbd"):
        daemon.attach(transport, image(place / f"{transport}.raw", "raw"), transport=transport)
        pids.add(daemon.qsd(transport))
    killed = vmstat("oom_kill")
    with deadline(100), others_spared(pids), hog(3000) as process:
        # Whoever is not protected is taken before it: its score is below that of a process that is as it was born.
        Path(f"/proc/{process.pid}/oom_score_adj").write_text("-500")
        assert process.stdout is not None
        while process.stdout.read(65536):
            pass
        assert process.wait() == -signal.SIGKILL
    assert vmstat("oom_kill") == killed + 1
    assert {main_pid(daemon), daemon.qsd("vduse"), daemon.qsd("nbd")} == pids
    for transport in ("vduse", "nbd"):
        daemon.detach(transport)
    assert leftovers(daemon.root) == []
