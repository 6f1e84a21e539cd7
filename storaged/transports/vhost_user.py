"""vhost-user: QSD serves a virtio disk on a socket (block/export/vhost-user-blk-server.c in QEMU), for one virtual
machine. There is no device on the host, and the kernel needs nothing.

What it survives: the daemon's death. QSD's: the virtual machine's QEMU waits and connects to the successor, if it was
told to (reconnect=1 at its chardev). Requests that were under way at that moment are not known to the successor: the
export has no VHOST_USER_PROTOCOL_F_INFLIGHT_SHMFD, and QEMU goes on from the used index, which is wrong where requests
had overtaken each other.
"""

from __future__ import annotations

import contextlib
import grp
import os
import pwd
import shutil
import stat
from collections.abc import Mapping
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host.unixpeers import clients_of
from storaged.model.blockdev import DISK, EXPORT
from storaged.model.plan import Device
from storaged.model.powers import NO_POWERS, Powers
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build
from storaged.transports.base import IOTHREAD, Availability, Connected, Seen, Site, iothread
from storaged.transports.options import POLLING_OPTION, Number, number, polling

_QUEUES = Number("virtqueues", 1, 256)
#: sun_path holds 108 bytes with the NUL at its end (unix(7)), for QEMU on both sides.
_LONGEST = 107
#: (uid_t) -1, which means no user to chown(2).
_NO_ID = 0xFFFFFFFF
#: The first QEMU whose export has a resize callback. Before, not even a machine that starts later sees the new size.
_TELLS_GROWTH = (8, 1)


