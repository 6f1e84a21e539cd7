"""Serves /metrics as long as the daemon runs. What that needs is loaded only where it is configured."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from storaged.host.blocking import BlockingCalls

if TYPE_CHECKING:
    from storaged.observe.exporter import Exporter
    from storaged.supervisor.manager import Manager

log = logging.getLogger("storaged.metrics")


async def serve_metrics(manager: Manager) -> None:
    """Serve them until cancelled, if they are configured. What fails is logged: the volumes are worth more."""
    environment = manager.environment
    if environment.config.metrics.listen is None:
        return
    try:
        exporter = await BlockingCalls("metrics")(
            "load what metrics need", 60, _load, manager, asyncio.get_running_loop()
        )
        exporter.server.start()
    except Exception:
        log.exception("there are no metrics")
        return
    try:
        await environment.counts.measure_lag()
    finally:
        exporter.server.stop()


def _load(manager: Manager, loop: asyncio.AbstractEventLoop) -> Exporter:
    """In a thread: some 50 ms of a processor go into these imports."""
    from storaged.observe.exporter import Exporter

    return Exporter(manager.environment.config.metrics, manager, loop)
