"""NBD: QSD's NBD server (nbd/server.c in QEMU) and the kernel's NBD client, over a unix socket that nobody else sees.

What it survives: the daemon's death, and QSD's: requests wait for a successor, and go on once the kernel was given a
connection to it. One connection, no request timeout and a long dead_conn_timeout are what keeps the data safe: with
more connections the kernel may send a request again that the first server is still about to do
(nbd_xmit_timeout in drivers/block/nbd.c).
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, nbd, netlink, queue, worker
from storaged.host.nbdhandshake import libnbd_problem, negotiate
from storaged.host.unixsock import connect_unix
from storaged.host.users import device_users
from storaged.model.blockdev import DISK, EXPORT
from storaged.model.plan import Device
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build, QsdVersion
from storaged.transports.base import IOTHREAD, Availability, Connected, HostDevice, Seen, Site, iothread
from storaged.transports.needs import check_family, lacking, load_modules
from storaged.transports.options import POLLING, POLLING_OPTION, Number, number, polling
from storaged.transports.queue import QUEUE_OPTIONS, attributes

_CONNECTIONS = Number("connections; more than one is faster, and not safe when QSD hangs", 1, 16)
_TIMEOUT = Number("seconds until a request fails; 0: never", 0, 86400)
_DEAD_TIMEOUT = Number("seconds that requests wait for a new QSD", 1, 365 * 86400)

#: In milliseconds: how often the kernel looks whether a request's connection is dead.
_LOOK_EVERY = 500
#: Larger requests gain nothing, smaller ones cost much (docs/benchmarks.md).
_MAX_SECTORS_KB = 1024
SOCKET = "nbd.sock"
#: Seconds that QSD may take for a handshake: it is on this host, and asks no storage.
_HANDSHAKE_PATIENCE = 10.0


def has_iothread(version: QsdVersion) -> bool:
    """Whether the I/O has a thread of its own: QSD 7.2 aborts with one when the client disconnects."""
    return version.major >= 10


def nbd_socket(record: Record) -> str:
    """The socket of the NBD server, in the volume's directory."""
    return os.path.join(record.sockets, SOCKET)


