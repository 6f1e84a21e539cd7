"""The states of a volume and the table of what may follow what."""

from __future__ import annotations

from enum import StrEnum

from storaged.model.plan import RESCUES, Device, Goal, Observed, Qsd


class State(StrEnum):
    """What a volume is doing, as users see it."""

    ABSENT = "absent"
    STARTING = "starting"
    EXPORTING = "exporting"
    ATTACHING = "attaching"
    ONLINE = "online"
    STALLED = "stalled"
    HUNG = "hung"
    RECOVERING = "recovering"
    RESCUED = "rescued"
    FAILED = "failed"
    DETACHING = "detaching"


_TROUBLE = frozenset({State.HUNG, State.RECOVERING, State.FAILED, State.DETACHING})

#: state -> the states that may follow it directly. A test walks all of it.
TRANSITIONS: dict[State, frozenset[State]] = {
    # A restarted daemon finds a volume in any condition, so anything may follow ABSENT.
    State.ABSENT: frozenset(State) - {State.ABSENT},
    State.STARTING: frozenset({State.ABSENT, State.EXPORTING, State.ATTACHING, State.ONLINE, State.STALLED})
    | {State.RESCUED} | _TROUBLE,
    State.EXPORTING: frozenset({State.STARTING, State.ATTACHING, State.ONLINE, State.STALLED, State.RESCUED})
    | _TROUBLE,
    State.ATTACHING: frozenset({State.STARTING, State.EXPORTING, State.ONLINE, State.STALLED, State.RESCUED})
    | _TROUBLE,
    State.ONLINE: frozenset({State.STALLED, State.RESCUED, State.ATTACHING}) | _TROUBLE,
    State.STALLED: frozenset({State.ONLINE, State.RESCUED, State.STARTING, State.EXPORTING, State.ATTACHING})
    | _TROUBLE,
    State.HUNG: frozenset({State.ONLINE, State.STARTING, State.EXPORTING, State.ATTACHING, State.STALLED})
    | {State.RESCUED} | _TROUBLE - {State.HUNG},
    State.RECOVERING: frozenset({State.ONLINE, State.STALLED, State.RESCUED}) | _TROUBLE - {State.RECOVERING},
    # A volume that was rescued before it was ever online begins anew when it is resumed.
    State.RESCUED: frozenset({State.ABSENT, State.STARTING, State.EXPORTING, State.ATTACHING, State.ONLINE})
    | {State.STALLED} | _TROUBLE,
    State.FAILED: frozenset(State) - {State.FAILED},
    # A detach that is refused leaves the volume as it was, or as it has become meanwhile.
    State.DETACHING: frozenset({State.ABSENT, State.ATTACHING, State.ONLINE, State.STALLED, State.RESCUED})
    | _TROUBLE - {State.DETACHING},
}


def state_of(goal: Goal, seen: Observed, *, was_online: bool, failed: bool) -> State:
    """Return the state that an observation amounts to.

    ``was_online``: the volume has been usable before, so that what is missing now is being replaced.
    ``failed``: the last try ended with a failure and nothing is being done about it at the moment.
    """
    if goal is Goal.ABSENT:
        return State.ABSENT if seen.nothing else State.FAILED if failed else State.DETACHING
    serving = seen.qsd is Qsd.RUNNING and seen.exported and seen.device is Device.HEALTHY and seen.linked
    if goal in RESCUES:
        reached = serving and seen.rescue if goal is Goal.FAILING and seen.device is not Device.NONE else (
            seen.qsd is Qsd.NONE and seen.device is Device.NONE and not (seen.linked or seen.remains)
        )
        if reached:
            return State.RESCUED
    elif serving and not seen.rescue and not seen.lost:
        return State.STALLED if seen.stalled else State.ONLINE
    if seen.qsd is Qsd.SILENT:
        return State.HUNG
    if failed:
        return State.FAILED
    if was_online:
        return State.RECOVERING
    if seen.qsd is Qsd.NONE or not seen.opened:
        return State.STARTING
    return State.EXPORTING if not seen.exported else State.ATTACHING
