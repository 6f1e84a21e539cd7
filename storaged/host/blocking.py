"""Calls that may block for minutes on a sick device run here: in threads of their own, with a deadline.

A thread that is stuck in the kernel cannot be cancelled. It is abandoned when its deadline passes, and counted:
a volume that has too many of them is refused further calls, so that one sick volume never uses up what the
others need. Threads are daemonic: a stuck one never keeps the process from ending.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

from storaged.errors import ErrorCode, StoragedError

P = ParamSpec("P")
R = TypeVar("R")

#: Abandoned calls that one volume may have at a time.
MAX_STUCK = 4


class BlockingCalls:
    """Runs blocking functions for one volume (or for the daemon itself)."""

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._abandoned = 0

    @property
    def stuck(self) -> int:
        """Calls that were given up and have not ended yet."""
        return self._abandoned

    async def __call__(
        self, what: str, timeout: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs
    ) -> R:
        """Return what ``function`` returns, or raise what it raises.

        ``what`` names the call in the error; ``timeout`` is in seconds. Raises HOST_STUCK when the deadline
        passes (the call goes on in its thread, its outcome is unknown) or too many earlier ones hang.
        """
        return await self.with_late_result(what, timeout, lambda: function(*args, **kwargs), lambda _: None)

    async def with_late_result(
        self, what: str, timeout: float, function: Callable[[], R], late: Callable[[R], None]
    ) -> R:
        """As above; ``late`` is given a result that comes after everybody stopped waiting for it."""
        if self._abandoned >= MAX_STUCK:
            raise StoragedError(
                ErrorCode.HOST_STUCK, f"cannot {what}", cause=f"{self._abandoned} earlier calls still hang",
                hint="the kernel or the storage below does not answer; look for D-state processes in ps",
            )
        loop = asyncio.get_running_loop()
        done: asyncio.Future[R] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            if done.done():
                self._abandoned -= 1
                if error is None:
                    late(result)
            elif error is None:
                done.set_result(result)
            else:
                done.set_exception(error)

        def work() -> None:
            result: R | None = None
            failure: BaseException | None = None
            try:
                result = function()
            except BaseException as error:  # handed over to the caller, whatever it is
                failure = error
            # The loop may be closed: the daemon has ended, and nobody waits for this any more.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(finish, result, failure)

        threading.Thread(target=work, name=f"{self._owner}: {what}", daemon=True).start()
        try:
            async with asyncio.timeout(timeout) as deadline:
                try:
                    return await done
                except asyncio.CancelledError:
                    if done.cancelled():
                        self._abandoned += 1
                    elif done.exception() is None:
                        late(done.result())  # it came in the same moment, and would be lost
                    raise
        except TimeoutError as error:
            if not deadline.expired():
                raise  # ETIMEDOUT from the storage below, not our own deadline
            raise StoragedError(
                ErrorCode.HOST_STUCK, f"cannot {what}", cause=f"no end of the call within {timeout:g} s",
                hint="the kernel or the storage below does not answer; look for D-state processes in ps",
            ) from error
