"""VDUSE devices, the server's end of vDPA devices: include/uapi/linux/vduse.h, drivers/vdpa/vdpa_user."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import struct
import time
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError

_CONTROL = "/dev/vduse/control"
#: _IOW(0x81, 0x03, char[256])
_DESTROY_DEV = 0x41008103
#: _IOWR(0x81, 0x10, struct vduse_iotlb_entry) {offset, start, last, perm}
_IOTLB_GET_FD = 0xC0208110
_ENTRY = struct.Struct("<QQQB7x")
#: _IOWR(0x81, 0x15, struct vduse_vq_info) {index, num, desc_addr, driver_addr, device_addr, state, ready}
_VQ_GET_INFO = 0xC0308115
_QUEUE = struct.Struct("<IIQQQ8sB7x")
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


@dataclass(frozen=True)
class Ring:
    """The indices of a split virtqueue (struct virtq_avail and virtq_used in the virtio standard), modulo 65536."""

    available: int
    """Requests that the kernel has ever made."""
    used: int
    """Requests that a server has ever answered."""

    @property
    def waiting(self) -> int:
        """Requests in flight."""
        return (self.available - self.used) % (1 << 16)


def rings(name: str, queues: int) -> list[Ring] | None:
    """Return the state of the queues of a device that is on the bus and has no server; None where it cannot be seen.

    Blocks for a moment, during which nobody else can serve it; for longer where a server that has just died has it.
    """
    deadline = time.monotonic() + _BUSY_PATIENCE
    while True:
        try:
            device = os.open(f"/dev/vduse/{name}", os.O_RDWR | os.O_CLOEXEC)
            break
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= deadline:
                return None
        time.sleep(_BUSY_STEP)
    try:
        return [_ring(device, index) for index in range(queues)]
    except (OSError, ValueError):
        return None
    finally:
        os.close(device)


def _ring(device: int, index: int) -> Ring:
    info = bytearray(_QUEUE.pack(index, 0, 0, 0, 0, b"", 0))
    fcntl.ioctl(device, _VQ_GET_INFO, info)
    _, _, _, driver_address, device_address, _, ready = _QUEUE.unpack(info)
    if not ready:
        raise ValueError("its driver does not use it")
    # Both begin with flags, 16 bits.
    return Ring(_read_16(device, driver_address + 2), _read_16(device, device_address + 2))


def _read_16(device: int, address: int) -> int:
    """Read a number of the memory that the kernel shares with the server."""
    entry = bytearray(_ENTRY.pack(0, address, address + 1, 0))
    fd = fcntl.ioctl(device, _IOTLB_GET_FD, entry)
    try:
        offset, start, _, _ = _ENTRY.unpack(entry)
        page, within = divmod(offset + address - start, mmap.PAGESIZE)
        with mmap.mmap(fd, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ, offset=page * mmap.PAGESIZE) as memory:
            return int.from_bytes(memory[within:within + 2], "little")
    finally:
        os.close(fd)


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
