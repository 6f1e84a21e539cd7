"""The kernel's NBD client: generic netlink (include/uapi/linux/nbd-netlink.h) and sysfs, drivers/block/nbd.c."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, netlink
from storaged.host.disk import Disk
from storaged.host.users import device_users

_CONNECT, _DISCONNECT, _RECONFIGURE, _LINK_DEAD, _STATUS = 1, 2, 3, 4, 5
#: How long the kernel may take to let go of a device after it has agreed to (seconds).
_GONE_PATIENCE = 10.0
_FORCED_GONE_PATIENCE = 1.0
_GONE_STEP = 0.005
#: Devices whose disconnection the kernel was asked for and has not answered.
_disconnecting: set[str] = set()
_disconnecting_lock = threading.Lock()


@dataclass(frozen=True)
class Negotiated:
    """What the server told in the handshake."""

    size: int
    """Bytes."""
    flags: int
    """Transmission flags as in the NBD protocol."""


@dataclass(frozen=True)
class Timeouts:
    """How long the kernel waits for a server (drivers/block/nbd.c), in seconds."""

    request: int
    """After this a request counts as failed; 0: never, the device waits for a new connection instead."""
    dead_connection: int
    """How long requests wait for a reconnection after the last connection died; then they fail."""


def connect(
    identifier: str, sockets: Sequence[socket.socket], told: Negotiated, *, block_size: int, timeouts: Timeouts
) -> Disk:
    """Give connected sockets to a free NBD device and return it. Blocks.

    ``identifier`` is what /sys/block/nbdN/backend shows, and keeps others' reconnections away. Raises NO_FREE_DEVICE,
    DEVICE_FAILED.
    """
    try:
        answers = netlink.request("nbd", _CONNECT, [
            ("NBD_ATTR_SIZE_BYTES", told.size),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", block_size),
            ("NBD_ATTR_SERVER_FLAGS", told.flags),
            ("NBD_ATTR_TIMEOUT", timeouts.request),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", timeouts.dead_connection),
            ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
            _sockets(sockets),
        ], [sock.fileno() for sock in sockets])
    except OSError as error:
        if error.errno in (errno.ENOMEM, errno.ENOSPC, errno.EBUSY):
            raise StoragedError(
                ErrorCode.NO_FREE_DEVICE, "there is no free NBD device", cause=error.strerror or "",
                hint="free one (nbd-client -d), or load the module with a smaller max_part",
            ) from error
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, "the kernel's NBD client does not take the connection",
            cause=error.strerror or str(error), hint="see dmesg",
        ) from error
    for answer in answers:
        for index in answer.find("NBD_ATTR_INDEX"):
            return Disk(f"/dev/nbd{index}", disk.diskseq(f"/dev/nbd{index}"))
    # The answer was lost: the kernel shows what became of it.
    found = find(identifier)
    if found is None:
        raise StoragedError(ErrorCode.DEVICE_FAILED, "the kernel names no NBD device", hint="see dmesg")
    return found


def reconnect(device: str, identifier: str, sockets: Sequence[socket.socket], timeouts: Timeouts) -> None:
    """Replace dead connections of a device by live ones; requests that wait go on. Blocks.

    The kernel agrees even where no connection is dead, and then drops the new one. The time-out of requests stays as
    it is: said again, it would set the time after which the kernel looks at them back to 30 s, until somebody shortens
    it again (nbd_set_cmd_timeout in drivers/block/nbd.c). Raises DEVICE_FAILED where the device is gone or another
    backend's.
    """
    try:
        netlink.request("nbd", _RECONFIGURE, [
            ("NBD_ATTR_INDEX", _index(device)),
            ("NBD_ATTR_BACKEND_IDENTIFIER", identifier),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", timeouts.dead_connection),
            _sockets(sockets),
        ], [sock.fileno() for sock in sockets])
    except OSError as error:
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, f"{device} cannot be reconnected", cause=error.strerror or str(error),
            hint="see dmesg; detach the volume and attach it again",
        ) from error


def disconnect(device: str, identifier: str) -> None:
    """End a device, whoever uses it: requests in flight fail. Blocks; see :func:`wait_gone` for its end.

    Does nothing where the device is gone or another backend's by now. Raises DEVICE_FAILED, HOST_STUCK.
    """
    with _disconnecting_lock:
        if device in _disconnecting:
            # The kernel takes a number. A second one that comes late would end whatever has the number by then.
            raise StoragedError(
                ErrorCode.HOST_STUCK, f"{device} cannot be disconnected", cause="an earlier disconnection still hangs",
                hint="a device without a server holds up all netlink; look for D-state processes in ps",
            )
        if backend(device) != identifier:
            return
        _disconnecting.add(device)
    try:
        netlink.request("nbd", _DISCONNECT, [("NBD_ATTR_INDEX", _index(device))])
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENODEV, errno.ENOENT):  # gone already
            raise StoragedError(
                ErrorCode.DEVICE_FAILED, f"{device} cannot be disconnected", cause=error.strerror or str(error),
                hint="see dmesg",
            ) from error
    finally:
        with _disconnecting_lock:
            _disconnecting.discard(device)


def wait_gone(device: str, identifier: str) -> None:
    """Wait until the kernel has let go of a disconnected device: at its last close. Raises HOST_STUCK."""
    if not _is_gone(device, identifier, _GONE_PATIENCE):
        raise StoragedError(
            ErrorCode.HOST_STUCK, f"the kernel does not let go of {device}",
            cause=f"it is still configured {_GONE_PATIENCE:g} s after its disconnection",
            hint="somebody may have it open: see fuser, and dmesg",
        )


def users_that_keep(device: str, identifier: str) -> list[str]:
    """Return who keeps a disconnected device from going away; nobody if it is gone."""
    return [] if _is_gone(device, identifier, _FORCED_GONE_PATIENCE) else device_users(device)


def _is_gone(device: str, identifier: str, patience: float) -> bool:
    # No event tells it: the last reference to the device's configuration is dropped by a worker or a closer.
    deadline = time.monotonic() + patience
    while backend(device) == identifier:
        if time.monotonic() >= deadline:
            return False
        time.sleep(_GONE_STEP)
    return True


def connected(device: str) -> bool:
    """Ask the kernel whether the device is set up; true for one whose server is dead, too. Blocks."""
    for answer in netlink.request("nbd", _STATUS, [("NBD_ATTR_INDEX", _index(device))]):
        for item in answer.find("NBD_ATTR_DEVICE_LIST", "NBD_DEVICE_ITEM"):
            told = dict(item["attrs"])
            if told.get("NBD_DEVICE_INDEX") == _index(device):
                return bool(told.get("NBD_DEVICE_CONNECTED"))
    return False


def watch_dead_links(tell: Callable[[str], None], listening: Callable[[], object]) -> None:
    """Call ``tell`` with the device each time the kernel loses a connection (group nbd_mc_group).

    ``listening`` is called once: from then on nothing is missed. Returns when somebody else begins to watch. Raises
    OSError, TRANSPORT_UNAVAILABLE where the kernel has no NBD (yet).
    """
    listener = netlink.listen("nbd", "nbd_mc_group")
    try:
        listening()
        for message in listener:
            for index in message.find("NBD_ATTR_INDEX") if message.command == _LINK_DEAD else ():
                tell(f"/dev/nbd{index}")
    finally:
        listener.close()


def module_number() -> int:
    """Return a number that is another one when the module was unloaded and loaded again. Never blocks."""
    try:
        return os.stat("/sys/module/nbd").st_ino
    except OSError:
        return 0


def backend(device: str) -> str | None:
    """Return the identifier of what a device is connected to, None if it is not connected. Never blocks."""
    return disk.attribute(device, "backend")


def find(identifier: str, ignore: Collection[str] = ()) -> Disk | None:
    """Return the device that is connected to this backend, and is none of those to ``ignore``.

    One that was disconnected while somebody has it open looks like one that is connected until its last close.
    """
    for entry in os.listdir("/sys/block"):
        path = f"/dev/{entry}"
        if entry.startswith("nbd") and path not in ignore and backend(path) == identifier:
            return Disk(path, disk.diskseq(path))
    return None


def _sockets(sockets: Sequence[socket.socket]) -> tuple[str, object]:
    items = [
        ("NBD_SOCK_ITEM", netlink.nested([("NBD_SOCK_FD", netlink.descriptor(index))])) for index in range(len(sockets))
    ]
    return ("NBD_ATTR_SOCKETS", netlink.nested(items))


def _index(device: str) -> int:
    return int(device.removeprefix("/dev/nbd"))
