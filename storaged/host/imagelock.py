"""QEMU's locks on image files, for who opens one without QEMU (raw_apply_lock_bytes in block/file-posix.c of QEMU).

They are locks of open file descriptions (fcntl_locking(2)) on single bytes: byte 100 + N says that the holder does what
permission N stands for, byte 200 + N that it lets nobody else do so. Permissions: BLK_PERM_* in QEMU.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

from storaged.errors import ErrorCode, StoragedError

_DOES, _FORBIDS = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3
#: struct flock, with a 64-bit off_t.
_FLOCK = "hhqqi0q"


def take(path: str, *, write: bool) -> int:
    """Return a descriptor that holds the locks of a reader, or of a writer; while it is open no QEMU opens the file to
    write to it.

    Raises SOURCE_IN_USE where a QEMU has it in a way that does not go with that.
    """
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        does = {_READ, _WRITE} if write else {_READ}
        for permission in (_WRITE, _RESIZE):
            _set(fd, _FORBIDS + permission)
        for permission in does:
            _set(fd, _DOES + permission)
        for byte in (_DOES + _WRITE, _DOES + _RESIZE, *(_FORBIDS + permission for permission in does)):
            if _is_held(fd, byte):
                raise StoragedError(
                    ErrorCode.SOURCE_IN_USE, "the image is in use",
                    cause=f"a QEMU {'writes to' if byte < _FORBIDS else 'has opened'} it: it holds its lock on {path}",
                    hint="end the virtual machine or the program that has it; lsof names it",
                )
    except BaseException:
        os.close(fd)
        raise
    return fd


def _set(fd: int, byte: int) -> None:
    try:
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, struct.pack(_FLOCK, fcntl.F_RDLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise StoragedError(
                ErrorCode.SOURCE_IN_USE, "the image is in use", cause="another program has locked it",
                hint="end that program; lslocks names it",
            ) from error
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        # A filesystem without locks: QEMU does without them, too.


def _is_held(fd: int, byte: int) -> bool:
    """Whether somebody else holds a lock on that byte."""
    try:
        found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0))
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL):
            raise
        return False
    kind: int = struct.unpack(_FLOCK, found)[0]
    return kind != fcntl.F_UNLCK
