"""An image that the benchmark makes for itself, so that jobs that write need nobody's data. Blocks.

It has a name of its own (``storaged-bench-ID.FORMAT``) in the directory that the user named, is full of bytes that
nothing compresses, and is removed in the end.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
from collections.abc import Callable, Iterator

from storaged.bench.ways import PREFIX, Shop
from storaged.errors import ErrorCode, StoragedError
from storaged.images.commands import Task
from storaged.images.making import Manner, convert
from storaged.images.operand import Wish
from storaged.model.formats import Format
from storaged.model.sizes import format_size

#: Formats that it can have: they hold nothing but the disk, and need no secret.
FORMATS = (Format.RAW, Format.QCOW2)
_PIECE = 8 << 20


@contextlib.contextmanager
def image(shop: Shop, directory: str, size: int, format: Format, tell: Callable[[str, float], None]) -> Iterator[str]:
    """Make an image of ``size`` bytes in a directory, yield its path, and remove it.

    Raises INVALID_ARGUMENT where it is no directory of this host, NO_SPACE before anything is written, OPEN_FAILED.
    """
    if not os.path.isdir(directory):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"--scratch needs a directory in the place of the source: {directory} is none",
            hint="name the directory in which the image shall be made; behind a server make an image yourself (storaged"
            " image create), and measure that with --destructive",
        )
    if format not in FORMATS:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"an image of the format {format} is not made here",
            hint=f"one of {', '.join(FORMATS)}",
        )
    if size % 4096:
        raise StoragedError(ErrorCode.INVALID_SIZE, f"{size} bytes are no multiple of 4096", hint="write 1G, or 512M")
    stem = os.path.join(os.path.realpath(directory), f"{PREFIX}{shop.id}")
    raw = f"{stem}.raw"
    _refuse_too_large(directory, size * (1 if format is Format.RAW else 2))
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, raw)
        _fill(raw, size, tell)
        if format is Format.RAW:
            yield raw
            return
        made = f"{stem}.{format}"
        stack.callback(_remove, made)
        task = Task(
            shop.layout, shop.config, "convert", lambda at: tell("making the image", at), lambda text: None,
            lambda text: None,
        )
        convert(task, Wish(raw, Format.RAW, name="source"), Wish(made, format, name="target"), Manner(), None)
        _remove(raw)
        yield made


def leftovers(shop: Shop, directory: str) -> list[str]:
    """Say which images are left in a directory of benchmarks that were killed."""
    found = []
    for path in sorted(glob.glob(os.path.join(glob.escape(directory), f"{PREFIX}*"))):
        id, _, ending = os.path.basename(path).removeprefix(PREFIX).rpartition(".")
        if ending in FORMATS and not shop.runs(id):
            found.append(f"{path} is left of a benchmark that was killed: remove it")
    return found


def _refuse_too_large(directory: str, size: int) -> None:
    free = os.statvfs(directory)
    if size > free.f_bavail * free.f_frsize:
        raise StoragedError(
            ErrorCode.NO_SPACE, f"there is no room for an image in {directory}",
            cause=f"{format_size(size)} are needed, {format_size(free.f_bavail * free.f_frsize)} are free",
            hint="say a smaller size, or another directory",
        )


def _fill(path: str, size: int, tell: Callable[[str, float], None]) -> None:
    piece = os.urandom(min(_PIECE, size))
    try:
        with open(path, "xb", buffering=0) as file:
            done = 0
            while done < size:
                tell("making the image", 100 * done / size)
                done += file.write(piece[:size - done])
            os.fsync(file.fileno())
    except OSError as error:
        code = ErrorCode.NO_SPACE if error.errno in (errno.ENOSPC, errno.EDQUOT) else ErrorCode.OPEN_FAILED
        raise StoragedError(
            code, f"cannot make {path}", cause=error.strerror or str(error), hint="check the directory and its room"
        ) from error


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
