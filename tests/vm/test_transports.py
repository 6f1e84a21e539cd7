"""VDUSE and NBD when something goes wrong with names, numbers and waits that all of the host share."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.process import identify
from tests.harness import Daemon, error_of, eventually, image, leftovers, luks_image, mounted, reads, run, writes

PATTERN = b"reviewed" * 8192


def backends() -> dict[str, str]:
    found = {}
    for entry in Path("/sys/block").glob("nbd*/backend"):
        with suppress(OSError):
            found[entry.parent.name] = entry.read_text().strip()
    return found


@pytest.fixture
def second(place: Path) -> Iterator[Daemon]:
    """Another daemon of the same host."""
    daemon = Daemon(place / "second")
    daemon.root.mkdir()
    yield daemon
    if daemon.process is not None:
        daemon.end()


def modules() -> set[str]:
    return {line.split()[0] for line in Path("/proc/modules").read_text().splitlines()}


def test_looking_loads_no_module(stopped: Daemon, place: Path) -> None:
    for name in ("nbd", "virtio_vdpa", "vduse", "vdpa", "loop", "fuse"):
        run("modprobe", "-r", name, check=False)
    before = modules()
    run("storaged", "doctor", check=False)
    assert modules() == before
    stopped.start()
    stopped.device("a", image(place / "a.raw", "raw"), transport="fuse")
    assert modules() - before <= {"fuse", "loop"}
    stopped.detach("a")


@pytest.mark.parametrize("transport", ["nbd", "vduse"])
def test_a_device_that_another_daemon_has_made_since_is_left_alone(
    stopped: Daemon, second: Daemon, place: Path, transport: str
) -> None:
    """A volume of the same name in two daemons: the first lost its QSD and its device while nobody looked."""
    stopped.start()
    device = stopped.device("a", image(place / "a", "qcow2"), format="qcow2", transport=transport)
    former = stopped.qsd("a")
    stopped.kill()
    if transport == "nbd":
        run("nbd-client", "-d", device)
        eventually(lambda: backends() == {}, "disconnected")
    else:
        Path("/sys/bus/vdpa/drivers/virtio_vdpa/unbind").write_text("storaged.a")
        run("python3", "-c", "from storaged.host import vdpa; vdpa.delete('storaged.a')", check=False)
    os.kill(former, signal.SIGKILL)
    eventually(lambda: identify(former) is None, "it is dead")
    if transport == "vduse":
        run("python3", "-c", "from storaged.host import vduse; vduse.destroy('storaged.a')", check=False)
    second.start()
    other = second.device("a", image(place / "b.raw", "raw"), transport=transport)
    writes(other, 0, PATTERN)
    stopped.start()
    time.sleep(5)
    assert reads(other, 0, len(PATTERN)) == PATTERN
    writes(other, 0, PATTERN)
    error = error_of(lambda: stopped.detach("a", force=True, timeout=20))
    assert error.code is ErrorCode.NAME_TAKEN
    assert reads(other, 0, len(PATTERN)) == PATTERN
    writes(other, 0, PATTERN)
    assert second.online("a")
    second.detach("a")
    stopped.detach("a", force=True)


def test_a_disk_that_was_bound_anew_is_not_taken_from_under_its_user(stopped: Daemon, place: Path) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a.raw", "raw"), transport="vduse")
    run("mkfs.ext4", "-q", device)
    former = stopped.qsd("a")
    stopped.kill()
    for action in ("unbind", "bind"):
        Path(f"/sys/bus/vdpa/drivers/virtio_vdpa/{action}").write_text("storaged.a")
    disks = Path("/sys/bus/vdpa/devices/storaged.a").glob("virtio*/block/*")
    other = f"/dev/{next(disks).name}"
    with mounted(other, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
        os.kill(former, signal.SIGKILL)
        stopped.start()
        eventually(lambda: stopped.replaced("a", former), "replaced", timeout=60)
        run("sync", directory / "file")
        assert stopped.show("a")["device"] == other
        error = error_of(lambda: stopped.detach("a"))
        assert error.code is ErrorCode.DEVICE_IN_USE
    stopped.detach("a", timeout=60)


def test_an_nbd_device_that_comes_when_nobody_waits_for_it_any_more_goes_again(
    stopped: Daemon, place: Path
) -> None:
    stopped.start()
    stopped.device("v", image(place / "v.raw", "raw"), transport="vduse")
    stopped.device("w", image(place / "w.raw", "raw"), transport="nbd")
    run("sh", "-c", "echo 25 > /sys/class/vduse/storaged.v/msg_timeout")
    qsd = stopped.qsd("v")
    os.kill(qsd, signal.SIGSTOP)
    # All generic netlink of the host stands still meanwhile.
    with subprocess.Popen(["vdpa", "dev", "del", "storaged.v"]) as deleter:
        time.sleep(1)
        error = error_of(lambda: stopped.attach("n", image(place / "n.raw", "raw"), transport="nbd", timeout=5))
        assert error.code in (ErrorCode.HOST_STUCK, ErrorCode.TIMEOUT), error
        deleter.wait(90)
    time.sleep(3)
    os.kill(qsd, signal.SIGCONT)
    assert "storaged.n" not in backends().values()
    assert "n" in stopped.names() or not os.path.exists(stopped.layout.volume_dir("n"))
    stopped.detach("v", force=True)
    stopped.detach("w")
    if "n" in stopped.names():
        stopped.detach("n", force=True)
    assert stopped.device("n", place / "n.raw", transport="nbd")
    stopped.detach("n")


def test_an_abandoned_device_whose_number_is_used_again_is_not_forgotten(stopped: Daemon, place: Path) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a", "qcow2"), format="qcow2", transport="nbd")
    former = stopped.qsd("a")
    with open(device, "rb"):
        stopped.kill()
        os.kill(former, signal.SIGKILL)
        stopped.start(fault="before connect", wait=False)
        stopped.wait_dead()
    eventually(lambda: backends() == {}, "gone with its last user")
    stopped.start(fault="connect: made", wait=False)
    stopped.wait_dead()
    stopped.start()
    eventually(lambda: stopped.online("a"), "online", timeout=40)
    assert len(backends()) == 1, backends()
    stopped.detach("a", timeout=60)
    assert leftovers(stopped.root) == []


def test_luks_goes_on_with_a_successor(stopped: Daemon, place: Path) -> None:
    (place / "key").write_bytes(b"secret")
    luks_image(place / "a.luks", place / "key")
    stopped.start()
    options = {"key-file": str(place / "key"), "logical-block-size": "4096"}
    for transport in ("nbd", "vduse"):
        device = stopped.device("a", place / "a.luks", format="luks", transport=transport, options=options)
        writes(device, 0, PATTERN)
        former = stopped.kill_qsd("a")
        eventually(lambda former=former: stopped.replaced("a", former), "replaced", timeout=60)  # type: ignore[misc]
        assert stopped.show("a")["device"] == device
        assert reads(device, 0, len(PATTERN)) == PATTERN
        error = error_of(lambda: stopped.attach("b", place / "a.luks", transport="fuse"))
        assert error.code is ErrorCode.SOURCE_IN_USE
        stopped.detach("a")


@pytest.mark.parametrize("transport", ["vduse", "nbd"])
def test_a_mount_of_a_partition_in_another_namespace_is_a_user(stopped: Daemon, place: Path, transport: str) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a.raw", "raw"), transport=transport)
    run("sfdisk", "-q", device, stdin="8M,16M,L\n")
    part = f"{device}{'' if transport == 'vduse' else 'p'}1"
    eventually(lambda: Path(part).exists(), "the partition")
    run("mkfs.ext4", "-q", part)
    (place / "mnt").mkdir()
    with subprocess.Popen(["unshare", "-m", "sh", "-c", f"mount {part} {place}/mnt && echo ok && exec sleep 600"],
                          stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ok\n"
        error = error_of(lambda: stopped.detach("a"))
        process.kill()
        assert error.code is ErrorCode.DEVICE_IN_USE
        assert any("mounted on" in line for line in error.users), error.users
    eventually(lambda: "a" not in stopped.names() or _detached(stopped), "free again")


def _detached(stopped: Daemon) -> bool:
    try:
        stopped.detach("a")
    except StoragedError:
        return False
    return True


@pytest.mark.parametrize("transport", ["vduse", "nbd"])
def test_detach_by_force_frees_those_who_wait_for_storage_that_hangs_below_a_qsd_that_answers(
    stopped: Daemon, place: Path, transport: str
) -> None:
    stopped.start()
    below = stopped.device("x", image(place / "x.raw", "raw", "200M"), transport="fuse")
    run("mkfs.ext4", "-q", below)
    with mounted(below, place / "mnt") as directory:
        source = directory / "b.raw"
        source.write_bytes(os.urandom(32 << 20))
        run("sync", source)
        device = stopped.device("b", source, transport=transport)
        run("sh", "-c", "echo 3 > /proc/sys/vm/drop_caches")
        storage = stopped.qsd("x")
        os.kill(storage, signal.SIGSTOP)
        try:
            words = ["dd", f"if={device}", "of=/dev/null", "bs=64k", "iflag=direct", "skip=100"]
            with subprocess.Popen(words, stderr=subprocess.DEVNULL) as reader:
                try:
                    eventually(lambda: " D " in Path(f"/proc/{reader.pid}/stat").read_text(), "the reader waits")
                    assert any("errors" in note for note in stopped.detach("b", force=True, timeout=50)) or (
                        transport == "nbd"
                    )
                    assert reader.wait(10) != 0
                finally:
                    os.kill(storage, signal.SIGCONT)
        finally:
            os.kill(storage, signal.SIGCONT)
        assert stopped.names() == ["x"]
    stopped.detach("x")
