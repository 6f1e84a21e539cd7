"""Loop devices by ioctl: loop(4), include/uapi/linux/loop.h in the kernel tree."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import threading
import time
from collections.abc import Callable

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk
from storaged.host.disk import Disk
from storaged.host.users import device_users

_LOOP_CTL_GET_FREE = 0x4C82
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CLR_FD = 0x4C01
_LOOP_SET_STATUS64 = 0x4C04
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_SET_CAPACITY = 0x4C07
_READ_ONLY = 1
_AUTOCLEAR = 4
_PARTSCAN = 8
_DIRECT_IO = 16


class _Info64(ctypes.Structure):
    """struct loop_info64."""

    _fields_ = [
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("rdevice", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("sizelimit", ctypes.c_uint64),
        ("number", ctypes.c_uint32),
        ("encrypt_type", ctypes.c_uint32),
        ("encrypt_key_size", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("file_name", ctypes.c_char * 64),
        ("crypt_name", ctypes.c_char * 64),
        ("encrypt_key", ctypes.c_uint8 * 32),
        ("init", ctypes.c_uint64 * 2),
    ]


class _Config(ctypes.Structure):
    """struct loop_config."""

    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _Info64),
        ("reserved", ctypes.c_uint64 * 8),
    ]


def set_up(
    backing: str, *, label: str, read_only: bool, direct_io: bool, block_size: int, attempts: int = 64
) -> Disk:
    """Put a free loop device over a file, in one ioctl (LOOP_CONFIGURE, Linux 5.8), and return it.

    ``label`` (at most 63 bytes) is for losetup's eyes, ``block_size`` the logical block size in bytes. The
    device does not vanish at its last close, and its partitions are scanned. Raises NO_FREE_DEVICE,
    DEVICE_FAILED.
    """
    file = os.open(backing, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
    try:
        config = _Config(fd=file, block_size=block_size)
        config.info.flags = _PARTSCAN | (_READ_ONLY if read_only else 0) | (_DIRECT_IO if direct_io else 0)
        config.info.file_name = os.fsencode(label)[:63]
        for _ in range(attempts):
            device = _next_free()
            path = f"/dev/loop{device}"
            try:
                fd = os.open(path, (os.O_RDONLY if read_only else os.O_RDWR) | os.O_CLOEXEC)
            except (FileNotFoundError, PermissionError) as error:
                raise _no_free(f"{path}: {error.strerror}") from error
            try:
                fcntl.ioctl(fd, _LOOP_CONFIGURE, config)
            except OSError as error:
                if error.errno == errno.EBUSY:
                    continue  # somebody else was faster with this number
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, f"cannot set up {path}", cause=error.strerror or str(error),
                    hint="LOOP_CONFIGURE needs Linux 5.8 or newer; see dmesg",
                ) from error
            finally:
                os.close(fd)
            return Disk(path, disk.diskseq(path))
        raise _no_free("every one was taken by somebody else first")
    finally:
        os.close(file)


def _next_free() -> int:
    try:
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise _no_free(f"/dev/loop-control: {error.strerror}") from error
    try:
        return fcntl.ioctl(control, _LOOP_CTL_GET_FREE)
    except OSError as error:
        raise _no_free(error.strerror or str(error)) from error
    finally:
        os.close(control)


def _no_free(cause: str) -> StoragedError:
    return StoragedError(
        ErrorCode.NO_FREE_DEVICE, "there is no free loop device", cause=cause,
        hint="load the module (modprobe loop), or free some: losetup -a lists them",
    )


def backing_file(path: str) -> str | None:
    """Return the path of the backing file as the kernel sees it, None when the device is not set up."""
    return disk.attribute(path, "loop/backing_file")


def find_by_backing(backing: str) -> list[Disk]:
    """Return the loop devices over exactly this path."""
    return [
        Disk(f"/dev/{entry}", disk.diskseq(f"/dev/{entry}"))
        for entry in os.listdir("/sys/block")
        if entry.startswith("loop") and backing_file(f"/dev/{entry}") == backing
    ]


def update_size(path: str) -> None:
    """Make a loop device take over the size of its backing file (LOOP_SET_CAPACITY). Raises OSError."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _LOOP_SET_CAPACITY, 0)
    finally:
        os.close(fd)


def release(
    device: Disk, *, read_only: bool, given_up: threading.Event, before: Callable[[], object] = lambda: None
) -> None:
    """Take a loop device away that nobody uses; data is flushed first.

    Refuses with DEVICE_IN_USE, the device as it was, when it is mounted, swapped on, held, or open anywhere.
    FLUSH_FAILED when what was written cannot be brought to the image. No error when it is gone already. A flush may
    hang; when it ends after ``given_up`` was set, the device is left as it is. ``before`` is called when it has been
    flushed, and still is nobody else's; it may block.
    """
    deadline, pauses = time.monotonic() + disk.PROBE_PATIENCE, disk.pauses_for_probes()
    while True:
        fd = disk.open_alone(
            device.path, lambda: is_bound(device), deadline=deadline
        )
        if fd is None:
            return
        try:
            if not read_only:
                disk.flush(fd, device.path)
            if not given_up.is_set():
                before()
            if given_up.is_set():
                return
            fcntl.ioctl(fd, _LOOP_CLR_FD)
        except OSError as error:
            if error.errno == errno.ENXIO:
                return
            raise
        finally:
            # The last close is what detaches: synchronously, when nobody else has it open.
            os.close(fd)
        if not is_bound(device):
            return
        # Somebody opened it without O_EXCL. LOOP_CLR_FD now means "at the last close": take that back.
        _clear_autoclear(device)
        if time.monotonic() >= deadline and not disk.patience_is_left(users := device_users(device.path), deadline):
            raise disk.in_use(device.path, users)
        time.sleep(next(pauses))


def release_by_force(device: Disk) -> list[str]:
    """Take a loop device away whoever uses it: at once if it is free, else at its last close.

    Returns who still uses it. Writes to nothing and waits for nothing.
    """
    if not is_bound(device):
        return []
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return []
    try:
        fcntl.ioctl(fd, _LOOP_CLR_FD)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(fd)
    return device_users(device.path) if is_bound(device) else []


def is_bound(device: Disk) -> bool:
    """Whether it is still set up, and by nobody else since."""
    return backing_file(device.path) is not None and disk.diskseq(device.path) == device.diskseq


def _clear_autoclear(device: Disk) -> None:
    try:
        fd = os.open(device.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        if not is_bound(device):
            return
        info = _Info64()
        fcntl.ioctl(fd, _LOOP_GET_STATUS64, info)
        if info.flags & _AUTOCLEAR:
            info.flags &= ~_AUTOCLEAR
            fcntl.ioctl(fd, _LOOP_SET_STATUS64, info)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(fd)
