"""The log of the requests in flight that QSD keeps for its successor (subprojects/libvduse/libvduse.c in QEMU).

Without it, or with another one, a successor carries out the wrong requests: some of those that wait then never end. So
it has a second link outside of QSD's TMPDIR, and a file beside that says which inode it is; both are made before the
device comes onto the bus, when nothing can be in flight yet. Whoever removes or replaces the log has removed a name.

Nothing in the log says whose it is. One that was overwritten in place by another volume's is found out by the queues
themselves: the log counts the requests that were answered, modulo 65536, and so does the memory that kernel and QSD
share. And where nothing is in flight no log is needed: the successor begins a new one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import struct
from collections.abc import Sequence
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError
from storaged.host import atomic
from storaged.host.vduse import Ring

#: VIRTQUEUE_MAX_SIZE: so many descriptors have a place in the log, whatever the size of the queue.
_DESCRIPTORS = 1024
#: VduseVirtqLogInflight: features, version, desc_num, last_batch_head, used_idx. The first two are never set.
_HEADER = struct.Struct("<QHHHH")
#: VduseDescStateSplit: inflight (1 byte), padding (5), next (2), counter (8). padding and next are never set.
_DESCRIPTOR_SIZE = 16
_NEVER_SET = range(1, 8)
_ALIGNMENT = 64
_QUEUE = -(-(_HEADER.size + _DESCRIPTORS * _DESCRIPTOR_SIZE) // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class ReconnectLog:
    """Where the log of a volume is."""

    directory: str
    """The volume's, in which QSD's TMPDIR is."""
    name: str
    """On the vDPA bus."""
    queues: int
    queue_size: int

    @property
    def path(self) -> str:
        """What QSD opens."""
        return os.path.join(self.directory, "tmp", f"vduse-blk-{self.name}")

    @property
    def kept(self) -> str:
        """The second link."""
        return os.path.join(self.directory, "reconnect.log")

    @property
    def identity(self) -> str:
        """The file that says which inode it is."""
        return os.path.join(self.directory, "reconnect.inode")

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.queues * _QUEUE


def forget(log: ReconnectLog) -> None:
    """Remove what is left of an older device: no request of it waits any more."""
    for path in (log.identity, log.kept, log.path):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def keep(log: ReconnectLog) -> None:
    """Give the log that QSD has just made its second link, and all the room that it will need.

    Only while nothing is in flight. Doing it again is no harm. Raises DEVICE_FAILED where there is no such log,
    NO_SPACE, INTERNAL.
    """
    try:
        seen = os.lstat(log.path)
        problem = "" if stat.S_ISREG(seen.st_mode) and seen.st_size == log.size else "it has another size"
    except OSError as error:
        problem = error.strerror or str(error)
    if problem:
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, "qemu-storage-daemon has made no log of the requests in flight",
            cause=f"{log.path}: {problem}", hint="end what removes files there; attach again",
        )
    _allocate(log)
    _link(log.path, log.kept)
    _write_identity(log)


def restore(log: ReconnectLog, rings: Sequence[Ring] | None) -> str:
    """See to it that a successor finds the log of its predecessor; return what was done about it, mostly nothing.

    ``rings`` are the device's queues; None where they cannot be seen. Only while nobody serves the device. Raises
    RECONNECT_LOG_LOST, with everything left as it is; and NO_SPACE, INTERNAL.
    """
    path_problem, recorded = _problem(log, log.path, rings), _recorded(log)
    kept_is_there = os.path.lexists(log.kept)
    if not path_problem and (recorded is not None or not kept_is_there or _inode(log.path) == _inode(log.kept)):
        # A daemon that died before it had made link and identity leaves a good log.
        if _inode(log.path) != _inode(log.kept):
            _link(log.path, log.kept)
        if recorded is None:
            _write_identity(log)
        return ""
    kept_problem = _problem(log, log.kept, rings)
    if not kept_problem:
        # tmp itself may be what was removed.
        os.makedirs(os.path.dirname(log.path), mode=0o700, exist_ok=True)
        _link(log.kept, log.path)
        if recorded is None:
            _write_identity(log)
        return f"the log of the requests in flight was put back: {path_problem or 'another file was in its place'}"
    cause = f"{log.path}: {path_problem or 'it is not known to be the right one'}; {log.kept}: {kept_problem}"
    waiting = None if rings is None else sum(ring.waiting for ring in rings)
    if waiting == 0:
        _begin_anew(log)
        return f"the log of the requests in flight was lost, but there are none: a new one was begun ({cause})"
    raise StoragedError(
        ErrorCode.RECONNECT_LOG_LOST, "the log of the requests in flight is lost",
        cause=cause if waiting is None else f"{cause}; requests that wait: {waiting}",
        hint="put the file back if it was moved: the volume goes on by itself. Else detach it by force, which ends the "
        "requests as far as that is possible; any that stay wait until the host is rebooted",
    )


def give_up(log: ReconnectLog) -> None:
    """Let a server begin with an empty log, where :func:`restore` has failed: a wrong one is worse than none."""
    with contextlib.suppress(FileNotFoundError):
        os.unlink(log.path)


def _begin_anew(log: ReconnectLog) -> None:
    """An empty log in the place of whatever there is: zeroes, as QSD makes it."""
    os.makedirs(os.path.dirname(log.path), mode=0o700, exist_ok=True)
    aside = atomic.write_aside(log.path, bytes(log.size))
    atomic.commit(aside, log.path)
    _link(log.path, log.kept)
    _write_identity(log)


def _problem(log: ReconnectLog, path: str, rings: Sequence[Ring] | None = None) -> str:
    """Say why a file cannot be the log; empty if it can."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        return error.strerror or str(error)
    try:
        seen = os.fstat(fd)
        if not stat.S_ISREG(seen.st_mode):
            return "it is no file"
        recorded = _recorded(log)
        if recorded is not None and recorded != (seen.st_dev, seen.st_ino):
            return "it is another file than the one that was made"
        if seen.st_size != log.size:
            return f"it has {seen.st_size} bytes, and not {log.size}"
        data = os.read(fd, log.size)
    finally:
        os.close(fd)
    if len(data) != log.size:
        return "it is cut short"
    for queue in range(log.queues):
        ring = rings[queue] if rings is not None else None
        problem = _queue_problem(data[queue * _QUEUE:(queue + 1) * _QUEUE], log.queue_size, ring)
        if problem:
            return f"queue {queue}: {problem}"
    return ""


