"""Tells volumes at once when the kernel has lost the connection of their NBD device."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Callable

from storaged.errors import StoragedError
from storaged.host import nbd

log = logging.getLogger("storaged.deadlinks")


class DeadLinks:
    """One thread that reads the kernel's multicast group, from the first NBD volume on.

    It has to be there before a device is connected: the kernel tells it once. What it misses nevertheless (the daemon
    was not there) is made good elsewhere: QSD's death is told by its pidfd, and an adopted device gets a new connection
    in any case.
    """

    def __init__(self) -> None:
        self._lost: dict[str, Callable[[], None]] = {}
        #: Devices whose connection died before anybody watched them.
        self._early: set[str] = set()
        self._thread: threading.Thread | None = None
        self._module = 0
        self._listening: asyncio.Future[None] | None = None

    def begin(self) -> asyncio.Future[None]:
        """Have the kernel's messages read, unless they are. Returns what is done when they are, or cannot be, read."""
        module = nbd.module_number()
        if self._listening is None or self._thread is None or not self._thread.is_alive() or module != self._module:
            # A thread of a module that was unloaded since is told nothing any more, and waits for ever.
            self._module = module
            self._early.clear()
            loop = asyncio.get_running_loop()
            listening = self._listening = loop.create_future()
            self._thread = threading.Thread(
                target=self._read, args=(loop, listening), name="NBD connections", daemon=True
            )
            self._thread.start()
        return self._listening

    async def listen(self, timeout: float) -> None:
        """Wait until a connection that dies from now on is noticed: at most ``timeout`` seconds, and goes on then."""
        done, _ = await asyncio.wait({self.begin()}, timeout=timeout)
        if not done:
            log.warning("the kernel's NBD connections are not watched yet")

    def watch(self, device: str, lost: Callable[[], None]) -> None:
        """Call ``lost`` in the event loop each time the connection of ``device`` dies, until :meth:`forget`."""
        self._lost[device] = lost
        self.begin()
        if device in self._early:
            self._early.discard(device)
            lost()

    def forget(self, device: str) -> None:
        """The device is gone."""
        self._lost.pop(device, None)
        self._early.discard(device)

    def _read(self, loop: asyncio.AbstractEventLoop, listening: asyncio.Future[None]) -> None:
        def tell(device: str) -> None:
            loop.call_soon_threadsafe(self._tell, device)

        def ready() -> None:
            if not listening.done():
                listening.set_result(None)

        try:
            nbd.watch_dead_links(tell, lambda: loop.call_soon_threadsafe(ready))
        except (OSError, StoragedError, RuntimeError) as error:  # RuntimeError: the loop is closed, the daemon ends
            log.warning("the kernel's NBD connections are not watched until the next attach: %s", error)
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(ready)

    def _tell(self, device: str) -> None:
        log.info("the kernel lost the connection of %s", device)
        lost = self._lost.get(device)
        if lost is not None:
            lost()
        else:
            self._early.add(device)
