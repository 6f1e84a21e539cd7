"""Host-wide locks, one per source identity, that live exactly as long as the process that can write.

The lock is flock(2) on an open file description that QSD inherits: when QSD is gone, whoever killed it, the
kernel has let go of the lock, and not a moment earlier. Writers lock exclusively, readers share. The files stay
(removing one would let two processes lock two files of one name); their content is for people only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Iterable

from storaged.errors import ErrorCode, StoragedError


def lock_path(directory: str, identity: str) -> str:
    """Return the path of the lock of a source identity."""
    return os.path.join(directory, hashlib.sha256(identity.encode()).hexdigest()[:32])


def take_lock(directory: str, identity: str, *, exclusive: bool, owner: str) -> int:
    """Return a descriptor that holds the lock; close it, in every process that has it, to let go.

    ``owner`` is what an error about a conflict shall call the holder. Raises SOURCE_IN_USE at once when the
    lock is held.
    """
    os.makedirs(directory, mode=0o700, exist_ok=True)
    fd = os.open(
        lock_path(directory, identity), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600
    )
    try:
        if not (_lock(fd, fcntl.LOCK_EX) if exclusive else _lock_shared(fd, owner)):
            holder = os.pread(fd, 4096, 0).decode(errors="replace").strip().replace("\n", ", ")
            raise StoragedError(
                ErrorCode.SOURCE_IN_USE,
                "the source is in use" + (" for writing" if not exclusive else ""),
                cause=f"held by {holder}" if holder else "its lock is held",
                hint="detach the other volume first, or attach both with --read-only or --snapshot",
                users=[holder] if holder else [],
            )
        if exclusive:
            _sign(fd, owner)
    except BaseException:
        os.close(fd)
        raise
    return fd


def let_go(held: Iterable[int]) -> None:
    """Give back locks that nobody else shall have: also where a child that was just forked still has them open."""
    for fd in held:
        fcntl.flock(fd, fcntl.LOCK_UN)
        os.close(fd)


def _lock(fd: int, kind: int) -> bool:
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _lock_shared(fd: int, owner: str) -> bool:
    """Share the lock, and keep the names of those who share it."""
    if _lock(fd, fcntl.LOCK_EX):
        _sign(fd, owner)  # alone: whatever stood there is of the past
        return _lock(fd, fcntl.LOCK_SH)
    if not _lock(fd, fcntl.LOCK_SH):
        return False
    os.pwrite(fd, f"{owner}\n".encode(), os.fstat(fd).st_size)
    return True


def _sign(fd: int, owner: str) -> None:
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{owner}\n".encode(), 0)


def refuse_claimed(path: str) -> None:
    """Raise SOURCE_IN_USE where somebody has mounted or claimed a block device that shall only be read.

    What is read while somebody else writes to it is neither the old state nor the new one.
    """
    try:
        os.close(os.open(path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _claimed(path, error) from error
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"cannot open {path}", cause=error.strerror or "", hint="check the device"
        ) from error


def claim_block_device(path: str) -> int:
    """Return an O_EXCL descriptor of a block device: while any process has it, nobody can mount or claim it.

    Raises SOURCE_IN_USE when it is mounted, swapped on or held already (open(2), block/bdev.c in the kernel).
    """
    try:
        return os.open(path, os.O_RDWR | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _claimed(path, error) from error
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"cannot open {path} for writing", cause=error.strerror or "",
            hint="attach it with --read-only if it cannot be written to",
        ) from error


def _claimed(path: str, error: OSError) -> StoragedError:
    return StoragedError(
        ErrorCode.SOURCE_IN_USE, f"the block device {path} is in use", cause=error.strerror or "",
        hint="it is mounted, swapped on, or held by device-mapper or md; see lsblk and fuser",
    )


def holders_are_dying(fd: int) -> bool:
    """Whether all processes that have a flock on this file were killed and only wait for the kernel to let go of them.

    Their main threads are zombies, so that no code of theirs ever runs again (proc_locks(5), proc_pid_stat(5)). False
    where a holder cannot be told.
    """
    seen = os.fstat(fd)
    file = f"{os.major(seen.st_dev):02x}:{os.minor(seen.st_dev):02x}:{seen.st_ino}"
    holders = []
    with open("/proc/locks", encoding="ascii") as locks:
        for line in locks:
            fields = line.split()
            if fields[1] == "FLOCK" and fields[5] == file:
                holders.append(fields[4])
    return bool(holders) and all(_is_zombie(pid) for pid in holders)


def _is_zombie(pid: str) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] == b"Z"
    except OSError:
        return False
