"""The decision: what to do next, from what is wished for and what is observed. A pure function."""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum


class Goal(StrEnum):
    """What the user wants of a volume."""

    ATTACHED = "attached"
    ABSENT = "absent"
    FAILING = "failing"
    """The device stays and fails all I/O, until the volume is resumed."""
    RELEASED = "released"
    """All I/O is ended with errors and the device is gone; the volume stays, until it is resumed."""


#: What a rescue leads to.
RESCUES = frozenset({Goal.FAILING, Goal.RELEASED})


class Qsd(StrEnum):
    """The qemu-storage-daemon process of a volume."""

    NONE = "none"
    RUNNING = "running"
    SILENT = "silent"
    """The process lives, but does not answer QMP."""


class Device(StrEnum):
    """The block device of a volume on the host."""

    NONE = "none"
    HEALTHY = "healthy"
    STALE = "stale"
    """It exists, nothing serves it any more, and nothing ever will."""
    UNSERVED = "unserved"
    """It exists, and its I/O waits until a successor serves it."""


@dataclass(frozen=True)
class Observed:
    """One look at the world, taken from /proc, sysfs, mounts and QMP."""

    qsd: Qsd = Qsd.NONE
    opened: bool = False
    """QSD has the source open."""
    exported: bool = False
    """QSD exports it and the host can reach the export."""
    remains: bool = False
    """Something of a dead export is left behind, for example its mount."""
    device: Device = Device.NONE
    linked: bool = False
    """The stable name points to the device."""
    directory: bool = False
    """The volume's private directory or overlay is there."""
    rescue: bool = False
    """The process that runs, or ran last, is a rescue server, which fails all I/O."""
    needs_server: bool = False
    """Not even by force can the device be taken away while nothing serves it."""
    lost: bool = False
    """What the device has acknowledged may be lost: it has to fail and go, and never to go on with a successor."""
    bridges: bool = False
    """The device stays when QSD dies, and its requests wait."""
    stalled: bool = False
    """Requests are in flight, and none of them ends: what needs them to end would wait for ever."""

    @property
    def nothing(self) -> bool:
        """Whether nothing of the volume is there."""
        return replace(self, needs_server=False, bridges=False, rescue=False) == Observed()


class Step(StrEnum):
    """What can be done to a volume. Each is idempotent; the world is observed again after each."""

    CLEAR = "clear"
    """Take away what a dead QSD left: a stale device, a dead mount."""
    START = "start"
    OPEN = "open"
    EXPORT = "export"
    CONNECT = "connect"
    RECONNECT = "reconnect"
    """Give a device that waits the connection to the present QSD."""
    RESCUE = "rescue"
    """Start a QSD that fails all I/O, for a device without a server that shall fail, or be taken away."""
    PUBLISH = "publish"
    DISCONNECT = "disconnect"
    UNPUBLISH = "unpublish"
    STOP = "stop"
    REMOVE = "remove"


#: What a step does, for people.
DOING = {
    Step.CLEAR: "clearing what a dead export left",
    Step.START: "starting qemu-storage-daemon",
    Step.OPEN: "opening the source",
    Step.EXPORT: "exporting the disk",
    Step.CONNECT: "setting up the device",
    Step.RECONNECT: "connecting the device to the new qemu-storage-daemon",
    Step.RESCUE: "starting a rescue server, which ends the waiting I/O with errors",
    Step.PUBLISH: "linking the stable name",
    Step.DISCONNECT: "flushing and taking the device away",
    Step.UNPUBLISH: "removing the stable name",
    Step.STOP: "stopping qemu-storage-daemon",
    Step.REMOVE: "removing the volume's directory",
}


