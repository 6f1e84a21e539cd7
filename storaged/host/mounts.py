"""Mounts, looked at without asking the filesystem: a FUSE server that hangs must not hang the one who looks."""

from __future__ import annotations

import ctypes
import os

_AT_FDCWD = -100
_AT_SYMLINK_NOFOLLOW = 0x100
_AT_STATX_FORCE_SYNC = 0x2000
_AT_STATX_DONT_SYNC = 0x4000
_STATX_INO = 0x100
_STATX_SIZE = 0x200
_STATX_ATTR_MOUNT_ROOT = 0x2000
_MNT_FORCE = 1
_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


class _Statx(ctypes.Structure):
    """struct statx, include/uapi/linux/stat.h; only what is used is named."""

    _fields_ = [
        ("mask", ctypes.c_uint32),
        ("blksize", ctypes.c_uint32),
        ("attributes", ctypes.c_uint64),
        ("nlink", ctypes.c_uint32),
        ("uid", ctypes.c_uint32),
        ("gid", ctypes.c_uint32),
        ("mode", ctypes.c_uint16),
        ("spare0", ctypes.c_uint16),
        ("inode", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
        ("blocks", ctypes.c_uint64),
        ("attributes_mask", ctypes.c_uint64),
        ("times", ctypes.c_uint8 * 64),
        ("rdev_major", ctypes.c_uint32),
        ("rdev_minor", ctypes.c_uint32),
        ("dev_major", ctypes.c_uint32),
        ("dev_minor", ctypes.c_uint32),
        ("rest", ctypes.c_uint8 * 112),
    ]


def _statx(path: str, flags: int, mask: int) -> _Statx:
    result = _Statx()
    if _libc.statx(_AT_FDCWD, os.fsencode(path), flags, mask, ctypes.byref(result)) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return result


def is_mount_point(path: str) -> bool:
    """Whether something is mounted exactly here. Never asks a FUSE server (statx(2), AT_STATX_DONT_SYNC)."""
    try:
        seen = _statx(path, _AT_SYMLINK_NOFOLLOW | _AT_STATX_DONT_SYNC, 0)
    except FileNotFoundError:
        return False
    except OSError:
        # ENOTCONN: the mount is there and its server is dead.
        return True
    return bool(seen.attributes & _STATX_ATTR_MOUNT_ROOT)


def quick_identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a file without asking its filesystem's server, None if there is none."""
    try:
        seen = _statx(path, _AT_STATX_DONT_SYNC, _STATX_INO)
    except OSError:
        return None
    return os.makedev(seen.dev_major, seen.dev_minor), int(seen.inode)


def fresh_size(path: str) -> int:
    """Return a file's size in bytes as its filesystem says it now, past the kernel's cache. May block."""
    return int(_statx(path, _AT_STATX_FORCE_SYNC, _STATX_SIZE).size)


def unmount(path: str) -> None:
    """Take a mount away even if its server is dead or hangs: pending requests end with an error (umount2(2)).

    No error when nothing is mounted there. Raises OSError otherwise.
    """
    while is_mount_point(path):
        if _libc.umount2(os.fsencode(path), _MNT_FORCE | _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
