"""VDUSE devices, the server's end of vDPA devices: include/uapi/linux/vduse.h, drivers/vdpa/vdpa_user."""

from __future__ import annotations

import errno
import fcntl
import os

from storaged.errors import ErrorCode, StoragedError

_CONTROL = "/dev/vduse/control"
#: _IOW(0x81, 0x03, char[256])
_DESTROY_DEV = 0x41008103


def node_exists(name: str) -> bool:
    """Whether the kernel has a VDUSE device of that name, served or not."""
    return os.path.lexists(f"/dev/vduse/{name}")


def destroy(name: str) -> None:
    """Remove a VDUSE device that nobody serves and that is not on the bus; no error if there is none.

    Raises NAME_TAKEN where somebody serves it, or it is on the bus.
    """
    if not node_exists(name):
        return
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(control, _DESTROY_DEV, name.encode().ljust(256, b"\0"))
    except OSError as error:
        if error.errno == errno.EINVAL and not node_exists(name):
            return
        raise StoragedError(
            ErrorCode.NAME_TAKEN, f"there is a VDUSE device {name} already", cause=error.strerror or "",
            hint=f"another program serves it (fuser /dev/vduse/{name}): end that, or choose another name",
        ) from error
    finally:
        os.close(control)


def control_problem() -> str:
    """Say why VDUSE devices cannot be made here; empty if they can."""
    try:
        os.close(os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{_CONTROL}: {error.strerror}"
    return ""


def set_limit(name: str, limit: str, value: int) -> None:
    """Set msg_timeout (seconds) or bounce_size (bytes, before the device is on the bus) of a VDUSE device.

    A kernel that has no such limit (Linux 6.1 has no bounce_size) goes without. Raises OSError.
    """
    try:
        with open(f"/sys/class/vduse/{name}/{limit}", "w", encoding="ascii") as file:
            file.write(str(value))
    except FileNotFoundError:
        if not os.path.isdir(f"/sys/class/vduse/{name}"):
            raise
