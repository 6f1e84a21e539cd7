"""Events: from the volumes to whoever watches. A watcher that is too slow loses events, never slows a volume."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Iterator
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


class EventHub:
    """Hands each event to all who subscribed."""

    def __init__(self) -> None:
        self._queues: set[asyncio.Queue[Event]] = set()

    def publish(self, volume: str, kind: str, state: str, message: str) -> None:
        """Never blocks."""
        event = Event(time.time(), volume, kind, state, message)
        for queue in self._queues:
            if queue.full():
                queue.get_nowait()
                queue.get_nowait()
                queue.put_nowait(Event(event.time, "", "lost", "", "this watcher was too slow: events were dropped"))
            queue.put_nowait(event)

    @contextlib.contextmanager
    def _subscribed(self) -> Iterator[asyncio.Queue[Event]]:
        queue: asyncio.Queue[Event] = asyncio.Queue(BACKLOG)
        self._queues.add(queue)
        try:
            yield queue
        finally:
            self._queues.discard(queue)

    async def watch(self, volume: str | None) -> AsyncGenerator[Event, None]:
        """Yield a first event ``ready`` once nothing can be missed any more, then events until closed."""
        with self._subscribed() as queue:
            yield Event(time.time(), volume or "", "ready", "", "")
            while True:
                event = await queue.get()
                if volume is None or event.volume in ("", volume):
                    yield event
