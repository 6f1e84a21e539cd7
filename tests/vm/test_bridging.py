"""Transports whose device stays when its QSD goes: what its users see is a pause, or errors, and nothing else."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image, mounted, reads, run
from tests.trouble import BLOCK, PATTERN, direct_write, kinds, reader, trouble

BRIDGING = ("vduse", "nbd")


@pytest.fixture(params=BRIDGING)
def transport(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    return str(request.param)


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_device_that_is_kept_fails_until_it_is_resumed_and_goes_on_with_all_that_was_written(
    daemon: Daemon, place: Path, transport: str, format: str
) -> None:
    device = daemon.device("a", image(place / "a", format), format=format, transport=transport)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        # Acknowledged and not flushed: a qcow2's QSD has in its memory where it is.
        direct_write(fd, 8 << 20, b"w" * BLOCK)
        daemon.call("Rescue", name="a", keep=True)
        seen = daemon.show("a")
        assert (seen["state"], seen["device"]) == ("rescued", device)
        for offset in (0, 8 << 20):
            with pytest.raises(OSError, match="error"):
                direct_write(fd, offset, b"x" * BLOCK)
        assert error_of(lambda: daemon.detach("a")).code is ErrorCode.DEVICE_IN_USE
        assert daemon.show("a")["state"] == "rescued"
        volume = daemon.call("Resume", name="a")["volume"]
        assert (volume["state"], volume["device"]) == ("online", device)
        direct_write(fd, 0, b"y" * BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert reads(device, 8 << 20, BLOCK) == b"w" * BLOCK
    assert reads(device, 0, BLOCK) == b"y" * BLOCK
    daemon.detach("a")


def test_a_device_that_is_kept_frees_who_waits_in_the_kernel(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
        run("sync", "-f", directory)
        os.kill(daemon.qsd("a"), signal.SIGSTOP)
        with reader(device) as process:
            daemon.call("Rescue", name="a", keep=True, timeout=45)
            assert process.wait(20) != 0
        assert daemon.show("a")["device"] == device
        daemon.call("Resume", name="a")
    run("e2fsck", "-fy", device, check=False)
    with mounted(device, place / "mnt") as directory:
        assert (directory / "file").read_bytes() == PATTERN
    daemon.detach("a")


def test_a_resume_without_a_source_leaves_the_device_failing(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    daemon.call("Rescue", name="a", keep=True)
    os.rename(source, place / "away")
    assert error_of(lambda: daemon.call("Resume", name="a")).code is ErrorCode.SOURCE_MISSING
    seen = daemon.show("a")
    assert (seen["state"], seen["device"]) == ("rescued", device)
    with pytest.raises(OSError, match="error"):
        reads(device, 0, BLOCK)
    os.rename(place / "away", source)
    daemon.call("Resume", name="a")
    reads(device, 0, BLOCK)
    daemon.detach("a")


def test_by_policy_a_stopped_qsd_is_replaced_without_an_error(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device(
        "a", image(place / "a.raw", "raw"), transport=transport, options={"on-hang": "restart-after:3"}
    )
    former = daemon.qsd("a")
    os.kill(former, signal.SIGSTOP)
    with reader(device) as process:
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=40)
        assert process.wait(30) == 0
    assert not os.path.exists(f"/proc/{former}"), "it can never write again"
    assert daemon.show("a")["device"] == device
    assert kinds(daemon)[-2:] == ["hang", "recovered"]
    assert "is stopped" in daemon.show("a")["history"][-2]["message"]
    assert daemon.show("a")["paused"] > 0
    daemon.detach("a")


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_an_upgrade_under_io_is_a_pause(daemon: Daemon, place: Path, transport: str, format: str) -> None:
    device = daemon.device("a", image(place / "a", format), format=format, transport=transport)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    direct_write(fd, 32 << 20, b"w" * BLOCK)
    with subprocess.Popen(
        [
            "fio", "--name=load", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--size=16m", "--iodepth=16",
            "--ioengine=libaio", "--direct=1", "--verify=crc32c", "--time_based", "--runtime=6", "--output=/dev/null",
        ]
    ) as fio:
        for _ in range(2):
            former = daemon.qsd("a")
            volume = daemon.call("Upgrade", name="a")["volume"]
            assert (volume["state"], volume["device"]) == ("online", device)
            assert volume["qsd_pid"] != former
        assert fio.wait(90) == 0
    os.fsync(fd)
    os.close(fd)
    assert reads(device, 32 << 20, BLOCK) == b"w" * BLOCK
    assert "upgrade" in kinds(daemon)
    assert "death" not in kinds(daemon)
    daemon.detach("a")


def test_by_policy_a_device_without_a_source_is_given_up(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport, options={"on-stall": "fail-after:4"})
    os.rename(source, place / "away")
    daemon.kill_qsd("a")
    with reader(device) as process:
        eventually(lambda: trouble(daemon) == "no-server", "it is found out")
        eventually(lambda: daemon.show("a")["state"] == "rescued", "rescued", timeout=60)
        assert process.wait(20) != 0
    os.rename(place / "away", source)
    assert daemon.call("Resume", name="a")["volume"]["device"] == device
    reads(device, 0, BLOCK)
    daemon.detach("a")


@pytest.mark.parametrize("fault", ["hand over: unexported", "hand over: closed"])
def test_the_daemon_dies_within_an_upgrade_and_the_next_one_goes_on_without_a_loss(
    stopped: Daemon, place: Path, transport: str, fault: str
) -> None:
    stopped.start(fault=fault)
    device = stopped.device("a", image(place / "a", "qcow2"), format="qcow2", transport=transport)
    fd = os.open(device, os.O_RDWR | os.O_DIRECT)
    try:
        direct_write(fd, 8 << 20, b"w" * BLOCK)
        assert error_of(lambda: stopped.call("Upgrade", name="a")).code is ErrorCode.DAEMON_UNREACHABLE
        stopped.wait_dead()
        stopped.start()
        eventually(lambda: stopped.online("a"), "it goes on", timeout=60)
        assert stopped.show("a")["device"] == device
        direct_write(fd, 0, b"x" * BLOCK)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert reads(device, 8 << 20, BLOCK) == b"w" * BLOCK
    stopped.detach("a", timeout=60)


@pytest.mark.parametrize("fault", ["after stop", "after rescue"])
def test_the_daemon_dies_within_a_rescue_and_the_next_one_finishes_it(
    stopped: Daemon, place: Path, transport: str, fault: str
) -> None:
    stopped.start(fault=fault)
    device = stopped.device("a", image(place / "a.raw", "raw"), transport=transport)
    os.kill(stopped.qsd("a"), signal.SIGSTOP)
    with reader(device) as process:
        error = error_of(lambda: stopped.call("Rescue", name="a", keep=True))
        assert error.code is ErrorCode.DAEMON_UNREACHABLE
        stopped.wait_dead()
        stopped.start()
        eventually(lambda: stopped.show("a")["state"] == "rescued", "finished", timeout=60)
        assert process.wait(20) != 0
    assert stopped.call("Resume", name="a")["volume"]["device"] == device
    reads(device, 0, BLOCK)
    stopped.detach("a", timeout=60)
