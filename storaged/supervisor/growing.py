"""Whether a volume can grow while it is attached. Pure."""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError
from storaged.model.record import Record
from storaged.model.sizes import MAX_SIZE
from storaged.transports.base import Transport


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
    if not (transport.grows and record.settings.get("grows", 1)):
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"a volume on {record.transport} cannot grow while it is attached",
            cause="QEMU does not resize a disk that it exports in this way",
            hint="detach it, resize the image (qemu-img resize), and attach it again; or use --transport vduse",
        )
    if record.spec.read_only:
        raise StoragedError(ErrorCode.UNSUPPORTED, "a read-only volume cannot grow")
