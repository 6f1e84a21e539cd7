"""The facts of this host that the doctor judges. Nothing is loaded, made or changed by looking."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from storaged.host import modules
from storaged.model.diagnosis import DeviceNode, Directory, Library
from storaged.model.modules import ModuleInfo, ModuleState
from storaged.qsd.version import QsdVersion, parse_version

#: Module and package of each have the same name.
_LIBRARIES = ("uvloop", "qemu.qmp", "asyncvarlink", "msgspec", "rich")
_QSD_DEADLINE = 10


def libraries() -> tuple[Library, ...]:
    """Import what storaged depends on, as the only proof that it is there and works."""
    return tuple(_library(name) for name in _LIBRARIES)


def libnbd() -> tuple[Library, bool]:
    """Return the module ``nbd``, and whether it is libnbd's: a package on PyPI has the same name."""
    try:
        module: Any = importlib.import_module("nbd")
    except Exception as error:
        return Library("nbd", problem=_why(error)), False
    try:
        return Library("nbd", version=str(module.NBD().get_version())), True
    except Exception:
        return Library("nbd", version=_version("nbd") or str(getattr(module, "__file__", "nbd"))), False


def qsd(binary: str) -> tuple[str | None, str, QsdVersion | None]:
    """Return the path of QSD (None if there is none), what ``--version`` said, and the version in it."""
    path = shutil.which(binary)
    if path is None:
        return None, "", None
    try:
        done = subprocess.run(
            [path, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=_QSD_DEADLINE,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return path, str(error), None
    output = done.stdout.decode(errors="replace").strip()
    return path, output.partition("\n")[0], parse_version(output)


def device_node(path: str, module: str, misc_name: str, *, root: str = "/") -> DeviceNode:
    """Try to open a driver's node. Not before the driver is there: opening would load its module."""
    registered = misc_name in _misc_drivers(root)
    info = modules.state(module, root=root)
    if registered and not info.present:
        info = ModuleInfo(info.name, ModuleState.BUILTIN)  # its files may be invisible, as in a container
    if not registered:
        return DeviceNode(path, info, "the driver is not there")
    try:
        os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return DeviceNode(path, info, error.strerror or str(error))
    return DeviceNode(path, info)


def loop_devices(*, root: str = "/") -> tuple[int, int]:
    """Return how many loop devices are free, and how many there are."""
    devices = list(Path(root, "sys/block").glob("loop*"))
    return sum(not (device / "loop/backing_file").exists() for device in devices), len(devices)


def directory(path: str) -> Directory:
    """Say whether ``path`` can be written, or be made, and how much room its filesystem has."""
    existing = path
    while not os.path.lexists(existing):
        existing = os.path.dirname(existing)
    if not os.path.isdir(existing):
        return Directory(path, problem=f"{existing} is no directory")
    try:
        space = os.statvfs(existing)
    except OSError as error:
        return Directory(path, problem=error.strerror or str(error))
    free = space.f_bavail * space.f_frsize
    if space.f_flag & os.ST_RDONLY:
        return Directory(path, problem="the filesystem is read-only", free=free)
    if not os.access(existing, os.W_OK | os.X_OK):
        return Directory(path, problem=f"no permission to write in {existing}", free=free)
    return Directory(path, free=free)


def _library(name: str) -> Library:
    try:
        importlib.import_module(name)
    except Exception as error:
        return Library(name, problem=_why(error))
    return Library(name, version=_version(name) or "of unknown version")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _why(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        return f"not installed for {sys.executable} ({error})"
    return f"cannot be imported: {error}"


def _misc_drivers(root: str) -> frozenset[str]:
    """Names of the drivers in /proc/misc, each with its node in /dev."""
    lines = _read(Path(root, "proc/misc")).splitlines()
    return frozenset(fields[1] for line in lines if len(fields := line.split()) == 2)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
