"""Watches whether one volume moves: samples its device, asks what its QSD is doing, and says what to do about it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from storaged.backends import find_backend
from storaged.errors import StoragedError
from storaged.host import disk, process, tcp
from storaged.host.tcpwatch import ConnectionWatch
from storaged.model import backingsources
from storaged.model.health import (
    STALLED_AFTER,
    STOPPED,
    Condition,
    Progress,
    Reaction,
    Standstill,
    Trouble,
    judge,
    policy_for,
)
from storaged.model.record import ProcessIdentity
from storaged.supervisor.holding import Holding

#: Seconds after which QSD of an online volume is asked, too: that costs a thousand times more than a look.
_ASK_EVERY = 60.0
#: Seconds of a standstill after which it is asked at once.
_SUSPICIOUS = 2.0
#: Seconds between two samples that tell at once whether anything moves.
_PROBE = 1.0
#: Seconds for an answer of a QSD whose device stands still; one that takes longer is ended without one.
_QUICK_ANSWER = 1.0
#: Seconds between two looks whether QSD still has its server, where nothing tells of the loss at once.
_LOOK_FOR_LOSS = 2.5
#: Seconds for the look at QSD's threads and connections in /proc.
_PATIENCE = 5.0


class Health:
    """Of one volume. Used by its actor only."""

    def __init__(self, held: Holding, wake: Callable[[], None]) -> None:
        """``wake`` is called when QSD has lost a connection that does not come back by itself."""
        self.condition: Condition | None = None
        """The trouble that the volume has, None where it has none."""
        self.standstill = 0.0
        """Seconds for which requests have been in flight and none has ended."""
        self.lost = False
        """QSD has lost its server, and would not find it again."""
        self._held = held
        self._watch = ConnectionWatch(wake)
        self._clock = Standstill()
        self.in_flight = 0
        """Requests in flight when the device was sampled last."""
        self.look_again = False
        """Requests were in flight, and only another look soon can tell whether they move."""
        self._began = 0.0

    @property
    def patience(self) -> float:
        """Seconds after which a standstill counts."""
        policy = self._held.spec.on_stall
        return min(STALLED_AFTER, policy.after) if policy is not None and policy.after else STALLED_AFTER

    @property
    def ask_every(self) -> float:
        """Seconds after which QSD of a volume that looks well is asked, too."""
        policy = self._held.spec.on_hang
        return min(_ASK_EVERY, policy.after) if policy is not None and policy.after else _ASK_EVERY

    @property
    def look_every(self) -> float:
        """Seconds between two looks, at most, so that the policies come about in time."""
        after = [policy.after for policy in (self._held.spec.on_hang, self._held.spec.on_stall) if policy]
        blind = [] if self._recovers or self._watch.active else [_LOOK_FOR_LOSS]
        return min(15.0, *(max(1.0, seconds / 3) for seconds in after if seconds), *blind, 15.0)

    @property
    def due_in(self) -> float | None:
        """Seconds until the policy is to be carried out; None where it is to wait, or nothing is wrong."""
        if self.condition is None or self.condition.policy.reaction is Reaction.WAIT:
            return None
        return max(0.0, self._began + self.condition.policy.after - time.monotonic())

    def glance(self) -> bool:
        """Sample the device, and say whether it moves, or has nothing to do, or may soon. Never blocks."""
        self._held.tell_stderr()
        progress = self._sample()
        if progress is not None:
            self.in_flight = progress.in_flight
            # At every other look: what moves costs two looks in the time of one, and not one after another.
            self.look_again = progress.in_flight > 0 and not self.look_again
        self.standstill = self._clock.update(progress, time.monotonic())
        self.lost = self._has_lost_server()
        self._held.stalled = self.lost or self.standstill >= self.patience
        return self.standstill < _SUSPICIOUS and not self.lost

    def watch(self) -> None:
        """Be told at once when QSD loses a connection that does not come back by itself. Never blocks."""
        who = self._who_must_not_lose()
        if who is not None:
            self._watch.watch(who)

    def leave(self) -> None:
        """The volume is gone, or the daemon ends."""
        self._watch.close()

    @property
    def _recovers(self) -> bool:
        try:
            # Asked at each look, of all volumes: whether it is a NetworkBackend would cost more to find out.
            opened = [find_backend(self._held.spec.source), *backingsources.backends(self._held.spec)]
            return all(getattr(backend, "recovers", True) for backend in opened)
        except StoragedError:
            return True  # what another version of the daemon has attached

    def _who_must_not_lose(self) -> ProcessIdentity | None:
        """QSD, where it has opened a source of whose connection it makes no other."""
        record = self._held.record
        if record is None or record.rescue or record.settled or not self._held.qsd.alive or self._recovers:
            return None
        return record.process

    def _has_lost_server(self) -> bool:
        self.watch()
        who = self._who_must_not_lose()
        return who is not None and not tcp.is_connected(who.pid)

    async def find_standstill(self) -> None:
        """Before all I/O is ended: find out within a moment whether requests are in flight of which none ends.

        What was written and not flushed is given up then.
        """
        held, first = self._held, self._sample()
        self.in_flight = first.in_flight if first is not None else 0
        await self.find_silence()
        if held.stalled or held.qsd.silent or first is None or not first.in_flight:
            return
        await asyncio.sleep(_PROBE)  # nothing tells that nothing happens
        second = self._sample()
        held.stalled = second is not None and second.in_flight > 0 and second.ended == first.ended
        if held.stalled:
            await held.qsd.ask(_QUICK_ANSWER)

    async def find_silence(self) -> None:
        """Before something is done by force: nobody needs to wait for a QSD that is stopped or hangs.

        A standstill counts only if it has lasted: a pause of the storage must cost nobody a flush.
        """
        held = self._held
        if not held.stalled:
            self.glance()
            held.stalled = held.stalled or self.standstill >= _SUSPICIOUS
        if held.record is None or held.record.process is None or not held.qsd.alive:
            return
        try:
            threads, _ = await held.blocking("look at QSD", _PATIENCE, _look_at, held.record.process.pid)
        except StoragedError:
            threads = ""  # too much hangs already
        if STOPPED & set(threads):
            held.qsd.note_silence()
        elif held.stalled:
            await held.qsd.ask(_QUICK_ANSWER)

    async def has_recovered(self) -> bool:
        """Before a policy is carried out: whether what it is about is over. The condition is dropped then."""
        condition, held = self.condition, self._held
        if condition is None or condition.trouble in (Trouble.NO_SERVER, Trouble.BACKEND_LOST):
            return False
        if condition.trouble.of_backend:
            self.glance()
            over = not held.stalled
        else:
            over = held.qsd.alive and await held.qsd.ask(_QUICK_ANSWER)
        if over:
            self.condition = None
        return over

    async def examine(self, waits: str | None) -> None:
        """Judge the present trouble, if there is one. Raises HOST_STUCK.

        ``waits``: the device waits for a QSD, and this is why none could be had; None where it does not.
        """
        self.glance()
        held = self._held
        if waits is not None and not held.qsd.alive:
            self._set(Trouble.NO_SERVER, time.monotonic() - held.qsd.died_at if held.qsd.died_at else 0.0, waits)
            return
        if held.record is None or held.record.process is None or not held.qsd.alive or held.record.rescue:
            self.condition = None
            return
        if self.lost:
            self._set(Trouble.BACKEND_LOST, 0.0, "it has no TCP connection any more")
            return
        silent = held.qsd.silent_since
        if silent is None and not held.stalled:
            self.condition = None
            return
        pid = held.record.process.pid
        threads, peers = await held.blocking("look at QSD", _PATIENCE, _look_at, pid)
        trouble = judge(
            silent=silent is not None, opening=held.record.settled, threads=threads,
            standstill=max(self.standstill, STALLED_AFTER) if held.stalled else 0.0, network=bool(peers),
        )
        if trouble is None:
            self.condition = None
            return
        lasted = max(self.standstill, 0.0 if silent is None else time.monotonic() - silent)
        detail = f"it has not answered since; its threads are in state {''.join(sorted(set(threads)))}"
        if trouble.of_backend:
            detail = f"of {self.in_flight} requests in flight none ends"
            if peers:
                detail += f", and {', '.join(peers)} acknowledges nothing"
        self._set(trouble, lasted, detail)

    def _set(self, trouble: Trouble, lasted: float, detail: str) -> None:
        held, now = self._held, time.monotonic()
        began = now - lasted
        if self.condition is not None and self.condition.trouble is trouble:
            began = min(began, self._began)
        # By the clock that nobody sets: a policy must not be due because somebody did.
        self._began = began
        self.condition = Condition(
            trouble, time.time() - (now - began), detail,
            policy_for(
                trouble, held.spec.on_hang, held.spec.on_stall, loses_writes=held.spec.keeps_writes_in_memory,
                bridged=held.transport.bridges,
            ),
        )

    def begin_anew(self) -> None:
        """Another server serves the device, or another device the volume."""
        self.condition = None
        self.standstill = 0.0
        self.look_again = False
        self.lost = False
        self._watch.close()
        self._clock = Standstill()
        self._held.stalled = False

    def _sample(self) -> Progress | None:
        record = self._held.record
        return disk.progress(record.device) if record is not None and record.device is not None else None


def _look_at(pid: int) -> tuple[str, list[str]]:
    return process.thread_states(pid), tcp.silent_peers(pid)


