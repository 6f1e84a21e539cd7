"""The qemu-storage-daemon of one volume: the process by its pidfd, its QMP session, and how both end."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable

from storaged.errors import ErrorCode, StoragedError
from storaged.host import process, tcpwatch
from storaged.model.record import ProcessIdentity
from storaged.qsd.process import died, qmp_socket
from storaged.qsd.session import ANSWER_TIMEOUT, Session

#: Seconds that QSD may take to end by itself, flushing, before it is killed; and to die of SIGKILL.
_QUIT_PATIENCE = 10.0
_KILL_PATIENCE = 10.0
#: Seconds for which a QSD that gave no answer is not asked again.
_SILENCE = 10.0


class ServedQsd:
    """At most one process at a time. ``wake`` is called when it dies."""

    def __init__(self, directory: str, wake: Callable[[], None]) -> None:
        self.started_at = 0.0
        """When it was started here (monotonic); 0 for one that was taken over."""
        self.last_death: StoragedError | None = None
        """A death that nobody asked for and nobody has looked at yet."""
        self.died_at = 0.0
        """When the last one died (monotonic)."""
        self._directory = directory
        self._wake = wake
        self._pidfd: int | None = None
        self._session: Session | None = None
        self._silent_since: float | None = None
        self._asked_at = 0.0
        self._gone = asyncio.Event()
        self._gone.set()

    @property
    def alive(self) -> bool:
        """Whether the process is there."""
        return self._pidfd is not None

    @property
    def silent(self) -> bool:
        """Whether it gave no answer when it was asked last."""
        return self._silent_since is not None

    @property
    def silent_since(self) -> float | None:
        """Since when it has given no answer (monotonic); None where it did when it was asked last."""
        return self._silent_since

    def find(self, who: ProcessIdentity) -> bool:
        """Take over exactly this process; False if it is dead already."""
        pidfd = process.open_pidfd(who)
        if pidfd is not None:
            self.watch(pidfd)
        return pidfd is not None

    def watch(self, pidfd: int) -> None:
        """Be told of the death of the process behind a pidfd, which belongs to us from now on."""
        self._pidfd = pidfd
        self._silent_since = None
        self._gone.clear()
        asyncio.get_running_loop().add_reader(pidfd, self._on_death)

    async def greet(self, pidfd: int, monitor: socket.socket, *, timeout: float) -> Session:
        """Watch a process that was just started, and return the session on its connected monitor."""
        self.watch(pidfd)
        self.started_at = time.monotonic()
        await self._hang_up()
        self._session = await Session.over(monitor, timeout=timeout)
        return self._session

    async def session(self) -> Session:
        """Return a session that can be used. Raises QSD_DIED, QSD_SILENT."""
        if self._session is not None and not self._session.usable:
            await self._hang_up()
        if self._session is None:
            self._session = await Session.connect(qmp_socket(self._directory), timeout=ANSWER_TIMEOUT)
        return self._session

    def refuse_silent(self) -> None:
        """Raise QSD_SILENT for one that gave no answer a moment ago, instead of waiting for it again and again."""
        if self._silent_since is not None and time.monotonic() - self._asked_at < _SILENCE:
            raise StoragedError(ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer")

    def note_silence(self, asked: float | None = None) -> None:
        """It does not answer; it was ``asked`` then (monotonic), or need not be: it is stopped."""
        if self._silent_since is None:
            self._silent_since = time.monotonic() if asked is None else asked
        self._asked_at = time.monotonic()

    async def ask(self, timeout: float) -> bool:
        """Whether it answers within ``timeout`` seconds."""
        asked = time.monotonic()
        try:
            async with asyncio.timeout(timeout):
                await (await self.session()).execute("query-version", timeout=timeout)
        except (TimeoutError, StoragedError) as error:
            if isinstance(error, TimeoutError) or error.code is ErrorCode.QSD_SILENT:
                self.note_silence(asked)
            return False
        self._silent_since = None
        return True

    async def note_answer(self, error: StoragedError | None, asked: float | None = None) -> None:
        """Remember whether it answered; ``error`` is what it failed to answer with, when it was ``asked``."""
        if error is None:
            self._silent_since = None
        elif error.code is ErrorCode.QSD_DIED:
            # The connection ended; the process is about to, or it hangs on its way out.
            await self.wait_gone(1.0)
        elif error.code is not ErrorCode.QSD_SILENT or error.cause:
            # Not for one that was not even asked (refuse_silent).
            self.note_silence(asked)

    async def stop(self, timeout: float, *, export: str, quits_badly: bool) -> None:
        """Let it end by itself, which flushes everything; kill it when it does not.

        ``quits_badly``: it would dump core then; so it closes everything, and is killed. ``export`` is its export's id.
        """
        patience = min(timeout, _QUIT_PATIENCE)
        try:
            self.refuse_silent()
            session = await self.session()
            if quits_badly and await session.close_everything(export, timeout=patience):
                await self.kill()
                return
            await session.execute("quit", timeout=min(patience, ANSWER_TIMEOUT))
        except StoragedError as error:
            # A connection that ended is what quit does. A QSD that is silent will not hear of quit at all.
            if error.code is ErrorCode.QSD_SILENT:
                patience = 0
        await self.wait_gone(patience)
        await self.kill()

    async def kill(self) -> None:
        """End it at once and see it gone. Raises QSD_SILENT where it does not even die of SIGKILL."""
        if self._pidfd is not None:
            tcpwatch.reset_at_death(self._pidfd)
            process.kill(self._pidfd)
            if not await self.wait_gone(_KILL_PATIENCE):
                raise StoragedError(
                    ErrorCode.QSD_SILENT, "qemu-storage-daemon does not even die of SIGKILL",
                    cause="its threads hang in the kernel, on the storage below",
                    hint="bring the storage below back or make it fail; then detach again",
                )
        self.last_death = None

    async def wait_gone(self, timeout: float) -> bool:
        """Wait until the process is gone, at most ``timeout`` seconds; say whether it is."""
        try:
            async with asyncio.timeout(timeout):
                await self._gone.wait()
        except TimeoutError:
            return False
        await self._hang_up()
        return True

    async def leave(self) -> None:
        """Let go of the process and the session without touching them."""
        if self._pidfd is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        await self._hang_up()

    def _on_death(self) -> None:
        pidfd = self._pidfd
        if pidfd is None:
            return
        asyncio.get_running_loop().remove_reader(pidfd)
        how = process.reap(pidfd)
        os.close(pidfd)
        self._pidfd = None
        self.died_at = time.monotonic()
        self.last_death = died(self._directory, how)
        self._gone.set()
        self._wake()

    async def _hang_up(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()
