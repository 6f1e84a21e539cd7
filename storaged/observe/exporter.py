"""Puts a daemon's volumes, what it counts, and the server of /metrics together."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading

from storaged.model.config import MetricsConfig
from storaged.observe.facts import gather, sample
from storaged.observe.http import MetricsServer, Protection
from storaged.observe.metrics import Metrics
from storaged.supervisor.manager import Manager

#: Seconds for the event loop to tell what it knows; it takes milliseconds, unless it stands still.
_PATIENCE = 5.0


class Exporter:
    """Serves the metrics of one daemon; only what is in memory is asked of its event loop."""

    def __init__(self, config: MetricsConfig, manager: Manager, loop: asyncio.AbstractEventLoop) -> None:
        self._manager, self._loop = manager, loop
        self._metrics = Metrics(manager.environment.counts)
        self._scraping = threading.Lock()
        host, port = config.address
        self.server = MetricsServer(host, port, Protection(config.web_config), self.scrape)

    def scrape(self, accept: str) -> tuple[str, bytes]:
        """Return the content type and the metrics as they are now; one at a time. Raises TimeoutError.

        Never on the event loop.
        """
        if not self._scraping.acquire(timeout=_PATIENCE):
            raise TimeoutError
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
            return self._metrics.render(accept, facts, sample)
        finally:
            self._scraping.release()
