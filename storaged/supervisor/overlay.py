"""The overlays of snapshots: where they are, how they come and how they go. Blocks, use a thread.

NAME.json in the daemon's snapshots directory is the mark of an overlay: where it is, which file it is, and which
source it belongs to. It is written before the overlay is made, so that none is ever lost, wherever the user wanted
it; and once more when the overlay is complete. From then on only that very file counts: one that is gone or was
replaced is an error, and never made anew, because what was written is in it. Overlays end in .qcow2, so that no
volume's name leads to another's.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import remove_file, state_error, sync_directory, write_atomic
from storaged.model.sizes import MAX_SIZE, parse_size
from storaged.model.spec import VolumeSpec

_DEFAULT_LIMIT = 10 << 30
#: Below this, qcow2's own tables leave no room for data.
_SMALLEST_LIMIT = 4 << 20
_MARK = ".json"


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is known of an overlay. ``inode`` is 0 until it is complete; its device may change with each boot."""

    path: str
    inode: int = 0
    limit: int = 0
    """Bytes."""
    fingerprint: list[list[int]] = []
    """Of the source: see Opening.fingerprint."""


#: Made here, once: see RECORDS in model/record.py.
_MARKS = msgspec.json.Decoder(Mark)


def limit_of(spec: VolumeSpec) -> int:
    """Return how large the overlay may grow, in bytes, a multiple of 64 KiB. Raises INVALID_SIZE."""
    text = spec.options.get("snapshot-size")
    limit = _DEFAULT_LIMIT if text is None else parse_size(text)
    if limit < _SMALLEST_LIMIT:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"a snapshot-size of {text} is too small", hint="4M is the least"
        )
    return min(-(-limit // 65536) * 65536, MAX_SIZE // 65536 * 65536)


def locate(snapshots: str, name: str) -> Mark | None:
    """Return the mark of a volume's overlay, None if it has none.

    Raises STATE_DAMAGED for one that cannot be read: there may well be an overlay, and nobody knows where.
    """
    path = _mark(snapshots, name)
    try:
        with open(path, "rb") as file:
            return _MARKS.decode(file.read())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise StoragedError(
            ErrorCode.STATE_DAMAGED, f"what is known of the overlay cannot be read: {path}", cause=str(error),
            hint="try again; if it is damaged, find the overlay and look at it before you move that file away",
        ) from error


def exists(snapshots: str, name: str) -> bool:
    """Whether anything is known of an overlay of a volume."""
    return os.path.lexists(_mark(snapshots, name))


def reserve(snapshots: str, directory: str | None, name: str) -> str:
    """Note where the overlay of a volume will be, and return it.

    Raises INVALID_ARGUMENT where the directory is missing or something is in the way, NO_SPACE, INTERNAL.
    """
    os.makedirs(snapshots, mode=0o700, exist_ok=True)
    known = locate(snapshots, name)
    if known is not None:
        return known.path
    if directory is None:
        path = os.path.join(snapshots, f"{name}.qcow2")
    else:
        if not os.path.isdir(directory):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"there is no snapshot directory {directory}",
                hint="create it, or say another --snapshot-dir",
            )
        # Another daemon may have a volume of that name, and its overlay in the same directory.
        owner = hashlib.sha256(snapshots.encode()).hexdigest()[:8]
        path = os.path.join(directory, f"storaged.{name}.{owner}.qcow2")
    if os.path.lexists(path):
        # Whoever put it there: what it holds, or points to, is not ours to write to.
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path} is in the way of the overlay", cause="it was not made by this volume",
            hint="look at it, and move it away",
        )
    write_atomic(_mark(snapshots, name), msgspec.json.encode(Mark(path=path)))
    return path


def check(snapshots: str, name: str, fingerprint: list[list[int]]) -> Mark | None:
    """Return the mark of a complete overlay that is the very file and belongs to this very source, None if there
    is no complete one yet.

    Raises SOURCE_MISSING where it is gone or was replaced, SOURCE_CHANGED where the source is not what it was.
    """
    mark = locate(snapshots, name)
    if mark is None or not mark.inode:
        return None
    hint = "bring it back (is its filesystem mounted?), or detach the volume, which gives the changes up"
    try:
        seen = os.lstat(mark.path)
    except OSError as error:
        raise StoragedError(
            ErrorCode.SOURCE_MISSING, f"the overlay {mark.path} is not there", cause=error.strerror or "", hint=hint
        ) from error
    if not stat.S_ISREG(seen.st_mode) or (seen.st_ino, seen.st_size) != (mark.inode, mark.limit):
        raise StoragedError(
            ErrorCode.SOURCE_MISSING, f"the overlay {mark.path} was replaced", cause="it is another file by now",
            hint=hint,
        )
    if not _is_the_same(mark.fingerprint, fingerprint):
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, "the source of the snapshot has changed",
            cause="the overlay's changes belong to what it was before, and would be a mix with what it is now",
            hint="bring the old source back, or detach the volume, which gives the changes up",
        )
    return mark


def _is_the_same(marked: list[list[int]], found: list[list[int]]) -> bool:
    """Whether these are the images that the overlay belongs to.

    Of what tells nothing but its size, more is no other content: the overlay ends where its base ended before.
    """
    if len(marked) != len(found):
        return False
    return all(
        before == now or (not any((before[0], before[2], now[0], now[2])) and before[1] < now[1])
        for before, now in zip(marked, found, strict=True)
    )


def new_file(path: str) -> str:
    """The file of an overlay until it is complete."""
    return f"{path}.new"


def create_new(path: str, limit: int) -> str:
    """Make the file of a new overlay, sparse and ``limit`` bytes large, and return its (temporary) path.

    What is at ``path`` is of an attempt that never got as far as being used.
    """
    new = new_file(path)
    try:
        for victim in (path, new):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(victim)
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.ftruncate(fd, limit)
        finally:
            os.close(fd)
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise StoragedError(
                ErrorCode.INVALID_SIZE, "the filesystem cannot hold an overlay of that size",
                hint="say a smaller one: -o snapshot-size=SIZE",
            ) from error
        raise state_error(new, error) from error
    return new


def finish(snapshots: str, name: str, path: str, fingerprint: list[list[int]]) -> None:
    """The overlay at PATH.new is complete: let it count."""
    try:
        os.rename(new_file(path), path)
        sync_directory(os.path.dirname(path))
        seen = os.lstat(path)
    except OSError as error:
        raise state_error(path, error) from error
    mark = Mark(path=path, inode=seen.st_ino, limit=seen.st_size, fingerprint=fingerprint)
    write_atomic(_mark(snapshots, name), msgspec.json.encode(mark))


def remove(snapshots: str, name: str) -> None:
    """Throw a volume's overlay away; no error when it has none. The mark goes last."""
    mark = locate(snapshots, name)
    if mark is None:
        return
    try:
        for victim in (new_file(mark.path), mark.path):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(victim)
    except OSError as error:
        raise state_error(mark.path, error) from error
    remove_file(_mark(snapshots, name))


def all_names(snapshots: str) -> list[str]:
    """Return the volumes that have an overlay."""
    try:
        entries = os.listdir(snapshots)
    except FileNotFoundError:
        return []
    return [entry.removesuffix(_MARK) for entry in entries if entry.endswith(_MARK)]


def _mark(snapshots: str, name: str) -> str:
    return os.path.join(snapshots, name + _MARK)
