"""Room that is kept for the one file of a volume that has to be written when something goes wrong, its record.

/run is small and everybody's. When it is full and a QSD dies, its successor cannot be written down, and so cannot be
started. So a volume has a file that takes up room, and gives it (and its inode) up when a write finds none.
"""

from __future__ import annotations

import contextlib
import os

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import write_atomic

#: Bytes; a record and its successor, which are there at once, take a page or two each.
SIZE = 64 << 10
_NAME = "reserve"


def write_reserved(path: str, data: bytes) -> None:
    """As ``write_atomic``, with room of its own in the directory of ``path``. Raises NO_SPACE, INTERNAL.

    What was used up is made anew by the next write that does without it.
    """
    reserve = os.path.join(os.path.dirname(path), _NAME)
    try:
        write_atomic(path, data)
    except StoragedError as error:
        if error.code is not ErrorCode.NO_SPACE or not _free(reserve):
            raise
        write_atomic(path, data)
        return
    _make(reserve)


def _free(path: str) -> bool:
    try:
        os.unlink(path)
    except OSError:
        return False
    return True


def _make(path: str) -> None:
    """Best effort: without it all works but on a full filesystem."""
    with contextlib.suppress(OSError):
        if os.lstat(path).st_blocks * 512 >= SIZE:
            return
    aside = f"{path}.new"
    try:
        # A name of its own would leave many behind; two writers of one volume do the same.
        fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.posix_fallocate(fd, 0, SIZE)
        finally:
            os.close(fd)
        os.rename(aside, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(aside)
