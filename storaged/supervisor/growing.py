"""Lets a volume grow while it is attached: what can, by how much, and in QSD."""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError
from storaged.model import blockdev
from storaged.model.formats import Format
from storaged.model.record import Record
from storaged.model.sizes import MAX_SIZE
from storaged.qsd.session import Session
from storaged.supervisor import opening
from storaged.supervisor.holding import Holding
from storaged.transports.base import Transport

#: Drivers of QEMU that truncate a file or an image, and so would cut off what others have added to it unseen. (Of the
#: rest some cannot, and ``iscsi`` and ``host_device`` only take over a size that is there.)
_CAN_CUT = frozenset({"file", "gluster", "nfs", "rbd", "ssh"})
#: One whose truncation changes nothing but what QSD believes (vitastor_co_truncate in Vitastor's qemu_driver.c).
_BELIEVES = frozenset({"vitastor"})
#: One that writes a zero at the new end to get there, over what is there by now (ssh_grow_file in block/ssh.c).
_WRITES = frozenset({"ssh"})


def check(record: Record, transport: Transport, present: int, size: int) -> None:
    """Raise INVALID_SIZE or UNSUPPORTED where a disk of ``present`` bytes cannot become one of ``size`` bytes."""
    if size < present:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"the volume has {present} bytes; it can grow, not shrink",
            hint="shrink the filesystem and copy it to a smaller image",
        )
    if size > MAX_SIZE:
        raise StoragedError(ErrorCode.INVALID_SIZE, f"{size} bytes are more than the kernel can address")
    if size % max(512, record.spec.logical_block_size):
        raise StoragedError(ErrorCode.INVALID_SIZE, f"{size} is no multiple of the block size")
    if size == present:
        return
    if not _can_follow(record, transport):
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"a volume on {record.transport} cannot grow while it is attached",
            cause="QEMU does not resize a disk that it exports in this way",
            hint="detach it, resize the image (qemu-img resize), and attach it again; or use --transport vduse",
        )
    if record.spec.read_only:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "a read-only volume cannot grow", hint="detach it, and attach it again"
        )


def _can_follow(record: Record, transport: Transport) -> bool:
    return transport.grows and bool(record.settings.get("grows", 1))


def how_to_take(record: Record, transport: Transport) -> str:
    """Say how a volume gets what its source has grown by."""
    if _can_follow(record, transport) and not record.spec.read_only:
        return f"storaged resize {record.spec.name} takes them"
    return "the volume has them when it is detached and attached again"


def check_source(source: int, size: int) -> None:
    """Raise INVALID_SIZE where a disk of ``size`` bytes would cut off what its source of ``source`` bytes has."""
    if size < source:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"the source has {source} bytes by now, and {size} would cut off the rest",
            hint="leave the size out: the volume then takes all that the source has",
        )


async def grow(held: Holding, size: int | None, timeout: float) -> int:
    """Grow QSD's disk to ``size`` bytes, or to all that the source has; return its size.

    Raises INVALID_SIZE, UNSUPPORTED, INVALID_ARGUMENT where the source does not tell its size, and what QSD refuses.
    """
    session, spec = await held.qsd.session(), held.spec
    nodes = await session.node_names()
    present = min(nodes[blockdev.DISK], held.known().size)
    if size is not None:
        check(held.known(), held.transport, present, size)
    source = await _look(held, session, nodes, size, timeout)
    if source is None:
        source = nodes.get(blockdev.FULL)  # at least so much
    if size is None:
        if source is None:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "what size the source has by now cannot be told", hint="say the new size"
            )
        size = max(present, source)
        rest = size % max(512, spec.logical_block_size)
        if rest and size - rest > present:
            # Nor is it attached at that size. To leave the rest out, QEMU would cut it off.
            raise StoragedError(
                ErrorCode.INVALID_SIZE, f"the source has {source} bytes, which is no multiple of the block size",
                hint=f"make it {size - rest + max(512, spec.logical_block_size)} bytes, and try again",
            )
        size -= rest
        check(held.known(), held.transport, present, size)
    elif source is not None:
        check_source(source, size)
    if blockdev.FULL in nodes and size > present:
        # A disk of a fixed size cannot be truncated (raw_co_truncate in block/raw-format.c).
        flags = opening.cache_flags(spec)
        await session.execute(
            "blockdev-reopen", {"options": [blockdev.unclipped_node(read_only=not spec.writes_source, cache=flags)]},
            timeout=timeout,
        )
        held.environment.fault("resize: reopened")
    if size > present:
        # To the size that the source has already, this only tells whoever uses the disk.
        try:
            await session.execute("block_resize", {"node-name": blockdev.DISK, "size": size}, timeout=timeout)
        except StoragedError as error:
            if error.code is ErrorCode.UNSUPPORTED and source is not None and size <= source:
                raise _unseen(spec.name, error.cause) from error
            raise
        held.environment.fault("resize: grown")
        await held.note(size=size, source_size=0)
    return size


def _unseen(name: str, cause: str) -> StoragedError:
    return StoragedError(
        ErrorCode.UNSUPPORTED, "qemu-storage-daemon has not noticed that the source has grown", cause=cause,
        hint=f"storaged upgrade {name} opens the source anew; then storaged resize {name} takes what it has",
    )


async def _look(held: Holding, session: Session, nodes: dict[str, int], size: int | None, timeout: float) -> int | None:
    """Return the size that the source has by now, None where that cannot be told, or need not.

    Raises UNSUPPORTED where the driver could only pretend to have another ``size``.
    """
    if held.spec.format is not Format.RAW or held.spec.snapshot:
        return None
    wanted = await held.source_calls("look at the source", timeout, opening.inspect, held.spec)
    if not wanted.remote:
        return wanted.size
    protocol = wanted.node["file"]
    driver = protocol["driver"]
    if size is not None and driver not in _CAN_CUT | _BELIEVES:
        return None
    if blockdev.LOOK in nodes:  # of a look that ended before its answer
        await session.execute("blockdev-del", {"node-name": blockdev.LOOK}, timeout=timeout)
    look = {**protocol, "node-name": blockdev.LOOK, "read-only": True}
    await session.add_node(look, timeout=timeout)
    try:
        source = (await session.node_names(timeout=timeout))[blockdev.LOOK]
    finally:
        await session.execute("blockdev-del", {"node-name": blockdev.LOOK}, timeout=timeout)
    if driver in _WRITES and source > nodes.get(blockdev.FULL, nodes[blockdev.DISK]):
        raise _unseen(held.spec.name, "its driver would write over the end of what was added")
    if driver in _BELIEVES and size is not None and size > source:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"QEMU's driver {driver} cannot resize an image",
            cause=f"the image has {source} bytes", hint="resize it first (vitastor-cli modify --resize SIZE IMAGE)",
        )
    return source
