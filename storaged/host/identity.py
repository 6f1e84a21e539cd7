"""What tells one source from any other, however it is spelled, and what else it touches.

A source is locked under each of its identities (storaged.host.locks). Two volumes collide where one of them writes
to what the other reads or writes: through a partition and its disk, a loop device and its file, or a device-mapper
device and what lies below it (sysfs, Documentation/ABI/testing/sysfs-block in the kernel tree).
"""

from __future__ import annotations

import os

from storaged.host import mounts
from storaged.host.chain import ImageFile

#: Devices may be stacked; deeper than this nothing is looked at.
_DEEPEST = 8


def own_identity(file: ImageFile) -> str:
    """Return the identity of a file or block device itself."""
    return block_identity(file.block_device) if file.block_device else file_identity(file.device, file.inode)


def file_identity(device: int, inode: int) -> str:
    """The identity of a regular file."""
    return f"file:{device}:{inode}"


def block_identity(number: int) -> str:
    """The identity of a block device, whatever node leads to it."""
    return f"block:{os.major(number)}:{os.minor(number)}"


def identities(file: ImageFile, *, exclusive: bool) -> dict[str, bool]:
    """Return the identities to lock for a file or block device, and whether each exclusively.

    Who uses a disk locks its partitions in the same way; who uses a partition shares the lock of its disk, so that
    two partitions of one disk can be used at once, but not a partition and its whole disk when either is written.
    """
    if not file.block_device:
        return {own_identity(file): exclusive}
    found: dict[str, bool] = {}
    _add_block(found, file.block_device, exclusive, 0)
    return found


def _add(found: dict[str, bool], identity: str, exclusive: bool) -> None:
    found[identity] = exclusive or found.get(identity, False)


def _add_block(found: dict[str, bool], number: int, exclusive: bool, depth: int) -> None:
    _add(found, block_identity(number), exclusive)
    if depth >= _DEEPEST:
        return
    directory = os.path.realpath(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    disk = directory
    if os.path.exists(f"{directory}/partition"):
        disk = os.path.dirname(directory)
        parent = _number(disk)
        if parent is not None:
            _add(found, block_identity(parent), False)
    else:
        for entry in _entries(directory):
            if os.path.exists(f"{directory}/{entry}/partition"):
                part = _number(f"{directory}/{entry}")
                if part is not None:
                    _add(found, block_identity(part), exclusive)
    backing = _backing_of_loop(disk)
    if backing is not None:
        # A file has no partitions that could be locked apart: any use of one counts as use of all.
        _add(found, backing, exclusive)
    for slave in _entries(f"{disk}/slaves"):
        below = _number(f"{disk}/slaves/{slave}")
        if below is not None:
            _add_block(found, below, False, depth + 1)


def _backing_of_loop(disk: str) -> str | None:
    try:
        with open(f"{disk}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
            path = file.read().rstrip("\n")
    except OSError:
        return None
    known = mounts.quick_identity(path)
    return file_identity(*known) if known is not None else None


def _number(directory: str) -> int | None:
    try:
        with open(f"{directory}/dev", encoding="ascii") as file:
            major, minor = map(int, file.read().split(":"))
    except (OSError, ValueError):
        return None
    return os.makedev(major, minor)


def _entries(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:
        return []
