"""The actor of one volume: one task, one request at a time, nothing that happens in it touches another."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Awaitable, Callable

from storaged.errors import ErrorCode, StoragedError
from storaged.model.plan import DOING, Goal, Observed, Step, plan
from storaged.model.recovery import STABLE_AFTER, backoff
from storaged.model.spec import Desired, VolumeSpec, difference
from storaged.model.states import State, state_of
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.opening import same_wish
from storaged.supervisor.requests import Request, error_of, nobody

log = logging.getLogger("storaged.volume")

#: Seconds between two looks at an online volume (sysfs and mounts only; a death is told by its pidfd at once).
_LOOK_EVERY = 15.0
_LOOK_STEP = 2.5
#: Seconds after which QSD of an online volume is asked, too, whether it is well: that costs a thousand times more.
_ASK_EVERY = 60.0
#: Seconds between two looks at a volume whose QSD does not answer.
_HUNG_LOOK = 5.0
#: Seconds between two looks at a volume that is not online, at least.
_LEAST_PATIENCE = 2.0
#: The same step this often in a row means that it has no effect.
_MOST_REPEATS = 3
#: Seconds to take back what a failed attach did.
_UNDO_PATIENCE = 30.0

#: These say something about the request, and nothing about the volume.
_OF_THE_REQUEST = frozenset({ErrorCode.VOLUME_BUSY, ErrorCode.VOLUME_EXISTS})
#: Steps of a detach that leave the device as it is when they fail: it may need a successor of a dead QSD first.
_TAKES_NOTHING_AWAY = frozenset({Step.START, Step.OPEN, Step.EXPORT, Step.RECONNECT, Step.DISCONNECT})
#: Refusals of a detach that leave the volume as it was.
_REFUSALS = frozenset({ErrorCode.DEVICE_IN_USE, ErrorCode.FLUSH_FAILED})


class Volume:
    """A volume: what is wished, what is seen, and the task that brings the two together."""

    def __init__(self, desired: Desired, environment: Environment, *, fresh: bool = False) -> None:
        """``fresh``: it comes from an attach request, and goes again if that fails."""
        self.spec = desired.spec
        self.goal = Goal(desired.wanted)
        # What an earlier daemon left is there, in whatever condition, until it has been looked at.
        self.state = State.ABSENT if fresh else State.STARTING
        self.since = time.time()
        self.failure: StoragedError | None = None
        self.seen = Observed()
        self.attachment = Attachment(desired.spec, environment, self._on_death)
        self._environment = environment
        self._inbox: asyncio.Queue[Request | None] = asyncio.Queue()
        self._current: asyncio.Task[None] | None = None
        self._serving: Request | None = None
        self._fresh = fresh
        self._first_failure: StoragedError | None = None
        self._was_online = False
        self._step: Step | None = None
        self._blamed: Step | None = None
        self._setbacks = 0
        self._not_before = 0.0
        self._next_look = 0.0
        self._ask_after = 0.0
        self._deadline = 0.0
        self._running = False
        self._over = False
        self._leaving = False

    # What others ask -----------------------------------------------------------------------------------------

    async def attach(self, spec: VolumeSpec, timeout: float) -> None:
        """Bring the volume online; when it never was, a failure takes back all that was done.

        Raises VOLUME_EXISTS, with nothing changed, where ``spec`` wishes for something else.
        """
        await self._ask(lambda: self._attach(spec), timeout, wishes=spec)

    async def detach(self, *, force: bool, timeout: float) -> list[str]:
        """Take the volume away and return what stays. By force: whatever is under way is given up first."""
        notes: list[str] = []
        if force:
            self._give_up_requests()
        await self._ask(lambda: self._detach(force, notes), timeout, gone_is_fine=True)
        return notes

    def _give_up_requests(self) -> None:
        """A detach by force comes before all that is under way or waits."""
        error = StoragedError(
            ErrorCode.VOLUME_BUSY, "given up", volume=self.spec.name, cause="a detach by force came in between",
            hint=f"storaged show {self.spec.name} says how it ended",
        )
        while not self._inbox.empty():
            request = self._inbox.get_nowait()
            if request is not None and not request.done.done():
                request.done.set_exception(error)
        if self._current is not None:
            self._current.cancel()

    async def resize(self, size: int, timeout: float) -> None:
        """Grow the volume to ``size`` bytes."""
        await self._ask(lambda: self._resize(size, timeout), timeout, about_the_volume=False)

    async def _ask(
        self, run: Callable[[], Awaitable[None]], timeout: float, *, gone_is_fine: bool = False,
        about_the_volume: bool = True, wishes: VolumeSpec | None = None,
    ) -> None:
        if self._over or self.ended:
            raise self._nothing_left(wishes)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._inbox.put_nowait(Request(run, timeout, done, gone_is_fine, about_the_volume, wishes))
        await done

    # The task ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing of the volume is left."""
        return self._running and self.goal is Goal.ABSENT and self.state is State.ABSENT

    async def run(self, *, adopt: bool) -> None:
        """Live until the volume is gone. ``adopt``: an earlier daemon may have left something running."""
        try:
            if adopt:
                await self._serve(Request(self._adopt, self._environment.config.attach_timeout, nobody()))
            self._running = True
            while not self.ended:
                self._serving = await self._next()
                await self._serve(self._serving)
                self._serving = None
        finally:
            self._over = True
            await self.attachment.leave()
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
            try:
                async with asyncio.timeout(max(0.0, self._next_look - time.monotonic())):
                    request = await self._inbox.get()
            except TimeoutError:
                # All that most looks of most volumes cost.
                if time.monotonic() < self._ask_after and self._looks_well():
                    self._next_look = self._when_to_look()
                    continue
            return request or Request(self._look, self._environment.config.attach_timeout, nobody())

    def _looks_well(self) -> bool:
        return self.state is State.ONLINE and self.attachment.looks_well()

    async def _serve(self, request: Request) -> None:
        """Run one request; its failure goes to whoever asked, and never further."""
        self._current = asyncio.create_task(self._bounded(request))
        try:
            await asyncio.wait({self._current})
        except asyncio.CancelledError:
            self._leaving = True
            self._current.cancel()
            await asyncio.wait({self._current})
            raise
        finally:
            finished, self._current = self._current, None
        error = error_of(finished)
        if error is not None:
            error.at(volume=self.spec.name)
            if request.about_the_volume and error.code not in _OF_THE_REQUEST:
                self._fail(error)
            if self.ended and self._fresh:
                self._first_failure = error
        self._next_look = self._when_to_look()
        if request.done.done():
            return
        if error is None:
            request.done.set_result(None)
        else:
            request.done.set_exception(error)

    async def _bounded(self, request: Request) -> None:
        self._blamed = None
        self._deadline = time.monotonic() + request.timeout
        try:
            async with asyncio.timeout(request.timeout) as deadline:
                await request.run()
        except TimeoutError as error:
            if not deadline.expired():
                raise
            raise StoragedError(
                ErrorCode.TIMEOUT, f"not done within {request.timeout:g} s", step=self._blamed or self._step or "",
                hint=f"storaged show {self.spec.name} tells what it waits for; try again with a longer --timeout",
            ) from error

    def _on_death(self) -> None:
        if self._current is None:
            self._inbox.put_nowait(None)

    def _when_to_look(self) -> float:
        """When to look next if nothing happens (monotonic).

        Spread, so that 100 volumes do not look at once; and in steps, so that some of them do: a look that finds
        the processor's caches warm costs a quarter of one that wakes it up (docs/benchmarks.md).
        """
        now = time.monotonic()
        if self.attachment.qsd.last_death is not None:
            return now
        if self.state is State.ONLINE:
            return math.ceil((now + _LOOK_EVERY * random.uniform(0.7, 1.0)) / _LOOK_STEP) * _LOOK_STEP
        if self.state is State.HUNG:
            return now + _HUNG_LOOK
        return max(now + _LEAST_PATIENCE, self._not_before)

    # What is done ------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        await self.attachment.adopt()
        self.spec = self.attachment.spec
        # The record of a device, or a socket, means that it has been usable: what is missing now is replaced.
        record = self.attachment.record
        self._was_online = record is not None and (record.device or record.socket) is not None
        try:
            await self._converge()
        except StoragedError as error:
            if self.goal is Goal.ABSENT and error.code in _REFUSALS:
                # A detach that an earlier daemon began is refused: the volume stays.
                await self._keep(str(error))
            raise

    async def _look(self) -> None:
        if self._looks_well() and await self.attachment.answers():
            self._settle()
            return
        if self._adoption_refused:
            return
        death, self.attachment.qsd.last_death = self.attachment.qsd.last_death, None
        if death is not None:
            self.seen = await self.attachment.observe()
            self._settle(working=True)
            self._count_death(death)
        if time.monotonic() < self._not_before and self.state is not State.HUNG:
            return
        await self._converge()

    def _count_death(self, death: StoragedError) -> None:
        """A death that nobody asked for: the first is repaired at once, repeated ones after a while."""
        if time.monotonic() - self.attachment.qsd.started_at > STABLE_AFTER:
            self._setbacks = 0
        self.failure = death.at(volume=self.spec.name)
        self._set_back()
        log.warning("%s", death)
        self._emit("failure", str(death))

    def _set_back(self) -> None:
        self._setbacks += 1
        self._not_before = time.monotonic() + backoff(self._setbacks)

    async def _attach(self, spec: VolumeSpec) -> None:
        if spec != self.spec and not await same_wish(
            spec, self.spec, self.attachment.record, self.attachment.blocking
        ):
            raise StoragedError(
                ErrorCode.VOLUME_EXISTS, "the volume is attached with other wishes", volume=self.spec.name,
                cause=difference(self.spec, spec), hint="detach it first, or choose another name",
            )
        if self.goal is Goal.ABSENT:
            raise StoragedError(
                ErrorCode.VOLUME_BUSY, "the volume is being detached", volume=self.spec.name,
                hint="wait until it is gone, or end it: storaged detach --force",
            )
        if self.failure is not None and self._adoption_refused:
            raise self.failure
        try:
            if self._fresh:
                await self._store(Desired(spec=self.spec))
            await self._converge()
        except BaseException as error:
            step = self._step
            if self._fresh and not self._leaving:
                if isinstance(error, StoragedError):
                    self._fail(error)
                try:
                    await self._undo()
                except asyncio.CancelledError:
                    # The time was over while it was taken back: that is not what it failed of.
                    if not isinstance(error, StoragedError):
                        raise
            self._blamed = step
            raise
        self._fresh = False

    async def _undo(self) -> None:
        """Take back a first attach that failed; shielded, because it must end whatever ended the attach."""
        self.goal = Goal.ABSENT
        request = Request(lambda: self._converge(force=True), _UNDO_PATIENCE, nobody())
        task = asyncio.create_task(self._bounded(request))
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancelled = error
        problem = error_of(task)
        if problem is not None:
            log.error("cannot take back the failed attach of %s: %s", self.spec.name, problem)
        if cancelled is not None:
            raise cancelled

    async def _detach(self, force: bool, notes: list[str]) -> None:
        before, self.goal = self.goal, Goal.ABSENT
        stored = False
        try:
            try:
                await self._store(Desired(spec=self.spec, wanted="absent"))
                stored = True
            except StoragedError:
                # On a full disk a volume must still go away: the entry is deleted at the end all the same.
                if not force:
                    raise
                stored = True
            await self._converge(force=force, notes=notes)
        except asyncio.CancelledError:
            if not stored:
                self.goal = before
            raise
        except StoragedError as error:
            if not stored:
                self.goal = before
            elif error.code in _REFUSALS or (
                not force and self._step in _TAKES_NOTHING_AWAY and error.code is not ErrorCode.HOST_STUCK
            ):
                # The device goes first, so nothing was changed yet. (What hangs may still happen.)
                await self._keep(str(error))
            raise

    async def _keep(self, why: str) -> None:
        """A detach was refused, and nothing was changed: the volume is wanted again."""
        self.goal = Goal.ATTACHED
        self._emit("refused", why)
        try:
            await self._store(Desired(spec=self.spec))
        except StoragedError as error:
            log.error("volume %s stays attached, but a restart would not know it: %s", self.spec.name, error)
        self._settle()

    async def _resize(self, size: int, timeout: float) -> None:
        if self.state is not State.ONLINE:
            raise StoragedError(
                ErrorCode.VOLUME_BUSY, f"the volume is {self.state}, not online", volume=self.spec.name,
                step="resize", hint=f"storaged show {self.spec.name} says why",
            )
        try:
            await self.attachment.resize(size, timeout)
        except StoragedError as error:
            raise error.at(volume=self.spec.name, step="resize") from error
        self._emit("state", f"resized to {size} bytes")

    async def _converge(self, *, force: bool = False, notes: list[str] | None = None) -> None:
        """Observe, plan, do one step, observe, until nothing is left to do. Raises what a step fails with."""
        repeats, last, started = 0, None, False
        self._step = None
        while True:
            self.seen = await self.attachment.observe()
            step = plan(self.goal, self.seen, force=force)
            repeats = repeats + 1 if step is last else 1
            last = step
            self._settle(working=step is not None)
            if step is None:
                break
            if repeats > _MOST_REPEATS:
                raise StoragedError(
                    ErrorCode.INTERNAL, "a step has no effect", volume=self.spec.name, step=step,
                    cause=f"it was done {_MOST_REPEATS} times and {self.seen} did not change",
                    hint="look into the journal, and report this",
                )
            self._step = step
            death = self.attachment.qsd.last_death
            if started and death is not None and step in (Step.START, Step.RESCUE):
                # The one that this has started is dead again: the next would fare no better.
                self.attachment.qsd.last_death = None
                raise death.at(volume=self.spec.name, step=step)
            started = started or step in (Step.START, Step.RESCUE)
            self._emit("step", DOING[step])
            self._environment.fault(f"before {step}")
            left = max(0.1, self._deadline - time.monotonic())
            try:
                await self.attachment.perform(step, timeout=left, force=force)
            except StoragedError as error:
                raise error.at(volume=self.spec.name, step=step) from error
            self._environment.fault(f"after {step}")
            for note in self.attachment.notes:
                self._emit("note", note)
                if notes is not None:
                    notes.append(note)
            self._step = None
        if self.goal is Goal.ABSENT and self.state is State.ABSENT:
            store = self._environment.store_of(self.spec.persist)
            self._environment.fault("before forget")
            await self.attachment.blocking("forget the volume", 30.0, store.delete, self.spec.name)
            self._emit("removed", "detached")
        elif self.state is not State.ONLINE:
            raise StoragedError(
                ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer", volume=self.spec.name, step="observe",
                hint="the storage below may hang; detach --force ends the volume without it",
            )

    async def _store(self, desired: Desired) -> None:
        store = self._environment.store_of(self.spec.persist)
        await self.attachment.blocking("store what is wished", 30.0, store.put, desired)

    # What is seen ------------------------------------------------------------------------------------------------

    @property
    def _adoption_refused(self) -> bool:
        return (
            self.goal is Goal.ATTACHED
            and self.failure is not None and self.failure.code is ErrorCode.ADOPTION_REFUSED
        )

    def _settle(self, *, working: bool = False) -> None:
        """Take over the state that the last observation amounts to."""
        failed = not working and self.failure is not None
        state = state_of(self.goal, self.seen, was_online=self._was_online, failed=failed)
        if self._adoption_refused:
            state = State.FAILED
        if state is State.ONLINE:
            self._was_online = True
            self._ask_after = time.monotonic() + _ASK_EVERY * random.uniform(0.9, 1.1)
            self.failure = None
            if self._setbacks and time.monotonic() - self.attachment.qsd.started_at > STABLE_AFTER:
                self._setbacks = 0
        self._set_state(state)

    def _fail(self, error: StoragedError) -> None:
        """Keep the failure and show it, unless the volume works all the same (a refused detach or resize)."""
        self._settle()
        if self.state is State.ONLINE:
            return
        news = self.failure is None or str(self.failure) != str(error)
        self.failure = error
        self._settle()
        if error.code is not ErrorCode.QSD_SILENT:
            self._set_back()
        if news:
            self._emit("failure", str(error))
            log.error("%s [%s]", error, error.code)

    def _set_state(self, state: State) -> None:
        if state is self.state:
            return
        log.info("volume %s: %s -> %s", self.spec.name, self.state, state)
        self.state, self.since = state, time.time()
        self._emit("state", state.value)

    def _emit(self, kind: str, message: str) -> None:
        self._environment.events.publish(self.spec.name, kind, self.state.value, message)

    def _nothing_left(self, wishes: VolumeSpec | None) -> StoragedError:
        """What to tell who asked for something of a volume that is gone, or whose actor is."""
        if not self.ended:
            return StoragedError(
                ErrorCode.INTERNAL, "nobody looks after this volume any more", volume=self.spec.name,
                cause="its actor ended by a bug, or the daemon is ending; its device goes on working",
                hint="restart storaged, which takes the volume over again",
            )
        if self._first_failure is not None and wishes == self.spec:
            return self._first_failure  # of the attach that it waited for, which wished for the same
        return StoragedError(
            ErrorCode.NO_SUCH_VOLUME, f"there is no volume {self.spec.name!r} any more", volume=self.spec.name
        )
