"""What a transport is: one way in which a QSD export becomes a block device of this host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from storaged.host import disk
from storaged.host.blocking import BlockingCalls
from storaged.model.plan import Device
from storaged.model.powers import NO_POWERS, Powers
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build
from storaged.transports.options import POLLING
from storaged.transports.queue import QUEUE_OPTIONS


@dataclass(frozen=True)
class Availability:
    """Whether this host and this QSD can do a transport, and why (not)."""

    available: bool
    reason: str
    hint: str = ""
    """What to do about it."""


@dataclass(frozen=True)
class Site:
    """Where one volume is attached: what a transport needs to know of it."""

    name: str
    directory: str
    blocking: BlockingCalls
    socket_directory: str
    """Where sockets for virtual machines are."""

    @property
    def bus_name(self) -> str:
        """The volume's name where all of the host meet: on the vDPA bus, among NBD's backends."""
        return f"storaged.{self.name}"


@dataclass(frozen=True)
class Seen:
    """What a transport observes of a volume on the host, without asking QSD or its storage anything."""

    reachable: bool
    """The host's end of the export is there (for FUSE: its mount)."""
    device: Device
    remains: bool
    """Something of an export is there, alive or dead."""


@dataclass(frozen=True)
class Connected:
    """A device that a transport set up; or a socket, where a virtual machine is to use it."""

    device: str | None
    diskseq: int = 0
    direct_io: bool = False
    socket: str | None = None
    served: bool = True
    """It is connected to the present QSD; false for one that was found and may be connected to an older one."""


class Transport(Protocol):
    """Calls that may block take a deadline in seconds; all are idempotent."""

    @property
    def name(self) -> str:
        """As the user writes it."""

    @property
    def options(self) -> Mapping[str, str]:
        """The options -o KEY=VALUE that it has, and what each means."""

    @property
    def needs_server(self) -> bool:
        """Whether its device cannot be taken away, not even by force, while nothing serves it."""

    @property
    def reconnects(self) -> bool:
        """Whether its device has a connection of its own, which has to be made anew to each QSD."""

    @property
    def bridges(self) -> bool:
        """Whether its device stays when QSD dies, and its I/O waits for a successor, or is ended by a rescue server."""

    @property
    def grows(self) -> bool:
        """Whether the disk can grow while it is attached."""

    def powers(self, site: Site) -> Powers:
        """Return what its QSD needs of the host."""

    def probe(self, build: Build | None) -> Availability:
        """Look, without changing anything, whether this host and this QSD can do it. None: of QSD nothing is known."""

    def make_ready(self, timeout: float) -> None:
        """Load the modules that it needs. Blocks. Raises TRANSPORT_UNAVAILABLE, TIMEOUT."""

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """Choose queues, sizes and timeouts for a new attachment. Raises INVALID_ARGUMENT."""

    def claims(self, site: Site) -> tuple[str, ...]:
        """Return the host-wide names that the volume's QSD must hold locks on."""

    def refuse_foreign(self, site: Site) -> None:
        """Raise NAME_TAKEN where the host has a device of this volume's name that this daemon did not make."""

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """Return what QSD is started with (arguments of object-add): iothreads."""

    def setup(self, site: Site, record: Record) -> list[tuple[str, dict[str, Any]]]:
        """Return the QMP commands, once for each QSD, that come before the export: servers."""

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """Return the arguments of block-export-add (BlockExportOptions in QEMU's qapi/block-export.json)."""

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """Make what the export needs to be there before it is added."""

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """Look at the host's side. Never blocks. ``alive``: QSD runs and has the export."""

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        """Look for a device on this volume's export, for an attachment whose record is lost or behind."""

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """Set up the device and return it."""

    async def reconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Give a device that waits for a server the present one."""

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Take the device away after a flush. Raises DEVICE_IN_USE, with nothing changed, if it is used."""

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Take the device away whoever uses it; return what stays until its last user is gone.

        ``flush``: QSD answers, so that it makes sense to flush what was written first. Raises HOST_STUCK where its
        requests do not end: with another server they may.
        """

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """After QSD's death: take away the stale device and what is left of the export; return what stays."""

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """QSD's node has grown to ``size`` bytes: make the device follow."""

    def partitions(self, record: Record) -> dict[int, str]:
        """Return the device's partitions by number."""


#: Seconds that a forced detach waits for written data to reach the image.
_FORCED_FLUSH = 5.0
#: The I/O thread of an export.
IOTHREAD = "io"


def iothread(record: Record) -> dict[str, Any]:
    """The object that it is."""
    made: dict[str, Any] = {"qom-type": "iothread", "id": IOTHREAD}
    if POLLING in record.settings:
        made[POLLING] = record.settings[POLLING]
    return made


class HostDevice:
    """What transports have in common that give a disk of the host; where one differs, it says so."""

    options: Mapping[str, str] = QUEUE_OPTIONS
    needs_server = False
    reconnects = False
    bridges = False
    grows = True

    def powers(self, site: Site) -> Powers:
        """Nothing: any user will do."""
        return NO_POWERS

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """Nothing to choose."""
        return {}

    def claims(self, site: Site) -> tuple[str, ...]:
        """No name that all of the host share."""
        return ()

    def refuse_foreign(self, site: Site) -> None:
        """Nobody else can have made it."""

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """Nothing."""
        return []

    def setup(self, site: Site, record: Record) -> list[tuple[str, dict[str, Any]]]:
        """Nothing."""
        return []

    async def reconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Its device is never left waiting, or needs nothing."""

    async def flush_before_force(
        self, site: Site, path: str, is_there: Callable[[], bool], timeout: float
    ) -> list[str]:
        """Flush what can be flushed in a few seconds; return what to tell the user where it could not."""
        try:
            await site.blocking(
                "flush the device", min(timeout, _FORCED_FLUSH), disk.flush_path, path, is_there
            )
        except Exception as error:  # whatever it is, the device goes away; the user is told
            return [f"not all that was written could be flushed: {error}"]
        return []

    def partitions(self, record: Record) -> dict[int, str]:
        """As the kernel sees them."""
        return disk.partitions(record.device) if record.device is not None else {}
