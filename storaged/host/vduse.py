"""VDUSE devices, the server's end of vDPA devices: include/uapi/linux/vduse.h, drivers/vdpa/vdpa_user."""

from __future__ import annotations

import errno
import fcntl
import os
import time

from storaged.errors import ErrorCode, StoragedError

_CONTROL = "/dev/vduse/control"
#: _IOW(0x81, 0x03, char[256])
_DESTROY_DEV = 0x41008103
#: Seconds that a server may take to let go of its device after its death.
_BUSY_PATIENCE = 3.0
_BUSY_STEP = 0.02


def node_exists(name: str) -> bool:
    """Whether the kernel has a VDUSE device of that name, served or not."""
    return os.path.lexists(f"/dev/vduse/{name}")


def destroy(name: str) -> None:
    """Remove a VDUSE device that nobody serves and that is not on the bus; no error if there is none.

    A server that has just died may hold it for a moment more: io_uring lets go of its files after the process is gone.
    Blocks for that moment. Raises NAME_TAKEN where somebody serves it, or it is on the bus.
    """
    deadline = time.monotonic() + _BUSY_PATIENCE
    while node_exists(name) and not _destroy(name, may_be_busy=time.monotonic() < deadline):
        time.sleep(_BUSY_STEP)


def _destroy(name: str, *, may_be_busy: bool) -> bool:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _DESTROY_DEV, name.encode().ljust(256, b"\0"))
    except OSError as error:
        if error.errno == errno.EINVAL and not node_exists(name):
            return True
        if error.errno == errno.EBUSY and may_be_busy:
            return False
        raise StoragedError(
            ErrorCode.NAME_TAKEN, f"there is a VDUSE device {name} already",
            cause="another program serves it" if error.errno == errno.EBUSY else error.strerror or str(error),
            hint=f"end that program (fuser /dev/vduse/{name} names it), or choose another name",
        ) from error
    finally:
        os.close(control)
    return True


def control_problem() -> str:
    """Say why VDUSE devices cannot be made here; empty if they can."""
    try:
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_CONTROL}: {error.strerror}"
    return ""


def set_limit(name: str, limit: str, value: int) -> None:
    """Set msg_timeout (seconds) or bounce_size (bytes, before the device is on the bus) of a VDUSE device.

    A kernel that has no such limit (Linux 6.1 has no bounce_size) goes without. Raises DEVICE_FAILED.
    """
    try:
        with open(f"/sys/class/vduse/{name}/{limit}", "w", encoding="ascii") as file:
            file.write(str(value))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and os.path.isdir(f"/sys/class/vduse/{name}"):
            return
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, f"the kernel does not take {limit} {value} for {name}",
            cause=error.strerror or str(error), hint="see dmesg",
        ) from error
