"""The kernel tells once that an NBD device has lost its connection: nobody may come too late for it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable

import pytest

from storaged.host import nbd
from storaged.supervisor.deadlinks import DeadLinks


class Kernel:
    """In the place of the multicast group: says what it is told to, once the listener is let in."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.module = 1
        self.listeners = 0
        self.open = threading.Event()
        self.deaths: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        monkeypatch.setattr(nbd, "module_number", lambda: self.module)
        monkeypatch.setattr(nbd, "watch_dead_links", self._watch)

    def _watch(self, tell: Callable[[str], None], listening: Callable[[], object]) -> None:
        self.listeners += 1
        if not self.open.wait(10):
            raise OSError("nobody let it in")
        listening()
        while (device := self.deaths.get(timeout=10)) is not None:
            tell(device)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


async def told(event: asyncio.Event) -> None:
    await asyncio.wait_for(event.wait(), 10)


def test_whoever_connects_a_device_waits_until_its_death_would_be_heard(kernel: Kernel) -> None:
    async def scene() -> None:
        links = DeadLinks()
        waiting = asyncio.create_task(links.listen(10))
        done, _ = await asyncio.wait({waiting}, timeout=0.1)
        assert not done
        kernel.open.set()
        await asyncio.wait_for(waiting, 10)
        await asyncio.wait_for(links.listen(10), 1)
        assert kernel.listeners == 1
        kernel.deaths.put(None)

    asyncio.run(scene())


def test_a_death_between_the_connection_and_the_watch_is_not_missed(kernel: Kernel) -> None:
    async def scene() -> None:
        links, early, late = DeadLinks(), asyncio.Event(), asyncio.Event()
        kernel.open.set()
        await links.listen(10)
        kernel.deaths.put("/dev/nbd0")
        links.watch("/dev/nbd1", late.set)
        kernel.deaths.put("/dev/nbd1")
        await told(late)
        links.watch("/dev/nbd0", early.set)
        assert early.is_set()
        kernel.deaths.put(None)

    asyncio.run(scene())


def test_a_device_that_is_gone_is_not_told_of(kernel: Kernel) -> None:
    async def scene() -> None:
        links, gone, other = DeadLinks(), asyncio.Event(), asyncio.Event()
        kernel.open.set()
        await links.listen(10)
        links.watch("/dev/nbd0", gone.set)
        links.watch("/dev/nbd1", other.set)
        links.forget("/dev/nbd0")
        kernel.deaths.put("/dev/nbd0")
        kernel.deaths.put("/dev/nbd1")
        await told(other)
        assert not gone.is_set()
        kernel.deaths.put(None)

    asyncio.run(scene())


def test_a_module_that_was_loaded_anew_is_listened_to_anew(kernel: Kernel) -> None:
    async def scene() -> None:
        links = DeadLinks()
        kernel.open.set()
        await links.listen(10)
        kernel.module = 2
        await links.listen(10)
        assert kernel.listeners == 2
        kernel.deaths.put(None)
        kernel.deaths.put(None)

    asyncio.run(scene())


def test_a_kernel_that_lets_nobody_listen_holds_nobody_up_for_long(
    kernel: Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    async def scene() -> None:
        links = DeadLinks()
        await links.listen(0.05)
        assert "not watched yet" in caplog.text
        kernel.open.set()
        kernel.deaths.put(None)

    asyncio.run(scene())
