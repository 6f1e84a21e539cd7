"""What is asked of a volume's actor, and where the outcome goes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError, bug
from storaged.model.spec import VolumeSpec

log = logging.getLogger("storaged.volume")


@dataclass
class Request:
    """Something asked of the actor, and where its outcome goes."""

    run: Callable[[], Awaitable[None]]
    timeout: float
    done: asyncio.Future[None]
    gone_is_fine: bool = False
    about_the_volume: bool = True
    """Its failure says something about the volume, and not only about the request."""
    wishes: VolumeSpec | None = None
    """Of an attach."""


def nobody() -> asyncio.Future[None]:
    """Return a place for an outcome that nobody asked for."""
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    future.set_result(None)
    return future


def error_of(task: asyncio.Task[None]) -> StoragedError | None:
    """Return what a finished task failed with, None if it did not; a bug is logged and becomes INTERNAL."""
    if task.cancelled():
        return StoragedError(
            ErrorCode.VOLUME_BUSY, "given up", cause="a detach by force, or the daemon's end, came in between",
            hint="storaged list shows what is there",
        )
    error = task.exception()
    if error is None or isinstance(error, StoragedError):
        return error
    log.error("a bug in the actor of a volume", exc_info=error)
    return bug(error)
