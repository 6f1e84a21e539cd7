"""What is known and held of one volume: its record, its qemu-storage-daemon, its threads, its names.

What looks at the volume (attachment), what brings it up (serving) and what takes it down (leaving) share this.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks, scope
from storaged.host.blocking import BlockingCalls
from storaged.model.record import ProcessIdentity, Record
from storaged.model.spec import VolumeSpec
from storaged.observe.journald import about
from storaged.qsd.process import log_file
from storaged.qsd.served import ServedQsd
from storaged.qsd.stderr import Stderr
from storaged.supervisor import launch, opening, records
from storaged.supervisor.environment import Environment
from storaged.transports import TRANSPORTS
from storaged.transports.base import Site, Transport

log = logging.getLogger("storaged.qsd")


@dataclass(frozen=True)
class Told:
    """What QSD has answered to a step. Nobody else talks to it, so the next look need not ask for the same."""

    opened: bool
    exported: bool


class Holding:
    """Used by the volume's actor only, one call at a time."""

    def __init__(self, spec: VolumeSpec, environment: Environment, wake: Callable[[], None]) -> None:
        """``wake`` is called when QSD dies, or the connection of the device."""
        self.spec = spec
        self.record: Record | None = None
        self.notes: list[str] = []
        """What a forced step could not take away, for the user."""
        self.environment = environment
        self.directory = environment.layout.volume_dir(spec.name)
        self.qsd = ServedQsd(self.directory, wake)
        self.stderr = Stderr(log_file(self.directory))
        self.site = Site(spec.name, self.directory, BlockingCalls(spec.name), environment.layout.vm_sockets_dir)
        # Calls that touch the source have threads of their own: a source that hangs must not use up those that a
        # detach needs.
        self.source_calls = BlockingCalls(f"{spec.name}, source")
        self.opening: opening.Opening | None = None
        self.exports = False
        """QSD had an export at the last look."""
        self.told: Told | None = None
        """Of the step just done, until it is looked at."""
        self.half_open = False
        """QSD was told to open the source, and it is not known what became of that."""
        self.connection_lost = False
        self.stalled = False
        """Requests of the device are in flight and none ends, as far as is known: nothing may wait for them."""
        self.handed_out = -math.inf
        """When somebody was last given an open descriptor of the device (time.monotonic)."""
        self.first = False
        """An attach that has never succeeded is under way: what it cannot have is refused."""
        self.told_of_queue = ""
        self.locks_to: socket.socket | None = None
        """Leads to QSD, for the locks of what is found while it opens the source; see hand_locks_over."""
        self._wake = wake
        self._writing: asyncio.Task[None] | None = None
        self._protecting: asyncio.Task[None] | None = None
        self._protected: ProcessIdentity | None = None

    @property
    def transport(self) -> Transport:
        """The transport in use; without a record the one whose remains can be told to be ours by their path alone."""
        return TRANSPORTS[self.record.transport if self.record else "fuse"]

    @property
    def blocking(self) -> BlockingCalls:
        """The threads of this volume."""
        return self.site.blocking

    def known(self) -> Record:
        """The record. Raises INTERNAL where there is none."""
        if self.record is None:
            raise StoragedError(ErrorCode.INTERNAL, "a step needs a record and there is none")
        return self.record

    def hand_locks_over(self, fds: list[int]) -> None:
        """Give QSD descriptors that hold locks, and close them here.

        They wait, unread, in a socket that it has inherited: open as long as it lives (unix(7), SCM_RIGHTS).
        """
        try:
            if fds:
                if self.locks_to is None:
                    raise StoragedError(ErrorCode.INTERNAL, "there is no way to give locks to qemu-storage-daemon")
                for fd in fds:
                    socket.send_fds(self.locks_to, [b"lock"], [fd])
        finally:
            for fd in fds:
                os.close(fd)

    def end_of_locks(self) -> None:
        """QSD gets no more locks."""
        if self.locks_to is not None:
            self.locks_to.close()
            self.locks_to = None

    async def note(self, **changes: object) -> None:
        """Change the record, in memory and on the disk. Raises what it cannot be written for."""
        self.note_meanwhile(**changes)
        await self.written()

    def note_meanwhile(self, **changes: object) -> None:
        """Change the record in memory at once, and on the disk while other things are done, until :meth:`written`."""
        self.record = msgspec.structs.replace(self.known(), **changes)
        self._begin_writing()

    async def written(self) -> None:
        """The record is on the disk as it is known here. Raises what it cannot be written for."""
        if self._writing is not None and self._writing.done() and _has_failed(self._writing):
            self._begin_writing()
        if self._writing is not None:
            await asyncio.shield(self._writing)

    async def wait_for_writing(self) -> None:
        """The record is not being written any more, whatever became of that."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    def _begin_writing(self) -> None:
        self._writing = asyncio.create_task(self._write(self._writing))
        # Who needs it on the disk asks; nobody else is to be told.
        self._writing.add_done_callback(_has_failed)

    async def _write(self, former: asyncio.Task[None] | None) -> None:
        if former is not None:
            await asyncio.wait({former})
        await self.blocking("write the record", 10, records.write_record, self.directory, self.known())

    def protect(self) -> None:
        """Keep the present QSD in memory, unless that is done. Nobody waits for it."""
        process = self.record.process if self.record is not None and self.qsd.alive else None
        if process is None or process == self._protected:
            return
        self.stop_protecting()  # one that is under way is about a QSD that is gone
        self._protected = process
        self._protecting = asyncio.create_task(scope.protect(process.pid, self.spec.name, self.known().device))

    def stop_protecting(self) -> None:
        """The actor ends."""
        if self._protecting is not None:
            self._protecting.cancel()

    def tell_stderr(self) -> None:
        """Log what QSD has said since the last time. Never blocks: the file is on a tmpfs."""
        for line in self.stderr.news():
            log.info("volume %s: QSD says: %s", self.spec.name, line, extra=about(self.spec.name, "qsd"))

    async def note_connection(self) -> None:
        """The device has a connection to the present QSD."""
        record = self.known()
        if self.transport.reconnects and record.device is not None:
            await self.note(served_by=record.process)
            self.environment.dead_links.watch(record.device, self._on_lost_connection)

    def _on_lost_connection(self) -> None:
        self.connection_lost = True
        self._wake()

    def forget_connection(self) -> None:
        """Nobody needs to be told of the device's connection any more."""
        if self.record is not None and self.record.device is not None and self.transport.reconnects:
            self.environment.dead_links.forget(self.record.device)

    async def forget_device(self) -> None:
        """The device is gone."""
        self.forget_connection()
        if self.record is not None and (self.record.device is not None or self.record.socket is not None):
            await self.note(
                device=None, diskseq=0, socket=None, served_by=None, lost=False, queue={}, queue_due=False
            )

    @contextlib.asynccontextmanager
    async def names_held(self) -> AsyncIterator[None]:
        """Hold the names that QSD holds while it lives: what has them may be another daemon's by now.

        Raises NAME_TAKEN.
        """
        if self.qsd.alive:
            yield
            return
        held = await self.blocking.with_late_result(
            "lock the name", 10,
            lambda: launch.take_names(self.site, self.transport.claims(self.site), self.environment.lock_directory),
            locks.let_go,
        )
        try:
            yield
        finally:
            locks.let_go(held)


def _has_failed(task: asyncio.Task[None]) -> bool:
    return task.cancelled() or task.exception() is not None
