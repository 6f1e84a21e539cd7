"""The table of transitions, against what state_of makes of every step, accident and change of mind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from storaged.model.plan import RESCUES, Device, Goal, Observed, Qsd, Step, plan
from storaged.model.states import TRANSITIONS, State, state_of
from tests.unit.world import BOTH, BRIDGING, POSSIBLE, WORLDS, Kind, World, after_accidents, do


def situations() -> Iterator[tuple[Goal, World, bool]]:
    """Goal, world, and whether the volume was online: then its record has a directory."""
    for goal in Goal:
        for world in WORLDS:
            for was_online in BOTH:
                if goal is Goal.FAILING and world.kind not in BRIDGING:
                    continue
                if goal is Goal.ABSENT or world.directory or not was_online:
                    yield goal, world, was_online


def next_situations(goal: Goal, world: World) -> Iterator[tuple[Goal, World]]:
    """What may come directly after: time, an accident, the planned step, another goal."""
    yield goal, world
    for after in after_accidents(world):
        yield goal, after
    if goal is Goal.ATTACHED:
        # Of a fresh attach that failed all is taken back; and only what is wanted can be rescued.
        yield Goal.ABSENT, world
        yield Goal.RELEASED, world
        if world.kind in BRIDGING:
            yield Goal.FAILING, world
    if goal in RESCUES:
        yield Goal.ATTACHED, world  # resumed
        yield Goal.ABSENT, world
    for force in BOTH if goal is Goal.ABSENT else (goal in RESCUES,):
        step = plan(goal, world.seen, force=force)
        if step is not None:
            yield goal, do(step, world, force=force)
        if step is Step.DISCONNECT and not force:
            yield Goal.ATTACHED, world  # somebody uses the device: the detach is refused, the volume stays


def produced() -> set[tuple[State, State]]:
    changes = set()
    for goal, world, was_online in situations():
        following = list(next_situations(goal, world))
        for failed in BOTH:
            before = state_of(goal, world.seen, was_online=was_online, failed=failed)
            for new_goal, new_world in following:
                for fails in BOTH:
                    after = state_of(
                        new_goal, new_world.seen, was_online=was_online or before is State.ONLINE, failed=fails
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


@pytest.mark.parametrize("state", State)
def test_every_state_is_met(state: State) -> None:
    assert state in {after for _, after in PRODUCED}


@pytest.mark.parametrize("failed", BOTH)
@pytest.mark.parametrize("was_online", BOTH)
def test_online_means_that_nothing_is_left_to_do_and_qsd_answers(failed: bool, was_online: bool) -> None:
    for seen in POSSIBLE:
        state = state_of(Goal.ATTACHED, seen, was_online=was_online, failed=failed)
        done = plan(Goal.ATTACHED, seen) is None and seen.qsd is Qsd.RUNNING
        assert (state in (State.ONLINE, State.STALLED)) == done, seen
        assert (state is State.STALLED) == (done and seen.stalled), seen


@pytest.mark.parametrize("failed", BOTH)
@pytest.mark.parametrize("was_online", BOTH)
@pytest.mark.parametrize("goal", sorted(RESCUES))
def test_rescued_means_that_nothing_is_left_to_do_and_no_io_can_wait(
    goal: Goal, was_online: bool, failed: bool
) -> None:
    for world in WORLDS:
        if goal is Goal.FAILING and world.kind not in BRIDGING:
            continue
        state = state_of(goal, world.seen, was_online=was_online, failed=failed)
        assert (state is State.RESCUED) == (plan(goal, world.seen) is None), world
        if state is State.RESCUED and world.seen.device is not Device.NONE:
            assert world.rescue
            assert world.served


@pytest.mark.parametrize("failed", BOTH)
@pytest.mark.parametrize("was_online", BOTH)
def test_absent_means_that_nothing_is_left(failed: bool, was_online: bool) -> None:
    for world in WORLDS:
        state = state_of(Goal.ABSENT, world.seen, was_online=was_online, failed=failed)
        assert (state is State.ABSENT) == (world == World(world.kind)), world
        # By force there is always a way on.
        assert (state is State.ABSENT) == (plan(Goal.ABSENT, world.seen, force=True) is None), world


USABLE = Observed(Qsd.RUNNING, True, True, True, Device.HEALTHY, True, True)


def test_a_failure_does_not_hide_that_a_volume_works() -> None:
    assert state_of(Goal.ATTACHED, USABLE, was_online=True, failed=True) is State.ONLINE


def test_a_device_that_only_fails_is_not_online() -> None:
    rescued = replace(USABLE, rescue=True, needs_server=True)
    assert state_of(Goal.ATTACHED, rescued, was_online=True, failed=False) is State.RECOVERING


def test_a_device_that_waits_for_a_new_qsd_is_recovering() -> None:
    waiting = Observed(device=Device.UNSERVED, linked=True, directory=True)
    assert state_of(Goal.ATTACHED, waiting, was_online=True, failed=False) is State.RECOVERING


@pytest.mark.parametrize("kind", Kind)
def test_a_first_attach_goes_through_its_states_in_order(kind: Kind) -> None:
    world, states = World(kind), []
    while True:
        state = state_of(Goal.ATTACHED, world.seen, was_online=False, failed=False)
        if state not in states:
            states.append(state)
        step = plan(Goal.ATTACHED, world.seen)
        if step is None:
            break
        world = do(step, world)
    assert states == [State.STARTING, State.EXPORTING, State.ATTACHING, State.ONLINE]
