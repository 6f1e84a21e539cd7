"""How many requests the kernel sends to a FUSE server at once: the filesystem fusectl, fs/fuse/control.c in the kernel.

It is usually mounted on /sys/fs/fuse/connections, but not in each container. So it is mounted here for a moment, where
nobody sees it: fsopen(2), fsmount(2).
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

from storaged.host import mounts

_FSOPEN_CLOEXEC = 1
_FSCONFIG_CMD_CREATE = 6
_FSMOUNT_CLOEXEC = 1

_libc = ctypes.CDLL(None, use_errno=True)


def let_in_flight(mountpoint: str, requests: int) -> None:
    """Let at least so many requests of direct I/O be with the server of this mount at once; the kernel's limit is 12.

    Asks the server nothing. Raises OSError: nothing is mounted there, this is not root of the host.
    """
    if in_flight_at_most(mountpoint) < requests:
        with _limit_of(mountpoint, os.O_WRONLY) as fd:
            os.write(fd, str(requests).encode())


def in_flight_at_most(mountpoint: str) -> int:
    """Return how many may be. Raises OSError."""
    with _limit_of(mountpoint, os.O_RDONLY) as fd:
        return int(os.read(fd, 16))


@contextmanager
def _limit_of(mountpoint: str, flags: int) -> Iterator[int]:
    """Open max_background of the connection, whose name is the minor number of the mount's device."""
    identity = mounts.quick_identity(mountpoint)
    if identity is None:
        raise FileNotFoundError(mountpoint)
    context = _checked(_libc.fsopen(b"fusectl", _FSOPEN_CLOEXEC))
    try:
        _checked(_libc.fsconfig(context, _FSCONFIG_CMD_CREATE, None, None, 0))
        directory = _checked(_libc.fsmount(context, _FSMOUNT_CLOEXEC, 0))
    finally:
        os.close(context)
    try:
        fd = os.open(f"{os.minor(identity[0])}/max_background", flags | os.O_CLOEXEC, dir_fd=directory)
    finally:
        os.close(directory)
    try:
        yield fd
    finally:
        os.close(fd)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), "fusectl")
    return result
