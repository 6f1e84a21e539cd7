"""Events: from the volumes to whoever watches. A watcher that is too slow loses events, never slows a volume."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

#: Events that wait for one watcher before the oldest are dropped.
BACKLOG = 1000


@dataclass(frozen=True)
class Event:
    """Something that happened; ``time`` in seconds since the epoch, ``kind`` as in the Varlink interface."""

    time: float
    volume: str
    kind: str
    state: str
    message: str


class _Watcher:
    """The events that wait for one watcher."""

    def __init__(self) -> None:
        self.waiting: deque[Event] = deque()
        self.lost = 0
        self.arrived = asyncio.Event()

    def put(self, event: Event) -> None:
        if len(self.waiting) >= BACKLOG:
            self.waiting.popleft()
            self.lost += 1
        self.waiting.append(event)
        self.arrived.set()

    async def get(self) -> Event:
        """The next event; what was dropped before it is told first."""
        while not self.waiting:
            self.arrived.clear()
            await self.arrived.wait()
        if self.lost:
            count, self.lost = self.lost, 0
            return Event(time.time(), "", "lost", "", f"this watcher was too slow: {count} events were dropped")
        return self.waiting.popleft()


class EventHub:
    """Hands each event to all who subscribed."""

    def __init__(self) -> None:
        self._watchers: set[_Watcher] = set()

    def publish(self, volume: str, kind: str, state: str, message: str) -> None:
        """Never blocks."""
        event = Event(time.time(), volume, kind, state, message)
        for watcher in self._watchers:
            watcher.put(event)

    async def watch(self, volume: str | None) -> AsyncGenerator[Event, None]:
        """Yield a first event ``ready`` once nothing can be missed any more, then events until closed."""
        watcher = _Watcher()
        self._watchers.add(watcher)
        try:
            yield Event(time.time(), volume or "", "ready", "", "")
            while True:
                event = await watcher.get()
                if volume is None or event.volume in ("", volume):
                    yield event
        finally:
            self._watchers.discard(watcher)
