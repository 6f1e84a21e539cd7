"""Takes a volume down: its device, with or without force, and its qemu-storage-daemon, with or without a successor."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import shutil
import time

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host import sshagent
from storaged.host.nbdhandshake import flush
from storaged.host.unixsock import connect_unix
from storaged.host.users import device_users, only_probes
from storaged.model import blockdev
from storaged.model.record import Record
from storaged.qsd.session import Session
from storaged.qsd.sideexport import side_export
from storaged.qsd.version import aborts_with_iothread, parse_version
from storaged.supervisor import fetching, overlay, queues
from storaged.supervisor.holding import Holding
from storaged.transports.nbd import nbd_socket

#: A way to the disk beside its export, for a flush.
_FLUSH_EXPORT = "flush"
#: Seconds within which a descriptor that was handed out is in a process again.
_ON_ITS_WAY = 10.0
#: Seconds for a QSD whose device shall fail from now on to close the source in good order; then it is killed.
_LAST_CLOSE = 5.0


async def disconnect(held: Holding, timeout: float, *, force: bool) -> None:
    """Take the device away; without force it refuses with DEVICE_IN_USE or FLUSH_FAILED, with nothing changed."""
    record = held.known()
    if force:
        if record.lost:
            held.notes.append(
                f"{record.device} fails from now on: qemu-storage-daemon died with writes of it in its memory"
            )
        if not await _disconnect_by_force(held, record, timeout):
            return
    else:
        if record.rescue or record.lost:
            # There is nothing to flush it to.
            record = msgspec.structs.replace(record, spec=msgspec.structs.replace(record.spec, read_only=True))
        await _let_descriptors_arrive(held, record, timeout)
        try:
            await held.transport.disconnect(held.site, record, timeout)
        except StoragedError as error:
            await queues.note_given_back(held)
            if error.code is ErrorCode.DEVICE_IN_USE and held.blocking.stuck and not error.users:
                raise StoragedError(
                    ErrorCode.HOST_STUCK, "an earlier try to flush the device still hangs",
                    hint="wait for the storage below to go on, or use --force",
                ) from error
            raise
        held.stalled = False  # it has flushed
    await held.forget_device()


async def _let_descriptors_arrive(held: Holding, record: Record, timeout: float) -> None:
    """Wait until a descriptor that was handed out is where it is seen: on its way it is in no process.

    So it is between us and who asked for it, and again where that hands it on, as systemd-vmspawn does to its QEMU,
    which may not take it before it has started. Raises DEVICE_IN_USE where ``timeout`` does not suffice.
    """
    wait = held.handed_out + _ON_ITS_WAY - time.monotonic()
    if wait <= 0 or await held.blocking("see who uses the device", timeout, _is_used, str(record.device)):
        return
    if wait >= timeout:
        raise StoragedError(
            ErrorCode.DEVICE_IN_USE, f"{record.device} may be in use",
            cause="an open descriptor of it was handed out a moment ago, and may be on its way",
            hint=f"try again in {math.ceil(wait)} s",
        )
    await asyncio.sleep(wait)


def _is_used(device: str) -> bool:
    users = device_users(device)
    return bool(users) and not only_probes(users)


async def _disconnect_by_force(held: Holding, record: Record, timeout: float) -> bool:
    """Return whether the device is gone; it is not where it has to get a rescue server first."""
    flush = held.qsd.alive and not (held.qsd.silent or record.rescue or record.lost or held.stalled)
    if held.stalled and not record.rescue:
        held.notes.append("what was written and not flushed is given up: no request has ended for a while")
    if not held.transport.bridges and (held.stalled or held.qsd.silent):
        # Whoever waits in the kernel while it looks for partitions, or at the last close, keeps everybody from opening
        # the device, us too. So its I/O has to end first; here it does so without QSD.
        await held.qsd.kill()
    try:
        async with held.names_held():
            held.notes += await held.transport.disconnect_by_force(held.site, record, timeout, flush=flush)
        if held.transport.reconnects and held.transport.find_device(held.site, record) is not None:
            await held.note(abandoned=[*record.abandoned, str(record.device)])
    except StoragedError as error:
        if error.code is not ErrorCode.HOST_STUCK or record.rescue:
            raise
        # Its requests wait for storage that does not answer. They end without QSD, or with a rescue server.
        held.notes.append(f"all I/O in flight ends with errors: {error.message}")
        await held.qsd.kill()
        if held.transport.bridges:
            return False
        async with held.names_held():
            held.notes += await held.transport.disconnect_by_force(held.site, record, timeout, flush=False)
    return True


async def stop(held: Holding, timeout: float, *, force: bool) -> None:
    """End QSD. Where its device stays, what it has acknowledged is brought to the source first, if that can be done.

    Raises QSD_SILENT where it does not even die of SIGKILL.
    """
    record = held.record
    if (record is not None and record.rescue) or held.stalled or held.qsd.silent:
        await held.qsd.kill()
    elif force and record is not None and record.device is not None and held.transport.bridges:
        try:
            with contextlib.suppress(StoragedError, TimeoutError):
                async with asyncio.timeout(min(timeout, _LAST_CLOSE)):
                    await hand_over(held, min(timeout, _LAST_CLOSE))
        finally:
            await held.qsd.kill()
    else:
        await held.qsd.stop(timeout, export=blockdev.EXPORT, quits_badly=_quits_badly(record))


async def hand_over(held: Holding, timeout: float, **changes: object) -> None:
    """End QSD in good order while its device waits: a successor finds all that was acknowledged on the source.

    ``changes`` are made to the record in the same moment in which it says so.
    When it fails QSD lives, and goes on with the export that the plan gives it again. Raises FLUSH_FAILED, QSD_SILENT.
    """
    session = await held.qsd.session()
    if await session.has_export(blockdev.EXPORT):
        await session.delete_export(blockdev.EXPORT, timeout=timeout)
    held.environment.fault("hand over: unexported")
    if held.known().spec.keeps_writes_in_memory:
        await _flush(held, session, timeout)
    if not await session.close_everything(blockdev.EXPORT, timeout=timeout):
        raise StoragedError(ErrorCode.QSD_REFUSED, "qemu-storage-daemon does not let go of the source")
    held.environment.fault("hand over: closed")
    await held.note(settled=True, **changes)
    await held.qsd.kill()


async def _flush(held: Holding, session: Session, timeout: float) -> None:
    """Flush the disk by an export of its own: QMP has no command for it, and closing a node reports no failure."""
    server = nbd_socket(held.known()) if held.transport.reconnects else None

    def work(path: str) -> None:
        try:
            with connect_unix(path) as sock:
                flush(sock, _FLUSH_EXPORT, timeout)
        except (ImportError, OSError) as error:
            raise StoragedError(
                ErrorCode.FLUSH_FAILED, "qemu-storage-daemon cannot be told to flush what it holds in its memory",
                cause=str(error), hint="apt install python3-libnbd",
            ) from error

    async with side_export(
        session, blockdev.DISK, _FLUSH_EXPORT, directory=held.directory, server=server, timeout=timeout
    ) as path:
        await held.blocking("flush", timeout, work, path)


def _quits_badly(record: Record | None) -> bool:
    version = parse_version(f"version {record.qsd_version}") if record else None
    return version is not None and aborts_with_iothread(version)


def remove(held: Holding) -> None:
    """Remove the overlay, what was started for QSD, and the volume's directory. Blocks."""
    sshagent.end(held.directory)
    overlay.remove(held.environment.layout.snapshots_dir, held.spec.name)
    fetching.remove(held.environment.layout, held.spec.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(held.directory)


def has_directory(held: Holding) -> bool:
    """Whether there is something to remove."""
    layout = held.environment.layout
    return (
        os.path.lexists(held.directory) or overlay.exists(layout.snapshots_dir, held.spec.name)
        or fetching.exists(layout, held.spec.name)
    )
