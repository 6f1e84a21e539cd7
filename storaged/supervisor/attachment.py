"""One volume's processes, exports and devices: observes them and performs the steps of the plan."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from collections.abc import AsyncIterator, Callable

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, links, locks, nbd, process
from storaged.host.blocking import BlockingCalls
from storaged.model import blockdev
from storaged.model.plan import Device, Observed, Qsd, Step
from storaged.model.qemu_args import QemuArguments, qemu_arguments
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.served import ServedQsd
from storaged.qsd.version import aborts_with_iothread, parse_version
from storaged.supervisor import adoption, growing, launch, opening, overlay
from storaged.supervisor.environment import Environment
from storaged.supervisor.snapshot import open_snapshot
from storaged.transports import TRANSPORTS
from storaged.transports.base import Seen, Site, Transport


class Attachment:
    """What is really there of one volume. Used by its actor only, one call at a time."""

    def __init__(self, spec: VolumeSpec, environment: Environment, wake: Callable[[], None]) -> None:
        self.spec = spec
        self.record: Record | None = None
        self.notes: list[str] = []
        """What a forced step could not take away, for the user."""
        self.qsd = ServedQsd(environment.layout.volume_dir(spec.name), wake)
        self._environment = environment
        self._directory = environment.layout.volume_dir(spec.name)
        self._site = Site(
            spec.name, self._directory, BlockingCalls(spec.name), environment.layout.vm_sockets_dir
        )
        # Calls that touch the source have threads of their own: a source that hangs must not use up those that a
        # detach needs.
        self._source_calls = BlockingCalls(f"{spec.name}, source")
        self._opening: opening.Opening | None = None
        self._wake = wake
        self._connection_lost = False

    # What is there -------------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        """The transport in use; without a record the one whose remains can be told to be ours by their path alone."""
        return TRANSPORTS[self.record.transport if self.record else "fuse"]

    @property
    def blocking(self) -> BlockingCalls:
        """The threads of this volume."""
        return self._site.blocking

    async def observe(self) -> Observed:
        """Look at the process, at QMP, and at the host's side."""
        if self._connection_lost:
            self._connection_lost = False
            if self.record is not None and self.record.served_by is not None:
                await self._note(served_by=None)
        await self._note_unrecorded_device()
        await self._note_freed_devices()
        qsd, opened, export = Qsd.NONE, False, False
        if self.qsd.alive:
            try:
                self.qsd.refuse_silent()
                session = await self.qsd.session()
                # A rescue server has the one node that fails all I/O, and no overlay.
                rescue = self.record is not None and self.record.rescue
                needed = blockdev.node_names_needed(self.spec.snapshot and not rescue)
                # An export stands on all of them, and is found at half the price.
                export = await session.has_export(blockdev.EXPORT)
                opened = export or needed <= (await session.node_names()).keys()
                qsd = Qsd.RUNNING
                await self.qsd.note_answer(None)
            except StoragedError as error:
                await self.qsd.note_answer(error)
                qsd = Qsd.SILENT if self.qsd.alive else Qsd.NONE
        seen = self.transport.observe(self._site, self.record, alive=export or qsd is Qsd.SILENT)
        if seen.device is Device.UNSERVED and qsd is Qsd.NONE:
            await self._note_losses()
        elif seen.device is Device.NONE and self.record is not None and self.record.lost:
            # It has gone without us, and the next one begins anew.
            await self._note(lost=False)
        return Observed(
            qsd=qsd, opened=opened, exported=(export or qsd is Qsd.SILENT) and seen.reachable,
            remains=seen.remains, device=seen.device, linked=self._linked(seen), directory=self._has_directory(),
            rescue=self.qsd.alive and self.record is not None and self.record.rescue,
            needs_server=self.transport.needs_server, lost=self.record is not None and self.record.lost,
        )

    async def _note_losses(self) -> None:
        """QSD is dead and its device waits. What it has acknowledged must not be missing under a later flush."""
        record = self.record
        if record is not None and not (record.rescue or record.lost) and record.spec.keeps_writes_in_memory:
            await self._note(lost=True)

    async def _note_unrecorded_device(self) -> None:
        """A set-up that was given up, or whose daemon died, may have made a device all the same.

        It must not be overlooked where it cannot be taken away without a server.
        """
        if self.record is None or not self.transport.needs_server:
            return
        found = self.transport.find_device(self._site, self.record)
        # Another one than that of the record: somebody has unbound it and bound it again.
        if found is not None and (found.device, found.diskseq) != (self.record.device, self.record.diskseq):
            await self._note(device=found.device, diskseq=found.diskseq)

    async def _note_freed_devices(self) -> None:
        """A device that its last user has let go of may get another connection of ours: that one is none to ignore."""
        if self.record is not None and self.record.abandoned:
            kept = [device for device in self.record.abandoned if nbd.backend(device) == self._site.bus_name]
            if kept != self.record.abandoned:
                await self._note(abandoned=kept)

    def looks_well(self) -> bool:
        """Whether an online volume still is, judged by sysfs and mounts alone: cheap, never blocks."""
        if not self.qsd.alive or self._connection_lost:
            return False
        record = self.record
        if record is None or self.transport.observe(self._site, record, alive=True).device is not Device.HEALTHY:
            return False
        return record.device is None or links.links_are_there(
            self._environment.layout.dev_dir, self.spec.name, record.device, self.transport.partitions(record)
        )

    async def answers(self) -> bool:
        """Whether QSD answers, and has the export: one QMP call."""
        try:
            return await (await self.qsd.session()).has_export(blockdev.EXPORT)
        except StoragedError as error:
            await self.qsd.note_answer(error)
            return False

    async def qemu_arguments(self, timeout: float) -> QemuArguments:
        """What a virtual machine's QEMU needs to use the source, or the socket. Changes nothing.

        Raises what ``opening.inspect`` raises, and HOST_STUCK where the source does not answer.
        """
        wanted = await self._source_calls("look at the source", timeout, opening.inspect, self.spec)
        return qemu_arguments(wanted.node, self.spec, self.record)

    def _linked(self, seen: Seen) -> bool:
        directory = self._environment.layout.dev_dir
        if self.record is not None and self.record.socket is not None:
            # A socket has no other name.
            return seen.device is Device.HEALTHY
        if self.record is None or self.record.device is None:
            return links.any_link(directory, self.spec.name)
        partitions = self.transport.partitions(self.record)
        return links.links_are_right(directory, self.spec.name, self.record.device, partitions)

    def _has_directory(self) -> bool:
        return (
            os.path.lexists(self._directory)
            or overlay.exists(self._environment.layout.snapshots_dir, self.spec.name)
        )

    # Adoption ------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over what an earlier daemon left running; end what can be told to be ours and serves nothing.

        Raises ADOPTION_REFUSED, with everything left as it is, where something serves a device and its identity
        is in doubt.
        """
        record, damage = await self._site.blocking("read the record", 10, adoption.read_record, self._site)
        self.record = record
        if record is not None:
            self.spec = record.spec
            self._environment.claims.hold(self.spec.name, record.sources)
            alive = record.process is not None and self.qsd.find(record.process)
            found = self.transport.find_device(self._site, record)
            if record.device is None and found is not None and found.device is not None:
                # The daemon died between the set-up and the record.
                await self._note(device=found.device, diskseq=found.diskseq)
            if record.served_by is not None:
                # Nobody has watched its connection meanwhile: it gets a new one, which the kernel takes or drops.
                await self._note(served_by=None)
            if alive:
                return
        servers = await self._site.blocking("look for processes", 10, adoption.strays, self._site)
        if record is None:
            self.record = adoption.find_in_doubt(self.spec, self._site, servers)
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
                async with self._names_held():
                    self.notes += await self.transport.clear(self._site, self.record, timeout)
                await self._forget_device()
            case Step.START:
                await self._start(timeout)
            case Step.OPEN:
                try:
                    await self._open(timeout)
                except StoragedError as error:
                    # What was opened half way serves nobody, and would be in the way of the next try.
                    if error.code is not ErrorCode.QSD_DIED:
                        await self.qsd.kill()
                    raise
            case Step.EXPORT:
                await self._export(timeout)
            case Step.CONNECT:
                connected = await self.transport.connect(self._site, self._known(), timeout)
                self._environment.fault("connect: made")
                await self._note(
                    device=connected.device, diskseq=connected.diskseq, direct_io=connected.direct_io,
                    socket=connected.socket,
                    abandoned=[device for device in self._known().abandoned if device != connected.device],
                )
                if connected.served:
                    await self._note_connection()
            case Step.RECONNECT:
                await self.transport.reconnect(self._site, self._known(), timeout)
                await self._note_connection()
            case Step.RESCUE:
                await self._rescue(timeout)
            case Step.PUBLISH:
                record = self._known()
                links.publish(
                    self._environment.layout.dev_dir, self.spec.name, str(record.device),
                    self.transport.partitions(record),
                )
            case Step.DISCONNECT:
                await self._disconnect(timeout, force=force)
            case Step.UNPUBLISH:
                links.unpublish(self._environment.layout.dev_dir, self.spec.name)
            case Step.STOP:
                await self.qsd.stop(timeout, export=blockdev.EXPORT, quits_badly=self._quits_badly())
            case Step.REMOVE:
                await self._site.blocking("remove the volume's directory", timeout, self._remove)

    async def resize(self, size: int, timeout: float) -> None:
        """Grow the disk to ``size`` bytes, then its device. Raises INVALID_SIZE, UNSUPPORTED, ..."""
        session = await self.qsd.session()
        present = (await session.node_names())[blockdev.DISK]
        growing.check(self._known(), self.transport, present, size)
        if size > present:
            await session.execute("block_resize", {"node-name": blockdev.DISK, "size": size}, timeout=timeout)
            await self._note(size=size)
        if self.transport.grows:
            await self.transport.resized(self._site, self._known(), size, timeout)

    async def leave(self) -> None:
        """The volume is gone, or the daemon ends: let go of everything without touching it."""
        self._forget_connection()
        self._environment.claims.drop(self.spec.name)
        await self.qsd.leave()

    async def _start(self, timeout: float) -> None:
        given_up, former = threading.Event(), self.record

        def work() -> launch.Started:
            return launch.launch(
                self.spec, former, self._site, self._environment, timeout=timeout, given_up=given_up
            )

        try:
            started = await self._source_calls.with_late_result("start QSD", timeout, work, launch.Started.give_up)
        except BaseException:
            given_up.set()
            raise
        await self._greet(started, timeout)

    async def _greet(self, started: launch.Started, timeout: float) -> None:
        self._opening, self.record = started.opening, started.record
        session = await self.qsd.greet(started.pidfd, started.monitor, timeout=timeout)
        # Only now it is surely itself: qsd.binary may be a script that executes the real one.
        await self._note(process=process.identify(started.pid), qsd_version=session.version)

    async def _note_connection(self) -> None:
        """The device has a connection to the present QSD."""
        record = self._known()
        if self.transport.reconnects and record.device is not None:
            await self._note(served_by=record.process)
            self._environment.dead_links.watch(record.device, self._on_lost_connection)

    def _on_lost_connection(self) -> None:
        self._connection_lost = True
        self._wake()

    async def _rescue(self, timeout: float) -> None:
        """A server in the place of a dead one that fails all I/O: it needs the name, the queues and the log."""
        if not self._known().binary:
            raise StoragedError(
                ErrorCode.ADOPTION_REFUSED, "the device cannot be taken away",
                cause="its record is lost, and nothing serves it: what its server must be like is not known",
                hint="its I/O waits until the host is rebooted; nothing else of the host is concerned",
            )

        def work() -> launch.Started:
            return launch.launch_rescue(self._known(), self._site, self._environment)

        await self._greet(
            await self._site.blocking.with_late_result("start QSD", timeout, work, launch.Started.give_up), timeout
        )
        session = await self.qsd.session()
        for command, arguments in self.transport.setup(self._site, self._known()):
            await session.execute(command, arguments)
        await session.execute("blockdev-add", blockdev.failing_node(self._known().size))

    async def _open(self, timeout: float) -> None:
        spec, wanted = self.spec, self._opening
        if wanted is None:
            # An adopted QSD that never got as far as opening: nothing is known of its locks. A new one is.
            await self.qsd.kill()
            return
        session = await self.qsd.session()
        for command, arguments in self.transport.setup(self._site, self._known()):
            await session.execute(command, arguments)
        if wanted.key_file is not None:
            secret = await self._source_calls(
                "read the key file", timeout, opening.read_passphrase, wanted.key_file
            )
            await session.execute("object-add", secret)
        await session.execute("blockdev-add", wanted.node, timeout=timeout)
        pid = self._known().process
        as_wanted = pid is not None and await self._source_calls(
            "look at what QSD opened", timeout, opening.opened_as_wanted, wanted, pid.pid
        )
        if not as_wanted:
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, "the source was replaced while it was opened",
                hint="find out who replaces it, then attach again",
            )
        if spec.snapshot:
            await open_snapshot(
                spec, wanted, str(self._known().overlay), session, self._environment, self._source_calls, timeout
            )
        size = (await session.node_names())[blockdev.DISK]
        if size == 0 or size % spec.logical_block_size:
            raise StoragedError(
                ErrorCode.INVALID_SIZE, f"the disk has {size} bytes",
                cause=f"that is no multiple of its logical block size {spec.logical_block_size}" if size else "",
                hint="resize the image (qemu-img resize), or say another -o logical-block-size",
            )
        device = self._known().device
        had = disk.size(device) if device is not None else 0
        if had not in (0, size):
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, f"the disk has {size} bytes by now, its device {had}",
                hint="bring the old size back; or detach the volume (--force) and attach it again",
            )
        await self._note(size=size)

    async def _export(self, timeout: float) -> None:
        record, session = self._known(), await self.qsd.session()
        if await session.has_export(blockdev.EXPORT):
            # The host's end of it is gone (somebody unmounted it); QSD has not noticed.
            await session.delete_export(blockdev.EXPORT, timeout=timeout)
        if record.socket is not None or record.served_by is not None:
            # What stood on an earlier export: it has to be made, or connected, anew.
            await self._note(socket=None, served_by=None)
        await self.transport.prepare(self._site, record, timeout)
        options = self.transport.export(self._site, record)
        if record.spec.options.get("cache") in ("writethrough", "directsync"):
            options["writethrough"] = True
        await session.add_export(options, timeout=timeout)

    async def _disconnect(self, timeout: float, *, force: bool) -> None:
        record = self._known()
        if record.lost:
            self.notes.append(
                f"{record.device} fails from now on: qemu-storage-daemon died with writes of it in its memory"
            )
        if force or record.rescue or record.lost:
            if not await self._disconnect_by_force(record, timeout):
                return
        else:
            try:
                await self.transport.disconnect(self._site, record, timeout)
            except StoragedError as error:
                if error.code is ErrorCode.DEVICE_IN_USE and self._site.blocking.stuck and not error.users:
                    raise StoragedError(
                        ErrorCode.HOST_STUCK, "an earlier try to flush the device still hangs",
                        hint="wait for the storage below to go on, or use --force",
                    ) from error
                raise
        await self._forget_device()

    async def _disconnect_by_force(self, record: Record, timeout: float) -> bool:
        """Return whether the device is gone; it is not where it has to get a rescue server first."""
        try:
            async with self._names_held():
                self.notes += await self.transport.disconnect_by_force(
                    self._site, record, timeout, flush=not (self.qsd.silent or record.rescue or record.lost)
                )
            if self.transport.reconnects and self.transport.find_device(self._site, record) is not None:
                await self._note(abandoned=[*record.abandoned, str(record.device)])
        except StoragedError as error:
            if error.code is not ErrorCode.HOST_STUCK or not self.transport.needs_server or record.rescue:
                raise
            # Its requests wait for storage that does not answer. A rescue server will end them.
            self.notes.append(f"all I/O in flight ends with errors: {error.message}")
            await self.qsd.kill()
            return False
        return True

    @contextlib.asynccontextmanager
    async def _names_held(self) -> AsyncIterator[None]:
        """Hold the names that QSD holds while it lives: what has them may be another daemon's by now.

        Raises NAME_TAKEN.
        """
        if self.qsd.alive:
            yield
            return
        held = await self._site.blocking.with_late_result(
            "lock the name", 10,
            lambda: launch.take_names(
                self._site, self.transport.claims(self._site), self._environment.lock_directory
            ),
            locks.let_go,
        )
        try:
            yield
        finally:
            locks.let_go(held)

    def _quits_badly(self) -> bool:
        version = parse_version(f"version {self.record.qsd_version}") if self.record else None
        return version is not None and aborts_with_iothread(version)

    def _remove(self) -> None:
        overlay.remove(self._environment.layout.snapshots_dir, self.spec.name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._directory)

    # The record ------------------------------------------------------------------------------------------------

    def _known(self) -> Record:
        if self.record is None:
            raise StoragedError(ErrorCode.INTERNAL, "a step needs a record and there is none")
        return self.record

    def _forget_connection(self) -> None:
        if self.record is not None and self.record.device is not None and self.transport.reconnects:
            self._environment.dead_links.forget(self.record.device)

    async def _forget_device(self) -> None:
        self._forget_connection()
        if self.record is not None and (self.record.device is not None or self.record.socket is not None):
            await self._note(device=None, diskseq=0, socket=None, served_by=None, lost=False)

    async def _note(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self._known(), **changes)
        await self._site.blocking("write the record", 10, launch.write_record, self._directory, self.record)