class VhostUserTransport:
    """The transport ``vhost-user``."""

    name = "vhost-user"
    needs_server = False
    reconnects = False
    bridges = False
    grows = True
    options: Mapping[str, str] = {
        "queues": f"{_QUEUES.about}; default 1; the virtual machine must not ask for more",
        "socket-owner": "USER or USER:GROUP (names or numbers) that the socket belongs to, as libvirt-qemu; default: "
        "the daemon's",
        **POLLING_OPTION,
    }

    def powers(self, site: Site) -> Powers:
        """Nothing, where it can make its socket in its own directory."""
        if len(os.fsencode(_own(site))) <= _LONGEST:
            return NO_POWERS
        return Powers(
            root="its directory has too long a path for a socket, and that of all sockets is root's",
            sockets=(site.socket_directory,),
        )

    def probe(self, build: Build | None) -> Availability:
        """QSD 5.2 with vhost-user-blk."""
        if build is not None and "vhost-user-blk" not in build.exports:
            return Availability(False, f"qemu-storage-daemon {build.version} has no vhost-user-blk export")
        return Availability(True, "vhost-user needs nothing of the kernel")

    def make_ready(self, timeout: float) -> None:
        """Nothing to load."""

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """Queues, whom the socket belongs to, and whether QSD tells a virtual machine that the disk has grown."""
        user, group = _owner(spec)
        return {
            "queues": number(spec, "queues", _QUEUES, 1), "uid": user, "gid": group, **polling(spec),
            "grows": int(build.version[:2] >= _TELLS_GROWTH),
        }

    def claims(self, site: Site) -> tuple[str, ...]:
        """The socket is in the daemon's own directory."""
        return ()

    def refuse_foreign(self, site: Site) -> None:
        """A path that is too long for QEMU is found out before anything is done."""
        path = self.socket(site)
        if len(os.fsencode(path)) > _LONGEST:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, f"the socket would be {path}",
                cause=f"that are {len(os.fsencode(path))} bytes, and QEMU takes {_LONGEST}",
                hint="choose a shorter name, or a shorter --root for the daemon",
            )

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """A thread for the I/O."""
        return [iothread(record)]

    def setup(self, site: Site, record: Record) -> list[tuple[str, dict[str, Any]]]:
        """Nothing."""
        return []

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """BlockExportOptionsVhostUserBlk."""
        options: dict[str, Any] = {
            "type": "vhost-user-blk", "id": EXPORT, "node-name": DISK, "iothread": IOTHREAD,
            "addr": {"type": "unix", "path": _bound(site, record)}, "writable": not record.spec.read_only,
            "num-queues": record.settings["queues"], "logical-block-size": record.spec.logical_block_size,
        }
        if record.spec.keeps_writes_in_memory:
            # A virtual machine may connect to a successor and go on; no device can fail in its stead.
            options["writethrough"] = True
        return options

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """A socket of a dead QSD is in the way of the next one."""
        path = self.socket(site)

        def work() -> None:
            os.makedirs(site.socket_directory, mode=0o711, exist_ok=True)
            for leftover in (path, _aside(path), _own(site)):
                _remove(leftover)

        await site.blocking("prepare the socket", timeout, work)

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """The socket is the device. One that a detach moved aside, and left there, has to come back first."""
        path = self.socket(site)
        there, aside = os.path.lexists(path), os.path.lexists(_aside(path))
        device = Device.NONE
        if alive and record is not None and record.socket is not None and (there or aside):
            device = Device.HEALTHY if there else Device.UNSERVED
        remains = there or aside or os.path.lexists(_own(site))
        return Seen(reachable=remains, device=device, remains=remains)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        """The socket, which a virtual machine may be connected to."""
        path = self.socket(site)
        return Connected(None, socket=path) if any(map(os.path.lexists, (path, _aside(path)))) else None

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """Put the socket in its place, and open it to its owner."""
        path = self.socket(site)

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(_own(site), path)
            # Only here nobody can put another thing in its place any more.
            if not stat.S_ISSOCK(os.lstat(path).st_mode):
                _remove(path)
                raise StoragedError(ErrorCode.DEVICE_FAILED, "qemu-storage-daemon has made no socket")
            os.chown(path, record.settings["uid"], record.settings["gid"], follow_symlinks=False)
            os.chmod(path, 0o660)

        await site.blocking("give the socket to its owner", timeout, work)
        return Connected(None, socket=path)

    async def reconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Put back the socket that a detach moved aside before its daemon died."""
        path = self.socket(site)

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(_aside(path), path)

        await site.blocking("put the socket back", timeout, work)

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Refuse while a virtual machine is connected; none can connect meanwhile: the socket is moved aside."""
        path = self.socket(site)

        def work() -> None:
            with contextlib.suppress(FileNotFoundError):
                os.rename(path, _aside(path))
            try:
                users = clients_of(path, _server(record), _bound(site, record))
            except BaseException:
                os.rename(_aside(path), path)
                raise
            if users:
                os.rename(_aside(path), path)
                raise StoragedError(
                    ErrorCode.DEVICE_IN_USE, "a virtual machine uses the volume", cause=users[0],
                    hint="unplug its disk or end it first; detach --force ends it all the same", users=users,
                )
            with contextlib.suppress(FileNotFoundError):
                os.unlink(_aside(path))

        await site.blocking("take the socket away", timeout, work)

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Take the socket away; who is connected is cut off when QSD ends, which flushes."""
        path = self.socket(site)

        def work() -> list[str]:
            users: list[str] = []
            with contextlib.suppress(OSError):  # the names are help
                users = clients_of(path, _server(record), _bound(site, record))
            for leftover in (path, _aside(path), _own(site)):
                _remove(leftover)
            return [f"its I/O waits, and may go on when this volume is attached again: {user}" for user in users]

        return await site.blocking("take the socket away", timeout, work)

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """The socket of a dead QSD."""
        return await self.disconnect_by_force(site, record, timeout, flush=False) if record else []

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """QSD tells the virtual machine by itself."""

    def partitions(self, record: Record) -> dict[int, str]:
        """None on this host."""
        return {}

    @staticmethod
    def socket(site: Site) -> str:
        """The path of the socket."""
        return os.path.join(site.socket_directory, f"{site.name}.sock")


def _aside(path: str) -> str:
    # Not a volume's name: it begins with a dot.
    return os.path.join(os.path.dirname(path), f".{os.path.basename(path)}")


def _own(site: Site) -> str:
    # Its own part of the volume's directory, as ``Record.sockets`` has it.
    return os.path.join(site.directory, "tmp", "vm.sock")


def _remove(path: str) -> None:
    """Remove whatever is there: in its own directory a QSD that was taken over makes what it likes."""
    try:
        os.unlink(path)
    except FileNotFoundError:
        pass
    except IsADirectoryError:
        shutil.rmtree(path)


def _bound(site: Site, record: Record) -> str:
    """Where QSD makes the socket. That of an older daemon, or with a long path, made it in its place at once."""
    own = _own(site)
    return own if record.sockets and len(os.fsencode(own)) <= _LONGEST else VhostUserTransport.socket(site)


def _server(record: Record) -> int:
    return record.process.pid if record.process is not None else 0


def _owner(spec: VolumeSpec) -> tuple[int, int]:
    text = spec.options.get("socket-owner")
    if text is None:
        return os.geteuid(), os.getegid()
    user, _, group = text.partition(":")
    try:
        # A user of a container may have no name here.
        if _is_id(user):
            return int(user), _group(group) if group else os.getegid()
        entry = pwd.getpwnam(user)
        return entry.pw_uid, _group(group) if group else entry.pw_gid
    except KeyError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"option socket-owner={text!r}", cause=str(error.args[0]),
            hint="use USER or USER:GROUP that this host has, or numbers", volume=spec.name,
        ) from error


def _group(group: str) -> int:
    return int(group) if _is_id(group) else grp.getgrnam(group).gr_gid


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and int(text) < _NO_ID


TRANSPORT = VhostUserTransport()