def plan(goal: Goal, seen: Observed, *, force: bool = False) -> Step | None:
    """Return the next step towards ``goal``, None when it is reached or nothing can be done but wait.

    ``force``: the device goes away whoever uses it, and its I/O may end with errors; a rescue is always by force.
    """
    if goal is Goal.FAILING and seen.device in (Device.UNSERVED, Device.HEALTHY):
        return _towards_failing(seen)
    force = force or goal in RESCUES
    if seen.lost and seen.device in (Device.UNSERVED, Device.HEALTHY):
        return _towards_a_server(seen, force=True)
    if goal is Goal.ATTACHED:
        return _towards_attached(seen)
    if seen.device is Device.UNSERVED or (seen.needs_server and force and seen.device is Device.HEALTHY):
        return _towards_a_server(seen, force=force)
    if force and seen.device is Device.HEALTHY and _holds_up_a_removal(seen):
        return Step.STOP
    step = _towards_absent(seen)
    # What is rescued keeps its record and its journal.
    return None if goal in RESCUES and step is Step.REMOVE else step


def _holds_up_a_removal(seen: Observed) -> bool:
    """Whether the kernel could not take the device away, because its server takes no more requests.

    The NBD client sends under a lock, and disconnects under the same: with the socket full both wait, and with them
    the generic netlink of the whole host (nbd_queue_rq and nbd_disconnect in drivers/block/nbd.c).
    """
    return seen.bridges and not seen.rescue and (seen.qsd is Qsd.SILENT or seen.stalled)


def _towards_failing(seen: Observed) -> Step | None:
    """A device that stays: the real server goes, and one that fails everything takes its place."""
    if seen.qsd is Qsd.NONE:
        return Step.RESCUE
    if seen.qsd is Qsd.SILENT or not seen.rescue or not seen.opened:
        return Step.STOP
    if not seen.exported:
        return Step.EXPORT
    if seen.device is Device.UNSERVED:
        return Step.RECONNECT
    return None if seen.linked else Step.PUBLISH


def _towards_attached(seen: Observed) -> Step | None:
    if seen.rescue and seen.qsd is not Qsd.NONE:
        # The real one takes its place.
        return Step.STOP
    if seen.qsd is Qsd.SILENT:
        # It may be opening, or hang, and it may write again: nothing is done over its head.
        return None
    dead = seen.qsd is Qsd.NONE or not seen.exported
    if seen.device is Device.STALE or (
        dead and seen.device is not Device.UNSERVED and (seen.remains or seen.device is not Device.NONE)
    ):
        return Step.CLEAR
    if seen.qsd is Qsd.NONE:
        return Step.START
    if not seen.opened:
        return Step.OPEN
    if not seen.exported:
        return Step.EXPORT
    if seen.device is Device.NONE:
        return Step.CONNECT
    if seen.device is Device.UNSERVED:
        return Step.RECONNECT
    if not seen.linked:
        return Step.PUBLISH
    return None


def _towards_a_server(seen: Observed, *, force: bool) -> Step | None:
    """A device whose I/O waits: what was written is flushed by a successor, or ended by force."""
    if force and not seen.needs_server:
        return Step.STOP if seen.qsd is Qsd.SILENT and _holds_up_a_removal(seen) else Step.DISCONNECT
    if seen.qsd is Qsd.SILENT:
        return Step.STOP if force else None
    if seen.qsd is Qsd.NONE:
        # What has failed until now is not to work once more on its way out.
        return Step.RESCUE if force or seen.rescue else Step.START
    if force and seen.stalled and not seen.rescue:
        # Its requests would not end, however long a removal waits.
        return Step.STOP
    if not seen.opened:
        # A rescue server never opens the source: a half-made one gives way to the next.
        return Step.STOP if force or seen.rescue else Step.OPEN
    if not seen.exported:
        # The real one may be refused (its reconnect log is lost): by force the rescue server has a try.
        return Step.STOP if force and not seen.rescue else Step.EXPORT
    return Step.DISCONNECT if force or seen.device is Device.HEALTHY else Step.RECONNECT


def _towards_absent(seen: Observed) -> Step | None:
    if seen.device is Device.STALE:
        return Step.CLEAR
    # The device goes first, and its refusal (somebody uses it) ends the whole thing with nothing changed.
    if seen.device is not Device.NONE:
        return Step.DISCONNECT
    if seen.linked:
        return Step.UNPUBLISH
    if seen.qsd is not Qsd.NONE:
        return Step.STOP
    if seen.remains:
        return Step.CLEAR
    if seen.directory:
        return Step.REMOVE
    return None
