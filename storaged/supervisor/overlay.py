"""The overlays of snapshots: where they are, how they come and how they go. Blocks, use a thread.

NAME.at in the daemon's snapshots directory is a link to the overlay, made before it: so none is ever lost,
wherever the user wanted it. Overlays end in .qcow2, so that no volume's name leads to another's. A crash while an
overlay is made leaves ``.new`` behind, which never counts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import state_error, sync_directory
from storaged.model.sizes import MAX_SIZE, parse_size
from storaged.model.spec import VolumeSpec

_DEFAULT_LIMIT = 10 << 30
_LINK = ".at"
#: Below this, qcow2's own tables leave no room for data.
_SMALLEST_LIMIT = 4 << 20


def limit_of(spec: VolumeSpec) -> int:
    """Return how large the overlay may grow, in bytes, a multiple of 64 KiB. Raises INVALID_SIZE."""
    text = spec.options.get("snapshot-size")
    limit = _DEFAULT_LIMIT if text is None else parse_size(text)
    if limit < _SMALLEST_LIMIT:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"a snapshot-size of {text} is too small", hint="4M is the least"
        )
    return min(-(-limit // 65536) * 65536, MAX_SIZE // 65536 * 65536)


def locate(snapshots: str, name: str) -> str | None:
    """Return where the overlay of a volume is (or will be), None if it has none."""
    try:
        return os.readlink(_link(snapshots, name))
    except (FileNotFoundError, NotADirectoryError):
        return None


def reserve(snapshots: str, directory: str | None, name: str) -> str:
    """Note where the overlay of a volume will be, and return it. Raises NO_SPACE, INTERNAL."""
    os.makedirs(snapshots, mode=0o700, exist_ok=True)
    known = locate(snapshots, name)
    if known is not None:
        return known
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
    link = _link(snapshots, name)
    try:
        os.symlink(path, link)
        sync_directory(snapshots)
    except OSError as error:
        raise state_error(link, error) from error
    return path


def create_new(path: str, limit: int) -> str:
    """Make the file of a new overlay, sparse and ``limit`` bytes large, and return its (temporary) path."""
    new = f"{path}.new"
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
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


def finish(path: str) -> None:
    """The overlay at PATH.new is complete: let it count."""
    os.rename(f"{path}.new", path)
    sync_directory(os.path.dirname(path))


def remove(snapshots: str, name: str) -> None:
    """Throw a volume's overlay away; no error when it has none. The link goes last."""
    path = locate(snapshots, name)
    if path is None:
        return
    try:
        for victim in (f"{path}.new", path, _link(snapshots, name)):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(victim)
        sync_directory(snapshots)
    except OSError as error:
        raise state_error(path, error) from error


def all_names(snapshots: str) -> list[str]:
    """Return the volumes that have an overlay."""
    try:
        entries = os.listdir(snapshots)
    except FileNotFoundError:
        return []
    return [entry.removesuffix(_LINK) for entry in entries if entry.endswith(_LINK)]


def _link(snapshots: str, name: str) -> str:
    return os.path.join(snapshots, name + _LINK)
