"""One volume's processes, exports and devices: observes them and performs the steps of the plan."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from storaged.backends import BACKENDS
from storaged.errors import ErrorCode, StoragedError
from storaged.host import links, process
from storaged.host.atomic import write_atomic
from storaged.host.blocking import BlockingCalls
from storaged.host.unixsock import bind_unix, connect_unix
from storaged.model import blockdev
from storaged.model.plan import Device, Observed, Qsd, Step
from storaged.model.record import ProcessIdentity, Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.process import died, find_binary, pidfile, qmp_socket, spawn
from storaged.qsd.session import ANSWER_TIMEOUT, Session
from storaged.supervisor import opening, overlay
from storaged.supervisor.environment import Environment
from storaged.transports import TRANSPORTS, choose_transport
from storaged.transports.base import Site, Transport

#: Seconds that QSD may take to end by itself, flushing, before it is killed; and to die of SIGKILL.
_QUIT_PATIENCE = 10.0
_KILL_PATIENCE = 10.0
#: Seconds for which a QSD that gave no answer is not asked again.
_SILENCE = 10.0


@dataclass(frozen=True)
class _Started:
    """A QSD that was just started."""

    opening: opening.Opening
    record: Record
    monitor: socket.socket
    pid: int
    pidfd: int


class Attachment:
    """What is really there of one volume. Used by its actor only, one call at a time."""

    def __init__(self, spec: VolumeSpec, environment: Environment, wake: Callable[[], None]) -> None:
        self.spec = spec
        self.record: Record | None = None
        self.notes: list[str] = []
        """What a forced step could not take away, for the user."""
        self.last_death: StoragedError | None = None
        self.started_at = 0.0
        self._environment = environment
        self._wake = wake
        self._directory = environment.layout.volume_dir(spec.name)
        self._site = Site(spec.name, self._directory, BlockingCalls(spec.name))
        self._session: Session | None = None
        self._pidfd: int | None = None
        self._silent_since: float | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._opening: opening.Opening | None = None

    # What is there -------------------------------------------------------------------------------------------

    @property
    def transport(self) -> Transport:
        """The transport in use; without a record any one that may have left something (all look the same)."""
        name = self.record.transport if self.record else next(iter(TRANSPORTS))
        return TRANSPORTS[name]

    @property
    def alive(self) -> bool:
        """Whether QSD's process is there."""
        return self._pidfd is not None

    @property
    def overlay(self) -> str | None:
        """The path of the overlay of a snapshot."""
        return self.record.overlay if self.record else None

    @property
    def blocking(self) -> BlockingCalls:
        """The threads of this volume."""
        return self._site.blocking

    async def observe(self) -> Observed:
        """Look at the process, at QMP, and at the host's side."""
        qsd, opened, export = Qsd.NONE, False, False
        if self._pidfd is None:
            await self._hang_up()
        else:
            try:
                self._refuse_silent()
                session = await self._connected()
                needed = blockdev.node_names_needed(self.spec.snapshot)
                opened = needed <= (await session.node_names()).keys()
                export = opened and await session.has_export(blockdev.EXPORT)
                qsd = Qsd.RUNNING
                self._silent_since = None
            except StoragedError as error:
                if error.code is ErrorCode.QSD_SILENT and self._silent_since is None:
                    self._silent_since = time.monotonic()
                if error.code is ErrorCode.QSD_DIED:
                    # The connection ended; the process is about to, or it hangs on its way out.
                    await self._wait_gone(1.0)
                qsd = Qsd.SILENT if self._pidfd is not None else Qsd.NONE
        seen = self.transport.observe(self._site, self.record, alive=export or qsd is Qsd.SILENT)
        return Observed(
            qsd=qsd, opened=opened, exported=(export or qsd is Qsd.SILENT) and seen.reachable,
            remains=seen.remains, device=seen.device, linked=self._linked(), directory=self._has_directory(),
        )

    def looks_well(self) -> bool:
        """Whether an online volume still is, judged by sysfs and mounts alone: cheap, never blocks."""
        if self._pidfd is None:
            return False
        seen = self.transport.observe(self._site, self.record, alive=True)
        return seen.device is Device.HEALTHY and self._linked()

    def _linked(self) -> bool:
        directory = self._environment.layout.dev_dir
        if self.record is None or self.record.device is None:
            return links.any_link(directory, self.spec.name)
        partitions = self.transport.partitions(self.record)
        return links.links_are_right(directory, self.spec.name, self.record.device, partitions)

    def _has_directory(self) -> bool:
        return (
            os.path.lexists(self._directory)
            or overlay.locate(self._environment.layout.snapshots_dir, self.spec.name) is not None
        )

    # Adoption ------------------------------------------------------------------------------------------------

    async def adopt(self) -> None:
        """Take over what an earlier daemon left running; end what can be told to be ours and serves nothing.

        Raises ADOPTION_REFUSED, with everything left as it is, where something serves a device and its identity
        is in doubt.
        """
        record, damage = await self._site.blocking("read the record", 10, self._read_record)
        self.record = record
        if record is not None:
            self.spec = record.spec
            self._environment.claims.hold(self.spec.name, record.sources)
            if record.process is not None and self._find(record.process):
                found = self.transport.find_device(self._site)
                if record.device is None and found is not None:
                    # The daemon died between the set-up and the record.
                    await self._note(device=found.device, diskseq=found.diskseq)
                return
        elif (device := self.transport.find_device(self._site)) is not None:
            strays = await self._site.blocking("look for processes", 10, self._strays)
            self._adopt_in_doubt(device.device, device.diskseq, strays)
            raise StoragedError(
                ErrorCode.ADOPTION_REFUSED, f"the record of {device.device} is lost", volume=self.spec.name,
                step="adopt", cause=damage or "there is none",
                hint="the device goes on working; detach the volume and attach it again when it is free",
            )
        await self._end_strays()

    def _adopt_in_doubt(self, device: str, diskseq: int, strays: list[ProcessIdentity]) -> None:
        """Hold on to what was found, so that the user can detach it; nothing else is done with it."""
        self.record = Record(
            spec=self.spec, transport=self.transport.name, transport_reason="found without a record",
            binary="", process=strays[0] if strays else None, device=device, diskseq=diskseq,
        )
        if strays:
            self._find(strays[0])

    def _strays(self) -> list[ProcessIdentity]:
        return process.find_by_arguments("--pidfile", pidfile(self._directory))

    async def _end_strays(self) -> None:
        """End a QSD of this volume that was started but never recorded: it serves nothing yet."""
        for stray in await self._site.blocking("look for processes", 10, self._strays):
            if self._find(stray):
                await self._kill()

    def _read_record(self) -> tuple[Record | None, str]:
        try:
            with open(os.path.join(self._directory, "record.json"), "rb") as file:
                record = msgspec.json.decode(file.read(), type=Record)
        except FileNotFoundError:
            return None, ""
        except (OSError, ValueError) as error:
            return None, f"record.json is damaged: {error}"
        if record.spec.name != self.spec.name or record.transport not in TRANSPORTS:
            return None, "record.json speaks of another volume or transport"
        return record, ""

    # Steps ---------------------------------------------------------------------------------------------------

    async def perform(self, step: Step, *, timeout: float, force: bool) -> None:
        """Do one step within ``timeout`` seconds. Raises what it fails with."""
        self.notes.clear()
        try:
            await self._perform(step, timeout=timeout, force=force)
        except StoragedError as error:
            if error.code is ErrorCode.QSD_DIED and await self._wait_gone(1.0):
                # Its exit status and last words say more than a lost connection.
                death, self.last_death = self.last_death, None
                raise (death or error) from error
            raise

    async def _perform(self, step: Step, *, timeout: float, force: bool) -> None:
        match step:
            case Step.CLEAR:
                self.notes += await self.transport.clear(self._site, self.record, timeout)
                await self._forget_device()
            case Step.START:
                await self._start(timeout)
            case Step.OPEN:
                await self._open(timeout)
            case Step.EXPORT:
                await self._export(timeout)
            case Step.CONNECT:
                connected = await self.transport.connect(self._site, self._known(), timeout)
                self._environment.fault("connect: made")
                await self._note(device=connected.device, diskseq=connected.diskseq, direct_io=connected.direct_io)
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
                await self._stop(timeout)
            case Step.REMOVE:
                await self._site.blocking("remove the volume's directory", timeout, self._remove)

    async def resize(self, size: int, timeout: float) -> None:
        """Grow the disk to ``size`` bytes, then its device. Raises INVALID_SIZE, UNSUPPORTED, ..."""
        record, session = self._known(), await self._connected()
        present = (await session.node_names())[blockdev.DISK]
        if size < present:
            raise StoragedError(
                ErrorCode.INVALID_SIZE, f"the volume has {present} bytes; it can grow, not shrink",
                hint="shrink the filesystem and copy it to a smaller image",
            )
        if size % max(512, record.spec.logical_block_size):
            raise StoragedError(ErrorCode.INVALID_SIZE, f"{size} is no multiple of the block size")
        if size > present:
            if record.spec.read_only:
                raise StoragedError(ErrorCode.UNSUPPORTED, "a read-only volume cannot grow")
            await session.execute("block_resize", {"node-name": blockdev.DISK, "size": size}, timeout=timeout)
        await self._note(size=size)
        await self.transport.resized(self._site, self._known(), size, timeout)

    async def leave(self) -> None:
        """The volume is gone, or the daemon ends: let go of everything without touching it."""
        self._environment.claims.drop(self.spec.name)
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        await self._hang_up()

    async def _start(self, timeout: float) -> None:
        spec, environment = self.spec, self._environment
        former = self.record
        transport, why = (
            (TRANSPORTS[former.transport], former.transport_reason) if former is not None
            else choose_transport(spec.transport, None)
        )

        def work() -> _Started:
            known = former.binary if former is not None else ""
            binary = find_binary(known or environment.config.qsd.binary)
            wanted = opening.inspect(spec)
            environment.claims.hold(spec.name, wanted.sources)
            held = opening.take(wanted, environment.lock_directory, f"volume {spec.name} ({self._directory})")
            try:
                os.makedirs(os.path.join(self._directory, "tmp"), mode=0o700, exist_ok=True)
                place = self._reserve_overlay() if spec.snapshot else None
                record = Record(
                    spec=spec, transport=transport.name, transport_reason=why, binary=binary,
                    sources=dict(wanted.sources), overlay=place, size=former.size if former else 0,
                )
                self._write_record(record)
                environment.fault("start: recorded")
                with bind_unix(qmp_socket(self._directory), mode=0o600) as listener:
                    # In the backlog before QSD is there: it is served as soon as its main loop runs.
                    monitor = connect_unix(qmp_socket(self._directory))
                    pid, pidfd = spawn(binary, self._directory, listener, held)
                environment.fault("start: spawned")
                return _Started(wanted, record, monitor, pid, pidfd)
            finally:
                for fd in held:
                    os.close(fd)

        def too_late(started: _Started) -> None:
            # Nobody waits for this QSD any more, and it has opened nothing yet.
            started.monitor.close()
            process.kill(started.pidfd)
            os.close(started.pidfd)

        started = await self._site.blocking.with_late_result("start QSD", timeout, work, too_late)
        self._opening, self.record = started.opening, started.record
        self._watch(started.pidfd)
        self.started_at = time.monotonic()
        self._session = await Session.over(started.monitor, timeout=timeout)
        # Only now it is surely itself: qsd.binary may be a script that executes the real one.
        await self._note(process=process.identify(started.pid), qsd_version=self._session.version)

    async def _open(self, timeout: float) -> None:
        spec, wanted = self.spec, self._opening
        if wanted is None:
            # An adopted QSD that never got as far as opening: nothing is known of its locks. A new one is.
            await self._kill()
            return
        session = await self._connected()
        if wanted.key_file is not None:
            secret = await self._site.blocking(
                "read the key file", timeout, opening.read_passphrase, wanted.key_file
            )
            await session.execute("object-add", secret)
        await session.execute("blockdev-add", wanted.node, timeout=timeout)
        if spec.snapshot:
            await self._open_overlay(session, timeout)
        again = await self._site.blocking("look at the source", timeout, opening.inspect, spec)
        if again.sources != wanted.sources:
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, "the source was replaced while it was opened",
                hint="find out who replaces it, then attach again",
            )
        size = (await session.node_names())[blockdev.DISK]
        if size == 0 or size % spec.logical_block_size:
            raise StoragedError(
                ErrorCode.INVALID_SIZE, f"the disk has {size} bytes",
                cause=f"that is no multiple of its logical block size {spec.logical_block_size}" if size else "",
                hint="resize the image (qemu-img resize), or say another -o logical-block-size",
            )
        await self._note(size=size)

    async def _open_overlay(self, session: Session, timeout: float) -> None:
        """Open the overlay over the base; make it first where there is none."""
        path = self._known().overlay
        assert path is not None
        flags = opening.cache_flags(self.spec)
        backend = BACKENDS["file"]
        exists = await self._site.blocking("look for the overlay", timeout, os.path.exists, path)
        if not exists:
            limit = overlay.limit_of(self.spec)
            new = await self._site.blocking("create the overlay", timeout, overlay.create_new, path, limit)
            protocol = backend.node(new, read_only=False, options=self.spec.options)
            await session.execute("blockdev-add", blockdev.overlay_file_node(protocol, limit), timeout=timeout)
            size = (await session.node_names())[blockdev.BASE]
            create = {
                "job-id": "create",
                "options": {"driver": "qcow2", "file": blockdev.OVERLAY_FILE, "size": size},
            }
            await session.run_job("blockdev-create", create, "create", timeout=timeout)
            await session.execute("blockdev-del", {"node-name": blockdev.OVERLAY_FILE}, timeout=timeout)
            self._environment.fault("open: overlay created")
            await self._site.blocking("finish the overlay", timeout, overlay.finish, path)
        limit = await self._site.blocking("look at the overlay", timeout, os.path.getsize, path)
        protocol = backend.node(path, read_only=False, options=self.spec.options)
        await session.execute("blockdev-add", blockdev.overlay_file_node(protocol, limit), timeout=timeout)
        await session.execute("blockdev-add", blockdev.overlay_tree(flags), timeout=timeout)

    def _reserve_overlay(self) -> str:
        layout, spec = self._environment.layout, self.spec
        overlay.limit_of(spec)
        place = spec.snapshot_dir or self._environment.config.snapshot_dir
        return overlay.reserve(layout.snapshots_dir, place, spec.name)

    async def _export(self, timeout: float) -> None:
        record, session = self._known(), await self._connected()
        if await session.has_export(blockdev.EXPORT):
            # The host's end of it is gone (somebody unmounted it); QSD has not noticed.
            await session.delete_export(blockdev.EXPORT, timeout=timeout)
        await self.transport.prepare(self._site, record, timeout)
        options = self.transport.export(self._site, record)
        if record.spec.options.get("cache") in ("writethrough", "directsync"):
            options["writethrough"] = True
        await session.execute("block-export-add", options, timeout=timeout)

    async def _disconnect(self, timeout: float, *, force: bool) -> None:
        record = self._known()
        if force:
            self.notes += await self.transport.disconnect_by_force(
                self._site, record, timeout, flush=self._silent_since is None
            )
        else:
            await self.transport.disconnect(self._site, record, timeout)
        await self._forget_device()

    async def _stop(self, timeout: float) -> None:
        """Let QSD end by itself, which flushes everything; kill it when it does not."""
        patience = min(timeout, _QUIT_PATIENCE)
        try:
            self._refuse_silent()
            session = await self._connected()
            await session.execute("quit", timeout=min(patience, ANSWER_TIMEOUT))
        except StoragedError as error:
            # A connection that ended is what quit does. A QSD that is silent will not hear of quit at all.
            if error.code is ErrorCode.QSD_SILENT:
                patience = 0
        await self._wait_gone(patience)
        await self._kill()

    def _refuse_silent(self) -> None:
        """Do not wait again and again for a QSD that gave no answer a moment ago."""
        if self._silent_since is not None and time.monotonic() - self._silent_since < _SILENCE:
            raise StoragedError(ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer")

    async def _kill(self) -> None:
        if self._pidfd is None:
            self.last_death = None
            return
        process.kill(self._pidfd)
        if not await self._wait_gone(_KILL_PATIENCE):
            raise StoragedError(
                ErrorCode.QSD_SILENT, "qemu-storage-daemon does not even die of SIGKILL",
                cause="its threads hang in the kernel, on the storage below",
                hint="bring the storage below back or make it fail; then detach again",
            )
        self.last_death = None

    def _remove(self) -> None:
        overlay.remove(self._environment.layout.snapshots_dir, self.spec.name)
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(self._directory)

    # The process and the record --------------------------------------------------------------------------------

    def _find(self, who: ProcessIdentity) -> bool:
        """Watch this process from now on; False if it is dead already."""
        pidfd = process.open_pidfd(who)
        if pidfd is not None:
            self._watch(pidfd)
        return pidfd is not None

    def _watch(self, pidfd: int) -> None:
        """Be told of the death of the process behind a pidfd, which belongs to us from now on."""
        self._pidfd = pidfd
        self._silent_since = None
        self._gone.clear()
        asyncio.get_running_loop().add_reader(pidfd, self._on_death)

    def _on_death(self) -> None:
        assert self._pidfd is not None
        asyncio.get_running_loop().remove_reader(self._pidfd)
        how = process.reap(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = None
        self.last_death = died(self._directory, how)
        self._gone.set()
        self._wake()

    async def _wait_gone(self, timeout: float) -> bool:
        try:
            async with asyncio.timeout(timeout):
                await self._gone.wait()
        except TimeoutError:
            return False
        await self._hang_up()
        return True

    async def _connected(self) -> Session:
        if self._session is not None and not self._session.usable:
            await self._hang_up()
        if self._session is None:
            self._session = await Session.connect(qmp_socket(self._directory), timeout=ANSWER_TIMEOUT)
        return self._session

    async def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    def _known(self) -> Record:
        if self.record is None:
            raise StoragedError(ErrorCode.INTERNAL, "a step needs a record and there is none")
        return self.record

    async def _forget_device(self) -> None:
        if self.record is not None and self.record.device is not None:
            await self._note(device=None, diskseq=0)

    async def _note(self, **changes: object) -> None:
        self.record = msgspec.structs.replace(self._known(), **changes)
        await self._site.blocking("write the record", 10, self._write_record, self.record)

    def _write_record(self, record: Record) -> None:
        write_atomic(os.path.join(self._directory, "record.json"), msgspec.json.encode(record))
