"""The task of one volume: one request at a time, each with a deadline; what fails in it goes to who asked for it."""

from __future__ import annotations

import asyncio
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable

from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import VolumeSpec
from storaged.supervisor.requests import Request, error_of, nobody


class Actor(ABC):
    """Takes requests one by one; between them it looks at the volume when it is time to, or when it is woken."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._inbox: asyncio.Queue[Request | None] = asyncio.Queue()
        self._current: asyncio.Task[None] | None = None
        self._serving: Request | None = None
        self._next_look = 0.0
        self._deadline = 0.0
        self.due = time.monotonic()
        """When it does something next at the latest (monotonic): all that it does has a deadline."""
        self._running = False
        self._over = False
        self._leaving = False

    # What a volume has to say ------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def ended(self) -> bool:
        """Whether nothing of the volume is left."""

    @abstractmethod
    async def _adopt(self) -> None:
        """Take over what an earlier daemon left."""

    @abstractmethod
    async def _look(self) -> None:
        """Look at the volume, and do what is to be done."""

    @abstractmethod
    def _looks_well_at_a_glance(self) -> bool:
        """Whether there is nothing to look at more closely: all that most looks of most volumes cost."""

    @abstractmethod
    def _when_to_look(self) -> float:
        """When to look next if nothing happens (monotonic)."""

    @abstractmethod
    async def _after(self, request: Request, error: StoragedError | None) -> None:
        """A request has ended, before its outcome is told."""

    @abstractmethod
    async def _leave(self) -> None:
        """The actor is over: let go of everything without touching it."""

    @abstractmethod
    def _patience(self) -> float:
        """Seconds for what nobody asked for."""

    @abstractmethod
    def _step_now(self) -> str:
        """The step that is under way, for an error."""

    @abstractmethod
    def _nothing_left(self, wishes: VolumeSpec | None) -> StoragedError:
        """What to tell who asked for something of a volume that is gone, or whose actor is."""

    # Requests ----------------------------------------------------------------------------------------------------

    async def ask(
        self, run: Callable[[], Awaitable[None]], timeout: float, *, gone_is_fine: bool = False,
        about_the_volume: bool = True, wishes: VolumeSpec | None = None,
    ) -> None:
        """Have ``run`` done when its turn comes, within ``timeout`` seconds from then. Raises what it raises."""
        if self._over or self.ended:
            raise self._nothing_left(wishes)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(Request(run, timeout, done, gone_is_fine, about_the_volume, wishes))
        await done

    def give_up_requests(self, why: str) -> None:
        """What comes now comes before all that is under way or waits."""
        error = StoragedError(
            ErrorCode.VOLUME_BUSY, "given up", volume=self.name, cause=f"{why} came in between",
            hint=f"storaged show {self.name} says how it ended",
        )
        while not self._inbox.empty():
            request = self._inbox.get_nowait()
            if request is not None and not request.done.done():
                request.done.set_exception(error)
        if self._current is not None:
            self._current.cancel()

    def wake(self) -> None:
        """Look at once, unless something is under way, which looks by itself."""
        if self._current is None:
            self._inbox.put_nowait(None)

    # The task ----------------------------------------------------------------------------------------------------

    async def run(self, *, adopt: bool) -> None:
        """Live until the volume is gone. ``adopt``: an earlier daemon may have left something running."""
        try:
            if adopt:
                await self._serve(Request(self._adopt, self._patience(), nobody()))
            self._running = True
            while not self.ended:
                self._serving = await self._next()
                await self._serve(self._serving)
                self._serving = None
        finally:
            self._over = True
            await self._leave()
            if self._serving is not None:
                self._answer_in_vain(self._serving)
            while not self._inbox.empty():
                request = self._inbox.get_nowait()
                if request is not None:
                    self._answer_in_vain(request)

    def _answer_in_vain(self, request: Request) -> None:
        """The actor is over: tell who still waits."""
        if request.done.done():
            return
        if request.gone_is_fine and self.ended:
            request.done.set_result(None)
        else:
            request.done.set_exception(self._nothing_left(request.wishes))

    async def _next(self) -> Request:
        """Wait for a request, a death (None in the inbox), or the time to look."""
        request = None
        while True:
            self.due = max(self._next_look, time.monotonic())
            try:
                async with asyncio.timeout(max(0.0, self._next_look - time.monotonic())):
                    request = await self._inbox.get()
            except TimeoutError:
                if self._looks_well_at_a_glance():
                    self._next_look = self._when_to_look()
                    continue
            return request or Request(self._look, self._patience(), nobody())

    async def _serve(self, request: Request) -> None:
        """Run one request; its failure goes to whoever asked, and never further."""
        self._current = asyncio.create_task(self.bounded(request))
        try:
            await asyncio.wait({self._current})
        except asyncio.CancelledError:
            self._leaving = True
            self._current.cancel()
            await asyncio.wait({self._current})
            raise
        finally:
            finished, self._current = self._current, None
            self.due = time.monotonic()
        error = error_of(finished)
        if error is not None:
            error.at(volume=self.name)
        await self._after(request, error)
        self._next_look = self._when_to_look()
        if request.done.done():
            return
        if error is None:
            request.done.set_result(None)
        else:
            request.done.set_exception(error)

    async def bounded(self, request: Request) -> None:
        """Run a request within its time. Raises TIMEOUT."""
        self._deadline = self.due = time.monotonic() + request.timeout
        try:
            async with asyncio.timeout(request.timeout) as deadline:
                await request.run()
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise StoragedError(
                ErrorCode.TIMEOUT, f"not done within {request.timeout:g} s", step=self._step_now(),
                hint=f"storaged show {self.name} tells what it waits for; try again with a longer --timeout",
            ) from error
