"""A QMP session with one qemu-storage-daemon. The only module that imports qemu.qmp."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import logging
import os
import socket
import time
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    Message,
    QMPClient,
    QMPError,
)

from storaged.errors import ErrorCode, StoragedError
from storaged.host.unixsock import connect_unix
from storaged.qsd.refusals import explain
from storaged.qsd.terse import terse

# Its errors reach the user through StoragedError; its own log would say each of them twice.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

#: Seconds that a QSD with nothing to do may take for an answer.
ANSWER_TIMEOUT = 5.0
#: Seconds that a server which has just died may hold its VDUSE device: io_uring lets go of its files late.
_BUSY_PATIENCE = 3.0
_BUSY_STEP = 0.05


class _Client(QMPClient):
    """Costs less: a pause of the disk waits for eight messages or so."""

    def __init__(self) -> None:
        super().__init__("storaged")
        self._numbers = itertools.count()

    def _cb_outbound(self, msg: Message) -> Message:
        return msg  # and not its text for a log that nobody reads

    def _cb_inbound(self, msg: Message) -> Message:
        return msg

    def _get_exec_id(self) -> str:
        # QSD reads it a byte at a time (qsd/terse.py).
        return str(next(self._numbers))


class Session:
    """One connection. After a lost connection or a missed deadline it is of no more use: open another."""

    def __init__(self, client: QMPClient) -> None:
        self._client = client
        self._broken = False

    @classmethod
    async def connect(cls, path: str, *, timeout: float) -> Session:
        """Connect to QSD's socket (a path of any length) and negotiate, within ``timeout`` seconds.

        Raises QSD_DIED where nobody listens or the connection ends, QSD_SILENT at the deadline.
        """
        try:
            sock = connect_unix(path)
        except BlockingIOError as error:
            raise _silent("it accepts no connection", 0) from error
        except OSError as error:
            raise _gone(error.strerror or str(error)) from error
        return await cls.over(sock, timeout=timeout)

    @classmethod
    async def over(cls, sock: socket.socket, *, timeout: float) -> Session:
        """Negotiate on a connected socket, which the session owns from now on."""
        client = _Client()
        try:
            async with asyncio.timeout(timeout):
                await client.connect(sock)
        except TimeoutError as error:
            sock.close()
            raise _silent("it does not greet", timeout) from error
        except (ConnectError, QMPError, OSError, EOFError) as error:
            sock.close()
            raise _gone(str(error)) from error
        return cls(client)

    @property
    def usable(self) -> bool:
        """Whether the connection is still there as far as is known."""
        return not self._broken and self._client.runstate.name == "RUNNING"

    @property
    def version(self) -> str:
        """QSD's version, for example 10.0.13."""
        greeting = self._client.greeting
        if greeting is None:
            return ""
        qemu: Any = greeting.QMP.version["qemu"]
        return f"{qemu['major']}.{qemu['minor']}.{qemu['micro']}"

    async def execute(
        self, command: str, arguments: dict[str, Any] | None = None, *, timeout: float = ANSWER_TIMEOUT
    ) -> Any:
        """Run a command and return what it returns.

        Raises a failure that explains QSD's refusal; QSD_DIED when the connection is lost, QSD_SILENT when
        ``timeout`` seconds pass: in both cases it is unknown whether the command took effect.
        """
        try:
            async with asyncio.timeout(timeout):
                return await self._client.execute(command, arguments)
        except TimeoutError as error:
            self._broken = True
            raise _silent(f"no answer to {command}", timeout) from error
        except ExecuteError as error:
            raise explain(command, str(error)) from error
        except (ExecInterruptedError, QMPError, OSError, EOFError) as error:
            self._broken = True
            raise _gone(f"the connection ended during {command}") from error

    async def close(self) -> None:
        """End the connection; QSD goes on and listens for the next one."""
        self._broken = True
        with contextlib.suppress(Exception):  # a connection that failed reports its failure here once more
            async with asyncio.timeout(1):
                await self._client.disconnect()

    async def add_node(self, node: dict[str, Any], *, timeout: float) -> None:
        """Open a node (BlockdevOptions). Raises as :meth:`execute`."""
        await self.execute("blockdev-add", terse(node), timeout=timeout)

    async def node_names(self, *, timeout: float = ANSWER_TIMEOUT) -> dict[str, int]:
        """Return the block nodes and their virtual sizes in bytes."""
        nodes = await self.execute("query-named-block-nodes", {"flat": True}, timeout=timeout)
        return {node["node-name"]: int(node["image"]["virtual-size"]) for node in nodes}

    async def has_export(self, export: str) -> bool:
        """Whether an export of that id is there and not on its way out."""
        exports = await self.execute("query-block-exports")
        return any(entry["id"] == export and not entry["shutting-down"] for entry in exports)

    async def add_export(self, options: dict[str, Any], *, timeout: float) -> None:
        """Add an export (BlockExportOptions). Raises QSD_REFUSED, ..."""
        deadline = time.monotonic() + min(timeout, _BUSY_PATIENCE)
        while True:
            try:
                await self.execute("block-export-add", options, timeout=timeout)
            except StoragedError as error:
                if os.strerror(errno.EBUSY) not in error.cause or time.monotonic() >= deadline:
                    raise
                await asyncio.sleep(_BUSY_STEP)  # nothing tells when
            else:
                return

    async def delete_export(self, export: str, *, timeout: float) -> None:
        """Delete an export, whoever uses it, and wait until it is gone."""

        def deleted(message: Any) -> bool:
            return bool(message["data"]["id"] == export)

        listener = EventListener("BLOCK_EXPORT_DELETED", deleted)
        with self._client.listen(listener):
            await self.execute("block-export-del", {"id": export, "mode": "hard"}, timeout=timeout)
            try:
                async with asyncio.timeout(timeout):
                    await listener.get()
            except TimeoutError as error:
                raise _silent("the export does not go", timeout) from error

    async def close_everything(self, export: str, *, timeout: float) -> bool:
        """Delete the export and all nodes, which flushes them; say whether none is left."""
        if await self.has_export(export):
            await self.delete_export(export, timeout=timeout)
        left = set(await self.node_names())
        before: set[str] = set()
        # A node goes only after the one that stands on it.
        while left and left != before:
            for node in left:
                with contextlib.suppress(StoragedError):
                    await self.execute("blockdev-del", {"node-name": node}, timeout=timeout)
            before, left = left, set(await self.node_names())
        return not left

    async def run_job(self, command: str, arguments: dict[str, Any], job: str, *, timeout: float) -> None:
        """Start a job, wait for its end and dismiss it. Raises what made it fail, QSD_SILENT at the deadline."""
        def concluded(message: Any) -> bool:
            data = message["data"]
            return bool(data["id"] == job and data["status"] == "concluded")

        listener = EventListener("JOB_STATUS_CHANGE", concluded)
        with self._client.listen(listener):
            await self.execute(command, arguments, timeout=timeout)
            try:
                async with asyncio.timeout(timeout):
                    await listener.get()
            except TimeoutError as error:
                raise _silent(f"the job of {command} does not end", timeout) from error
        jobs = await self.execute("query-jobs")
        failure = next((entry.get("error") for entry in jobs if entry["id"] == job), None)
        await self.execute("job-dismiss", {"id": job})
        if failure:
            raise explain(command, failure)


def _gone(cause: str) -> StoragedError:
    return StoragedError(ErrorCode.QSD_DIED, "qemu-storage-daemon is gone", cause=cause)


def _silent(cause: str, timeout: float) -> StoragedError:
    return StoragedError(
        ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer",
        cause=f"{cause} within {timeout:g} s" if timeout else cause,
        hint="the storage below may hang; detach --force ends the volume without it",
    )
