"""How hangs are told apart, how long each has lasted, and what is done about it. Pure.

The facts come from host/disk.py (``progress``), host/process.py (``thread_states``), host/tcp.py and the monitor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from storaged.errors import ErrorCode, StoragedError

#: Requests of which none ended for this long (seconds) stand still. A disk that retries a sector takes several.
STALLED_AFTER = 10.0
#: After how many seconds a QSD that hangs is replaced, where that costs nothing but a pause.
RESTART_AFTER = 30.0
_LONGEST = 86400
_POLICY = re.compile(r"(restart|fail)-after:([1-9][0-9]{0,4})", re.ASCII)
#: States of a thread that is no more (proc_pid_stat(5)).
_ENDED = frozenset("ZXx")
STOPPED = frozenset("Tt")
_IN_KERNEL = "D"


class Trouble(StrEnum):
    """Why a volume hangs. Stable names: users see them."""

    #: Somebody stopped QSD, or traces it.
    QSD_STOPPED = "qsd-stopped"
    #: QSD is silent, and the kernel does not let go of one of its threads (state D).
    QSD_IN_KERNEL = "qsd-in-kernel"
    #: QSD is silent while it opens the source.
    QSD_OPENING = "qsd-opening"
    #: QSD is silent, and nothing says why.
    QSD_SILENT = "qsd-silent"
    #: QSD answers, requests are in flight, and none ends.
    BACKEND_SILENT = "backend-silent"
    #: As before, and a TCP peer of QSD acknowledges nothing.
    NETWORK_AWAY = "network-away"
    #: QSD has lost its connection to the server, and QEMU's driver makes no other: each request fails from now on.
    BACKEND_LOST = "backend-lost"
    #: QSD is dead, no successor can be had, and the device waits for one.
    NO_SERVER = "no-server"

    @property
    def of_backend(self) -> bool:
        """Whether QSD is not to blame: what is behind it does not answer, or cannot be opened."""
        return self in (Trouble.BACKEND_SILENT, Trouble.NETWORK_AWAY, Trouble.BACKEND_LOST, Trouble.NO_SERVER)


@dataclass(frozen=True)
class Progress:
    """One look at a block device: requests in flight, and how many have ended since it was made."""

    in_flight: int
    ended: int


class Standstill:
    """For how long requests of one device have been in flight without any of them ending."""

    def __init__(self) -> None:
        self._last: Progress | None = None
        self._since = 0.0
        self._seconds = 0.0

    def update(self, progress: Progress | None, now: float) -> float:
        """Take a look's result at ``now`` (monotonic seconds) and return the seconds, 0.0 if nothing stands still.

        None says that the look failed: what was known stays. It is never too much: what was in flight at two looks
        with nothing ended between them was in flight all the time.
        """
        if progress is None:
            return self._seconds
        last, self._last = self._last, progress
        # Another count, be it a smaller one: something ended, or this is another device by now.
        if last is None or not last.in_flight or last.ended != progress.ended:
            self._since = now
        self._seconds = max(0.0, now - self._since) if progress.in_flight else 0.0
        return self._seconds


def judge(*, silent: bool, opening: bool, threads: str, standstill: float, network: bool) -> Trouble | None:
    """Return what is wrong, None where nothing is.

    ``silent``: QSD answers no QMP. ``opening``: it has been told to open the source, and has not said that it did.
    ``threads``: the states of its threads (proc_pid_stat(5)). ``standstill``: seconds, from :class:`Standstill`.
    ``network``: a TCP peer of it does not acknowledge. A QSD that is dead has no trouble: its pidfd tells that.
    """
    if silent:
        living = set(threads) - _ENDED
        if not living:
            return None
        in_kernel = _IN_KERNEL in living
        # An open(2) in state D is what opening looks like on slow storage. And SIGCONT helps only one that the kernel
        # lets go of: SIGKILL neither, so "stopped" must not hide it.
        if in_kernel and not opening:
            return Trouble.QSD_IN_KERNEL
        if living & STOPPED and not in_kernel:
            return Trouble.QSD_STOPPED
        return Trouble.QSD_OPENING if opening else Trouble.QSD_SILENT
    if standstill >= STALLED_AFTER:
        return Trouble.NETWORK_AWAY if network else Trouble.BACKEND_SILENT
    return None


class Reaction(StrEnum):
    """What is done about a trouble."""

    WAIT = "wait"
    #: QSD is killed, and another takes its place.
    RESTART = "restart"
    #: Requests end with EIO.
    FAIL = "fail"


@dataclass(frozen=True)
class Policy:
    """A reaction, and after how many seconds of the trouble it is due (0 for WAIT, and for what is due at once)."""

    reaction: Reaction
    after: float = 0.0

    def __str__(self) -> str:
        return "wait" if self.reaction is Reaction.WAIT else f"{self.reaction}-after:{self.after:g}"


WAIT = Policy(Reaction.WAIT)


def parse_policy(text: str) -> Policy:
    """Return the policy that is spelled ``wait``, ``restart-after:SECONDS`` or ``fail-after:SECONDS``.

    Raises INVALID_ARGUMENT for anything else.
    """
    if text == "wait":
        return WAIT
    match = _POLICY.fullmatch(text)
    if match is None or int(match[2]) > _LONGEST:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{text!r} says nothing that can be done about a hang",
            hint=f"use wait, restart-after:SECONDS or fail-after:SECONDS, with 1 to {_LONGEST} whole seconds",
        )
    return Policy(Reaction(match[1]), float(match[2]))


def policy_for(
    trouble: Trouble, on_hang: Policy | None, on_stall: Policy | None, *, loses_writes: bool, bridged: bool
) -> Policy:
    """Return what shall be done about a trouble.

    ``on_hang`` and ``on_stall`` are the user's wishes, None where there is none. ``loses_writes``: QSD may hold
    acknowledged writes that die with it. ``bridged``: requests wait without an error while there is no QSD.
    """
    if trouble is Trouble.BACKEND_LOST:
        # There is nothing to wait for, and nothing that could still be lost: all fails until there is another QSD.
        return Policy(Reaction.RESTART)
    if trouble.of_backend:
        if trouble is Trouble.NO_SERVER and on_stall is not None and on_stall.reaction is Reaction.RESTART:
            return WAIT  # that is tried all the time
        return on_stall or WAIT  # the data is worth more than the wait
    if trouble is Trouble.QSD_OPENING:
        return WAIT  # opening has a deadline of its own
    policy = on_hang or (Policy(Reaction.RESTART, RESTART_AFTER) if bridged and not loses_writes else WAIT)
    if trouble is Trouble.QSD_IN_KERNEL and policy.reaction is Reaction.RESTART:
        # Killed, it would be a zombie that still holds the device and the source: no successor could start.
        return WAIT
    return policy


@dataclass(frozen=True)
class Condition:
    """A trouble that a volume has now."""

    trouble: Trouble
    #: Seconds since the epoch.
    since: float
    #: For people: what was seen, a part of a sentence ("of 3 requests none ended").
    detail: str
    policy: Policy

    @property
    def acts_at(self) -> float | None:
        """When the policy is due (seconds since the epoch), None if it is to wait."""
        return None if self.policy.reaction is Reaction.WAIT else self.since + self.policy.after


_MEANINGS = {
    Trouble.QSD_STOPPED: "qemu-storage-daemon is stopped",
    Trouble.QSD_IN_KERNEL: "qemu-storage-daemon does not answer, the kernel holds a thread of it",
    Trouble.QSD_OPENING: "qemu-storage-daemon is opening the source, and does not answer meanwhile",
    Trouble.QSD_SILENT: "qemu-storage-daemon does not answer",
    Trouble.BACKEND_SILENT: "the storage below answers no request",
    Trouble.NETWORK_AWAY: "the storage below is not reached over the network",
    Trouble.BACKEND_LOST: "qemu-storage-daemon has lost its server, and makes no new connection",
    Trouble.NO_SERVER: "the device waits, and no qemu-storage-daemon can serve it",
}

_ADVICE = {
    Trouble.QSD_STOPPED: "somebody stopped it, or traces it: kill -CONT {pid}, or storaged rescue {name}",
    Trouble.QSD_IN_KERNEL: "look at the storage below and at /proc/{pid}/task/*/stack: it cannot be killed before the "
    "kernel lets go of it; storaged rescue {name} ends what waits as far as that goes",
    Trouble.QSD_OPENING: "wait, or mend the storage below; the opening ends at its deadline",
    Trouble.QSD_SILENT: "it may go on by itself; storaged rescue {name} ends what waits with errors",
    Trouble.BACKEND_SILENT: "mend the storage below: requests go on when it answers; storaged rescue {name} ends them "
    "with errors",
    Trouble.NETWORK_AWAY: "look at the network and at the server: requests go on when it is back; "
    "storaged rescue {name} ends them with errors",
    Trouble.BACKEND_LOST: "another qemu-storage-daemon takes its place; look why the server ended the connection",
    Trouble.NO_SERVER: "mend what the failure names: it is tried again by itself; storaged rescue {name} ends what "
    "waits with errors",
}


def meaning(trouble: Trouble) -> str:
    """Say for people what is wrong."""
    return _MEANINGS[trouble]


def advice(trouble: Trouble, name: str, pid: int) -> str:
    """Say for people what to do about it, as a hint; ``name`` is the volume, ``pid`` its QSD."""
    return _ADVICE[trouble].format(name=name, pid=pid)
