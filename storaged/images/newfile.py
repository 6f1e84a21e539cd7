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
        made = _make(part, replaces=part != path)
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


def _make(part: str, *, replaces: bool) -> tuple[int, int]:
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(part, flags, 0o666)
    except FileExistsError:
        if not replaces:
            raise
        seen = os.lstat(part)
        identity = file_identity(seen.st_dev, seen.st_ino)
        # Held by who is at it just now: then it is refused.
        locks.let_go([locks.take_lock(LOCK_DIR, identity, exclusive=True, owner="the removal of a leftover")])
        os.unlink(part)
        fd = os.open(part, flags, 0o666)
    try:
        seen = os.fstat(fd)
        return seen.st_dev, seen.st_ino
    finally:
        os.close(fd)


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
