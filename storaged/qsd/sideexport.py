"""A way to a node beside its export: an NBD export on a socket in the volume's directory, for a moment."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator

from storaged.errors import StoragedError
from storaged.qsd.session import Session

#: Below the volume's directory, where any QSD may make one.
_SOCKET = "tmp/side.sock"
#: Seconds for the end of it: what hangs here hangs on a storage that has let the time run out already.
_LAST_PATIENCE = 2.0


@contextlib.asynccontextmanager
async def side_export(
    session: Session, node: str, name: str, *, directory: str, server: str | None, timeout: float
) -> AsyncIterator[str]:
    """Export a node, read-only, by NBD under ``name``; yield the path of the socket.

    ``server`` is the socket (in ``directory``, QSD's working directory) of the NBD server that QSD has already, None if
    it has none: it can have only one. What a try that was cut short has left is taken away first.
    """
    if await session.has_export(name):
        await session.delete_export(name, timeout=timeout)
    if server is None:
        with contextlib.suppress(StoragedError):
            await session.execute("nbd-server-stop")
        await session.execute("nbd-server-start", {"addr": {"type": "unix", "data": {"path": _SOCKET}}})
    try:
        await session.add_export({"type": "nbd", "id": name, "node-name": node, "name": name}, timeout=timeout)
        try:
            yield os.path.join(directory, server or _SOCKET)
        finally:
            await session.delete_export(name, timeout=min(timeout, _LAST_PATIENCE))
    finally:
        if server is None:
            await session.execute("nbd-server-stop", timeout=min(timeout, _LAST_PATIENCE))
