"""Hangs are told apart by what is seen, and each gets the reaction that loses nothing unless the user wished it."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode
from storaged.host import disk
from storaged.model.health import (
    RESTART_AFTER,
    STALLED_AFTER,
    WAIT,
    Condition,
    Policy,
    Progress,
    Reaction,
    Standstill,
    Trouble,
    advice,
    judge,
    meaning,
    parse_policy,
    policy_for,
)
from storaged.model.spec import VolumeSpec, check_spec, without_defaults
from tests.harness import error_of

POLICIES = st.builds(Policy, st.sampled_from([Reaction.RESTART, Reaction.FAIL]), st.integers(1, 86400)) | st.just(WAIT)
OF_QSD = [trouble for trouble in Trouble if not trouble.of_backend]
OF_BACKEND = [Trouble.BACKEND_SILENT, Trouble.NETWORK_AWAY]
THREADS = st.text("RSDTtZXI", max_size=6)


# Standstill ---------------------------------------------------------------------------------------------------


def seconds(*samples: tuple[float, int, int] | tuple[float, None]) -> float:
    """What the last of these looks (time, in flight, ended) says."""
    standstill, said = Standstill(), -1.0
    for now, *numbers in samples:
        said = standstill.update(None if numbers[0] is None else Progress(*numbers), now)
    return said


def test_a_device_without_requests_does_not_stand_still_however_long_that_lasts() -> None:
    assert seconds((0.0, 0, 7), (1000.0, 0, 7)) == 0


def test_requests_that_are_seen_once_may_have_come_just_now() -> None:
    assert seconds((1000.0, 3, 7)) == 0
    assert seconds((0.0, 0, 7), (1000.0, 3, 7)) == 0


def test_it_lasts_from_the_first_look_that_saw_them() -> None:
    assert seconds((5.0, 0, 7), (10.0, 1, 7), (12.0, 1, 7), (25.0, 64, 7)) == 15


def test_a_request_that_ends_is_a_sign_of_life_though_others_wait() -> None:
    assert seconds((0.0, 64, 7), (20.0, 64, 8)) == 0
    assert seconds((0.0, 64, 7), (20.0, 64, 8), (24.0, 64, 8)) == 4


def test_a_smaller_count_is_another_device_and_no_standstill() -> None:
    assert seconds((0.0, 1, 700), (20.0, 1, 3)) == 0


def test_it_is_over_when_nothing_waits_and_begins_anew() -> None:
    assert seconds((0.0, 1, 7), (20.0, 0, 7)) == 0
    assert seconds((0.0, 1, 7), (20.0, 0, 7), (30.0, 1, 7), (33.0, 1, 7)) == 3


def test_a_look_that_fails_changes_nothing() -> None:
    assert seconds((0.0, None)) == 0
    assert seconds((0.0, 1, 7), (12.0, 1, 7), (99.0, None)) == 12
    assert seconds((0.0, 1, 7), (12.0, 1, 7), (13.0, None), (20.0, 1, 7)) == 20


@given(
    st.lists(
        st.tuples(
            st.floats(0, 100), st.none() | st.tuples(st.integers(0, 2), st.integers(0, 1))
        ),
        min_size=1,
    )
)
def test_it_never_says_more_than_the_time_for_which_nothing_can_have_ended(
    looks: list[tuple[float, tuple[int, int] | None]]
) -> None:
    standstill, now, ended = Standstill(), 0.0, 0
    still_since: float | None = None
    said = 0.0
    for step, look in looks:
        now += step
        if look is None:
            assert standstill.update(None, now) == said
            continue
        in_flight, newly = look
        ended += newly
        if newly or not in_flight:
            still_since = now if in_flight else None
        elif still_since is None:
            still_since = now
        said = standstill.update(Progress(in_flight, ended), now)
        assert said == (0 if still_since is None else now - still_since)


# What is read of a block device -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stat", "expected"),
    [
        ("  1 2 3 4  50 6 7 8  9 10 11", Progress(9, 51)),
        ("  1 2 3 4  50 6 7 8  9 10 11  1200 13 14 15", Progress(9, 1251)),
        ("  1 2 3 4  50 6 7 8  9 10 11  1200 13 14 15  16000 17", Progress(9, 17251)),
        ("0 " * 17, Progress(0, 0)),
        ("", None),
        ("1 2 3 4", None),
        ("what is this", None),
    ],
)
def test_the_counts_of_older_and_newer_kernels_are_read_and_nothing_else_is(
    monkeypatch: pytest.MonkeyPatch, stat: str, expected: Progress | None
) -> None:
    monkeypatch.setattr(disk, "_stat", lambda path: stat.encode() if path == "/dev/vda" else b"")
    assert disk.progress("/dev/vda") == expected


def test_a_device_that_is_not_there_has_no_counts() -> None:
    assert disk.progress("/dev/no-such-device") is None


# judge --------------------------------------------------------------------------------------------------------


def judged(
    threads: str = "SSS", *, silent: bool = False, opening: bool = False, standstill: float = 0, network: bool = False
) -> Trouble | None:
    return judge(silent=silent, opening=opening, threads=threads, standstill=standstill, network=network)


@pytest.mark.parametrize(
    ("threads", "opening", "trouble"),
    [
        ("TTT", False, Trouble.QSD_STOPPED),
        ("STS", False, Trouble.QSD_STOPPED),
        ("St", False, Trouble.QSD_STOPPED),
        ("TTT", True, Trouble.QSD_STOPPED),
        ("SDS", False, Trouble.QSD_IN_KERNEL),
        # SIGCONT would not help: the kernel holds it.
        ("TTD", False, Trouble.QSD_IN_KERNEL),
        # Killed, and not gone: a zombie that holds the device.
        ("ZD", False, Trouble.QSD_IN_KERNEL),
        ("SDS", True, Trouble.QSD_OPENING),
        ("TTD", True, Trouble.QSD_OPENING),
        ("RSS", True, Trouble.QSD_OPENING),
        ("RSS", False, Trouble.QSD_SILENT),
        ("ZS", False, Trouble.QSD_SILENT),
        ("", False, None),
        ("Z", False, None),
        ("ZXX", True, None),
    ],
)
def test_a_silent_qsd_is_judged_by_what_its_threads_do(threads: str, opening: bool, trouble: Trouble | None) -> None:
    assert judged(threads, silent=True, opening=opening) is trouble


@pytest.mark.parametrize("network", [False, True])
def test_a_qsd_that_answers_is_well_until_requests_have_stood_still_for_a_while(network: bool) -> None:
    assert judged("SDTR", network=network) is None
    assert judged(standstill=STALLED_AFTER - 0.001, network=network) is None
    expected = Trouble.NETWORK_AWAY if network else Trouble.BACKEND_SILENT
    assert judged(standstill=STALLED_AFTER, network=network) is expected


@given(st.booleans(), st.booleans(), THREADS, st.floats(0, 1e6), st.booleans())
def test_who_is_to_blame_follows_from_whether_qsd_answers(
    silent: bool, opening: bool, threads: str, standstill: float, network: bool
) -> None:
    trouble = judged(threads, silent=silent, opening=opening, standstill=standstill, network=network)
    if trouble is None:
        assert not set(threads) - set("ZX") if silent else standstill < STALLED_AFTER
    else:
        assert trouble.of_backend is not silent


def test_every_trouble_can_come_out() -> None:
    everything = itertools.product([False, True], [False, True], ["S", "T", "D"], [0, STALLED_AFTER], [False, True])
    found = {
        judged(threads, silent=silent, opening=opening, standstill=standstill, network=network)
        for silent, opening, threads, standstill, network in everything
    }
    # That there is no QSD, or none that has its server, is nothing to judge.
    assert found == {None, *Trouble} - {Trouble.NO_SERVER, Trouble.BACKEND_LOST}


# Policies -----------------------------------------------------------------------------------------------------


@given(POLICIES)
def test_a_policy_is_read_as_it_is_spelled(policy: Policy) -> None:
    assert parse_policy(str(policy)) == policy


@pytest.mark.parametrize("text", ["wait", "restart-after:1", "restart-after:30", "fail-after:86400"])
def test_a_spelling_is_given_back(text: str) -> None:
    assert str(parse_policy(text)) == text


@pytest.mark.parametrize(
    "text",
    [
        "", "Wait", "wait ", "wait:3", "restart", "restart-after", "restart-after:", "restart-after:0", "fail-after:-1",
        "fail-after:86401", "fail-after:99999", "fail-after:1.5", "fail-after:1e3", "fail-after:030", "fail-after:٣",
        "fail-after:5\n", "wait-after:5", "restart-after:5,fail-after:9", "\udcff",
    ],
)
def test_what_is_no_policy_is_refused_with_what_there_is(text: str) -> None:
    error = error_of(lambda: parse_policy(text))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    for word in ("wait", "restart-after:", "fail-after:", "86400"):
        assert word in error.hint
    assert f"{error}".encode()


@given(st.text("aefilnrstw-:0123456789 ", max_size=20))
def test_no_text_has_two_spellings(text: str) -> None:
    try:
        policy = parse_policy(text)
    except Exception:
        return
    assert str(policy) == text


def chosen(
    trouble: Trouble, hang: Policy | None = None, stall: Policy | None = None, *, loses: bool = False,
    bridged: bool = True,
) -> Policy:
    return policy_for(trouble, hang, stall, loses_writes=loses, bridged=bridged)


RESTART, FAIL = Policy(Reaction.RESTART, 5), Policy(Reaction.FAIL, 7)


@pytest.mark.parametrize("trouble", OF_BACKEND)
@pytest.mark.parametrize("hang", [None, WAIT, RESTART, FAIL])
def test_a_silent_backend_is_waited_for_unless_the_user_wishes_otherwise(
    trouble: Trouble, hang: Policy | None
) -> None:
    assert chosen(trouble, hang) == WAIT
    for stall in (WAIT, RESTART, FAIL):
        assert chosen(trouble, hang, stall) == stall


@pytest.mark.parametrize("trouble", [Trouble.QSD_STOPPED, Trouble.QSD_SILENT])
def test_a_qsd_that_hangs_is_replaced_by_itself_only_where_that_is_no_more_than_a_pause(trouble: Trouble) -> None:
    assert chosen(trouble) == Policy(Reaction.RESTART, RESTART_AFTER)
    assert str(chosen(trouble)) == "restart-after:30"
    assert chosen(trouble, loses=True) == WAIT
    assert chosen(trouble, bridged=False) == WAIT
    assert chosen(trouble, loses=True, bridged=False) == WAIT


@pytest.mark.parametrize("trouble", [Trouble.QSD_STOPPED, Trouble.QSD_SILENT])
@pytest.mark.parametrize("hang", [WAIT, RESTART, FAIL])
@pytest.mark.parametrize("loses", [False, True])
@pytest.mark.parametrize("bridged", [False, True])
def test_the_users_wish_counts_for_a_qsd_that_hangs(
    trouble: Trouble, hang: Policy, loses: bool, bridged: bool
) -> None:
    assert chosen(trouble, hang, FAIL, loses=loses, bridged=bridged) == hang


def test_what_the_kernel_holds_cannot_be_replaced_but_its_requests_may_fail() -> None:
    assert chosen(Trouble.QSD_IN_KERNEL) == WAIT
    assert chosen(Trouble.QSD_IN_KERNEL, RESTART) == WAIT
    assert chosen(Trouble.QSD_IN_KERNEL, FAIL) == FAIL


@given(st.none() | POLICIES, st.none() | POLICIES, st.booleans(), st.booleans())
def test_opening_is_always_waited_for(hang: Policy | None, stall: Policy | None, loses: bool, bridged: bool) -> None:
    assert chosen(Trouble.QSD_OPENING, hang, stall, loses=loses, bridged=bridged) == WAIT


@given(st.none() | POLICIES, st.none() | POLICIES, st.booleans(), st.booleans())
def test_a_qsd_that_fails_all_for_good_is_replaced_at_once_whatever_is_wished(
    hang: Policy | None, stall: Policy | None, loses: bool, bridged: bool
) -> None:
    assert chosen(Trouble.BACKEND_LOST, hang, stall, loses=loses, bridged=bridged) == Policy(Reaction.RESTART, 0)


@given(
    st.sampled_from([trouble for trouble in Trouble if trouble is not Trouble.BACKEND_LOST]), st.none() | POLICIES,
    st.none() | POLICIES, st.booleans(), st.booleans(),
)
def test_nothing_fails_and_nothing_is_lost_unless_the_user_wished_it(
    trouble: Trouble, hang: Policy | None, stall: Policy | None, loses: bool, bridged: bool
) -> None:
    policy = chosen(trouble, hang, stall, loses=loses, bridged=bridged)
    wished = stall if trouble.of_backend else hang
    if wished is None:
        assert policy.reaction is not Reaction.FAIL
        if loses or not bridged:
            assert policy == WAIT
    else:
        assert policy in (wished, WAIT)


# As options of a volume ---------------------------------------------------------------------------------------


def volume(**options: str) -> VolumeSpec:
    """A volume with these options, - for _."""
    return VolumeSpec(
        name="web1", source="/images/web1", options={key.replace("_", "-"): value for key, value in options.items()}
    )


@given(POLICIES, POLICIES)
def test_a_volume_has_the_policies_that_its_options_spell(hang: Policy, stall: Policy) -> None:
    spec = volume(on_hang=str(hang), on_stall=str(stall))
    check_spec(spec, frozenset())
    assert (spec.on_hang, spec.on_stall) == (hang, stall)


def test_a_volume_of_which_nothing_was_said_has_no_policies_of_its_own() -> None:
    assert (volume().on_hang, volume().on_stall) == (None, None)


def test_to_wait_for_a_silent_backend_is_the_same_wish_as_to_say_nothing_and_for_qsd_it_is_not() -> None:
    assert without_defaults(volume(on_stall="wait"), {}) == volume()
    assert without_defaults(volume(on_hang="wait"), {}) == volume(on_hang="wait")


@pytest.mark.parametrize("option", ["on_hang", "on_stall"])
@pytest.mark.parametrize("text", ["", "fail", "fail-after:0", "restart-after:86401", "fail-after:\udcff"])
def test_an_option_that_spells_no_policy_is_refused_and_named(option: str, text: str) -> None:
    error = error_of(lambda: check_spec(volume(**{option: text}), frozenset()))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert error.volume == "web1"
    assert option.replace("_", "-") in error.message
    assert "fail-after:SECONDS" in error.hint


# For people ---------------------------------------------------------------------------------------------------


def test_a_condition_says_when_something_will_be_done() -> None:
    assert Condition(Trouble.QSD_SILENT, 1000.0, "", RESTART).acts_at == 1005.0
    assert Condition(Trouble.QSD_SILENT, 1000.0, "", FAIL).acts_at == 1007.0
    assert Condition(Trouble.QSD_SILENT, 1000.0, "", WAIT).acts_at is None


def test_the_names_are_stable() -> None:
    assert [str(trouble) for trouble in Trouble] == [
        "qsd-stopped", "qsd-in-kernel", "qsd-opening", "qsd-silent", "backend-silent", "network-away", "backend-lost",
        "no-server",
    ]


@pytest.mark.parametrize("trouble", Trouble)
def test_each_trouble_is_said_with_what_to_do(trouble: Trouble) -> None:
    assert meaning(trouble)
    said = advice(trouble, "web1", 4711)
    assert "{" not in said
    # Of these two the end comes by itself.
    assert trouble in (Trouble.QSD_OPENING, Trouble.BACKEND_LOST) or "storaged rescue web1" in said


def test_who_stopped_qsd_can_let_it_go_on() -> None:
    assert "kill -CONT 4711" in advice(Trouble.QSD_STOPPED, "web1", 4711)


@pytest.mark.parametrize("trouble", OF_QSD)
def test_no_advice_holds_for_two_troubles_of_qsd(trouble: Trouble) -> None:
    others = [other for other in Trouble if other is not trouble]
    assert all(advice(trouble, "a", 1) != advice(other, "a", 1) for other in others)
    assert all(meaning(trouble) != meaning(other) for other in others)
