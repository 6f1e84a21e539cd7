"""The journal of a volume: bounded whatever happens, and damage to it costs nothing else."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.model.history import LIMIT, PAUSE_BOUNDS, Entry, Happening, History

NOW = 1_700_000_000.0
HOUR = 3600.0
ANY = st.text(st.characters(exclude_categories=()))  # lone surrogates, too
ADDED = st.tuples(
    st.sampled_from(Happening), ANY | st.sampled_from(["a", "b"]), st.floats(-1e12, 1e12),
    st.none() | st.floats(0, 1e9),
)


def journal(*happened: tuple[str, str, float, float | None]) -> History:
    history = History()
    for kind, message, now, seconds in happened:
        history.add(kind, message, now=now, seconds=seconds)
    return history


def test_what_happens_is_told_in_its_order_with_its_time_and_how_long_it_took() -> None:
    history = History()
    history.add(Happening.DEATH, "killed by signal 9", now=NOW)
    history.add(Happening.RECOVERED, "another QSD serves it", now=NOW + 2, seconds=1.5)
    assert history.entries == (
        Entry(time=NOW, kind="death", message="killed by signal 9", last=NOW),
        Entry(time=NOW + 2, kind="recovered", message="another QSD serves it", seconds=1.5, last=NOW + 2),
    )
    assert history.counts() == {"death": 1, "recovered": 1}
    assert history.paused == 1.5


def test_the_same_thing_in_a_row_is_counted_with_its_first_and_last_time_and_the_longest() -> None:
    history = journal(("hang", "x", NOW, 3.0), ("hang", "x", NOW + HOUR, 9.0), ("hang", "x", NOW + 2 * HOUR, None))
    assert history.entries == (
        Entry(time=NOW, kind="hang", message="x", seconds=9.0, times=3, last=NOW + 2 * HOUR),
    )
    assert history.counts() == {"hang": 3}


@pytest.mark.parametrize(
    "second",
    [("hang", "y", NOW + 1, None), ("death", "x", NOW + 1, None), ("hang", "x", NOW + HOUR + 1, None)],
    ids=["another message", "another kind", "more than an hour later"],
)
def test_what_is_not_the_same_has_an_entry_of_its_own(second: tuple[str, str, float, float | None]) -> None:
    history = journal(("hang", "x", NOW, None), second)
    assert [entry.times for entry in history.entries] == [1, 1]


def test_the_same_thing_with_another_in_between_is_told_again() -> None:
    history = journal(*(("death", "x", NOW, None), ("recovered", "y", NOW, 1.0)) * 3)
    assert [entry.kind for entry in history.entries] == ["death", "recovered"] * 3


def test_a_clock_that_was_set_back_makes_no_second_entry() -> None:
    assert len(journal(("hang", "x", NOW, None), ("hang", "x", NOW - 10 * HOUR, None)).entries) == 1


def test_the_oldest_go_and_are_still_counted() -> None:
    history = journal(*(("death", str(number), NOW + number, None) for number in range(LIMIT + 50)))
    assert [entry.message for entry in history.entries] == [str(number) for number in range(50, LIMIT + 50)]
    assert history.counts() == {"death": LIMIT + 50}
    again = History.decode(history.encode())
    assert again.entries == history.entries
    assert again.counts() == history.counts()


def test_the_pause_is_that_of_the_last_recovery_which_has_one_and_of_nothing_else() -> None:
    history = journal(("recovered", "a", NOW, 9.0), ("recovered", "a", NOW + 1, 2.0))
    assert history.paused == 2.0
    history.add(Happening.RECOVERED, "the backend is back", now=NOW + 2)
    history.add(Happening.HANG, "x", now=NOW + 3, seconds=70.0)
    assert history.paused == 2.0
    assert History().paused is None


@given(st.lists(ADDED, max_size=3 * LIMIT))
def test_whatever_happens_it_is_bounded_and_can_be_stored(happened: list[tuple[str, str, float, float | None]]) -> None:
    history = journal(*happened)
    assert len(history.entries) <= LIMIT
    assert all(len(entry.message) <= 1000 for entry in history.entries)
    assert sum(history.counts().values()) == len(happened)
    again = History.decode(history.encode())
    assert (again.entries, again.counts(), again.paused) == (history.entries, history.counts(), history.paused)


def test_the_largest_journal_that_there_can_be_fits_into_a_few_hundred_kilobytes() -> None:
    # Six bytes for a letter is the most that JSON takes: \u001b. What is not ASCII takes four at most.
    history = journal(*(("death", "\x1b" * 2000, NOW + 2 * HOUR * number, None) for number in range(2 * LIMIT)))
    assert LIMIT * 6000 < len(history.encode()) < LIMIT * 6200


@pytest.mark.parametrize("message", ["x" * 1000, "x" * 1001, "x" * 100_000, "\udcff" * 1000])
def test_a_long_message_is_cut_and_says_so(message: str) -> None:
    (entry,) = journal(("failure", message, NOW, None)).entries
    assert len(entry.message) <= 1000
    assert entry.message.endswith("…") == (message != "x" * 1000)


@given(st.binary())
@example(b"")
@example(b"null")
@example(b"[]")
@example(b"[" * 100_000)
@example(b'{"entries": [], "counts": {"\xff": 1}}')
@example(b'{"entries": [{"time": 1, "kind": "death"}], "counts": {}}')
@example(b'{"entries": [{"time": 1e999, "kind": "death", "message": ""}], "counts": {}}')
@example(b'{"entries": [], "counts": {"death": "many"}}')
def test_damaged_data_gives_an_empty_journal_that_can_be_used(data: bytes) -> None:
    history = History.decode(data)
    assert history.entries == ()
    assert history.counts() == {}
    history.add(Happening.DEATH, "x", now=NOW)
    assert len(history.entries) == 1


@given(st.data())
def test_a_journal_that_was_cut_short_or_garbled_is_never_an_exception(data: st.DataObject) -> None:
    good = journal(("death", "a", NOW, None), ("recovered", "b", NOW, 1.0)).encode()
    at = data.draw(st.integers(0, len(good) - 1))
    assert History.decode(good[:at]).entries == ()
    garbled = History.decode(good[:at] + data.draw(st.binary(max_size=3)) + good[at + 1:])
    assert len(garbled.entries) <= 2


def test_the_entry_of_a_newer_daemon_can_be_read_and_too_many_are_cut() -> None:
    entry = b'{"time": 1, "kind": "teleported", "message": "m", "colour": "blue"}'
    history = History.decode(b'{"counts": {"teleported": 500}, "entries": [' + b",".join([entry] * 500) + b"]}")
    assert len(history.entries) == LIMIT
    assert history.entries[0].kind == "teleported"
    assert history.counts() == {"teleported": 500}


def test_pauses_are_counted_in_ranges_and_added_up() -> None:
    history = journal(
        ("recovered", "x", NOW, 0.05), ("recovered", "x", NOW, 0.1), ("recovered", "x", NOW, 3.0),
        ("recovered", "x", NOW, 1000.0), ("recovered", "x", NOW, None), ("hang", "x", NOW, 5.0),
    )
    assert history.pauses == (2, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1)
    assert history.pause_seconds == pytest.approx(1003.15)
    assert history.count(Happening.RECOVERED) == 5
    assert history.count(Happening.DEATH) == 0


def test_what_was_counted_is_there_again() -> None:
    history = journal(("recovered", "x", NOW, 3.0))
    history.waited = 7.5
    again = History.decode(history.encode())
    assert (again.pauses, again.pause_seconds, again.waited) == (history.pauses, 3.0, 7.5)


@pytest.mark.parametrize("more", ["", ', "pauses": [1, 2]', ', "pauses": [], "pause_seconds": 5.0'])
def test_the_journal_of_another_version_begins_its_pauses_anew(more: str) -> None:
    again = History.decode(f'{{"entries": [], "counts": {{"recovered": 3}}{more}}}'.encode())
    assert again.pauses == (0,) * (len(PAUSE_BOUNDS) + 1)
    assert again.pause_seconds == 0
    again.add(Happening.RECOVERED, "x", now=NOW, seconds=1e6)
    assert again.pauses[-1] == 1
    assert again.count(Happening.RECOVERED) == 4
