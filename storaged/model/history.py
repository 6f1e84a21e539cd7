"""The journal of a volume: what happened to it, bounded, so that a user can be told days later. Pure.

It is help, and no state: nothing is decided by it, and a journal that is lost or damaged costs no more than itself.
"""

from __future__ import annotations

from bisect import bisect_left
from enum import StrEnum

import msgspec

#: Entries that are kept of a volume; the oldest go first.
LIMIT = 100
#: Letters of a message that are kept.
_LONGEST = 1000
#: Seconds within which the same thing is counted, and not told again.
_ONE_STORY = 3600.0
#: Upper bounds, in seconds, of the ranges in which pauses are counted; what is longer counts beyond the last.
PAUSE_BOUNDS = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Happening(StrEnum):
    """What can happen to a volume."""

    DEATH = "death"
    """QSD ended, and nobody had asked for it."""
    HANG = "hang"
    """QSD did not answer."""
    STALL = "stall"
    """QSD answered, and its I/O stood still."""
    RECOVERED = "recovered"
    """It works again, with a successor of QSD or by itself."""
    RESCUE = "rescue"
    """The I/O in flight was ended with errors."""
    RESUME = "resume"
    """The source was put back after a rescue."""
    UPGRADE = "upgrade"
    """QSD was replaced by another binary."""
    LOST = "lost"
    """Writes that had been acknowledged, and not flushed, are gone."""
    FAILURE = "failure"
    """A try to repair it failed."""
    GROWN = "grown"
    """The source has more bytes by now than the device."""
    ADOPTED = "adopted"
    """A daemon that started took it over."""


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """Something that happened once, or several times in a row. Times in seconds since the epoch."""

    time: float
    """When it happened first."""
    kind: str
    """A Happening; a string, so that the entry of a newer daemon can be read."""
    message: str
    seconds: float | None = None
    """How long it lasted: the pause of a recovery, the time of a hang. Of several the longest."""
    times: int = 1
    last: float = 0.0
    """When it happened last; the journal sets it, for what happened once too."""


class _Stored(msgspec.Struct, kw_only=True):
    """What is written to the file."""

    entries: list[Entry]
    counts: dict[str, int]
    paused: float | None = None
    pauses: list[int] = []
    pause_seconds: float = 0.0
    waited: float = 0.0


#: Made here, once: see RECORDS in model/record.py.
_STORED = msgspec.json.Decoder(_Stored)


class History:
    """What happened to one volume, oldest first, and how often over its whole life."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []
        self._counts: dict[str, int] = {}
        self._paused: float | None = None
        self._pauses = [0] * (len(PAUSE_BOUNDS) + 1)
        self._pause_seconds = 0.0
        self.waited = 0.0
        """Seconds for which I/O has waited, also where that ended with errors: all pauses that are over."""

    @property
    def entries(self) -> tuple[Entry, ...]:
        """The entries that are kept, oldest first, at most LIMIT."""
        return tuple(self._entries)

    @property
    def paused(self) -> float | None:
        """Seconds that I/O waited at the last recovery that says it; None if there was none."""
        return self._paused

    @property
    def pauses(self) -> tuple[int, ...]:
        """How many recoveries had a pause up to each of PAUSE_BOUNDS, above the one before; last, the longer ones."""
        return tuple(self._pauses)

    @property
    def pause_seconds(self) -> float:
        """The sum of these pauses."""
        return self._pause_seconds

    def count(self, kind: Happening) -> int:
        """How often this has happened."""
        return self._counts.get(kind, 0)

    def counts(self) -> dict[str, int]:
        """Return how often each kind of thing has happened, also of what is no longer among the entries."""
        return dict(self._counts)

    def add(self, kind: str, message: str, *, now: float, seconds: float | None = None) -> None:
        """Note that something happened at ``now`` (since the epoch) and lasted ``seconds``.

        What is of the same kind and has the same message as the newest entry is counted there, if that was within
        an hour. ``message`` may be any text: it is cut, and what no encoding takes is written out.
        """
        # A path of the host that is no UTF-8 has lone surrogates in it, which JSON cannot hold.
        text = message[: _LONGEST + 1].encode("utf-8", "backslashreplace").decode("utf-8")
        if len(text) > _LONGEST:
            text = text[: _LONGEST - 1] + "…"
        kind = str(kind)
        self._counts[kind] = self._counts.get(kind, 0) + 1
        if kind == Happening.RECOVERED and seconds is not None:
            self._paused = seconds
            self._pauses[bisect_left(PAUSE_BOUNDS, seconds)] += 1
            self._pause_seconds += max(0.0, seconds)
        newest = self._entries[-1] if self._entries else None
        # A clock that was set back makes no new story.
        if newest and (newest.kind, newest.message) == (kind, text) and now - newest.last <= _ONE_STORY:
            longest = max((value for value in (newest.seconds, seconds) if value is not None), default=None)
            self._entries[-1] = msgspec.structs.replace(
                newest, seconds=longest, times=newest.times + 1, last=now
            )
            return
        self._entries.append(Entry(time=now, kind=kind, message=text, seconds=seconds, last=now))
        del self._entries[:-LIMIT]

    def encode(self) -> bytes:
        """Return the journal as JSON, for a file."""
        return msgspec.json.encode(_Stored(
            entries=self._entries, counts=self._counts, paused=self._paused, pauses=self._pauses,
            pause_seconds=self._pause_seconds, waited=self.waited,
        ))

    @classmethod
    def decode(cls, data: bytes) -> History:
        """Return the journal that ``encode`` wrote, and an empty one where ``data`` is anything else."""
        history = cls()
        try:
            stored = _STORED.decode(data)
        except (ValueError, RecursionError):
            return history
        history._entries = stored.entries[-LIMIT:]
        history._counts = stored.counts
        history._paused = stored.paused
        if len(stored.pauses) == len(history._pauses):  # those of another version may have other bounds
            history._pauses, history._pause_seconds = stored.pauses, stored.pause_seconds
        history.waited = stored.waited
        return history