class NbdTransport(HostDevice):
    """The transport ``nbd``."""

    name = "nbd"
    grows = False
    reconnects = True
    bridges = True
    options: Mapping[str, str] = {
        "connections": f"{_CONNECTIONS.about}; default 1",
        "timeout": f"{_TIMEOUT.about}; default 0",
        "dead-timeout": f"{_DEAD_TIMEOUT.about} before they fail; default 3600",
        **POLLING_OPTION, **QUEUE_OPTIONS,
    }

    def probe(self, build: Build | None) -> Availability:
        """The kernel's NBD client, and libnbd for the handshake."""
        if build is not None and "nbd" not in build.exports:
            return Availability(False, f"qemu-storage-daemon {build.version} has no nbd export")
        missing = lacking("nbd")
        if missing is not None:
            return missing
        problem = libnbd_problem()
        if problem:
            return Availability(False, problem, "apt install python3-libnbd")
        return Availability(True, "the kernel has an NBD client")

    def make_ready(self, timeout: float) -> None:
        """Load the module, with the parameters that the administrator has given it in modprobe.d."""
        netlink.start()  # meanwhile
        load_modules("nbd", timeout)
        check_family("nbd")

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """The safe set, or what the user insists on."""
        polls = has_iothread(build.version)
        # Of a build without exports nothing is known. What auto took need not have all that was said.
        if POLLING in spec.options and not polls and build.exports and spec.transport != "auto":
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {POLLING} cannot be had by nbd here", volume=spec.name,
                cause=f"qemu-storage-daemon {build.version} has no I/O thread of its own for it, 10.0 has",
                hint="leave it out, or take another transport",
            )
        return {
            "connections": number(spec, "connections", _CONNECTIONS, 1),
            "timeout": number(spec, "timeout", _TIMEOUT, 0),
            "dead-timeout": number(spec, "dead-timeout", _DEAD_TIMEOUT, 3600),
            **(polling(spec) if polls or not build.exports else {}),
            "iothread": int(polls),
        }

    def claims(self, site: Site) -> tuple[str, ...]:
        """The identifier is what tells our device from others'."""
        return (f"nbd:{site.bus_name}",)

    def refuse_foreign(self, site: Site) -> None:
        """A device with our identifier that we did not make is left alone."""
        found = nbd.find(site.bus_name)
        if found is not None:
            users = device_users(found.path)
            raise StoragedError(
                ErrorCode.NAME_TAKEN, f"{found.path} has the backend identifier {site.bus_name} already",
                cause=f"it is still used: {users[0]}" if users else "this daemon does not know it",
                hint=f"end its users, or what it belongs to (nbd-client -d {found.path}); or choose another name",
                users=users,
            )

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """A thread for the I/O, where that is safe."""
        return [iothread(record)] if record.settings["iothread"] else []

    def setup(self, site: Site, record: Record) -> list[tuple[str, dict[str, Any]]]:
        """The server, in the volume's directory (QSD's working directory: its path may be too long)."""
        return [("nbd-server-start", {"addr": {"type": "unix", "data": {"path": nbd_socket(record)}}})]

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """BlockExportOptionsNbd."""
        options: dict[str, Any] = {
            "type": "nbd", "id": EXPORT, "node-name": DISK, "name": site.bus_name,
            "writable": not record.spec.read_only,
        }
        if record.settings["iothread"]:
            options["iothread"] = IOTHREAD
        return options

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """Nothing: the server is there."""

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """The identifier in sysfs tells whether the device is ours; the record, whose connection it has."""
        device = Device.NONE
        if record is not None and record.device is not None and nbd.backend(record.device) == site.bus_name:
            served = alive and record.served_by is not None and record.served_by == record.process
            device = Device.HEALTHY if served else Device.UNSERVED
        return Seen(reachable=True, device=device, remains=False)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        """The device with our identifier."""
        found = nbd.find(site.bus_name, record.abandoned if record else ())
        return Connected(found.path, found.diskseq) if found else None

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """The handshake by libnbd, then the kernel gets the connections."""
        given_up = threading.Event()

        def work() -> Connected:
            found = nbd.find(site.bus_name, record.abandoned)
            if found is not None:
                # The answer to an earlier try was lost. Whose connection it has is not known: it gets a new one.
                return Connected(found.path, found.diskseq, served=False)
            with _connections(site, record, timeout) as (sockets, told):
                made = nbd.connect(
                    site.bus_name, sockets, told, block_size=record.spec.logical_block_size,
                    timeouts=_timeouts(record),
                )
            if given_up.is_set():
                # Netlink stood still, and nobody waits for this device any more.
                nbd.disconnect(made.path, site.bus_name)
            else:
                _tune(made.path, record)
            return Connected(made.path, made.diskseq)

        try:
            return await site.blocking("set up an NBD device", timeout, work)
        except BaseException:
            given_up.set()
            raise

    async def reconnect(self, site: Site, record: Record, timeout: float) -> None:
        """New connections in the place of dead ones: the requests that wait are sent again."""

        def work() -> None:
            if not nbd.connected(str(record.device)):
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, f"{record.device} is not set up any more",
                    cause="somebody disconnected it",
                    hint="see dmesg; detach the volume and attach it again",
                )
            with _connections(site, record, timeout) as (sockets, told):
                if told.size != record.size:
                    raise StoragedError(
                        ErrorCode.SOURCE_CHANGED, f"the disk has {told.size} bytes by now, its device {record.size}",
                        hint="bring the old size back; or detach the volume and attach it again",
                    )
                nbd.reconnect(str(record.device), site.bus_name, sockets, _timeouts(record))
            _tune(str(record.device), record)

        await site.blocking("reconnect the NBD device", timeout, work)

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Flush, give the queue back and disconnect, under an O_EXCL descriptor."""
        path, given_up = record.device, threading.Event()
        if path is None:
            return

        def remove() -> None:
            queue.give_back(path, record.queue, attributes(record.spec))
            if not given_up.is_set():
                nbd.disconnect(path, site.bus_name)

        try:
            await site.blocking(
                "take the NBD device away", timeout, disk.remove_unused, path,
                lambda: nbd.backend(path) == site.bus_name, remove, read_only=record.spec.read_only, given_up=given_up,
            )
        except BaseException:
            given_up.set()
            raise
        await site.blocking("see the NBD device go", timeout, nbd.wait_gone, path, site.bus_name)

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Flush for a few seconds if there is a server, then end all requests and the connection."""
        path = record.device
        if path is None:
            return []
        notes: list[str] = []
        served = record.served_by is not None and record.served_by == record.process
        if flush and served and not record.spec.read_only:
            notes = await self.flush_before_force(site, path, lambda: nbd.backend(path) == site.bus_name, timeout)
            if notes:
                # QSD may have ceased to read: a disconnection would wait for who sends, and all of netlink with it.
                raise StoragedError(ErrorCode.HOST_STUCK, notes[0])
        await site.blocking("take the NBD device away", timeout, nbd.disconnect, path, site.bus_name)
        users = await site.blocking("see the NBD device go", timeout, nbd.users_that_keep, path, site.bus_name)
        await site.blocking("give the NBD device back", timeout, _give_back, path, record)
        return notes + [f"{path} fails all I/O and stays until its last user is gone: {user}" for user in users]

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """Nothing is left but the socket, which goes with the directory."""
        return []

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """QSD does not resize a disk that it exports by NBD."""
        raise StoragedError(ErrorCode.UNSUPPORTED, "a volume on NBD cannot be resized")


