"""No two volumes of a daemon have one source when one of them writes to it."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.supervisor.claims import Claims


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_source_that_is_written_to_has_one_volume(first: bool, second: bool) -> None:
    claims = Claims()
    claims.hold("a", {"s": first})
    with pytest.raises(StoragedError) as caught:
        claims.hold("b", {"s": second})
    assert caught.value.code is ErrorCode.SOURCE_IN_USE
    assert caught.value.users == ("volume a",)
    assert caught.value.hint


def test_any_number_may_read_one_source() -> None:
    claims = Claims()
    for name in "abc":
        claims.hold(name, {"s": False})


def test_the_base_of_one_volume_is_not_written_to_by_another() -> None:
    claims = Claims()
    claims.hold("a", {"overlay": True, "base": False})
    with pytest.raises(StoragedError):
        claims.hold("b", {"other": True, "base": True})


def test_a_volume_takes_its_own_source_again_and_gives_up_what_it_no_longer_has() -> None:
    claims = Claims()
    claims.hold("a", {"s": True, "old": True})
    claims.hold("a", {"s": True})
    claims.hold("b", {"old": True})


def test_a_refusal_changes_nothing() -> None:
    claims = Claims()
    claims.hold("a", {"s": True})
    claims.hold("b", {"t": True})
    with pytest.raises(StoragedError):
        claims.hold("b", {"u": True, "s": True})
    claims.hold("c", {"u": True})
    with pytest.raises(StoragedError):
        claims.hold("c", {"t": True})


def test_what_is_dropped_is_free_and_dropping_nothing_is_no_error() -> None:
    claims = Claims()
    claims.hold("a", {"s": True})
    claims.drop("a")
    claims.drop("a")
    claims.hold("b", {"s": True})


def test_it_keeps_its_own_copy() -> None:
    claims, wishes = Claims(), {"s": True}
    claims.hold("a", wishes)
    wishes.clear()
    with pytest.raises(StoragedError):
        claims.hold("b", {"s": True})


SOURCES = st.dictionaries(st.sampled_from("xyz"), st.booleans(), max_size=3)


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | SOURCES), max_size=30))
def test_whatever_is_asked_in_whatever_order_a_writer_is_alone(asked: list[tuple[str, dict[str, bool] | None]]) -> None:
    claims, held = Claims(), dict[str, dict[str, bool]]()
    for name, sources in asked:
        if sources is None:
            claims.drop(name)
            held.pop(name, None)
            continue
        conflict = any(
            identity in theirs and (writes or theirs[identity])
            for other, theirs in held.items() if other != name for identity, writes in sources.items()
        )
        try:
            claims.hold(name, sources)
        except StoragedError:
            assert conflict
        else:
            assert not conflict
            held[name] = sources


def test_of_many_threads_that_want_one_source_one_gets_it() -> None:
    claims, winners, start = Claims(), list[int](), threading.Barrier(16)

    def want(number: int) -> None:
        start.wait()
        try:
            claims.hold(f"v{number}", {"s": True})
        except StoragedError:
            return
        winners.append(number)

    threads = [threading.Thread(target=want, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
