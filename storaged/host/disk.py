"""What all block devices of the kernel have in common: sysfs (sysfs-block in Documentation/ABI), open(2), fsync(2)."""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError
from storaged.host.users import device_users, only_probes
from storaged.model.health import Progress

#: udev looks at a new or changed device for a moment: that is not a user, wait for it to go (seconds). On a
#: busy host it takes longer; then it is known by its name.
PROBE_PATIENCE = 2.0
_UDEV_PATIENCE = 15.0


@dataclass(frozen=True)
class Disk:
    """A disk of the kernel: its path and the number that tells it from any later disk of that path."""

    path: str
    diskseq: int


def attribute(path: str, name: str) -> str | None:
    """Return an attribute below /sys/block/X of the device ``path``, None if there is none. Never blocks."""
    try:
        with open(f"/sys/block/{os.path.basename(path)}/{name}", encoding="utf-8", errors="surrogateescape") as f:
            return f.read().rstrip("\n")
    except OSError:
        return None


def set_attribute(path: str, name: str, value: object) -> None:
    """Write an attribute below /sys/block/X. Raises OSError."""
    with open(f"/sys/block/{os.path.basename(path)}/{name}", "w", encoding="ascii") as file:
        file.write(f"{value}\n")


def diskseq(path: str) -> int:
    """Return the kernel's serial number of what is behind this device now (Linux 5.15), 0 if unknown."""
    text = attribute(path, "diskseq")
    return int(text) if text else 0


def is_read_only(path: str) -> bool:
    """Whether the kernel refuses writes to this device."""
    return attribute(path, "ro") == "1"


def size(path: str) -> int:
    """Return the device's size in bytes as the kernel knows it, 0 if there is no such device."""
    return 512 * int(attribute(path, "size") or 0)


def counters(device: str) -> list[int] | None:
    """Return the fields of /sys/block/X/stat (Documentation/block/stat.rst), None if there is none. Never blocks."""
    try:
        return [int(field) for field in _stat(device).split()] or None
    except (OSError, ValueError):
        return None


def _stat(device: str) -> bytes:
    # Asked of all volumes, often: a file object would cost twice as much.
    fd = os.open(f"/sys/block/{os.path.basename(device)}/stat", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(fd, 4096)
    finally:
        os.close(fd)


def progress(device: str) -> Progress | None:
    """Return how many requests are in flight and how many have ended, None if it cannot be told. Never blocks.

    Of Documentation/block/stat.rst: fields 1, 5, 12 and 16 count the reads, writes, discards and flushes that ended,
    well or not; field 9 is what is in flight. Not the attribute ``inflight``: since Linux 6.16 that leaves out what
    the driver does not have yet; before, both counted the same (block/genhd.c). Linux 6.1 does not count a flush that
    has nothing beside it (blk_mq_check_inflight in block/blk-mq.c); that of Debian 13, 6.12, does. Nothing is counted
    where ``queue/iostats`` is 0.
    """
    fields = counters(device)
    if fields is None or len(fields) < 9:
        return None
    # Discards are there since Linux 4.18, flushes since 5.5.
    return Progress(in_flight=fields[8], ended=fields[0] + fields[4] + sum(fields[11:12]) + sum(fields[15:16]))


def partitions(path: str) -> dict[int, str]:
    """Return the partitions that the kernel sees, by number: {1: "/dev/loop3p1"}."""
    name = os.path.basename(path)
    found: dict[int, str] = {}
    try:
        entries = os.listdir(f"/sys/block/{name}")
    except FileNotFoundError:
        return found
    for entry in entries:
        if entry.startswith(name):
            number = attribute(path, f"{entry}/partition")
            if number is not None:
                found[int(number)] = f"/dev/{entry}"
    return found


def open_alone(path: str, is_there: Callable[[], bool], *, deadline: float) -> int | None:
    """Return an O_EXCL descriptor: while it is held, nobody can mount or claim the device. None: it is gone.

    Raises DEVICE_IN_USE, at ``deadline`` (monotonic) at the latest where nobody can be named.
    """
    pauses = pauses_for_probes()
    while is_there():
        try:
            # Not for writing: the close would make udev look at it once more. fsync does without.
            return os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENODEV):
                return None
            if error.errno != errno.EBUSY:
                raise
        users = device_users(path)
        if (users and not only_probes(users)) or not patience_is_left(users, deadline):
            raise in_use(path, users)
        time.sleep(next(pauses))
    return None


def open_same(path: str, number: int, *, write: bool) -> int:
    """Return a descriptor of the disk with this ``diskseq``, and of no later one of that path. May block.

    Raises OSError; ENXIO where it is another disk by now.
    """
    fd = os.open(path, (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC | os.O_NOFOLLOW)
    # Numbers only grow. Where this is the one now, no later disk can have been opened.
    if not stat.S_ISBLK(os.fstat(fd).st_mode) or diskseq(path) != number:
        os.close(fd)
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO), path)
    return fd


def pauses_for_probes() -> Iterator[float]:
    """Yield how long (seconds) to wait before each next try: a probe is short, but may have to wait for a processor."""
    pause = 0.005
    while True:
        yield pause
        pause = min(2 * pause, 0.3)


def patience_is_left(users: list[str], deadline: float) -> bool:
    """Whether to wait for these users to go: until ``deadline`` (monotonic), for udev longer."""
    return time.monotonic() < deadline + (_UDEV_PATIENCE if only_probes(users) else 0)


def in_use(path: str, users: list[str] | None = None) -> StoragedError:
    """The failure of taking away a device that is used; ``users`` are looked for if they are not given."""
    named = device_users(path) if users is None else users
    return StoragedError(
        ErrorCode.DEVICE_IN_USE, f"{path} is in use", cause=named[0] if named else "somebody has it open",
        hint="unmount or close it first; detach --force ends it all the same",
        users=named,
    )


def flush(fd: int, path: str) -> None:
    """Bring what was written to the device into the image (fsync(2)). May block; raises FLUSH_FAILED."""
    try:
        os.fsync(fd)
    except OSError as error:
        raise StoragedError(
            ErrorCode.FLUSH_FAILED, f"the data written to {path} cannot be flushed",
            cause=error.strerror or str(error),
            hint="make room or repair the storage below and detach again; --force gives the data up",
        ) from error


def flush_path(path: str, is_there: Callable[[], bool]) -> None:
    """As :func:`flush`, for a device that is not open yet."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if is_there():
            flush(fd, path)
    finally:
        os.close(fd)


def remove_unused(
    path: str, is_there: Callable[[], bool], remove: Callable[[], None], *, read_only: bool,
    given_up: threading.Event,
) -> None:
    """Flush a device that nobody uses, and call ``remove``, which takes it away whoever has it open.

    Refuses with DEVICE_IN_USE, the device as it was, when it is mounted, swapped on, held or open anywhere. Mounts
    and holders are kept away by an O_EXCL descriptor over the whole removal. Who has it open without O_EXCL is found
    in /proc only; udev's probes are waited for. FLUSH_FAILED as for :func:`flush`; a flush may hang, and when it ends
    after ``given_up`` was set the device is left as it is.
    """
    deadline = time.monotonic() + PROBE_PATIENCE
    fd = open_alone(path, is_there, deadline=deadline)
    if fd is None:
        return
    pauses = pauses_for_probes()
    try:
        while users := device_users(path):
            if not patience_is_left(users, deadline):
                raise in_use(path, users)
            time.sleep(next(pauses))
        if not read_only:
            flush(fd, path)
        if not given_up.is_set():
            remove()
    finally:
        os.close(fd)
