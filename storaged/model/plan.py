"""The decision: what to do next, from what is wished for and what is observed. A pure function."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Goal(StrEnum):
    """What the user wants of a volume."""

    ATTACHED = "attached"
    ABSENT = "absent"


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
    """It exists, but nothing serves it any more."""


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


class Step(StrEnum):
    """What can be done to a volume. Each is idempotent; the world is observed again after each."""

    CLEAR = "clear"
    """Take away what a dead QSD left: a stale device, a dead mount."""
    START = "start"
    OPEN = "open"
    EXPORT = "export"
    CONNECT = "connect"
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
    Step.PUBLISH: "linking the stable name",
    Step.DISCONNECT: "flushing and taking the device away",
    Step.UNPUBLISH: "removing the stable name",
    Step.STOP: "stopping qemu-storage-daemon",
    Step.REMOVE: "removing the volume's directory",
}


def plan(goal: Goal, seen: Observed) -> Step | None:
    """Return the next step towards ``goal``, None when it is reached or nothing can be done but wait."""
    return _towards_attached(seen) if goal is Goal.ATTACHED else _towards_absent(seen)


def _towards_attached(seen: Observed) -> Step | None:
    if seen.qsd is Qsd.SILENT:
        # It may be opening, or hang, and it may write again: nothing is done over its head.
        return None
    dead = seen.qsd is Qsd.NONE or not seen.exported
    if seen.device is Device.STALE or (dead and (seen.remains or seen.device is not Device.NONE)):
        return Step.CLEAR
    if seen.qsd is Qsd.NONE:
        return Step.START
    if not seen.opened:
        return Step.OPEN
    if not seen.exported:
        return Step.EXPORT
    if seen.device is Device.NONE:
        return Step.CONNECT
    if not seen.linked:
        return Step.PUBLISH
    return None


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
