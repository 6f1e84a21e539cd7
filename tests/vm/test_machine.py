"""The test machine is what the other tests here take it for."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.harness import Daemon, image, leftovers, mounted, reads, run

TOP = Path(__file__).parents[2]


def test_systemd_runs_it() -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    done = run("systemctl", "is-system-running", "--wait", check=False)
    assert done.stdout == "running\n", run("systemctl", "--failed").stdout


def test_the_service_is_shut_in_as_far_as_the_documentation_says() -> None:
    stated = re.search(r"`systemd-analyze security storaged`: \*\*(\d+)\.(\d) ", (TOP / "docs/systemd.md").read_text())
    assert stated is not None
    unit = TOP / "systemd/storaged.service"
    threshold = int(stated[1] + stated[2])
    asked = ("systemd-analyze", "security", "--offline=yes", unit)
    told = run(*asked, f"--threshold={threshold}", check=False)
    assert told.returncode == 0, told.stdout[-200:]
    # Or the threshold would say nothing.
    assert run(*asked, f"--threshold={threshold - 10}", check=False).returncode != 0


def test_it_has_no_network() -> None:
    assert sorted(os.listdir("/sys/class/net")) == ["eth0", "lo"]
    assert "default" not in run("ip", "route").stdout


def test_udev_runs() -> None:
    assert run("systemctl", "is-active", "systemd-udevd").stdout == "active\n"
    run("udevadm", "settle", "--timeout=60")
    assert "ID_FS_TYPE=ext4" in run("udevadm", "info", "/dev/vda").stdout


@pytest.mark.parametrize("module", ["vduse", "virtio_vdpa", "nbd", "fuse", "loop"])
def test_kernel_modules(module: str) -> None:
    run("modprobe", "--dry-run", module)
    run("modprobe", module)
    assert Path(f"/sys/module/{module}").is_dir()


def test_vduse_can_be_opened() -> None:
    run("modprobe", "vduse")
    run("udevadm", "settle", "--timeout=60")
    os.close(os.open("/dev/vduse/control", os.O_RDWR))


def test_qsd_has_the_exports() -> None:
    said = run("qemu-storage-daemon", "--help").stdout
    for export in ("vduse-blk", "fuse", "nbd", "vhost-user-blk"):
        assert re.search(rf"--export \[?type=\]?{export},", said)


def test_fuse_from_end_to_end(daemon: Daemon, place: Path) -> None:
    disk = image(place / "disk.qcow2")
    device = daemon.device("web", disk, format="qcow2", transport="fuse")
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(b"x" * 100_000)
    assert reads(device, 1080, 2) == b"\x53\xef"  # the magic number of ext4
    daemon.detach("web")
    assert leftovers(daemon.root) == []
    run("qemu-img", "check", "-q", "-f", "qcow2", disk)