def _queue_problem(data: bytes, queue_size: int, ring: Ring | None) -> str:
    features, version, descriptors, head, answered = _HEADER.unpack_from(data)
    # A reset of the device zeroes all of it, and the number comes back with the next QSD only.
    if features or version or descriptors not in (0, _DESCRIPTORS) or head >= queue_size:
        return "its header is damaged"
    # QSD notes an answer after it has given it (vduse_queue_push): if it was killed in between, it is one behind.
    if ring is not None and (ring.used - answered) % (1 << 16) > 1:
        return f"{answered} requests were answered by it, and {ring.used} by the queue: it is another one's, or old"
    # Whole slices, compared at once: a pause of the disk waits for this.
    begin, end = _HEADER.size, _HEADER.size + _DESCRIPTORS * _DESCRIPTOR_SIZE
    if not _is_zero(data[begin + queue_size * _DESCRIPTOR_SIZE:]):
        return "descriptors are in use that our queue has not"
    if data[begin:end:_DESCRIPTOR_SIZE].translate(None, b"\0\1"):
        return "its descriptors are damaged"
    if not all(_is_zero(data[begin + never:end:_DESCRIPTOR_SIZE]) for never in _NEVER_SET):
        return "its descriptors are damaged"
    return ""


def _is_zero(data: bytes) -> bool:
    return data == bytes(len(data))


def _inode(path: str) -> tuple[int, int] | None:
    try:
        seen = os.lstat(path)
    except OSError:
        return None
    return seen.st_dev, seen.st_ino


def _recorded(log: ReconnectLog) -> tuple[int, int] | None:
    try:
        with open(log.identity, encoding="ascii") as file:
            device, inode = file.read().split()
        return int(device), int(inode)
    except (OSError, ValueError):
        # Not there yet, or removed or damaged, as the log may be: then the links alone tell.
        return None


def _write_identity(log: ReconnectLog) -> None:
    seen = os.lstat(log.path)
    atomic.write_atomic(log.identity, f"{seen.st_dev} {seen.st_ino}\n".encode())


def _link(source: str, target: str) -> None:
    """Make ``target`` a link to ``source``, in the place of whatever it is. Raises NO_SPACE, INTERNAL."""
    aside = os.path.join(os.path.dirname(target), f".{os.path.basename(target)}.new")
    try:
        if _inode(source) == _inode(target):
            return
        with contextlib.suppress(FileNotFoundError):
            os.unlink(aside)
        os.link(source, aside, follow_symlinks=False)
        os.rename(aside, target)
    except OSError as error:
        raise atomic.state_error(target, error) from error


def _allocate(log: ReconnectLog) -> None:
    """QSD makes the file with holes: where /run is full later it would be killed by SIGBUS as it fills one."""
    try:
        fd = os.open(log.path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, log.size)
        finally:
            os.close(fd)
    except OSError as error:
        raise atomic.state_error(log.path, error) from error
