"""Tells volumes at once when the kernel has lost the connection of their NBD device."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable

from storaged.errors import StoragedError
from storaged.host import nbd

log = logging.getLogger("storaged.deadlinks")


class DeadLinks:
    """One thread that reads the kernel's multicast group, from the first NBD volume on.

    What it misses (it is not there yet, the daemon was not) is made good elsewhere: QSD's death is told by its pidfd,
    and an adopted device gets a new connection in any case.
    """

    def __init__(self) -> None:
        self._lost: dict[str, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None
        self._module = 0

    def watch(self, device: str, lost: Callable[[], None]) -> None:
        """Call ``lost`` in the event loop each time the connection of ``device`` dies, until :meth:`forget`."""
        self._lost[device] = lost
        module = nbd.module_number()
        if self._thread is None or not self._thread.is_alive() or module != self._module:
            # A thread of a module that was unloaded since is told nothing any more, and waits for ever.
            self._module = module
            loop = asyncio.get_running_loop()
            self._thread = threading.Thread(target=self._read, args=(loop,), name="NBD connections", daemon=True)
            self._thread.start()

    def forget(self, device: str) -> None:
        """The device is gone."""
        self._lost.pop(device, None)

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        def tell(device: str) -> None:
            loop.call_soon_threadsafe(self._tell, device)

        try:
            nbd.watch_dead_links(tell)
        except (OSError, StoragedError, RuntimeError) as error:  # RuntimeError: the loop is closed, the daemon ends
            log.warning("the kernel's NBD connections are not watched until the next attach: %s", error)

    def _tell(self, device: str) -> None:
        log.info("the kernel lost the connection of %s", device)
        lost = self._lost.get(device)
        if lost is not None:
            lost()
