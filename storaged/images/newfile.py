"""A new image file that has its name only when it is complete.

Until then it is ``.NAME.storaged-part`` beside it: whoever is killed in the middle leaves no half-written image under
the name that was asked for. Such a leftover is replaced by the next who makes that image.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator

from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks
from storaged.host.atomic import sync_directory
from storaged.host.identity import file_identity
from storaged.model.formats import Format
from storaged.model.layout import LOCK_DIR

_PART = ".storaged-part"


@contextlib.contextmanager
def new_file(path: str, format: Format) -> Iterator[str]:
    """Yield the path at which the image is to be made; at the end it is on the disk and has its name.

    If that fails or is interrupted nothing of it is left. A vmdk may be several files that name each other, so it has
    its name from the beginning. Raises INVALID_ARGUMENT where something is there, NO_SPACE, OPEN_FAILED.
    """
    directory, name = os.path.split(path)
    part = path if format is Format.VMDK else os.path.join(directory, f".{name}{_PART}")
    taken = [path] if os.path.lexists(path) else _extents(path, format)
    if taken:
        raise is_there(taken[0])
    try:
        made, lock = _make(part, path)
        try:
            yield part
            seen = os.stat(part)
            if (seen.st_dev, seen.st_ino) != made:
                raise StoragedError(
                    ErrorCode.SOURCE_CHANGED, f"{part} was replaced", cause="two made the same image at once",
                    hint="look at what is there, and try again",
                )
            _sync(part)
            if part != path:
                _rename(part, path)
            sync_directory(directory)
        except BaseException as error:
            if isinstance(error, StoragedError):
                error.message, error.cause, error.hint = (
                    text.replace(part, path) for text in (error.message, error.cause, error.hint)
                )
            with contextlib.suppress(OSError):
                seen = os.stat(part)
                if (seen.st_dev, seen.st_ino) == made:
                    for place in (part, *_extents(path, format)):
                        os.unlink(place)
            raise
        finally:
            locks.let_go([lock])
    except OSError as error:
        code = ErrorCode.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else ErrorCode.OPEN_FAILED
        raise StoragedError(
            code, f"cannot make {path}", cause=error.strerror or str(error), hint="check the directory and its room"
        ) from error


def _extents(path: str, format: Format) -> list[str]:
    """The files beside a vmdk that QEMU would write as its parts, whatever they are (vmdk_co_do_create)."""
    if format is not Format.VMDK:
        return []
    directory, name = os.path.split(path)
    stem, ending = os.path.splitext(name)
    pattern = re.compile(rf"{re.escape(stem)}-(?:flat|[fs][0-9]{{3,}}){re.escape(ending)}")
    return [os.path.join(directory, entry) for entry in os.listdir(directory) if pattern.fullmatch(entry)]


def is_there(shown: str) -> StoragedError:
    """The failure of who wants to make what is there already."""
    return StoragedError(
        ErrorCode.INVALID_ARGUMENT, f"{shown} is there already", cause="nothing is overwritten that could be wanted",
        hint="remove it, or choose another name; convert -n writes into an image that is there",
    )


def _make(part: str, path: str) -> tuple[tuple[int, int], int]:
    """Make the file; return its device and inode, and the lock that says that somebody is at it.

    Not the lock of an image: who fills this one takes that. Raises SOURCE_IN_USE where somebody makes it already.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(part, flags, 0o666)
    except FileExistsError:
        if part == path:
            raise
        _remove_leftover(part, path)
        fd = os.open(part, flags, 0o666)
    try:
        seen = os.fstat(fd)
    finally:
        os.close(fd)
    lock = _lock(seen, path)
    # Before it was locked, another may have taken it for a leftover.
    if _inode(part) != (seen.st_dev, seen.st_ino):
        locks.let_go([lock])
        raise _made_by_another(path)
    return (seen.st_dev, seen.st_ino), lock


def _remove_leftover(part: str, path: str) -> None:
    seen = os.lstat(part)
    held = [_lock(seen, path)]
    try:
        # A qemu-img may have outlived who started it.
        identity = file_identity(seen.st_dev, seen.st_ino)
        held.append(locks.take_lock(LOCK_DIR, identity, exclusive=True, owner="the removal of a leftover"))
        if _inode(part) != (seen.st_dev, seen.st_ino):
            raise _made_by_another(path)
        os.unlink(part)
    finally:
        locks.let_go(held)


def _lock(seen: os.stat_result, path: str) -> int:
    try:
        return locks.take_lock(
            LOCK_DIR, f"new:{seen.st_dev}:{seen.st_ino}", exclusive=True, owner=f"storaged image (pid {os.getpid()})"
        )
    except StoragedError as error:
        if error.code is not ErrorCode.SOURCE_IN_USE:
            raise
        raise _made_by_another(path, error.cause) from error


def _made_by_another(path: str, cause: str = "") -> StoragedError:
    return StoragedError(
        ErrorCode.SOURCE_IN_USE, f"{path} is being made by another command", cause=cause,
        hint="wait until that has ended, or choose another name",
    )


def _inode(path: str) -> tuple[int, int] | None:
    try:
        seen = os.lstat(path)
    except FileNotFoundError:
        return None
    return seen.st_dev, seen.st_ino


def _sync(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _rename(part: str, path: str) -> None:
    """As rename(2), but for a name that somebody else has taken meanwhile."""
    try:
        os.link(part, path, follow_symlinks=False)
    except FileExistsError as error:
        raise is_there(path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        # A filesystem without hard links.
        if os.path.lexists(path):
            raise is_there(path) from error
        os.rename(part, path)
    else:
        os.unlink(part)