@contextlib.contextmanager
def _connections(
    site: Site, record: Record, timeout: float
) -> Iterator[tuple[list[socket.socket], nbd.Negotiated]]:
    """Connected sockets past the handshake. The kernel keeps its own reference, so ours are closed at the end."""
    patience = min(timeout / 2, _HANDSHAKE_PATIENCE)
    with contextlib.ExitStack() as stack:
        try:
            sockets = [
                stack.enter_context(connect_unix(os.path.join(site.directory, nbd_socket(record))))
                for _ in range(record.settings["connections"])
            ]
        except OSError as error:
            raise StoragedError(
                ErrorCode.DEVICE_FAILED, "qemu-storage-daemon takes no NBD connection",
                cause=error.strerror or str(error), hint="look into the journal and qsd.log",
            ) from error
        told = [negotiate(sock, site.bus_name, patience) for sock in sockets]
        yield sockets, told[0]


def _give_back(path: str, record: Record) -> None:
    """The queue as it was, of a device that nobody has any more: the next one's is as it is left."""
    if record.queue and disk.attribute(path, "pid") is None:
        queue.give_back(path, record.queue, attributes(record.spec))


def _timeouts(record: Record) -> nbd.Timeouts:
    return nbd.Timeouts(record.settings["timeout"], record.settings["dead-timeout"])


def _tune(path: str, record: Record) -> None:
    # Newer kernels begin with 1280. Writing freezes the queue, which takes longer than to connect.
    said = "max-sectors-kb" in record.spec.options
    if not said and int(disk.attribute(path, "queue/max_sectors_kb") or _MAX_SECTORS_KB) < _MAX_SECTORS_KB:
        with contextlib.suppress(OSError, StoragedError):  # only slower without it
            largest = int(disk.attribute(path, "queue/max_hw_sectors_kb") or _MAX_SECTORS_KB)
            # It waits for the requests in flight, for ever if the server dies meanwhile.
            attribute = f"/sys/block/{os.path.basename(path)}/queue/max_sectors_kb"
            worker.write(attribute, str(min(largest, _MAX_SECTORS_KB)))
    if record.settings["timeout"] == 0:
        disk.set_attribute(path, "queue/io_timeout", _LOOK_EVERY)


TRANSPORT = NbdTransport()
