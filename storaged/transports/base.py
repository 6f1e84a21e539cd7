"""What a transport is: one way in which a QSD export becomes a block device of this host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from storaged.host.blocking import BlockingCalls
from storaged.model.plan import Device
from storaged.model.record import Record
from storaged.qsd.version import QsdVersion


@dataclass(frozen=True)
class Availability:
    """Whether this host and this QSD can do a transport, and why (not)."""

    available: bool
    reason: str


@dataclass(frozen=True)
class Site:
    """Where one volume is attached: what a transport needs to know of it."""

    name: str
    directory: str
    blocking: BlockingCalls


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
    """A device that a transport set up."""

    device: str
    diskseq: int
    direct_io: bool


class Transport(Protocol):
    """Calls that may block take a deadline in seconds; all are idempotent."""

    @property
    def name(self) -> str:
        """As the user writes it."""

    def probe(self, version: QsdVersion | None) -> Availability:
        """Look, without changing anything, whether this host and this QSD can do it."""

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """Return the arguments of block-export-add (BlockExportOptions in QEMU's qapi/block-export.json)."""

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """Make what the export needs to be there before it is added."""

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """Look at the host's side. Never blocks. ``alive``: QSD runs and has the export."""

    def find_device(self, site: Site) -> Connected | None:
        """Look for a device on this volume's export, for an attachment whose record is lost or behind."""

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """Set up the device and return it."""

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Take the device away after a flush. Raises DEVICE_IN_USE, with nothing changed, if it is used."""

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Take the device away whoever uses it; return what stays until its last user is gone.

        ``flush``: QSD answers, so that it makes sense to flush what was written first.
        """

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """After QSD's death: take away the stale device and what is left of the export; return what stays."""

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """QSD's node has grown to ``size`` bytes: make the device follow."""

    def partitions(self, record: Record) -> dict[int, str]:
        """Return the device's partitions by number."""
