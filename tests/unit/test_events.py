"""A watcher sees all from its first event on, or is told that it missed some; it never slows a volume."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

from storaged.supervisor.events import BACKLOG, Event, EventHub


async def listening(hub: EventHub, volume: str | None = None) -> AsyncGenerator[Event, None]:
    """A watcher that is subscribed."""
    watcher = hub.watch(volume)
    assert (await anext(watcher)).kind == "ready"
    return watcher


async def read(watcher: AsyncGenerator[Event, None], count: int) -> list[Event]:
    async with asyncio.timeout(5):
        return [await anext(watcher) for _ in range(count)]


async def read_all(watcher: AsyncGenerator[Event, None]) -> list[Event]:
    """All that waits for a watcher: it stops when nothing comes any more."""
    events = []
    while True:
        try:
            async with asyncio.timeout(0.05):
                events.append(await anext(watcher))
        except (TimeoutError, StopAsyncIteration):
            return events


def test_the_first_event_is_ready_and_nothing_after_it_is_missed() -> None:
    async def run() -> None:
        hub = EventHub()
        watcher = await listening(hub)
        for number in range(3):
            hub.publish("a", "step", "starting", str(number))
        assert [event.message for event in await read(watcher, 3)] == ["0", "1", "2"]

    asyncio.run(run())


def test_every_watcher_gets_every_event_with_its_time() -> None:
    async def run() -> None:
        hub = EventHub()
        watchers = [await listening(hub) for _ in range(3)]
        before = time.time()
        hub.publish("a", "state", "online", "m")
        for watcher in watchers:
            (event,) = await read(watcher, 1)
            assert (event.volume, event.kind, event.state, event.message) == ("a", "state", "online", "m")
            assert before <= event.time <= time.time()

    asyncio.run(run())


def test_a_watcher_of_one_volume_hears_of_no_other() -> None:
    async def run() -> None:
        hub = EventHub()
        watcher = await listening(hub, "a")
        hub.publish("b", "state", "online", "")
        hub.publish("a", "state", "hung", "")
        assert [event.state for event in await read(watcher, 1)] == ["hung"]

    asyncio.run(run())


def test_what_was_published_before_is_not_heard() -> None:
    async def run() -> None:
        hub = EventHub()
        hub.publish("a", "state", "starting", "")
        watcher = await listening(hub)
        hub.publish("a", "state", "online", "")
        assert [event.state for event in await read(watcher, 1)] == ["online"]

    asyncio.run(run())


def test_a_slow_watcher_keeps_as_many_as_there_is_room_for() -> None:
    async def run() -> None:
        hub = EventHub()
        watcher = await listening(hub)
        for number in range(BACKLOG):
            hub.publish("a", "step", "", str(number))
        events = await read_all(watcher)
        # Compared as text: in CI, pytest would take minutes to tell two long lists apart.
        assert " ".join(event.message for event in events) == " ".join(map(str, range(BACKLOG)))

    asyncio.run(run())


def test_a_watcher_that_is_too_slow_loses_the_oldest_and_is_told_even_if_it_watches_one_volume() -> None:
    async def run() -> None:
        hub = EventHub()
        watcher = await listening(hub, "a")
        for number in range(BACKLOG + 10):
            hub.publish("a", "step", "", str(number))
        lost, *kept = await read_all(watcher)
        assert lost.kind == "lost"
        assert " 10 " in lost.message
        assert {event.kind for event in kept} == {"step"}
        assert " ".join(event.message for event in kept) == " ".join(map(str, range(10, BACKLOG + 10)))

    asyncio.run(run())


def test_a_slow_watcher_is_told_of_each_loss_where_it_was_and_once() -> None:
    async def run() -> None:
        hub = EventHub()
        watcher = await listening(hub)
        for extra in (2 * BACKLOG, 7):
            for number in range(BACKLOG + extra):
                hub.publish("a", "step", "", str(number))
            lost, first = await read(watcher, 2)
            assert (lost.kind, first.kind, first.message) == ("lost", "step", str(extra))
            assert f" {extra} " in lost.message
            assert {event.kind for event in await read(watcher, BACKLOG - 1)} == {"step"}
        hub.publish("a", "step", "", "last")
        assert [event.message for event in await read(watcher, 1)] == ["last"]

    asyncio.run(run())


def test_a_slow_watcher_costs_a_fast_one_nothing() -> None:
    async def run() -> None:
        hub = EventHub()
        slow, fast = await listening(hub), await listening(hub)
        for number in range(2 * BACKLOG):
            hub.publish("a", "step", "", str(number))
            assert [event.message for event in await read(fast, 1)] == [str(number)]
        await slow.aclose()

    asyncio.run(run())


def test_who_stops_watching_is_forgotten() -> None:
    async def run() -> None:
        hub = EventHub()
        closed, cancelled = await listening(hub), await listening(hub)
        await closed.aclose()
        task = asyncio.ensure_future(anext(cancelled))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert not hub._watchers

    asyncio.run(run())
