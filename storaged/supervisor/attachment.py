"""One volume's processes, exports and devices: observes them and performs the steps of the plan."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, links, nbd
from storaged.model import blockdev
from storaged.model.plan import Device, Observed, Qsd, Step
from storaged.model.qemu_args import QemuArguments, qemu_arguments
from storaged.supervisor import adoption, fetching, growing, leaving, opening, queues, serving
from storaged.supervisor.holding import Holding
from storaged.transports.base import Connected, Seen


class Attachment(Holding):
    """What is really there of one volume. Used by its actor only, one call at a time."""

    # What is there -------------------------------------------------------------------------------------------

    async def observe(self) -> Observed:
        """Look at the process, at QMP, and at the host's side."""
        told, self.told = self.told, None
        if self.connection_lost:
            self.connection_lost = False
            if self.record is not None and self.record.served_by is not None:
                await self.note(served_by=None)
        if told is None:
            await self._note_unrecorded_device()
            await self._note_freed_devices()
        qsd, opened, export = Qsd.NONE, False, False
        asked = time.monotonic()
        if self.qsd.alive and told is not None:
            # I/O may wait for this: what was looked at before the step is not looked at again.
            qsd, opened, export = Qsd.RUNNING, told.opened, told.exported
            await self.qsd.note_answer(None)
        elif self.qsd.alive:
            try:
                self.qsd.refuse_silent()
                session = await self.qsd.session()
                # A rescue server has the one node that fails all I/O, and no overlay.
                rescue = self.record is not None and self.record.rescue
                needed = blockdev.node_names_needed(self.spec.snapshot and not rescue)
                # An export stands on all of them, and is found at half the price.
                export = await session.has_export(blockdev.EXPORT)
                # Nodes alone do not tell: opening may have been cut short before what was opened was looked at.
                finished = rescue or (self.record is not None and not self.record.settled)
                opened = export or (finished and needed <= (await session.node_names()).keys())
                qsd = Qsd.RUNNING
                await self.qsd.note_answer(None)
            except StoragedError as error:
                await self.qsd.note_answer(error, asked)
                qsd = Qsd.SILENT if self.qsd.alive else Qsd.NONE
        self.exports = export
        seen = self.transport.observe(self.site, self.record, alive=export or qsd is Qsd.SILENT)
        if seen.device is Device.UNSERVED and qsd is Qsd.NONE:
            await self._note_losses()
        elif seen.device is Device.NONE and self.record is not None and self.record.lost:
            # It has gone without us, and the next one begins anew.
            await self.note(lost=False)
        return Observed(
            qsd=qsd, opened=opened, exported=(export or qsd is Qsd.SILENT) and seen.reachable,
            remains=seen.remains, device=seen.device, linked=self._linked(seen), directory=leaving.has_directory(self),
            rescue=self.record is not None and self.record.rescue,
            needs_server=self.transport.needs_server, bridges=self.transport.bridges,
            lost=self.record is not None and self.record.lost,
            stalled=self.stalled and qsd is Qsd.RUNNING and seen.device is Device.HEALTHY,
        )

    async def _note_losses(self) -> None:
        """QSD is dead and its device waits. What it has acknowledged must not be missing under a later flush."""
        record = self.record
        if record is None or record.rescue or record.lost or record.settled:
            return
        if record.spec.keeps_writes_in_memory:
            await self.note(lost=True)

    async def _note_unrecorded_device(self) -> None:
        """A set-up that was given up, or whose daemon died, may have made a device all the same.

        It must not be overlooked where it cannot be taken away without a server.
        """
        if self.record is None or not self.transport.needs_server:
            return
        found = self.transport.find_device(self.site, self.record)
        # Another one than that of the record: somebody has unbound it and bound it again.
        if found is not None and (found.device, found.diskseq) != (self.record.device, self.record.diskseq):
            await self.note(**self._of_new_device(found))

    async def _note_freed_devices(self) -> None:
        """A device that its last user has let go of may get another connection of ours: that one is none to ignore."""
        if self.record is not None and self.record.abandoned:
            kept = [device for device in self.record.abandoned if nbd.backend(device) == self.site.bus_name]
            if kept != self.record.abandoned:
                await self.note(abandoned=kept)

    def looks_well(self) -> bool:
        """Whether an online volume still is, judged by sysfs and mounts alone: cheap, never blocks."""
        if not self.qsd.alive or self.connection_lost:
            return False
        record = self.record
        if record is None or record.queue_due:
            return False
        if self.transport.observe(self.site, record, alive=True).device is not Device.HEALTHY:
            return False
        return record.device is None or links.links_are_there(
            self.environment.layout.dev_dir, self.spec.name, record.device, self.transport.partitions(record)
        )

    async def answers(self) -> bool:
        """Whether QSD answers, and has the export: one QMP call."""
        asked = time.monotonic()
        try:
            return await (await self.qsd.session()).has_export(blockdev.EXPORT)
        except StoragedError as error:
            await self.qsd.note_answer(error, asked)
            return False

    async def qemu_arguments(self, timeout: float) -> QemuArguments:
        """What a virtual machine's QEMU needs to use the source, or the socket. Changes nothing.

        Raises what ``opening.inspect`` raises, and HOST_STUCK where the source does not answer.
        """
        wanted = await self.source_calls("look at the source", timeout, opening.inspect, self.spec)
        node, objects = opening.outside(wanted, self.spec, self.directory)
        if fetching.is_fetched(self.spec):
            node = fetching.located(node, fetching.path_of(self.environment.layout, self.spec.name))
        found = qemu_arguments(node, self.spec, self.record, objects)
        layers = self.record.layers if self.record is not None else []
        if wanted.is_open_ended and (len(layers) > 1 + self.spec.snapshot or any(layer.data_file for layer in layers)):
            # In one -blockdev QEMU would follow the headers (model/blockdev.image_nodes).
            note = "the image stands on others, behind servers: what QEMU needs for these is not told here"
            found = dataclasses.replace(found, blockdev=[], drive=[], notes=[*found.notes, note])
        return found

    def _linked(self, seen: Seen) -> bool:
        directory = self.environment.layout.dev_dir
        if self.record is not None and self.record.socket is not None:
            # A socket has no other name.
            return seen.device is Device.HEALTHY
        if self.record is None or self.record.device is None:
            return links.any_link(directory, self.spec.name)
        partitions = self.transport.partitions(self.record)
        return links.links_are_right(directory, self.spec.name, self.record.device, partitions)

    # Adoption ------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over what an earlier daemon left running; end what can be told to be ours and serves nothing.

        Raises ADOPTION_REFUSED, with everything left as it is, where something serves a device and its identity
        is in doubt.
        """
        self.stderr.skip()
        record, damage = await self.blocking("read the record", 10, adoption.read_record, self.site)
        self.record = record
        if record is not None:
            self.spec = record.spec
            self.environment.claims.hold(self.spec.name, record.sources)
            # It may have been found by an earlier try that was cut short.
            alive = self.qsd.alive or (record.process is not None and self.qsd.find(record.process))
            found = self.transport.find_device(self.site, record)
            if record.device is None and found is not None and found.device is not None:
                # The daemon died between the set-up and the record.
                await self.note(**self._of_new_device(found))
            if record.served_by is not None:
                # Nobody has watched its connection meanwhile: it gets a new one, which the kernel takes or drops.
                await self.note(served_by=None)
            if alive:
                return
        servers = await self.blocking("look for processes", 10, adoption.strays, self.site)
        if record is None:
            self.record = adoption.find_in_doubt(self.spec, self.site, servers)
            if self.record is not None:
                # It is held on to, so that the user can detach it; nothing else is done with it.
                if servers:
                    self.qsd.find(servers[0])
                raise adoption.refusal(self.record, damage)
        for server in servers:
            # It was started and never recorded: it serves nothing yet.
            if self.qsd.find(server):
                await self.qsd.kill()

    # Steps ---------------------------------------------------------------------------------------------------

    async def perform(self, step: Step, *, timeout: float, force: bool) -> None:
        """Do one step within ``timeout`` seconds. Raises what it fails with."""
        self.notes.clear()
        try:
            await self._perform(step, timeout=timeout, force=force)
        except StoragedError as error:
            lost = error.code is ErrorCode.QSD_DIED or (
                error.code is ErrorCode.DEVICE_FAILED and step in (Step.CONNECT, Step.RECONNECT)
            )
            if lost and await self.qsd.wait_gone(1.0):
                # Its exit status and last words say more than a lost connection, or a device that came to nothing.
                death, self.qsd.last_death = self.qsd.last_death, None
                raise (death or error) from error
            raise

    async def _perform(self, step: Step, *, timeout: float, force: bool) -> None:
        match step:
            case Step.CLEAR:
                async with self.names_held():
                    self.notes += await self.transport.clear(self.site, self.record, timeout)
                await self.forget_device()
            case Step.START:
                await serving.start(self, timeout)
                if self.transport.reconnects:
                    self.environment.dead_links.begin()
            case Step.OPEN:
                await serving.open_source(self, timeout)
            case Step.EXPORT:
                await serving.export(self, timeout)
            case Step.CONNECT:
                if self.transport.reconnects:
                    await self.environment.dead_links.listen(min(10.0, timeout / 2))
                connected = await self.transport.connect(self.site, self.known(), timeout)
                self.environment.fault("connect: made")
                await self.note(
                    **self._of_new_device(connected), direct_io=connected.direct_io, socket=connected.socket,
                    abandoned=[device for device in self.known().abandoned if device != connected.device],
                )
                if connected.served:
                    await self.note_connection()
                self.environment.fault("connect: noted")
                await queues.set_up(self, timeout)
            case Step.RECONNECT:
                await self.transport.reconnect(self.site, self.known(), timeout)
                await self.note_connection()
            case Step.RESCUE:
                await serving.start_rescue(self, timeout)
            case Step.PUBLISH:
                record = self.known()
                links.publish(
                    self.environment.layout.dev_dir, self.spec.name, str(record.device),
                    self.transport.partitions(record),
                )
            case Step.DISCONNECT:
                await leaving.disconnect(self, timeout, force=force)
            case Step.UNPUBLISH:
                links.unpublish(self.environment.layout.dev_dir, self.spec.name)
            case Step.STOP:
                await leaving.stop(self, timeout, force=force)
            case Step.REMOVE:
                await self.wait_for_writing()
                await self.blocking("remove the volume's directory", timeout, leaving.remove, self)

    async def finish_queue(self, timeout: float) -> None:
        """Set up what an earlier try, or an earlier daemon, has not of the queue of a device that works."""
        if self.record is not None:
            await queues.set_up(self, timeout)

    def _of_new_device(self, found: Connected) -> dict[str, Any]:
        """What the record has of a device, all of it written at once: before its queue is touched."""
        return {
            "device": found.device, "diskseq": found.diskseq, "counted": _counted(found.device),
            **queues.of_new_device(self.known(), found.device),
        }

    async def resize(self, size: int | None, timeout: float) -> int:
        """Grow the disk to ``size`` bytes, or to all that the source has, then its device; return its size.

        Raises what ``growing.grow`` raises.
        """
        size = await growing.grow(self, size, timeout)
        if self.transport.grows:
            await self.transport.resized(self.site, self.known(), size, timeout)
        return size

    async def leave(self) -> None:
        """The volume is gone, or the daemon ends: let go of everything without touching it."""
        self.forget_connection()
        self.stop_protecting()
        self.end_of_locks()
        self.environment.claims.drop(self.spec.name)
        await self.qsd.leave()


def _counted(device: str | None) -> list[int]:
    """What the kernel has counted of a device so far."""
    return (disk.counters(device) or []) if device is not None else []
