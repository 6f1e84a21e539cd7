"""The NBD protocol by libnbd: the handshake on a socket that the kernel gets later, a flush and reads of our own.

The only importer of nbd.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host.nbd import Negotiated

#: Transmission flags (doc/proto.md of the NBD project).
_HAS_FLAGS, _READ_ONLY, _FLUSH, _ROTATIONAL, _TRIM, _ZEROES, _MULTI_CONN = 1, 2, 4, 16, 32, 64, 256


def libnbd_problem() -> str:
    """Say why libnbd's binding cannot be used; empty if it can."""
    try:
        import nbd

        nbd.NBD  # noqa: B018  # PyPI's package of that name has none
    except (ImportError, AttributeError) as error:
        return f"libnbd's Python binding is missing ({error})"
    return ""


def negotiate(sock: socket.socket, export: str, timeout: float = 10.0) -> Negotiated:
    """Agree with the server on an export; the socket is then in the transmission phase.

    Blocks, for at most ``timeout`` seconds.

    Nothing that the kernel's client does not understand is asked for: no structured replies, no block status. And that
    the server can do FUA is not passed on: QEMU 10.0 acknowledges such a write without a flush, if it comes right after
    one (its file-posix takes FUA upon itself, and leaves the flush out because the write is not counted yet). Without
    FUA the kernel sends a write and then a flush.
    Raises DEVICE_FAILED, QSD_SILENT.
    """
    import nbd  # not at the top: only who uses NBD needs libnbd to be there

    handle = nbd.NBD()
    handle.set_export_name(export)
    handle.set_request_structured_replies(False)
    if hasattr(handle, "set_request_meta_context"):  # libnbd 1.16
        handle.set_request_meta_context(False)
    try:
        # libnbd owns what it is given and closes it, without a word to the server, when the handle goes.
        handle.aio_connect_socket(os.dup(sock.fileno()))
        _wait(handle, handle.aio_is_ready, timeout, "ended the NBD handshake")
        flags = _HAS_FLAGS
        for has, flag in (
            (handle.is_read_only, _READ_ONLY), (handle.can_flush, _FLUSH),
            (handle.is_rotational, _ROTATIONAL), (handle.can_trim, _TRIM), (handle.can_zero, _ZEROES),
            (handle.can_multi_conn, _MULTI_CONN),
        ):
            if has():
                flags |= flag
        told = Negotiated(size=handle.get_size(), flags=flags)
    except nbd.Error as error:
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, "the NBD handshake with qemu-storage-daemon failed", cause=str(error),
            hint="look into the journal and qsd.log",
        ) from error
    # Both ends share one open file description: libnbd's O_NONBLOCK would make the kernel's client fail.
    sock.setblocking(True)
    return told


def flush(sock: socket.socket, export: str, timeout: float) -> None:
    """Have the server bring to its storage all that was written to an export (NBD_CMD_FLUSH).

    Blocks, for at most ``timeout`` seconds. Raises FLUSH_FAILED, QSD_SILENT.
    """
    import nbd

    handle = nbd.NBD()
    handle.set_export_name(export)
    try:
        handle.aio_connect_socket(os.dup(sock.fileno()))
        _wait(handle, handle.aio_is_ready, timeout, "ended the NBD handshake")
        cookie = handle.aio_flush()
        # It raises what the server answers with, once it has.
        _wait(handle, lambda: bool(handle.aio_command_completed(cookie)), timeout, "flushed")
    except nbd.Error as error:
        raise StoragedError(
            ErrorCode.FLUSH_FAILED, "qemu-storage-daemon cannot flush what it holds in its memory", cause=str(error),
            hint="make room or repair the storage below",
        ) from error


@contextmanager
def reading(sock: socket.socket, export: str, timeout: float) -> Iterator[tuple[int, Callable[[int, int], bytes]]]:
    """Yield the size of an export (bytes), and read(offset, length), which returns fewer bytes only at its end.

    All of it blocks, for at most ``timeout`` seconds in total. Raises OPEN_FAILED, QSD_SILENT.
    """
    import nbd

    deadline = time.monotonic() + timeout
    handle = nbd.NBD()
    handle.set_export_name(export)

    def read(offset: int, length: int) -> bytes:
        size = handle.get_size()
        length = max(0, min(length, size - offset))
        if not length:
            return b""
        # Whole blocks, as small as the server can read.
        block = max(1, handle.get_block_size(nbd.SIZE_MINIMUM))
        start, end = offset // block * block, min(size, -(-(offset + length) // block) * block)
        buffer = nbd.Buffer(end - start)
        try:
            cookie = handle.aio_pread(buffer, start)
            _wait(
                handle, lambda: bool(handle.aio_command_completed(cookie)), deadline - time.monotonic(), "read"
            )
        except nbd.Error as error:
            raise failure(error) from error
        return bytes(buffer.to_bytearray()[offset - start:offset - start + length])

    def failure(error: Exception) -> StoragedError:
        return StoragedError(
            ErrorCode.OPEN_FAILED, "the begin of the image cannot be read", cause=str(error),
            hint="look at the server, and at its log",
        )

    try:
        handle.aio_connect_socket(os.dup(sock.fileno()))
        _wait(handle, handle.aio_is_ready, timeout, "ended the NBD handshake")
    except nbd.Error as error:
        raise failure(error) from error
    yield handle.get_size(), read


def _wait(handle: Any, is_done: Callable[[], bool], timeout: float, what: str) -> None:
    deadline = time.monotonic() + timeout
    while not is_done():
        if time.monotonic() >= deadline:
            raise StoragedError(
                ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer",
                cause=f"it has not {what} within {timeout:.0f} s",
                hint="it is stopped, or the storage below hangs",
            )
        handle.poll(max(1, int(1000 * (deadline - time.monotonic()))))
