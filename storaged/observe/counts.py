"""What the daemon counts of itself, from its start on. Plain numbers: nothing here knows Prometheus."""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left

from storaged.errors import ErrorCode

#: Upper bounds, in seconds, of the ranges in which the loop's lags are counted.
LAG_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
#: Seconds between two measurements of the lag.
_MEASURE_EVERY = 1.0


class Counts:
    """Changed on the event loop only; another thread may read it, each number by itself."""

    def __init__(self) -> None:
        self.began = time.time()
        """When the counting began, seconds since the epoch."""
        self.request_errors: dict[ErrorCode, int] = dict.fromkeys(ErrorCode, 0)
        """Errors that callers of the API were answered with."""
        self.volume_failures: dict[ErrorCode, int] = dict.fromkeys(ErrorCode, 0)
        """What volumes failed with, each try."""
        self.lags = [0] * (len(LAG_BOUNDS) + 1)
        """How often the loop was late by up to each of LAG_BOUNDS; last, by more."""
        self.lag_seconds = 0.0
        """The sum of the lags."""

    def request_failed(self, code: ErrorCode) -> None:
        """A caller is answered with an error."""
        self.request_errors[code] += 1

    def volume_failed(self, code: ErrorCode) -> None:
        """A volume could not be brought to what it is to be, or lost it."""
        self.volume_failures[code] += 1

    def loop_was_late(self, seconds: float) -> None:
        """The event loop did something ``seconds`` later than it should have."""
        self.lags[bisect_left(LAG_BOUNDS, seconds)] += 1
        self.lag_seconds += seconds

    async def measure_lag(self) -> None:
        """Once a second: how late the loop is. Ends when it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _MEASURE_EVERY
            await asyncio.sleep(_MEASURE_EVERY)
            self.loop_was_late(max(0.0, loop.time() - due))
