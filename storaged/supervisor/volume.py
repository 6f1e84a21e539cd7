"""The actor of one volume: what is wished, what is seen, and the task that brings the two together."""

from __future__ import annotations

import asyncio
import logging
import math
import random
import time
from collections.abc import Mapping
from dataclasses import replace

from storaged.errors import ErrorCode, StoragedError
from storaged.host.secrets import are_kept as kept_secrets_are
from storaged.host.secrets import keep as keep_secrets
from storaged.model.health import Reaction, Trouble, advice, meaning
from storaged.model.history import Happening
from storaged.model.plan import RESCUES, Device, Goal, Qsd, Step
from storaged.model.recovery import STABLE_AFTER
from storaged.model.spec import VolumeSpec, difference
from storaged.model.states import State
from storaged.supervisor import replacing
from storaged.supervisor.convergence import Convergence
from storaged.supervisor.opening import same_wish
from storaged.supervisor.requests import Request, error_of, nobody
from storaged.supervisor.secrets import NO_SECRETS

log = logging.getLogger("storaged.volume")

#: Looks are spread, and in steps of so many seconds (see Volume._when_to_look).
_LOOK_STEP = 2.5
#: Seconds between two looks at a volume of which something stands still.
_TROUBLE_LOOK = 1.0
#: Seconds between two looks at a volume whose QSD does not answer.
_HUNG_LOOK = 5.0
#: Seconds between two looks at a volume that is not online, at least.
_LEAST_PATIENCE = 2.0
#: Seconds to take back what a failed attach did.
_UNDO_PATIENCE = 30.0

#: These say something about the request, and nothing about the volume.
_OF_THE_REQUEST = frozenset({ErrorCode.VOLUME_BUSY, ErrorCode.VOLUME_EXISTS, ErrorCode.UNSUPPORTED})
#: These say that something may hang.
_OF_A_HANG = frozenset({ErrorCode.QSD_SILENT, ErrorCode.TIMEOUT, ErrorCode.HOST_STUCK})
#: Steps of a detach that leave the device as it is when they fail: it may need a successor of a dead QSD first.
_TAKES_NOTHING_AWAY = frozenset({Step.START, Step.OPEN, Step.EXPORT, Step.RECONNECT, Step.DISCONNECT})
#: Refusals of a detach that leave the volume as it was.
_REFUSALS = frozenset({ErrorCode.DEVICE_IN_USE, ErrorCode.FLUSH_FAILED})
_USABLE = frozenset({State.ONLINE, State.STALLED})


