"""Keeps the journal of one volume: in its directory below /run, so that it outlives the daemon and goes with it."""

from __future__ import annotations

import logging
import os
import time

from storaged.errors import StoragedError
from storaged.host.atomic import write_atomic
from storaged.model.history import Happening, History
from storaged.observe.journald import about
from storaged.supervisor.holding import Holding

log = logging.getLogger("storaged.journal")
_LEVELS = {
    Happening.DEATH: logging.WARNING, Happening.HANG: logging.WARNING, Happening.STALL: logging.WARNING,
    Happening.RESCUE: logging.WARNING, Happening.LOST: logging.ERROR, Happening.FAILURE: logging.ERROR,
}

#: Seconds for reading or writing it.
_PATIENCE = 10.0


class Journal:
    """What happened, and the pause that is under way. Used by the volume's actor only."""

    def __init__(self, held: Holding) -> None:
        self.history = History()
        self._held = held
        self._path = os.path.join(held.directory, "history.json")
        self._unsaved = False
        self._pause_began: float | None = None

    def add(
        self, what: Happening, message: str, seconds: float | None = None, *, log_as: str = "", code: str = "",
    ) -> None:
        """Note what has happened, and log it; ``seconds`` is how long it lasted. :meth:`save` writes it.

        ``log_as`` is the whole line of the log where it is to say more; ``code`` that of the error.
        """
        name = self._held.spec.name
        lasted = f" ({seconds:.1f} s)" if seconds is not None else ""
        log.log(
            _LEVELS.get(what, logging.INFO), "%s", log_as or f"volume {name}: {what}: {message}{lasted}",
            extra=about(name, what, code=code),
        )
        self.history.add(what, message, now=time.time(), seconds=seconds)
        self._unsaved = True

    def begin_pause(self, since: float) -> None:
        """I/O waits since then (monotonic), if it does not wait already."""
        if self._pause_began is None:
            self._pause_began = since

    @property
    def pause(self) -> float:
        """Seconds for which I/O has been waiting, as far as is known; 0 where it does not wait."""
        return 0.0 if self._pause_began is None else time.monotonic() - self._pause_began

    def end_pause(self, message: str) -> None:
        """I/O goes on, if it has waited."""
        if self._pause_began is not None:
            seconds = self.pause
            self.add(Happening.RECOVERED, message, seconds)
            self.history.waited += seconds
            self._pause_began = None

    def forget_pause(self) -> None:
        """What has waited was ended with errors."""
        self.history.waited += self.pause
        self._pause_began = None

    async def load(self) -> None:
        """Read what an earlier daemon has written. One that is lost costs no more than itself."""
        try:
            self.history = await self._held.blocking("read the journal", _PATIENCE, _read, self._path)
        except (OSError, StoragedError) as error:
            log.warning("the journal of volume %s cannot be read: %s", self._held.spec.name, error)

    async def save(self) -> None:
        """Write it, if there is something new and a place for it."""
        if not self._unsaved:
            return
        self._unsaved = False
        try:
            await self._held.blocking("write the journal", _PATIENCE, _write, self._path, self.history.encode())
        except (OSError, StoragedError) as error:
            log.warning("the journal of volume %s cannot be written: %s", self._held.spec.name, error)


def _read(path: str) -> History:
    try:
        with open(path, "rb") as file:
            return History.decode(file.read())
    except FileNotFoundError:
        return History()


def _write(path: str, data: bytes) -> None:
    # A volume that is gone has taken its directory with it.
    if os.path.isdir(os.path.dirname(path)):
        write_atomic(path, data)
