"""Puts a daemon's volumes, what it counts, and the server of /metrics together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import threading
import time
from collections.abc import Sequence

from storaged.model.config import MetricsConfig
from storaged.observe.facts import Facts, gather, sample
from storaged.observe.http import MetricsServer, Protection
from storaged.observe.metrics import Metrics
from storaged.supervisor.manager import Manager

#: Seconds for the event loop to tell what it knows; it takes milliseconds, unless it stands still.
_PATIENCE = 5.0
#: After a scrape comes a pause of so many times what it took, at most the second number in seconds: whoever scrapes all
#: the time gets a fifth of one processor, and the volumes the rest.
_REST = 4
_LONGEST_REST = 1.0


class Exporter:
    """Serves the metrics of one daemon; only what is in memory is asked of its event loop."""

    def __init__(self, config: MetricsConfig, manager: Manager, loop: asyncio.AbstractEventLoop) -> None:
        self._manager, self._loop = manager, loop
        self._metrics = Metrics(manager.environment.counts)
        self._scraping = threading.Lock()
        self._not_before = 0.0
        host, port = config.address
        self.server = MetricsServer(host, port, Protection(config.web_config), self.scrape)

    def scrape(self, accept: str) -> tuple[str, bytes]:
        """Return the content type and the metrics as they are now; one at a time. Raises TimeoutError.

        Never on the event loop.
        """
        if not self._scraping.acquire(timeout=_PATIENCE):
            raise TimeoutError
        time.sleep(max(0.0, self._not_before - time.monotonic()))
        began = time.monotonic()
        try:
            asking = gather(self._manager.volumes)
            try:
                asked = asyncio.run_coroutine_threadsafe(asking, self._loop)
            except RuntimeError as error:  # the daemon has ended
                asking.close()
                raise TimeoutError from error
            try:
                facts = asked.result(_PATIENCE)
            except (concurrent.futures.TimeoutError, concurrent.futures.CancelledError) as error:
                asked.cancel()
                raise TimeoutError from error
            return self._render(accept, facts)
        finally:
            now = time.monotonic()
            self._not_before = now + min(_LONGEST_REST, _REST * (now - began))
            self._scraping.release()

    def _render(self, accept: str, facts: Sequence[Facts]) -> tuple[str, bytes]:
        """What this makes is gone when it ends, and has no cycles: it goes without a collection of garbage.

        A collection meanwhile would take it for something that stays, and so, every few scrapes, all objects of the
        daemon would be looked through: 15 ms in which the event loop stands still (measured).
        """
        collects = gc.isenabled()
        gc.disable()
        try:
            return self._metrics.render(accept, facts, sample)
        finally:
            if collects:
                gc.enable()
