"""The table of transitions, against what state_of makes of every step, accident and change of mind."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from storaged.model.plan import Device, Goal, Observed, Qsd, Step, plan
from storaged.model.states import TRANSITIONS, State, state_of
from tests.unit.world import BOTH, POSSIBLE, after_accidents, do

#: Of later phases: no observation amounts to them yet.
LATER = {State.STALLED, State.RESCUED}


def situations() -> Iterator[tuple[Goal, Observed, bool]]:
    """Goal, observation, and whether the volume was online: then its record has a directory."""
    for goal in Goal:
        for seen in POSSIBLE:
            for was_online in BOTH:
                if goal is Goal.ABSENT or seen.directory or not was_online:
                    yield goal, seen, was_online


def next_situations(goal: Goal, seen: Observed) -> Iterator[tuple[Goal, Observed]]:
    """What may come directly after: time, an accident, the planned step, another goal."""
    yield goal, seen
    for after in after_accidents(seen):
        yield goal, after
    step = plan(goal, seen)
    if step is not None:
        yield goal, do(step, seen)
    if goal is Goal.ATTACHED:
        yield Goal.ABSENT, seen
    elif step is Step.DISCONNECT:
        yield Goal.ATTACHED, seen  # somebody uses the device: the detach is refused, the volume stays


def produced() -> set[tuple[State, State]]:
    changes = set()
    for goal, seen, was_online in situations():
        for failed in BOTH:
            before = state_of(goal, seen, was_online=was_online, failed=failed)
            for new_goal, new_seen in next_situations(goal, seen):
                for fails in BOTH:
                    after = state_of(
                        new_goal, new_seen, was_online=was_online or before is State.ONLINE, failed=fails
                    )
                    if after is not before:
                        changes.add((before, after))
    return changes


PRODUCED = sorted(produced())


@pytest.mark.parametrize(("before", "after"), PRODUCED)
def test_what_really_follows_is_in_the_table(before: State, after: State) -> None:
    assert after in TRANSITIONS[before]


def test_every_state_is_in_the_table_and_none_follows_itself() -> None:
    assert TRANSITIONS.keys() == set(State)
    for state, following in TRANSITIONS.items():
        assert state not in following
        assert following <= set(State)


def reachable(start: State) -> set[State]:
    found, todo = {start}, [start]
    while todo:
        for following in TRANSITIONS[todo.pop()] - found:
            found.add(following)
            todo.append(following)
    return found


@pytest.mark.parametrize("state", State)
def test_from_every_state_a_volume_can_come_online_and_can_go(state: State) -> None:
    assert {State.ONLINE, State.ABSENT, State.DETACHING} <= reachable(state)


@pytest.mark.parametrize("state", sorted(set(State) - LATER))
def test_every_state_of_this_phase_is_met(state: State) -> None:
    assert state in {after for _, after in PRODUCED}


@pytest.mark.parametrize("seen", POSSIBLE, ids=str)
@pytest.mark.parametrize("failed", BOTH)
@pytest.mark.parametrize("was_online", BOTH)
def test_online_means_that_nothing_is_left_to_do_and_qsd_answers(
    seen: Observed, failed: bool, was_online: bool
) -> None:
    state = state_of(Goal.ATTACHED, seen, was_online=was_online, failed=failed)
    assert (state is State.ONLINE) == (plan(Goal.ATTACHED, seen) is None and seen.qsd is Qsd.RUNNING)


@pytest.mark.parametrize("seen", POSSIBLE, ids=str)
def test_absent_means_that_nothing_is_left(seen: Observed) -> None:
    for was_online in BOTH:
        for failed in BOTH:
            state = state_of(Goal.ABSENT, seen, was_online=was_online, failed=failed)
            assert (state is State.ABSENT) == (plan(Goal.ABSENT, seen) is None)


USABLE = Observed(Qsd.RUNNING, True, True, True, Device.HEALTHY, True, True)


def test_a_failure_does_not_hide_that_a_volume_works() -> None:
    assert state_of(Goal.ATTACHED, USABLE, was_online=True, failed=True) is State.ONLINE


def test_a_first_attach_goes_through_its_states_in_order() -> None:
    seen, states = Observed(), []
    while True:
        state = state_of(Goal.ATTACHED, seen, was_online=False, failed=False)
        if state not in states:
            states.append(state)
        step = plan(Goal.ATTACHED, seen)
        if step is None:
            break
        seen = do(step, seen)
    assert states == [State.STARTING, State.EXPORTING, State.ATTACHING, State.ONLINE]
