"""A small model of the world: what each step, and each accident, does to a volume, and what is observed of it.

The facts are those of the kernel, of QSD and of the record; what Attachment.observe makes of them differs from one
kind of transport to the next, and so does what the kernel agrees to. A step that it would not agree to, or that
would lose data, is an AssertionError here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from enum import StrEnum
from itertools import product

from storaged.model.plan import Device, Observed, Qsd, Step

BOTH = (False, True)
#: Every value that Observed can have, whether it makes sense or not; lost apart, which overrules the rest.
EVERYTHING = [
    Observed(
        qsd, opened, exported, remains, device, linked, directory, rescue, needs_server, bridges=bridges,
        stalled=stalled,
    )
    for qsd, device in product(Qsd, Device)
    for opened, exported, remains, linked, directory, rescue, needs_server, bridges, stalled
    in product(BOTH, repeat=9)
]


class Kind(StrEnum):
    """What sets the transports apart."""

    FUSE = "fuse"
    """The device is bound to one export: with its QSD's death it is stale for ever."""
    VDUSE = "vduse"
    """The device waits for whoever exports, and cannot go away while nobody does."""
    NBD = "nbd"
    """The device waits until it gets another connection."""
    VHOST_USER = "vhost-user"
    """There is a socket and no device; ``device`` below: the socket was given to its owner."""


#: Transports whose device waits for a successor of its QSD.
BRIDGING = (Kind.VDUSE, Kind.NBD)


@dataclass(frozen=True)
class World:
    """The facts behind an observation."""

    kind: Kind
    qsd: Qsd = Qsd.NONE
    rescue: bool = False
    opened: bool = False
    export: bool = False
    """QSD has the export, whether it answers or not."""
    front: bool = False
    """The host's end of it, alive or dead: the mount, the VDUSE node, the socket."""
    device: bool = False
    served: bool = False
    """The device's I/O reaches this very export."""
    linked: bool = False
    directory: bool = False
    aside: bool = False
    """A detach was cut short after it had moved the socket away, so that nobody could connect."""
    stalled: bool = False
    """The storage below stands still, with requests in flight."""

    @property
    def seen(self) -> Observed:
        """What Attachment.observe and the observe of the transport return."""
        running = self.qsd is Qsd.RUNNING
        alive = self.export if running else self.qsd is Qsd.SILENT
        device, remains = Device.NONE, self.front
        match self.kind:
            case Kind.FUSE:
                device = Device.HEALTHY if alive else Device.STALE
            case Kind.VDUSE:
                device, remains = Device.HEALTHY if alive else Device.UNSERVED, self.front and not self.device
            case Kind.NBD:
                device, remains = Device.HEALTHY if alive and self.served else Device.UNSERVED, False
            case Kind.VHOST_USER:
                if alive and self.front:
                    device = Device.UNSERVED if self.aside else Device.HEALTHY
        device = device if self.device else Device.NONE
        reachable = self.front or device is Device.HEALTHY
        return Observed(
            qsd=self.qsd, opened=running and self.opened, exported=alive and reachable, remains=remains,
            device=device,
            linked=self.linked or (self.kind is Kind.VHOST_USER and device is Device.HEALTHY),
            directory=self.directory, rescue=self.rescue, needs_server=self.kind is Kind.VDUSE,
            bridges=self.kind in (Kind.VDUSE, Kind.NBD), stalled=self.stalled and running and device is Device.HEALTHY,
        )


def makes_sense(world: World) -> bool:
    """Whether it can come to this."""
    return not (
        (world.opened and world.qsd is Qsd.NONE)
        or (world.export and not world.opened)
        or (world.qsd is not Qsd.NONE and not world.directory)
        # Which server it had last is told by the record, which is in the volume's directory.
        or (world.rescue and (world.kind not in (Kind.VDUSE, Kind.NBD) or not world.directory))
        or (world.served and not (world.device and world.export))
        # Only NBD has a device that another export than the present one may once have served.
        or (world.device and world.export and not world.served and world.kind is not Kind.NBD)
        # Mount point and NBD's socket are in the volume's directory.
        or (world.front and not world.directory and world.kind in (Kind.FUSE, Kind.NBD))
        or (not world.front and world.opened and world.kind is Kind.NBD)
        or (not world.front and (world.device or world.export) and world.kind is Kind.VDUSE)
        or (world.kind is Kind.VHOST_USER and (world.linked or (world.device and not world.directory)))
        or (world.aside and not (world.kind is Kind.VHOST_USER and world.front))
        or (world.aside and world.export and not world.device)
        # A rescue server asks no storage.
        or (world.stalled and (world.rescue or not world.served))
    )


#: Every world that there can be, and what is observed of them.
WORLDS = [
    world for kind, qsd in product(Kind, Qsd) for facts in product(BOTH, repeat=10)
    if makes_sense(world := World(kind, qsd, *facts))
]
POSSIBLE = sorted({world.seen for world in WORLDS}, key=str)