class Volume(Convergence):
    """What others ask of a volume, and what it does by itself."""

    # What others ask -----------------------------------------------------------------------------------------

    async def attach(self, spec: VolumeSpec, timeout: float, secrets: Mapping[str, bytes] = NO_SECRETS) -> None:
        """Bring the volume online; when it never was, a failure takes back all that was done.

        ``secrets``, by option, are kept for QSD and its successors. Raises VOLUME_EXISTS, with nothing changed, where
        ``spec`` wishes for something else.
        """
        await self.ask(lambda: self._attach(spec, secrets), timeout, wishes=spec)

    async def detach(self, *, force: bool, timeout: float) -> list[str]:
        """Take the volume away and return what stays. By force: whatever is under way is given up first."""
        notes: list[str] = []
        if force:
            self.give_up_requests("a detach by force")
        await self.ask(lambda: self._detach(force, notes), timeout, gone_is_fine=True)
        return notes

    async def rescue(self, *, keep: bool, timeout: float) -> list[str]:
        """End all I/O with errors and return what the user should know; the volume stays, to be resumed.

        ``keep``: the device stays, too, and fails all I/O. Raises UNSUPPORTED where the transport cannot do that.
        """
        notes: list[str] = []
        if self._fresh:
            raise self._busy("rescue", "it is being attached for the first time", "storaged detach --force ends that")
        if self.goal is Goal.ABSENT:
            raise self._busy("rescue", "it is being detached", "storaged detach --force ends all I/O")
        self.give_up_requests("a rescue")
        await self.ask(lambda: self._rescue(keep, notes), timeout)
        return notes

    async def resume(self, timeout: float) -> None:
        """Put the real source back under a device that fails, or make a new device. Nothing where it is online."""
        await self.ask(self._resume, timeout)

    async def upgrade(self, timeout: float) -> None:
        """Replace QSD by the program that is installed now; its I/O pauses meanwhile."""
        await self.ask(lambda: self._upgrade(timeout), timeout)

    async def resize(self, size: int | None, timeout: float) -> None:
        """Grow the volume to ``size`` bytes, or to all that its source has by now."""
        await self.ask(lambda: self._resize(size, timeout), timeout, about_the_volume=False)

    # The task ------------------------------------------------------------------------------------------------

    @property
    def ended(self) -> bool:
        """Whether nothing of the volume is left."""
        return self._running and (self._parked or (self.goal is Goal.ABSENT and self.state is State.ABSENT))

    def _looks_well_at_a_glance(self) -> bool:
        return (
            time.monotonic() < self._ask_after and self.state is State.ONLINE and self.condition is None
            and self.attachment.looks_well() and self._health.glance()
        )

    async def _after(self, request: Request, error: StoragedError | None) -> None:
        if error is not None:
            if request.about_the_volume and error.code not in _OF_THE_REQUEST:
                self._fail(error)
            if self.ended and self._fresh:
                self._first_failure = error
            if error.code in _OF_A_HANG and not request.done.done():
                # Who asked is told; what hangs is looked at by the way.
                self._ask_after = 0.0
                self.wake()
        death = self.attachment.qsd.last_death
        if death is not None and self.state in _USABLE:
            # The request has met it, and mended it by the way.
            self.attachment.qsd.last_death = None
            self._count_death(death)
            self._settle()
        if self._stored is not None and self._stored != self.goal and not self.ended:
            # What was under way ended before it could say so.
            try:
                await self._store(self.goal)
            except StoragedError as problem:
                log.error("what is wished of volume %s cannot be stored: %s", self.name, problem, extra=self._about)
        # Nothing of this is to make I/O wait longer.
        self.attachment.protect()
        self._health.watch()
        await self._journal.save()

    async def _leave(self) -> None:
        self._health.leave()
        await self.attachment.leave()

    def _patience(self) -> float:
        return self._environment.config.attach_timeout

    def _step_now(self) -> str:
        return self._blamed or self._step or ""

    async def bounded(self, request: Request) -> None:
        """As Actor does."""
        self._blamed = None
        await super().bounded(request)

    def _when_to_look(self) -> float:
        """When to look next if nothing happens (monotonic).

        Spread, so that 100 volumes do not look at once; and in steps, so that some of them do: a look that finds
        the processor's caches warm costs a quarter of one that wakes it up (docs/benchmarks.md).
        """
        now = time.monotonic()
        if self.attachment.qsd.last_death is not None:
            return now
        due_in = self._health.due_in
        if due_in is not None and self.goal is Goal.ATTACHED:
            return now + min(_HUNG_LOOK, max(0.05, due_in))
        if self.state is State.STALLED or (self.state is State.ONLINE and self._health.standstill > 0):
            return now + min(_TROUBLE_LOOK, self._health.patience / 3)
        if self.state in (State.ONLINE, State.RESCUED):
            every = self._health.look_every
            step = min(_LOOK_STEP, every)
            if self._health.look_again:
                return now + step
            return math.ceil((now + every * random.uniform(0.7, 1.0)) / step) * step
        if self.state is State.HUNG:
            return now + _HUNG_LOOK
        return max(now + _LEAST_PATIENCE, self._not_before)

    # What is done ------------------------------------------------------------------------------------------------

    async def _adopt(self) -> None:
        try:
            await self._converge()
        except StoragedError as error:
            if self.goal is Goal.ABSENT and error.code in _REFUSALS:
                # A detach that an earlier daemon began is refused: the volume stays.
                record = self.attachment.record
                failing = record is not None and record.rescue
                await self._keep(str(error), Goal.FAILING if failing else Goal.ATTACHED)
            raise

    async def _look(self) -> None:
        if self._adoption_refused:
            return
        failure: StoragedError | None = None
        try:
            if self.attachment.qsd.last_death is None and self._looks_usable() and await self.attachment.answers():
                self._health.glance()
                self._settle()
            else:
                await self._mend()
        except StoragedError as error:
            failure = error
        await self._examine(failure or self.failure)
        if self._health.due_in == 0 and self.goal is Goal.ATTACHED:
            await self._react()
        elif failure is not None:
            raise failure

    def _looks_usable(self) -> bool:
        return self.state in _USABLE and self.attachment.looks_well()

    async def _mend(self) -> None:
        """Do what the plan says, but not at once after repeated deaths."""
        death, self.attachment.qsd.last_death = self.attachment.qsd.last_death, None
        if death is not None:
            # So much is known without a look, for which I/O would wait.
            self.seen = replace(self.seen, qsd=Qsd.NONE, opened=False, exported=False)
            self._settle(working=True)
            self._count_death(death)
        if time.monotonic() < self._not_before and self.state is not State.HUNG:
            if death is not None:
                self.seen = await self.attachment.observe()
                self._settle(working=True)
            return
        await self._converge()

    def _count_death(self, death: StoragedError) -> None:
        """A death that nobody asked for: the first is repaired at once, repeated ones after a while."""
        if time.monotonic() - self.attachment.qsd.started_at > STABLE_AFTER:
            self._setbacks = 0
        self.failure = death.at(volume=self.name)
        self._health.begin_anew()
        self._environment.counts.volume_failed(death.code)
        self._journal.add(Happening.DEATH, death.cause or death.message, log_as=str(self.failure), code=death.code)
        self._journal.begin_pause(self.attachment.qsd.died_at)
        self._set_back()
        self._emit("failure", str(death))

    async def _examine(self, failure: StoragedError | None) -> None:
        """Tell hangs apart, and keep what is found. ``failure``: what the volume fails with at the moment."""
        before = self.condition
        waits = failure is not None and self.goal is Goal.ATTACHED and self.seen.device is Device.UNSERVED
        try:
            await self._health.examine(str(failure) if waits else None)
        except StoragedError as error:
            log.warning("volume %s: it cannot be told why it hangs: %s", self.name, error, extra=self._about)
        now = self.condition
        if self.goal is Goal.ATTACHED and self.state in _USABLE:
            self._settle()
        if now is not None and (before is None or before.trouble is not now.trouble):
            kind = Happening.STALL if now.trouble.of_backend else Happening.HANG
            record = self.attachment.record
            pid = record.process.pid if record is not None and record.process is not None else 0
            what = f"{meaning(now.trouble)} [{now.trouble}]: {now.detail}; {advice(now.trouble, self.name, pid)}"
            line = f"volume {self.name}: {what}"
            self._journal.add(kind, f"{meaning(now.trouble)}: {now.detail}", log_as=line, code=now.trouble)
            self._journal.begin_pause(time.monotonic() - (time.time() - now.since))
            self._emit("failure", f"{meaning(now.trouble)} ({now.trouble}): {now.detail}; policy: {now.policy}")

    async def _react(self) -> None:
        """The time that a policy gives is over."""
        condition = self.condition
        assert condition is not None
        if await self._health.has_recovered():
            # Its last answer, or the lack of one, was of some time ago.
            await self._converge()
            return
        if condition.trouble is Trouble.BACKEND_LOST:
            await self.attachment.qsd.kill()
            # As after a death that nobody asked for: a server that ends each connection is not asked again at once.
            self.attachment.qsd.last_death = StoragedError(
                ErrorCode.QSD_DIED, "qemu-storage-daemon was ended",
                cause="it had lost its server, and makes no new connection",
            )
            await self._mend()
            return
        why = f"{meaning(condition.trouble)} since {time.time() - condition.since:.0f} s, and its policy is"
        why += f" {condition.policy}"
        log.warning("volume %s: %s", self.name, why, extra=self._about)
        self._emit("note", why)
        if condition.policy.reaction is Reaction.FAIL:
            bridged = self.attachment.transport.bridges and self.seen.device is not Device.NONE
            self._journal.add(Happening.RESCUE, why)
            await self._end_io(Goal.FAILING if bridged else Goal.RELEASED, None)
            return
        await self.attachment.qsd.kill()
        self._health.begin_anew()
        await self._converge()

    async def _attach(self, spec: VolumeSpec, secrets: Mapping[str, bytes]) -> None:
        if spec != self.spec and not await same_wish(
            spec, self.spec, self.attachment.record, self.attachment.blocking
        ):
            raise StoragedError(
                ErrorCode.VOLUME_EXISTS, "the volume is attached with other wishes", volume=self.name,
                cause=difference(self.spec, spec), hint="detach it first, or choose another name",
            )
        if self.goal is Goal.ABSENT:
            raise StoragedError(
                ErrorCode.VOLUME_BUSY, "the volume is being detached", volume=self.name,
                hint="wait until it is gone, or end it: storaged detach --force",
            )
        if self.goal in RESCUES:
            raise StoragedError(
                ErrorCode.VOLUME_BUSY, "the volume was rescued, and fails all I/O", volume=self.name,
                hint=f"storaged resume {self.name} puts its source back; storaged detach {self.name} ends it",
            )
        if self._refused is not None:
            raise self._refused
        try:
            if secrets:
                await self._take_secrets(secrets)
            if self._fresh:
                await self._store(self.goal)
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

    async def _take_secrets(self, secrets: Mapping[str, bytes]) -> None:
        """Keep them. Raises VOLUME_EXISTS where the volume works with others: nobody knows whether these would do."""
        held = self.attachment
        if not self._fresh and self.state is not State.FAILED:
            if await held.blocking("compare the secrets", 10, kept_secrets_are, held.directory, secrets):
                return
            raise StoragedError(
                ErrorCode.VOLUME_EXISTS, "the volume is attached with another secret", volume=self.name,
                hint="give the same one; or detach the volume first, or choose another name",
            )
        await held.blocking("keep the secrets", 10, keep_secrets, held.directory, secrets)

    async def _undo(self) -> None:
        """Take back a first attach that failed; shielded, because it must end whatever ended the attach."""
        self.goal = Goal.ABSENT
        request = Request(lambda: self._converge(force=True), _UNDO_PATIENCE, nobody())
        task = asyncio.create_task(self.bounded(request))
        cancelled: asyncio.CancelledError | None = None
        while not task.done():
            try:
                await asyncio.wait({task})
            except asyncio.CancelledError as error:
                cancelled = error
        problem = error_of(task)
        if problem is not None:
            log.error("cannot take back the failed attach of %s: %s", self.name, problem, extra=self._about)
        if cancelled is not None:
            raise cancelled

    async def _detach(self, force: bool, notes: list[str]) -> None:
        before, self.goal = self.goal, Goal.ABSENT
        stored = False
        try:
            try:
                await self._store(Goal.ABSENT)
                stored = True
            except StoragedError:
                # On a full disk a volume must still go away: the entry is deleted at the end all the same.
                if not force:
                    raise
                stored = True
            if force:
                await self._health.find_silence()
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
                await self._keep(str(error), before if before in RESCUES else Goal.ATTACHED)
            raise

    async def _keep(self, why: str, goal: Goal = Goal.ATTACHED) -> None:
        """A detach was refused, and nothing was changed: the volume is wanted again."""
        self.goal = goal
        self._emit("refused", why)
        try:
            await self._store(goal)
        except StoragedError as error:
            what = "volume %s stays attached, but a restart would not know it: %s"
            log.error(what, self.name, error, extra=self._about)
        self._settle()

    async def _rescue(self, keep: bool, notes: list[str]) -> None:
        if self.goal is Goal.ABSENT:
            raise self._busy("rescue", "it is being detached", "storaged detach --force ends all I/O")
        if not self._adopted:
            await self._take_over()
        if self._refused is not None:
            raise self._refused
        if keep:
            replacing.refuse_to_keep(self.attachment)
        await self._health.find_standstill()
        what = "the device stays and fails" if keep else "the device goes"
        self._journal.add(Happening.RESCUE, f"asked for: {self._health.in_flight} requests were in flight, {what}")
        await self._end_io(Goal.FAILING if keep else Goal.RELEASED, notes)

    async def _end_io(self, goal: Goal, notes: list[str] | None) -> None:
        """End all I/O with errors. From now on this is what is wished for, whatever becomes of this try."""
        self.goal = goal
        await self._store(goal)
        await self._converge(force=True, notes=notes)
        self._health.begin_anew()
        self._journal.forget_pause()

    async def _resume(self) -> None:
        before = self.goal
        if before is Goal.ABSENT:
            raise self._busy("resume", "it is being detached", "attach it again when it is gone")
        if not self._adopted:
            await self._take_over()
        if self._refused is not None:
            raise self._refused
        if before is Goal.ATTACHED and self.state is State.ONLINE:
            return
        # Before anything is touched: what fails goes on failing.
        await replacing.check_source(self.attachment, max(0.1, self._deadline - time.monotonic()))
        self.goal = Goal.ATTACHED
        try:
            await self._store(Goal.ATTACHED)
            await self._converge()
        except BaseException as error:
            self.goal = before
            if before in RESCUES and isinstance(error, StoragedError):
                self._blamed = self._step
                await self._store(before)
                # Nothing is to wait for a source that is not there.
                await self._converge(force=True)
            raise
        if before in RESCUES:
            self._journal.add(Happening.RESUME, f"online again, as {self._device()}")

    async def _upgrade(self, timeout: float) -> None:
        if self.state is not State.ONLINE:
            raise self._busy("upgrade", f"it is {self.state}, not online", f"storaged show {self.name} says why")
        before = self._version()
        await replacing.check_source(self.attachment, timeout)
        binary = await replacing.choose_program(self.attachment, timeout)
        began = time.monotonic()
        try:
            await replacing.end_the_old_one(self.attachment, binary, max(0.1, self._deadline - time.monotonic()))
        except Exception:
            # The old one goes on.
            await self._converge()
            raise
        if self.attachment.transport.bridges:
            self._journal.begin_pause(began)
        await self._converge()
        self._journal.add(Happening.UPGRADE, f"from {before} to {self._version()}", time.monotonic() - began)

    def _version(self) -> str:
        record = self.attachment.record
        return f"qemu-storage-daemon {record.qsd_version}" if record is not None else ""

    def _device(self) -> str:
        record = self.attachment.record
        return str(record.device or record.socket) if record is not None else ""

    async def _resize(self, size: int | None, timeout: float) -> None:
        if self.state is not State.ONLINE:
            raise self._busy("resize", f"it is {self.state}, not online", f"storaged show {self.name} says why")
        try:
            size = await self.attachment.resize(size, timeout)
        except StoragedError as error:
            raise error.at(volume=self.name, step="resize") from error
        self._emit("state", f"resized to {size} bytes")

    def _busy(self, step: str, cause: str, hint: str) -> StoragedError:
        return StoragedError(
            ErrorCode.VOLUME_BUSY, "this cannot be done with the volume now", volume=self.name, step=step, cause=cause,
            hint=hint,
        )

    def _nothing_left(self, wishes: VolumeSpec | None) -> StoragedError:
        """What to tell who asked for something of a volume that is gone, or whose actor is."""
        if not self.ended:
            return StoragedError(
                ErrorCode.INTERNAL, "nobody looks after this volume any more", volume=self.name,
                cause="its actor ended by a bug, or the daemon is ending; its device goes on working",
                hint="restart storaged, which takes the volume over again",
            )
        if self._first_failure is not None and wishes == self.spec:
            return self._first_failure  # of the attach that it waited for, which wished for the same
        return StoragedError(
            ErrorCode.NO_SUCH_VOLUME, f"there is no volume {self.name!r} any more", volume=self.name
        )
