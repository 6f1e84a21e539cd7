"""Files that are whole or not there: write, fsync, rename, fsync the directory."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile

from storaged.errors import ErrorCode, StoragedError


def write_atomic(path: str, data: bytes, *, mode: int = 0o600) -> None:
    """Replace ``path`` by ``data``; after a crash it holds the old content or the new, never a part.

    Raises NO_SPACE on a full disk or quota, INTERNAL on any other I/O error; nothing is left behind but, after a
    crash, a file .NAME.*.tmp.
    """
    commit(write_aside(path, data, mode=mode), path)


def write_new(path: str, data: bytes, *, mode: int = 0o600) -> None:
    """As :func:`write_atomic`, but where there is nothing yet: INVALID_ARGUMENT if there is."""
    temporary = write_aside(path, data, mode=mode)
    try:
        os.link(temporary, path)
        sync_directory(os.path.dirname(path))
    except FileExistsError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"cannot write {path}", cause="it exists by now", hint="choose another name"
        ) from error
    except OSError as error:
        raise state_error(path, error) from error
    finally:
        discard(temporary)


def write_aside(path: str, data: bytes, *, mode: int = 0o600) -> str:
    """Write ``data`` durably beside ``path``, for ``commit``, and return where. Raises as write_atomic."""
    directory, base = os.path.split(path)
    temporary = None
    try:
        # A name of its own: a call that hangs must not write into what a later one has renamed into place.
        fd, temporary = tempfile.mkstemp(prefix=f".{base[:100]}.", suffix=".tmp", dir=directory)
        try:
            os.fchmod(fd, mode)
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view):]
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        if temporary is not None:
            discard(temporary)
        raise state_error(path, error) from error
    return temporary


def commit(temporary: str, path: str) -> None:
    """Let what ``write_aside`` wrote take the place of ``path``. Raises as write_atomic."""
    try:
        os.rename(temporary, path)
        sync_directory(os.path.dirname(path))
    except OSError as error:
        discard(temporary)
        raise state_error(path, error) from error


def discard(temporary: str) -> None:
    """Drop what ``write_aside`` wrote; never fails."""
    with contextlib.suppress(OSError):
        os.unlink(temporary)


def remove_file(path: str) -> None:
    """Remove a file for good; it is no error when there is none. Raises INTERNAL on an I/O error."""
    try:
        os.unlink(path)
        sync_directory(os.path.dirname(path))
    except FileNotFoundError:
        return
    except OSError as error:
        raise state_error(path, error) from error


def sync_directory(path: str) -> None:
    """Make renames and removals in a directory durable (fsync(2))."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def state_error(path: str, error: OSError) -> StoragedError:
    """Turn an OSError about a state file into a failure that says what to do."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return StoragedError(
            ErrorCode.NO_SPACE, f"cannot write {path}", cause=error.strerror or "",
            hint=f"make room on the filesystem of {os.path.dirname(path)}",
        )
    return StoragedError(
        ErrorCode.INTERNAL, f"cannot write {path}", cause=error.strerror or str(error),
        hint=f"check that {os.path.dirname(path)} exists and can be written to",
    )
