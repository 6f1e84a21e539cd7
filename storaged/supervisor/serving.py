"""Brings a volume up: its qemu-storage-daemon, or a rescue server, the source, the export."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, process
from storaged.model import blockdev
from storaged.model.formats import Format
from storaged.model.record import Layer
from storaged.model.states import State
from storaged.observe.journald import about
from storaged.qsd.session import Session
from storaged.supervisor import fetching, fingerprint, launch, opening, remotechain
from storaged.supervisor.holding import Holding, Told
from storaged.supervisor.snapshot import open_snapshot

log = logging.getLogger("storaged.serving")

#: Seconds between two words on how far a source has come that is fetched first.
_TELL_EVERY = 1.0


async def start(held: Holding, timeout: float) -> None:
    """Start QSD with a monitor only, from the record if there is one. Raises what ``launch.launch`` raises."""
    await held.wait_for_writing()
    given_up, former = threading.Event(), held.record

    loop, events = asyncio.get_running_loop(), held.environment.events

    told = time.monotonic()

    def tell(done: int, total: int | None) -> None:
        nonlocal told
        if time.monotonic() < told + _TELL_EVERY:
            return
        told = time.monotonic()
        loop.call_soon_threadsafe(
            events.publish, held.spec.name, "note", State.STARTING, fetching.told(done, total)
        )

    def work() -> launch.Started:
        return launch.launch(
            held.spec, former, held.site, held.environment, timeout=timeout, given_up=given_up, progress=tell
        )

    try:
        started = await held.source_calls.with_late_result("start QSD", timeout, work, launch.Started.give_up)
    except BaseException:
        given_up.set()
        raise
    await _greet(held, started, timeout)
    held.told = Told(opened=False, exported=False)


async def start_rescue(held: Holding, timeout: float) -> None:
    """A server in the place of a dead one that fails all I/O: it needs the name, the queues and the log."""
    if not held.known().binary:
        raise StoragedError(
            ErrorCode.ADOPTION_REFUSED, "the device cannot be taken away",
            cause="its record is lost, and nothing serves it: what its server must be like is not known",
            hint="its I/O waits until the host is rebooted; nothing else of the host is concerned",
        )

    await held.wait_for_writing()

    def work() -> launch.Started:
        return launch.launch_rescue(held.known(), held.site, held.environment)

    await _greet(
        held, await held.blocking.with_late_result("start QSD", timeout, work, launch.Started.give_up), timeout
    )
    session = await held.qsd.session()
    for command, arguments in held.transport.setup(held.site, held.known()):
        await session.execute(command, arguments)
    await session.execute("blockdev-add", blockdev.failing_node(held.known().size))
    await _fail_flushes(session, held.known().size, timeout)


async def _fail_flushes(session: Session, size: int, timeout: float) -> None:
    """Have something written to the failing disk, in vain: QEMU acknowledges flushes of a disk without writes.

    See bdrv_co_flush in block/io.c. An acknowledged flush would say that what QSD acknowledged before is safe. The
    write is a backup's: of all that QMP has it is the simplest.
    """
    zeroes = "zeroes"
    await session.execute("blockdev-add", {"driver": "null-co", "node-name": zeroes, "size": size})
    try:
        await session.run_job(
            "blockdev-backup",
            {"device": zeroes, "target": blockdev.DISK, "sync": "full", "job-id": "write", "auto-dismiss": False},
            "write", timeout=timeout,
        )
    except StoragedError as error:
        if os.strerror(errno.EIO) not in error.cause:
            raise
    await session.execute("blockdev-del", {"node-name": zeroes})


async def _greet(held: Holding, started: launch.Started, timeout: float) -> None:
    held.end_of_locks()
    held.opening, held.record, held.half_open = started.opening, started.record, False
    held.locks_to = started.locks_to
    session = await held.qsd.greet(started.pidfd, started.monitor, timeout=timeout)
    # Only now it is surely itself: qsd.binary may be a script that executes the real one.
    held.note_meanwhile(process=process.identify(started.pid), qsd_version=session.version)


async def open_source(held: Holding, timeout: float) -> None:
    """Open the source, within ``timeout`` seconds; one that is half open is ended."""
    if held.opening is None or held.half_open:
        # An adopted QSD that never got as far as opening: nothing is known of its locks. Or a try that was cut short.
        await _kill_unopened(held)
        return
    held.half_open = True
    try:
        await _open(held, held.opening, timeout)
        held.told = Told(opened=True, exported=False)
    except StoragedError as error:
        # What was opened half way serves nobody, and would be in the way of the next try.
        if error.code is not ErrorCode.QSD_DIED:
            await _kill_unopened(held)
        raise


async def _kill_unopened(held: Holding) -> None:
    """A QSD without its disk has closed it all, and holds nothing; one that is silent cannot be asked."""
    if not held.known().settled:
        try:
            nodes = await (await held.qsd.session()).node_names()
        except StoragedError:
            nodes = {blockdev.DISK: 0}
        if blockdev.DISK not in nodes:
            await held.note(settled=True)
    await held.qsd.kill()


async def _open(held: Holding, wanted: opening.Opening, timeout: float) -> None:
    spec, began = held.spec, time.monotonic()
    session = await held.qsd.session()
    for command, arguments in held.transport.setup(held.site, held.known()):
        await session.execute(command, arguments)
    for secret in wanted.secrets:
        await session.execute("object-add", await held.source_calls(
            "read a secret", timeout, opening.secret_object, secret, spec, held.directory
        ))
    for needed in wanted.requirements.objects:
        await session.execute("object-add", needed)
    if wanted.is_open_ended:
        wanted = held.opening = await remotechain.complete(held, session, wanted, timeout)
    # QSD answers in the order in which it is asked: the question for the nodes goes right behind.
    as_wanted, sizes = await asyncio.gather(
        _add_and_look(held, session, wanted, timeout), session.node_names(timeout=timeout)
    )
    if not as_wanted:
        raise _replaced()
    _refuse_further_files(wanted, sizes)
    if spec.snapshot:
        # Of what is behind a server the size is all that tells whether it changed.
        behind = [
            [0, sizes[f"{blockdev.BASE}-{depth}" if depth else blockdev.BASE], 0]
            for depth, layer in enumerate(wanted.layers) if not layer.source.startswith("/")
        ]
        below = [*behind, *wanted.fingerprint]
        await open_snapshot(
            spec, below, str(held.known().overlay), session, held.environment, held.source_calls, timeout
        )
        sizes = await session.node_names()
    size, source_size, top = sizes[blockdev.DISK], 0, blockdev.DISK
    device = held.known().device
    # A daemon may have died between the growth of the device and the record of it.
    had = disk.size(device) if device is not None else 0
    kept = had or held.known().size
    if 0 < kept < size and not spec.snapshot:
        # Until somebody asks for more: who uses the device has laid out what it had.
        source_size, size, top = await _open_in_full(held, session, wanted, kept, timeout), kept, blockdev.FULL
    if size == 0 or size % spec.logical_block_size:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"the disk has {size} bytes",
            cause=f"that is no multiple of its logical block size {spec.logical_block_size}" if size else "",
            hint="resize the image (qemu-img resize), or say another -o logical-block-size",
        )
    if size < kept:
        # Whatever the transport: what lay beyond the new end is gone, or another disk answers by that name.
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, f"the disk has {size} bytes by now, it had {kept}",
            hint="bring the old size back; or detach the volume (--force) and attach it again",
        )
    if had not in (0, size):
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, f"the disk has {size} bytes by now, its device {had}",
            hint="bring the old size back; or detach the volume (--force) and attach it again",
        )
    owes = spec.writes_source and not spec.keeps_writes_in_memory and not wanted.safe_when_acknowledged
    if held.known().size and owes:
        # Before the record says that it is open: who adopts it then would not do this any more.
        await _owe_a_flush(held, session, top, source_size or size, timeout)
    if source_size:
        await session.add_node(
            blockdev.clipped_node(size, read_only=not spec.writes_source, cache=opening.cache_flags(spec)),
            timeout=timeout,
        )
    took = time.monotonic() - began
    which = await _tell_disk(held, wanted, timeout)
    # Once it is exported it may acknowledge writes: that it does waits for this to be on the disk.
    held.note_meanwhile(
        size=size, source_size=source_size, fingerprint=which, settled=False, open_seconds=took,
        sources=dict(wanted.sources),
        layers=layers_of(wanted.layers, sizes, held.known().overlay if spec.snapshot else None),
    )


def layers_of(chain: Sequence[Layer], sizes: Mapping[str, int], overlay: str | None) -> list[Layer]:
    """Return what is told of the images that were opened: ``sizes`` are those of the nodes, by name."""
    top = blockdev.BASE if overlay is not None else blockdev.DISK
    layers = [
        Layer(
            source=layer.source, format=layer.format, virtual_size=sizes[f"{top}-{number}" if number else top],
            backing=chain[number + 1].source if number + 1 < len(chain) else None, data_file=layer.data_file,
        )
        for number, layer in enumerate(chain)
    ]
    if overlay is None:
        return layers
    disk = Layer(
        source=overlay, format=Format.QCOW2, virtual_size=sizes[blockdev.DISK], backing=layers[0].source
    )
    return [disk, *layers]


async def _tell_disk(held: Holding, wanted: opening.Opening, timeout: float) -> str:
    """Return what tells this disk from others of its name, once QSD has it open, so that it is that one.

    Raises SOURCE_CHANGED where it is another one than before; OPEN_FAILED where nobody tells, and somebody did before.
    """
    record = held.known()
    if not wanted.remote:
        return ""
    patience = min(timeout / 2, fingerprint.PATIENCE)
    try:
        found = await held.source_calls(
            "ask which disk this is", patience + 1, fingerprint.ask, held.spec, held.directory, patience
        )
    except StoragedError as error:
        if record.fingerprint and error.code is not ErrorCode.UNSUPPORTED:
            raise
        held.notes.append(f"{error}; {error.hint}")
        log.warning("volume %s: %s", held.spec.name, held.notes[-1], extra=about(held.spec.name))
        return record.fingerprint
    fingerprint.compare(record, found)
    return found


async def _open_in_full(
    held: Holding, session: Session, wanted: opening.Opening, kept: int, timeout: float
) -> int:
    """Open a source that has more than the ``kept`` bytes once more, as the node below the disk; return its size.

    The disk cannot be clipped later: nobody may truncate what lies below a ``raw`` node of a fixed size, and the
    flush that is owed needs that.
    """
    await session.execute("blockdev-del", {"node-name": blockdev.DISK}, timeout=timeout)
    in_full = replace(wanted, node={**wanted.node, "node-name": blockdev.FULL})
    if not await _add_and_look(held, session, in_full, timeout):
        raise _replaced()
    sizes = await session.node_names(timeout=timeout)
    _refuse_further_files(wanted, sizes)
    if sizes[blockdev.FULL] < kept:
        raise _replaced()
    return sizes[blockdev.FULL]


def _refuse_further_files(wanted: opening.Opening, nodes: Mapping[str, int]) -> None:
    """Behind a server, a header may have been another one when QEMU read it, and named one more file."""
    if wanted.is_open_ended and len(nodes) > wanted.most_nodes:
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, "the image was changed while it was opened, and needs another file",
            hint="find out who changes it behind the server, then attach again",
        )


def _replaced() -> StoragedError:
    return StoragedError(
        ErrorCode.SOURCE_CHANGED, "the source was replaced while it was opened",
        hint="find out who replaces it, then attach again",
    )


async def _add_and_look(held: Holding, session: Session, wanted: opening.Opening, timeout: float) -> bool:
    """Open the source, and say whether QSD has opened what was looked at before."""
    try:
        await session.add_node(wanted.node, timeout=timeout)
    except StoragedError as error:
        answered = error.code not in (ErrorCode.QSD_DIED, ErrorCode.QSD_SILENT)
        if answered and await held.source_calls("look at the source again", timeout, opening.was_replaced, wanted):
            raise _replaced() from error
        raise
    held.environment.fault("open: added")
    pid = held.known().process
    return pid is not None and await held.source_calls(
        "look at what QSD opened", timeout, opening.opened_as_wanted, wanted, pid.pid,
        (held.directory, held.environment.lock_directory),
    )


async def _owe_a_flush(held: Holding, session: Session, node: str, size: int, timeout: float) -> None:
    """Let the next flush reach the storage below, although this QSD has written nothing yet to ``node``.

    QEMU leaves out a flush of a node that was not written to since its last one (bdrv_co_flush, write_gen in
    block/io.c), and knows nothing of what its predecessor has acknowledged. A truncation to the present size changes
    nothing, and counts as a write in each node down to the one that reaches the data.
    """
    try:
        await session.execute("block_resize", {"node-name": node, "size": size}, timeout=timeout)
    except StoragedError as error:
        if error.code in (ErrorCode.QSD_DIED, ErrorCode.QSD_SILENT):
            raise
        log.warning(
            "volume %s: what was acknowledged before may not be flushed by the next flush, but only by one after a "
            "write: %s", held.spec.name, error.cause or error, extra=about(held.spec.name),
        )


async def export(held: Holding, timeout: float) -> None:
    """Export the disk, as the record says."""
    record, session = held.known(), await held.qsd.session()
    if held.exports:
        # The host's end of it is gone (somebody unmounted it); QSD has not noticed.
        await session.delete_export(blockdev.EXPORT, timeout=timeout)
    if record.socket is not None or record.served_by is not None:
        # What stood on an earlier export: it has to be made, or connected, anew.
        await held.note(socket=None, served_by=None)
    await held.transport.prepare(held.site, record, timeout)
    options = held.transport.export(held.site, record)
    if record.spec.options.get("cache") in ("writethrough", "directsync"):
        options["writethrough"] = True
    await held.written()
    await session.add_export(options, timeout=timeout)