def do(step: Step, world: World, *, force: bool = False) -> World:
    """The world after a step that worked."""
    running = world.qsd is Qsd.RUNNING
    match step:
        case Step.CLEAR:
            assert not world.served, "the device works"
            assert not world.device or world.kind in (Kind.FUSE, Kind.VHOST_USER), "its requests still wait"
            assert not (world.export and world.kind is Kind.VDUSE), "the kernel does not remove a node that is served"
            return replace(world, device=False, front=world.front and world.kind is Kind.NBD, aside=False)
        case Step.START:
            assert world.qsd is Qsd.NONE, "two of them would write"
            return replace(world, qsd=Qsd.RUNNING, rescue=False, opened=False, export=False, directory=True)
        case Step.RESCUE:
            assert world.qsd is Qsd.NONE, "the first may still write"
            assert world.kind in (Kind.VDUSE, Kind.NBD), "only there it makes a difference"
            assert force or world.rescue, "what waits would be lost"
            return replace(
                world, qsd=Qsd.RUNNING, rescue=True, opened=True, export=False, directory=True,
                front=world.front or world.kind is Kind.NBD,
            )
        case Step.OPEN:
            assert running
            assert not world.rescue, "it must not touch the source"
            return replace(world, opened=True, front=world.front or world.kind is Kind.NBD)
        case Step.EXPORT:
            assert running
            assert world.opened
            assert not world.device or world.kind is not Kind.FUSE, "it would look as if this served the device"
            # A new export has no connection yet, and its socket no owner.
            return replace(
                world, export=True, front=True, stalled=False, served=world.device and world.kind is Kind.VDUSE,
                device=world.device and world.kind is not Kind.VHOST_USER, aside=False,
            )
        case Step.CONNECT:
            assert running
            assert world.export
            assert not world.device, "there would be two"
            return replace(world, device=True, served=True)
        case Step.RECONNECT:
            assert running
            assert world.export
            assert world.kind is Kind.NBD or world.aside, "there is nothing to connect"
            return replace(world, served=True, aside=False)
        case Step.PUBLISH:
            assert world.device
            assert world.kind is not Kind.VHOST_USER, "there is no device to link to"
            return replace(world, linked=True)
        case Step.DISCONNECT:
            assert world.device
            if world.kind is Kind.VDUSE:
                assert world.qsd is not Qsd.NONE, "it would wait for ever"
                assert running or not force, "its requests would never end"
                assert not (force and world.stalled), "its requests would never end"
            if world.kind is Kind.NBD and force and world.served and not world.rescue:
                assert running, "netlink would stand still"
                assert not world.stalled, "netlink would stand still"
            if not force:
                assert world.served or world.qsd is Qsd.SILENT, "what waits would be lost"
            return replace(
                world, device=False, served=False, stalled=False, aside=False,
                front=world.front and world.kind is not Kind.VHOST_USER,
            )
        case Step.UNPUBLISH:
            return replace(world, linked=False)
        case Step.STOP:
            return qsd_dies(world)
        case Step.REMOVE:
            assert world.qsd is Qsd.NONE
            assert not world.seen.remains
            assert world.seen.device is Device.NONE
            # The record goes with it, and so does NBD's socket.
            return World(world.kind, linked=world.linked)


def qsd_dies(world: World) -> World:
    """Whatever it made of the host stays behind."""
    return replace(world, qsd=Qsd.NONE, opened=False, export=False, served=False, stalled=False)


def qsd_quits(world: World) -> World:
    """By SIGTERM; it takes the socket for the virtual machine with it, where it is in its place."""
    return replace(qsd_dies(world), front=world.front and (world.kind is not Kind.VHOST_USER or world.aside))


def qsd_hangs(world: World) -> World:
    return replace(world, qsd=Qsd.SILENT) if world.qsd is Qsd.RUNNING else world


def qsd_wakes(world: World) -> World:
    return replace(world, qsd=Qsd.RUNNING) if world.qsd is Qsd.SILENT else world


def export_vanishes(world: World) -> World:
    stays = world.kind in (Kind.VDUSE, Kind.NBD) or world.aside
    return replace(world, export=False, served=False, stalled=False, front=world.front and stays)


def front_vanishes(world: World) -> World:
    """Somebody unmounts it lazily, or removes the socket. Nobody can remove a VDUSE node that is in use."""
    return replace(world, front=world.front and world.kind in (Kind.VDUSE, Kind.NBD), aside=False)


def device_vanishes(world: World) -> World:
    """losetup -d, vdpa dev del, nbd-client -d."""
    return world if world.kind is Kind.VHOST_USER else replace(
        world, device=False, served=False, stalled=False
    )


def connection_breaks(world: World) -> World:
    """The kernel gives up NBD's connection, and tells."""
    return replace(world, served=False, stalled=False) if world.kind is Kind.NBD else world


def storage_stalls(world: World) -> World:
    return replace(world, stalled=world.served and not world.rescue)


def storage_goes_on(world: World) -> World:
    return replace(world, stalled=False)


def detach_is_cut_short(world: World) -> World:
    """The daemon dies between the two steps of taking a socket away."""
    known = world.kind is Kind.VHOST_USER and world.front and world.device
    return replace(world, aside=True) if known else world


def link_vanishes(world: World) -> World:
    return replace(world, linked=False)


ACCIDENTS: list[Callable[[World], World]] = [
    qsd_dies, qsd_quits, qsd_hangs, qsd_wakes, export_vanishes, front_vanishes, device_vanishes, connection_breaks,
    detach_is_cut_short, link_vanishes,
    storage_stalls, storage_goes_on,
]


def after_accidents(world: World) -> Iterator[World]:
    for accident in ACCIDENTS:
        yield accident(world)
