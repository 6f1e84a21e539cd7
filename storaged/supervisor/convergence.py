"""Brings a volume to what is wished for: observe, plan, do one step, observe; and what users see of that."""

from __future__ import annotations

import logging
import random
import time
from dataclasses import replace

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host.process import boot_id
from storaged.model.health import Condition
from storaged.model.history import Happening, History
from storaged.model.plan import DOING, RESCUES, Device, Goal, Observed, Qsd, Step, plan
from storaged.model.recovery import STABLE_AFTER, backoff
from storaged.model.spec import Desired
from storaged.model.states import State, state_of
from storaged.observe.journald import about
from storaged.supervisor import growing
from storaged.supervisor.actor import Actor
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.health import Health
from storaged.supervisor.journal import Journal

log = logging.getLogger("storaged.volume")

#: The same step this often in a row means that it has no effect.
_MOST_REPEATS = 3
#: States in which a volume is what was asked for, or as good as its storage lets it be.
_SETTLED = frozenset({State.ONLINE, State.STALLED, State.RESCUED})


class Convergence(Actor):
    """A volume's goal, state, failure and observation."""

    def __init__(self, desired: Desired, environment: Environment, *, fresh: bool = False) -> None:
        """``fresh``: it comes from an attach request, and goes again if that fails."""
        super().__init__(desired.spec.name)
        self.spec = desired.spec
        self.goal = Goal(desired.wanted)
        # What an earlier daemon left is there, in whatever condition, until it has been looked at.
        self.state = State.ABSENT if fresh else State.STARTING
        self.since = time.time()
        self.failure: StoragedError | None = None
        self.seen = Observed()
        self.attachment = Attachment(desired.spec, environment, self.wake)
        self._environment = environment
        self._health = Health(self.attachment, self.wake)
        self._about = about(self.name)
        self._journal = Journal(self.attachment)
        self._stored: Goal | str | None = None if fresh else self.goal
        self._adopted = fresh
        self._refused: StoragedError | None = None
        self._fresh = fresh
        self._first_failure: StoragedError | None = None
        self._was_online = False
        self._step: Step | None = None
        self._blamed: Step | None = None
        self._setbacks = 0
        self._not_before = 0.0
        self._ask_after = 0.0
        self._told_size = 0
        self._parking = self._parked = False
        self._in_both = False

    @property
    def condition(self) -> Condition | None:
        """What hangs, and what will be done about it; None where nothing does."""
        return self._health.condition

    @property
    def history(self) -> History:
        """What happened to the volume."""
        return self._journal.history

    @property
    def waiting(self) -> float:
        """Seconds for which I/O has been waiting, 0 where it moves: for QSD, for its answer, for the storage below."""
        return max(self._journal.pause, self._health.standstill)

    @property
    def waited(self) -> float:
        """Seconds for which I/O has waited in the volume's life, the present pause included."""
        return self.history.waited + self._journal.pause

    @property
    def parked(self) -> bool:
        """Whether it was ended because the host goes down, and is wished for all the same."""
        return self._parked

    # Towards the goal -----------------------------------------------------------------------------------------

    def _set_back(self) -> None:
        self._setbacks += 1
        self._not_before = time.monotonic() + backoff(self._setbacks)

    async def persist(self, on: bool, timeout: float) -> None:
        """Keep what is wished over reboots, or forget it with the next. Raises NO_SPACE, VOLUME_BUSY."""
        await self.ask(lambda: self._persist(on), timeout, about_the_volume=False)

    async def park(self, timeout: float) -> None:
        """The host goes down: flush and end what nobody uses, and keep the wish. The actor ends then.

        Raises DEVICE_IN_USE and whatever else a detach fails with; nothing is changed then.
        """
        await self.ask(self._park, timeout, gone_is_fine=True, about_the_volume=False)

    async def _persist(self, on: bool) -> None:
        if self.goal is Goal.ABSENT or self._fresh:
            raise StoragedError(
                ErrorCode.VOLUME_BUSY, "it is being attached or detached", volume=self.name, step="persist",
                hint="try again when that is done",
            )
        if self.spec.persist is on and not self._in_both:
            return
        # Until all is done: who tries again after a failure does the rest of it.
        self._in_both = True
        former = self._environment.store_of(not on)
        self.spec = self.attachment.spec = msgspec.structs.replace(self.spec, persist=on)
        await self._store(self.goal)
        if self.attachment.record is not None:
            await self.attachment.note(spec=self.spec)
        # Where both have it, the one over reboots counts: a daemon that dies here has made it so, or has done nothing.
        await self.attachment.blocking("forget the former wish", 30.0, former.delete, self.name)
        self._in_both = False

    async def _park(self) -> None:
        before, self.goal = self.goal, Goal.ABSENT
        self._parking = True
        try:
            await self._converge()
        except BaseException:
            self.goal, self._parking = before, False
            self._settle()
            raise
        self._parked = True

    async def _converge(self, *, force: bool = False, notes: list[str] | None = None) -> None:
        """Observe, plan, do one step, observe, until nothing is left to do. Raises what a step fails with."""
        repeats, last, started = 0, None, False
        self._step = None
        force = force or self.goal in RESCUES
        if not self._adopted:
            await self._take_over()
        while True:
            self.seen = await self.attachment.observe()
            step = plan(self.goal, self.seen, force=force)
            if self._parking and step is Step.REMOVE:
                # What is kept over reboots may be in it: the changes of a snapshot.
                return
            repeats = repeats + 1 if step is last else 1
            last = step
            self._settle(working=step is not None)
            if step is None:
                await self._finish_queue(notes)
                break
            if repeats > _MOST_REPEATS:
                raise StoragedError(
                    ErrorCode.INTERNAL, "a step has no effect", volume=self.name, step=step,
                    cause=f"it was done {_MOST_REPEATS} times and {self.seen} did not change",
                    hint="look into the journal, and report this",
                )
            self._step = step
            death = self.attachment.qsd.last_death
            if started and death is not None and step in (Step.START, Step.RESCUE):
                # The one that this has started is dead again: the next would fare no better.
                self.attachment.qsd.last_death = None
                raise death.at(volume=self.name, step=step)
            started = started or step in (Step.START, Step.RESCUE)
            self._emit("step", DOING[step])
            self._environment.fault(f"before {step}")
            left = max(0.1, self._deadline - time.monotonic())
            self.attachment.first = self._fresh
            try:
                # What has lost writes must not stay, whoever uses it.
                gone = self.seen.lost and self.goal is Goal.ATTACHED
                await self.attachment.perform(step, timeout=left, force=force or gone)
            except StoragedError as error:
                raise error.at(volume=self.name, step=step) from error
            if step is Step.OPEN:
                self._tell_growth()
            self._environment.fault(f"after {step}")
            if step is Step.STOP:
                self._health.begin_anew()
            self._tell_notes(notes)
            self._step = None
        if self._parking and self.state is State.ABSENT:
            return
        if self.goal is Goal.ABSENT and self.state is State.ABSENT:
            store = self._environment.store_of(self.spec.persist)
            self._environment.fault("before forget")
            if self._in_both:
                other = self._environment.store_of(not self.spec.persist)
                await self.attachment.blocking("forget the volume", 30.0, other.delete, self.name)
            await self.attachment.blocking("forget the volume", 30.0, store.delete, self.name)
            self._emit("removed", "detached")
        elif self.state not in _SETTLED:
            raise StoragedError(
                ErrorCode.QSD_SILENT, "qemu-storage-daemon does not answer", volume=self.name, step="observe",
                hint="the storage below may hang; detach --force ends the volume without it",
            )

    async def _finish_queue(self, notes: list[str] | None) -> None:
        """All is as it shall be, but for the queue of the device, perhaps."""
        seen = self.seen
        if self.goal is Goal.ATTACHED and not seen.stalled and (seen.qsd, seen.device) == (Qsd.RUNNING, Device.HEALTHY):
            self.attachment.notes.clear()
            await self.attachment.finish_queue(max(0.1, self._deadline - time.monotonic()))
            self._tell_notes(notes)

    def _tell_notes(self, notes: list[str] | None) -> None:
        for note in self.attachment.notes:
            self._emit("note", note)
            if notes is not None:
                notes.append(note)

    async def _take_over(self) -> None:
        """Take over what an earlier daemon left, unless that is done. One that is cut short begins anew."""
        await self._journal.load()
        try:
            await self.attachment.adopt()
        except StoragedError as error:
            if error.code is not ErrorCode.ADOPTION_REFUSED:
                raise
            self._refused = error
        self._adopted = True
        # What is stored is newer than the record where a daemon died within persist.
        self.spec = msgspec.structs.replace(self.attachment.spec, persist=self.spec.persist)
        self.attachment.spec = self.spec
        # The record of a device, or a socket, means that it has been usable: what is missing now is replaced.
        record = self.attachment.record
        self._was_online = record is not None and (record.device or record.socket) is not None
        self._told_size = record.source_size if record is not None else 0
        if self._was_online:
            self._journal.add(Happening.ADOPTED, "taken over from an earlier daemon")
        if self._refused is not None and self.goal is not Goal.ABSENT:
            raise self._refused

    def _tell_growth(self) -> None:
        """Say once that the source has more than the device."""
        record = self.attachment.record
        size = record.source_size if record is not None else 0
        if size and size != self._told_size:
            how = growing.how_to_take(record, self.attachment.transport) if record is not None else ""
            message = f"the source has {size} bytes by now; {how}"
            self._journal.add(Happening.GROWN, message)
            self._emit("note", message)
        self._told_size = size

    async def _store(self, goal: Goal) -> None:
        """Store what is wished for. Raises NO_SPACE, HOST_STUCK."""
        store = self._environment.store_of(self.spec.persist)
        desired = Desired(spec=self.spec, wanted=goal.value, boot=boot_id() if goal in RESCUES else "")
        # One that is given up may be written all the same.
        self._stored = "unknown"
        await self.attachment.blocking("store what is wished", 30.0, store.put, desired)
        self._stored = goal

    # What is seen ------------------------------------------------------------------------------------------------

    @property
    def _adoption_refused(self) -> bool:
        return self._refused is not None and self.goal is not Goal.ABSENT

    def _settle(self, *, working: bool = False) -> None:
        """Take over the state that the last observation amounts to."""
        stalled = self.attachment.stalled and self.seen.qsd is Qsd.RUNNING and self.seen.device is Device.HEALTHY
        self.seen = replace(self.seen, stalled=stalled)
        failed = not working and self.failure is not None
        state = state_of(self.goal, self.seen, was_online=self._was_online, failed=failed)
        if self._adoption_refused:
            state = State.FAILED
        if state in (State.ONLINE, State.STALLED):
            self._was_online = True
        if state is State.ONLINE:
            self._health.condition = None
            self._journal.end_pause("online again")
        if state in _SETTLED:
            self._ask_after = time.monotonic() + self._health.ask_every * random.uniform(0.9, 1.1)
            self.failure = None
            if self._setbacks and time.monotonic() - self.attachment.qsd.started_at > STABLE_AFTER:
                self._setbacks = 0
        self._set_state(state)

    def _fail(self, error: StoragedError) -> None:
        """Keep the failure and show it, unless the volume works all the same (a refused detach or resize)."""
        self._settle()
        if self.state in _SETTLED:
            return
        self._environment.counts.volume_failed(error.code)
        news = self.failure is None or str(self.failure) != str(error)
        self.failure = error
        self._settle()
        if error.code is not ErrorCode.QSD_SILENT:
            self._set_back()
        if news:
            line = f"{error} [{error.code}]"
            if error.code is not ErrorCode.QSD_SILENT or self._health.condition is None:
                self._journal.add(Happening.FAILURE, str(error), log_as=line, code=error.code)
            else:
                log.error("%s", line, extra=about(self.name, Happening.FAILURE, code=error.code))
            self._emit("failure", str(error))

    def _set_state(self, state: State) -> None:
        if state is self.state:
            return
        log.info("volume %s: %s -> %s", self.name, self.state, state, extra=about(self.name, "state", state=state))
        self.state, self.since = state, time.time()
        self._emit("state", state.value)

    def _emit(self, kind: str, message: str) -> None:
        self._environment.events.publish(self.name, kind, self.state.value, message)
