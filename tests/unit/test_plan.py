"""What plan promises, in a model world that has every observation there can be."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.plan import Device, Goal, Observed, Qsd, Step, plan
from tests.unit.world import ACCIDENTS, EVERYTHING, POSSIBLE, do, makes_sense

#: No way is longer: at most one of each step.
MOST_STEPS = len(Step)
TAKES_AWAY = {Step.DISCONNECT, Step.STOP, Step.UNPUBLISH, Step.REMOVE}


def go(goal: Goal, seen: Observed) -> tuple[list[Step], Observed]:
    """Follow the plan to where it has nothing more to do."""
    steps: list[Step] = []
    while (step := plan(goal, seen)) is not None:
        steps.append(step)
        assert len(steps) <= MOST_STEPS, steps
        seen = do(step, seen)
    return steps, seen


@pytest.mark.parametrize("start", [seen for seen in EVERYTHING if seen.qsd is not Qsd.SILENT], ids=str)
def test_from_anything_but_silence_an_attached_volume_becomes_usable(start: Observed) -> None:
    _, end = go(Goal.ATTACHED, start)
    assert end.qsd is Qsd.RUNNING
    assert end.opened
    assert end.exported
    assert end.device is Device.HEALTHY
    assert end.linked


@pytest.mark.parametrize("start", POSSIBLE, ids=str)
def test_from_anything_possible_an_absent_volume_leaves_nothing(start: Observed) -> None:
    _, end = go(Goal.ABSENT, start)
    assert end == Observed()


@pytest.mark.parametrize("seen", EVERYTHING, ids=str)
def test_what_is_wanted_is_never_taken_down(seen: Observed) -> None:
    assert plan(Goal.ATTACHED, seen) not in TAKES_AWAY


@pytest.mark.parametrize("seen", [seen for seen in EVERYTHING if seen.qsd is Qsd.SILENT], ids=str)
def test_over_the_head_of_a_silent_qsd_nothing_is_done(seen: Observed) -> None:
    assert plan(Goal.ATTACHED, seen) is None


@pytest.mark.parametrize("start", EVERYTHING, ids=str)
def test_a_healthy_device_is_disconnected_before_anything_else_of_it_goes(start: Observed) -> None:
    steps, _ = go(Goal.ABSENT, start)
    if start.device is Device.HEALTHY:
        assert steps[0] is Step.DISCONNECT
    else:
        assert Step.DISCONNECT not in steps


@pytest.mark.parametrize("start", EVERYTHING, ids=str)
def test_a_directory_goes_last(start: Observed) -> None:
    steps, _ = go(Goal.ABSENT, start)
    assert Step.REMOVE not in steps[:-1]


@pytest.mark.parametrize("seen", POSSIBLE, ids=str)
def test_a_device_that_works_is_never_cleared(seen: Observed) -> None:
    if seen.device is Device.HEALTHY:
        for goal in Goal:
            assert plan(goal, seen) is not Step.CLEAR


@pytest.mark.parametrize("seen", POSSIBLE, ids=str)
def test_nothing_is_set_up_over_what_a_dead_export_left(seen: Observed) -> None:
    if plan(Goal.ATTACHED, seen) in (Step.START, Step.OPEN, Step.EXPORT):
        assert seen.device is Device.NONE
        assert not seen.remains or (seen.exported and seen.qsd is Qsd.RUNNING)


@pytest.mark.parametrize("seen", POSSIBLE, ids=str)
def test_a_second_qsd_is_never_started(seen: Observed) -> None:
    if seen.qsd is not Qsd.NONE:
        assert plan(Goal.ATTACHED, seen) is not Step.START


def test_nothing_is_done_from_nothing_to_nothing() -> None:
    assert plan(Goal.ABSENT, Observed()) is None


def test_a_first_attach_takes_the_shortest_way() -> None:
    steps, end = go(Goal.ATTACHED, Observed())
    assert steps == [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH]
    assert go(Goal.ABSENT, end)[0] == [Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.CLEAR, Step.REMOVE]


ACCIDENT = st.sampled_from(ACCIDENTS)


@given(st.lists(st.one_of(ACCIDENT, st.sampled_from(Goal)), max_size=40), st.sampled_from(POSSIBLE))
def test_whatever_happens_on_the_way_the_goal_is_reached_once_it_is_quiet(
    happenings: list[object], seen: Observed
) -> None:
    for happening in happenings:
        if isinstance(happening, Goal):
            step = plan(happening, seen)
            seen = do(step, seen) if step is not None else seen
        else:
            assert callable(happening)
            seen = happening(seen)
        assert makes_sense(seen)
    assert go(Goal.ABSENT, seen)[1] == Observed()
    if seen.qsd is not Qsd.SILENT:
        assert go(Goal.ATTACHED, seen)[1].linked
