"""Looks at the header of an image that is behind a server, before QEMU opens it as an image."""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError
from storaged.host.nbdhandshake import reading
from storaged.host.unixsock import connect_unix
from storaged.model.formats import Format
from storaged.model.headers import ImageHeader, read_header
from storaged.qsd.session import Session
from storaged.qsd.sideexport import side_export
from storaged.supervisor.holding import Holding
from storaged.transports.nbd import nbd_socket

_EXPORT = "header"


async def read(held: Holding, session: Session, node: str, format: Format, timeout: float) -> ImageHeader:
    """Return the header of the image in a node that QSD has open. Raises WRONG_FORMAT, UNSUPPORTED, QSD_SILENT."""
    server = nbd_socket(held.known()) if held.transport.reconnects else None

    def work(path: str) -> ImageHeader:
        with connect_unix(path) as sock, reading(sock, _EXPORT, timeout) as (size, read):
            return read_header(format, read, size)

    async with side_export(session, node, _EXPORT, directory=held.directory, server=server, timeout=timeout) as path:
        return await held.source_calls("look at the image's header", timeout, work, path)


def refuse_references(header: ImageHeader) -> None:
    """Raise BACKING_NOT_ALLOWED where an image that has to stand alone names another file."""
    for reference in (*([header.backing] if header.backing is not None else []), *header.others):
        raise StoragedError(
            ErrorCode.BACKING_NOT_ALLOWED,
            f"the image needs another file, as its {reference.kind}: {reference.path!r}",
            cause="an image behind a server may stand on nothing else",
            hint="make it one that stands alone (qemu-img rebase, or convert), or copy it to a file of this host",
        )
