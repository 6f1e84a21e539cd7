"""vDPA devices: generic netlink (include/uapi/linux/vdpa.h) and the bus in sysfs (sysfs-bus-vdpa in the kernel's ABI).

A device goes away in two steps. Unbinding it from virtio_vdpa removes the disk and waits for its requests: without
a live server that wait has no end, so it happens in a child that can be left behind. ``delete`` after that takes no
time. The other way round, "vdpa dev del" holds up all generic netlink of the host while it waits.
"""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import time

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, netlink, worker
from storaged.host.disk import Disk

_BUS = "/sys/bus/vdpa"
_DEV_NEW = 3
_DEV_DEL = 4
_STEP = 0.01


def add(name: str) -> None:
    """Put the VDUSE device ``name`` on the bus (vdpa dev add name NAME mgmtdev vduse). Blocks.

    That it returns does not mean that there is a disk: look with :func:`find_disk`. No error when it is there already.
    """
    try:
        netlink.request("vdpa", _DEV_NEW, [("VDPA_ATTR_DEV_NAME", name), ("VDPA_ATTR_MGMTDEV_DEV_NAME", "vduse")])
    except OSError as error:
        if error.errno == errno.EEXIST:
            return
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, f"the kernel does not take {name} onto the vDPA bus",
            cause="the export is gone: qemu-storage-daemon died" if error.errno == errno.EINVAL
            else error.strerror or str(error),
            hint="see dmesg",
        ) from error


def delete(name: str) -> None:
    """Take the device off the bus. Only after :func:`unbind`. No error when it is gone already."""
    try:
        netlink.request("vdpa", _DEV_DEL, [("VDPA_ATTR_DEV_NAME", name)])
    except OSError as error:
        if error.errno != errno.ENODEV:
            raise StoragedError(
                ErrorCode.DEVICE_FAILED, f"the kernel does not take {name} off the vDPA bus",
                cause=error.strerror or str(error), hint="see dmesg",
            ) from error


def exists(name: str) -> bool:
    """Whether a device of that name is on the bus."""
    return os.path.lexists(f"{_BUS}/devices/{name}")


def driver(name: str) -> str | None:
    """Return the driver that the device is bound to: virtio_vdpa, vhost_vdpa, or None."""
    try:
        return os.path.basename(os.readlink(f"{_BUS}/devices/{name}/driver"))
    except OSError:
        return None


def find_disk(name: str) -> Disk | None:
    """Return the disk that virtio_blk made of the device, None if there is none (yet)."""
    base = f"{_BUS}/devices/{name}"
    with contextlib.suppress(OSError):
        for entry in os.listdir(base):
            if entry.startswith("virtio"):
                for name_ in os.listdir(f"{base}/{entry}/block"):
                    return Disk(f"/dev/{name_}", disk.diskseq(f"/dev/{name_}"))
    return None


def has_virtio_driver(name: str) -> bool:
    """Whether the virtio device that virtio_vdpa made of it has a driver: virtio_blk lets go of one without answers."""
    base = f"{_BUS}/devices/{name}"
    with contextlib.suppress(OSError):
        return any(
            os.path.lexists(f"{base}/{entry}/driver") for entry in os.listdir(base) if entry.startswith("virtio")
        )
    return False


def is_going(name: str) -> bool:
    """Whether it is being unbound, and waits for requests: driver and disk are gone, the virtio device is not."""
    with contextlib.suppress(OSError):
        return driver(name) is None and any(
            entry.startswith("virtio") for entry in os.listdir(f"{_BUS}/devices/{name}")
        )
    return False


def bind(name: str) -> None:
    """See to it that virtio_vdpa has the device, and not vhost_vdpa, which may be loaded as well.

    Raises DEVICE_FAILED.
    """
    bound = driver(name)
    if bound == "virtio_vdpa":
        return
    try:
        # By a worker: the new driver looks for partitions, which waits for the server without an end.
        worker.write(f"{_BUS}/devices/{name}/driver_override", "virtio_vdpa")
        if bound is not None:
            worker.write(f"{_BUS}/drivers/{bound}/unbind", name)
        worker.write(f"{_BUS}/drivers/virtio_vdpa/bind", name)
    except OSError as error:
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, f"virtio_vdpa does not take {name}", cause=error.strerror or str(error),
            hint="see dmesg",
        ) from error


def unbind(name: str, timeout: float) -> None:
    """Take the disk away, whoever uses it. Blocks for at most ``timeout`` seconds; raises HOST_STUCK after that.

    The write is done by a child: it ends when all requests in flight have ended, and may never return. A child that
    is left behind changes nothing but what was wished for.
    """
    bound = driver(name)
    if bound is None:
        # An earlier child may be at it still: who deletes the device now stops all generic netlink of the host.
        deadline = time.monotonic() + timeout
        while is_going(name):
            if time.monotonic() >= deadline:
                raise _does_not_go(name, timeout)
            time.sleep(_STEP)
        return
    child = subprocess.Popen(
        ["/bin/sh", "-c", 'echo "$1" > "$2"', "sh", name, f"{_BUS}/drivers/{bound}/unbind"],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True,
    )
    try:
        _, complaint = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired as error:
        child.kill()
        # It cannot be waited for. Whoever collects the daemon's children gets it; Popen must not warn.
        if child.stderr is not None:
            child.stderr.close()
        raise _does_not_go(name, timeout) from error
    if child.returncode != 0 and driver(name) is not None:
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, f"cannot unbind {name} from {bound}",
            cause=complaint.decode(errors="replace").strip(), hint="see dmesg",
        )


def _does_not_go(name: str, timeout: float) -> StoragedError:
    return StoragedError(
        ErrorCode.HOST_STUCK, f"the disk of {name} does not go away",
        cause=f"its requests have not ended within {timeout:g} s",
        hint="the storage below does not answer; detach --force ends the requests with I/O errors",
    )
