"""On Debian 12 the kernel's VDUSE comes from the package storaged-vduse-dkms (kernel-config/dkms)."""

from __future__ import annotations

import os
import platform
import stat
from pathlib import Path

import pytest

from tests.harness import run

# Elsewhere none of this is collected: in CI a test that is skipped is one that is missing.
__test__ = platform.freedesktop_os_release().get("VERSION_ID") == "12"

MODULES = ("vdpa", "vduse", "virtio_vdpa")
KERNEL = os.uname().release


@pytest.mark.parametrize("module", MODULES)
def test_modules_come_from_dkms(module: str) -> None:
    assert run("modinfo", "-n", module).stdout == f"/lib/modules/{KERNEL}/updates/dkms/{module}.ko\n"
    assert run("modinfo", "-F", "vermagic", module).stdout.split()[0] == KERNEL
    assert run("modinfo", "-F", "signer", module).stdout == "DKMS module signing key\n"


def test_source_is_as_new_as_the_kernel() -> None:
    [log] = Path("/var/lib/dkms/storaged-vduse").glob(f"*/{KERNEL}/*/log/make.log")
    first, second = log.read_text().splitlines()[:2]
    assert first.startswith("storaged-vduse: source 6.1.")
    assert not second.startswith("storaged-vduse: warning")


def test_modules_load() -> None:
    run("modprobe", "-a", "vduse", "virtio_vdpa")
    assert [module for module in MODULES if not Path("/sys/module", module).is_dir()] == []
    assert stat.S_ISCHR(os.stat("/dev/vduse/control").st_mode)
    assert run("vdpa", "mgmtdev", "show").stdout.startswith("vduse:")
