"""What plan promises, in a model world that has every observation there can be of every kind of transport."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.plan import Device, Goal, Observed, Qsd, Step, plan
from tests.unit.world import ACCIDENTS, BOTH, BRIDGING, EVERYTHING, WORLDS, Kind, World, do, makes_sense

#: No way is longer: at most one of each step, but a second STOP.
MOST_STEPS = len(Step) + 1
#: Goal and force.
WISHES = [
    (Goal.ATTACHED, False), (Goal.ABSENT, False), (Goal.ABSENT, True), (Goal.FAILING, True), (Goal.RELEASED, True),
]


def way(goal: Goal, world: World, *, force: bool = False) -> Iterator[tuple[Step, World]]:
    """Follow the plan: each step with the world before it."""
    taken: list[Step] = []
    while (step := plan(goal, world.seen, force=force)) is not None:
        assert [step] != taken[-1:], f"{step} has no effect on {world}"
        taken.append(step)
        assert len(taken) <= MOST_STEPS, taken
        yield step, world
        world = do(step, world, force=force)
        assert makes_sense(world)


def go(goal: Goal, world: World, *, force: bool = False) -> tuple[list[Step], World]:
    """Follow the plan to where it has nothing more to do."""
    steps = []
    for step, before in way(goal, world, force=force):
        steps.append(step)
        world = do(step, before, force=force)
    return steps, world


def waits_in_vain(world: World) -> bool:
    """Its device waits for a QSD that hangs: neither is what was written to be lost, nor can it be flushed."""
    return world.seen.qsd is Qsd.SILENT and world.seen.device is Device.UNSERVED


def test_the_model_has_every_kind_of_trouble() -> None:
    assert {world.seen.device for world in WORLDS} == set(Device)
    for kind in BRIDGING:
        assert any(world.kind is kind and world.seen.device is Device.UNSERVED for world in WORLDS)
    assert any(world.rescue and world.served for world in WORLDS)
    assert any(map(waits_in_vain, WORLDS))


# Every goal is reached ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", Kind)
def test_from_anything_but_silence_an_attached_volume_becomes_usable(kind: Kind) -> None:
    for start in WORLDS:
        if start.kind is not kind or start.qsd is Qsd.SILENT:
            continue
        _, end = go(Goal.ATTACHED, start)
        assert end.seen == Observed(
            Qsd.RUNNING, True, True, end.seen.remains, Device.HEALTHY, True, True, needs_server=kind is Kind.VDUSE,
            bridges=kind in BRIDGING, stalled=end.stalled,
        ), start
        assert end.served, start


@pytest.mark.parametrize("kind", Kind)
def test_from_anything_that_can_be_flushed_an_absent_volume_leaves_nothing(kind: Kind) -> None:
    for start in WORLDS:
        if start.kind is kind and not waits_in_vain(start):
            assert go(Goal.ABSENT, start)[1] == World(kind), start


@pytest.mark.parametrize("kind", Kind)
def test_by_force_an_absent_volume_leaves_nothing_wherever_it_begins(kind: Kind) -> None:
    for start in WORLDS:
        if start.kind is kind:
            assert go(Goal.ABSENT, start, force=True)[1] == World(kind), start


@pytest.mark.parametrize("kind", BRIDGING)
def test_a_rescue_that_keeps_the_device_ends_with_a_server_that_fails_everything(kind: Kind) -> None:
    for start in WORLDS:
        if start.kind is kind and start.device:
            end = go(Goal.FAILING, start, force=True)[1]
            assert end.device, start
            assert end.served, start
            assert end.rescue, start
            assert end.linked, start


@pytest.mark.parametrize("kind", Kind)
def test_a_rescue_that_releases_leaves_the_directory_alone(kind: Kind) -> None:
    for start in WORLDS:
        if start.kind is kind:
            end = go(Goal.RELEASED, start, force=True)[1]
            # Of a socket that is gone nothing is left but the record; it also says which server was the last.
            assert replace(end, directory=False, front=False, device=False, rescue=False) == World(kind), start
            assert end.seen.device is Device.NONE, start
            assert end.directory >= start.directory, start
            assert not end.seen.remains


@pytest.mark.parametrize("kind", BRIDGING)
def test_a_device_that_fails_goes_on_with_the_real_one_when_it_is_resumed(kind: Kind) -> None:
    attached = go(Goal.ATTACHED, World(kind))[1]
    steps, failing = go(Goal.FAILING, attached, force=True)
    reconnect = [Step.RECONNECT] if kind is Kind.NBD else []
    assert steps == [Step.STOP, Step.RESCUE, Step.EXPORT, *reconnect]
    steps, resumed = go(Goal.ATTACHED, failing)
    assert steps == [Step.STOP, Step.START, Step.OPEN, Step.EXPORT, *reconnect]
    assert resumed == attached


def test_a_rescue_server_that_hangs_gives_way_to_the_real_one() -> None:
    for start in WORLDS:
        if start.rescue and start.qsd is Qsd.SILENT:
            assert go(Goal.ATTACHED, start)[1].served, start


@pytest.mark.parametrize("kind", BRIDGING)
def test_a_device_that_fails_does_not_work_once_more_on_its_way_out(kind: Kind) -> None:
    failing = do(Step.STOP, go(Goal.FAILING, go(Goal.ATTACHED, World(kind))[1], force=True)[1])
    for force in BOTH:
        assert Step.START not in go(Goal.ABSENT, failing, force=force)[0]


def test_by_force_a_stalled_server_is_ended_before_a_device_that_waits_for_it() -> None:
    stalled = replace(go(Goal.ATTACHED, World(Kind.VDUSE))[1], stalled=True)
    for goal in (Goal.ABSENT, Goal.RELEASED):
        steps = go(goal, stalled, force=True)[0]
        assert steps[:4] == [Step.STOP, Step.RESCUE, Step.EXPORT, Step.DISCONNECT]


def test_without_force_what_waits_for_a_qsd_that_hangs_goes_on_waiting() -> None:
    for start in filter(waits_in_vain, WORLDS):
        assert plan(Goal.ABSENT, start.seen) is None
        assert not start.seen.nothing


def test_nothing_is_done_from_nothing_to_nothing() -> None:
    for needs_server in BOTH:
        assert plan(Goal.ABSENT, Observed(needs_server=needs_server)) is None
        assert plan(Goal.ABSENT, Observed(needs_server=needs_server), force=True) is None


# The shortest ways --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "there", "back"),
    [
        (
            Kind.FUSE, [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH],
            [Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.CLEAR, Step.REMOVE],
        ),
        (
            Kind.VDUSE, [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH],
            [Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.CLEAR, Step.REMOVE],
        ),
        (
            Kind.NBD, [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH],
            [Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.REMOVE],
        ),
        (
            Kind.VHOST_USER, [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT],
            [Step.DISCONNECT, Step.STOP, Step.REMOVE],
        ),
    ],
)
def test_a_first_attach_and_its_detach_take_the_shortest_way(
    kind: Kind, there: list[Step], back: list[Step]
) -> None:
    steps, attached = go(Goal.ATTACHED, World(kind))
    assert steps == there
    for force in BOTH:
        assert go(Goal.ABSENT, attached, force=force)[0] == back


def attached_but_dead(kind: Kind) -> World:
    """An online volume whose QSD was killed."""
    return do(Step.STOP, go(Goal.ATTACHED, World(kind))[1])


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (Kind.FUSE, [Step.CLEAR, Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT]),
        (Kind.VDUSE, [Step.START, Step.OPEN, Step.EXPORT]),
        (Kind.NBD, [Step.START, Step.OPEN, Step.EXPORT, Step.RECONNECT]),
        (Kind.VHOST_USER, [Step.CLEAR, Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT]),
    ],
)
def test_a_dead_qsd_gets_a_successor(kind: Kind, steps: list[Step]) -> None:
    assert go(Goal.ATTACHED, attached_but_dead(kind))[0] in (steps, [*steps, Step.PUBLISH])


@pytest.mark.parametrize(
    ("kind", "steps"),
    [
        (Kind.VDUSE, [Step.START, Step.OPEN, Step.EXPORT, Step.DISCONNECT]),
        (Kind.NBD, [Step.START, Step.OPEN, Step.EXPORT, Step.RECONNECT, Step.DISCONNECT]),
    ],
)
def test_a_detach_first_brings_what_waits_into_the_image(kind: Kind, steps: list[Step]) -> None:
    assert go(Goal.ABSENT, attached_but_dead(kind))[0][: len(steps)] == steps


@pytest.mark.parametrize(
    ("kind", "steps"),
    [(Kind.VDUSE, [Step.RESCUE, Step.EXPORT, Step.DISCONNECT]), (Kind.NBD, [Step.DISCONNECT])],
)
def test_a_detach_by_force_ends_what_waits_with_errors(kind: Kind, steps: list[Step]) -> None:
    assert go(Goal.ABSENT, attached_but_dead(kind), force=True)[0][: len(steps)] == steps


def test_a_socket_that_a_detach_left_moved_aside_comes_back_first() -> None:
    aside = replace(go(Goal.ATTACHED, World(Kind.VHOST_USER))[1], aside=True)
    assert go(Goal.ATTACHED, aside)[0] == [Step.RECONNECT]
    assert go(Goal.ABSENT, aside)[0][:2] == [Step.RECONNECT, Step.DISCONNECT]
    assert go(Goal.ABSENT, aside, force=True)[0][0] is Step.DISCONNECT


def test_by_force_a_qsd_that_hangs_is_ended_before_a_device_that_needs_it() -> None:
    hangs = replace(go(Goal.ATTACHED, World(Kind.VDUSE))[1], qsd=Qsd.SILENT)
    steps = go(Goal.ABSENT, hangs, force=True)[0]
    assert steps[:4] == [Step.STOP, Step.RESCUE, Step.EXPORT, Step.DISCONNECT]


def test_the_real_one_takes_the_place_of_a_rescue_server() -> None:
    for start in WORLDS:
        if start.rescue and start.qsd is Qsd.RUNNING and start.device:
            steps, end = go(Goal.ATTACHED, start)
            assert steps[:4] == [Step.STOP, Step.START, Step.OPEN, Step.EXPORT]
            assert not end.rescue


# What is never done -------------------------------------------------------------------------------------------


def test_what_is_wanted_is_never_taken_down() -> None:
    for seen in EVERYTHING:
        step = plan(Goal.ATTACHED, seen)
        assert step not in {Step.DISCONNECT, Step.UNPUBLISH, Step.REMOVE, Step.RESCUE}
        assert step is not Step.STOP or seen.rescue


def test_over_the_head_of_a_silent_qsd_nothing_is_done() -> None:
    for seen in EVERYTHING:
        if seen.qsd is Qsd.SILENT and not seen.rescue:
            assert plan(Goal.ATTACHED, seen) is None


def test_a_second_qsd_is_never_started() -> None:
    for seen in EVERYTHING:
        for goal, force in WISHES:
            if seen.qsd is not Qsd.NONE:
                assert plan(goal, seen, force=force) not in {Step.START, Step.RESCUE}


def test_a_device_that_works_or_waits_is_never_cleared() -> None:
    for world in WORLDS:
        for goal, force in WISHES:
            if world.seen.device in (Device.HEALTHY, Device.UNSERVED):
                assert plan(goal, world.seen, force=force) is not Step.CLEAR, world


def test_without_force_there_is_no_rescue() -> None:
    for seen in EVERYTHING:
        for goal in (Goal.ATTACHED, Goal.ABSENT):
            assert seen.rescue or plan(goal, seen) is not Step.RESCUE


def test_a_rescue_server_is_never_told_to_open_the_source() -> None:
    for seen in EVERYTHING:
        for goal, force in WISHES:
            if seen.rescue:
                assert plan(goal, seen, force=force) is not Step.OPEN


def test_nothing_is_set_up_over_what_a_dead_export_left() -> None:
    for world in WORLDS:
        seen = world.seen
        if plan(Goal.ATTACHED, seen) in (Step.START, Step.OPEN, Step.EXPORT):
            assert seen.device in (Device.NONE, Device.UNSERVED)
            assert not seen.remains or (seen.exported and seen.qsd is Qsd.RUNNING)


def test_without_force_a_device_goes_only_after_its_own_qsd_has_flushed_it() -> None:
    for start in WORLDS:
        for step, before in way(Goal.ABSENT, start):
            if step is Step.DISCONNECT:
                assert before.seen.device is Device.HEALTHY
                assert not before.rescue or start.rescue, "the user has used force before"


def test_by_force_a_device_that_needs_a_server_goes_only_while_one_answers() -> None:
    for start in WORLDS:
        for step, before in way(Goal.ABSENT, start, force=True):
            if step is Step.DISCONNECT and before.kind is Kind.VDUSE:
                assert before.seen.qsd is Qsd.RUNNING
                assert before.seen.device is Device.HEALTHY


# The order of a detach ----------------------------------------------------------------------------------------


def test_a_healthy_device_is_disconnected_before_anything_else_of_it_goes() -> None:
    for start in WORLDS:
        if start.seen.device is Device.HEALTHY:
            assert plan(Goal.ABSENT, start.seen) is Step.DISCONNECT
            hangs = start.qsd is Qsd.SILENT and (start.kind is Kind.VDUSE or not start.rescue)
            needs_another = start.kind in BRIDGING and (hangs or start.stalled)
            assert plan(Goal.ABSENT, start.seen, force=True) is (Step.STOP if needs_another else Step.DISCONNECT)


def test_a_link_goes_after_the_device_and_the_directory_last() -> None:
    for start in WORLDS:
        for force in BOTH:
            steps = go(Goal.ABSENT, start, force=force)[0]
            assert Step.REMOVE not in steps[:-1]
            if Step.UNPUBLISH in steps:
                assert Step.DISCONNECT not in steps[steps.index(Step.UNPUBLISH):]


@pytest.mark.parametrize("goal", Goal)
@pytest.mark.parametrize("force", BOTH)
def test_a_device_whose_acknowledged_writes_are_lost_goes_as_by_force_whatever_is_wished(
    goal: Goal, force: bool
) -> None:
    for seen in (seen for seen in EVERYTHING if seen.device in (Device.UNSERVED, Device.HEALTHY)):
        lost = replace(seen, lost=True)
        step = plan(goal, lost, force=force)
        # Never a successor, under which a flush would succeed and the writes would be missing.
        assert step not in (Step.START, Step.OPEN, Step.CLEAR)
        if goal is Goal.FAILING:
            assert step is not None or lost.rescue, "it goes on failing"
            assert step is not Step.RECONNECT or lost.rescue
        else:
            assert step not in (Step.RECONNECT, None)
        assert step is not Step.DISCONNECT or not lost.needs_server or lost.exported


def test_once_such_a_device_is_gone_the_volume_gets_a_new_one() -> None:
    gone = Observed(qsd=Qsd.RUNNING, opened=True, exported=True, rescue=True, needs_server=True, directory=True)
    assert plan(Goal.ATTACHED, gone) is Step.STOP
    assert plan(Goal.ATTACHED, replace(gone, qsd=Qsd.NONE, opened=False, exported=False, rescue=False)) is Step.START


# Whatever happens ---------------------------------------------------------------------------------------------


@given(
    st.lists(st.one_of(st.sampled_from(ACCIDENTS), st.sampled_from(WISHES)), max_size=40), st.sampled_from(WORLDS)
)
def test_whatever_happens_on_the_way_the_goal_is_reached_once_it_is_quiet(
    happenings: list[object], world: World
) -> None:
    for happening in happenings:
        if isinstance(happening, tuple):
            goal, force = happening
            step = plan(goal, world.seen, force=force)
            world = do(step, world, force=force) if step is not None else world
        else:
            assert callable(happening)
            world = happening(world)
        assert makes_sense(world)
        if world.seen.device is Device.HEALTHY and world.qsd is Qsd.RUNNING:
            assert world.served, "what looks healthy is"
    assert go(Goal.ABSENT, world, force=True)[1] == World(world.kind)
    if not waits_in_vain(world):
        assert go(Goal.ABSENT, world)[1] == World(world.kind)
    if world.qsd is not Qsd.SILENT:
        assert go(Goal.ATTACHED, world)[1].served
