"""The search for settings against synthetic hosts: what it accepts, how sure it is, and when it ends."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.bench.search import ERROR, PAIRS, PAIRS_OF_VERIFICATION, Knob, Outcome, Pair, Search, least_budget

#: The relative noise of a single measurement, as standard deviation of its logarithm.
NOISE = 0.05


@dataclass
class Host:
    """A host on which each value has an effect (a factor), and each measurement some noise and takes some time."""

    seed: int
    effects: Mapping[tuple[str, str], float] = field(default_factory=dict)
    noise: float = NOISE
    seconds: tuple[float, float] = (1.0, 1.0)
    drift: float = 0.0
    """By which part it becomes slower with each measurement."""
    impossible: frozenset[tuple[str, str]] = frozenset()
    now: float = 0.0
    measured: int = 0
    pairs: list[Pair] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.chance = random.Random(self.seed)

    def measure(self, chosen: Mapping[str, str]) -> float:
        """The logarithm of a figure."""
        self.now += self.chance.uniform(*self.seconds) / 2
        self.measured += 1
        effect = sum(math.log(self.effects.get(one, 1.0)) for one in chosen.items())
        return effect + self.chance.gauss(0, self.noise) - self.drift * self.measured

    def answer(self, pair: Pair) -> Outcome:
        """Measure a pair in its order."""
        self.pairs.append(pair)
        if self.impossible & set(pair.candidate.items()):
            return Outcome(self.now, problem="the kernel has none")
        if pair.candidate_first:
            mine, other = self.measure(pair.candidate), self.measure(pair.against)
        else:
            other, mine = self.measure(pair.against), self.measure(pair.candidate)
        return Outcome(self.now, math.exp(mine - other))


def run(search: Search, host: Host) -> Search:
    """Let a search come to its end."""
    asked = search.pairs()
    try:
        pair = next(asked)
        while True:
            pair = asked.send(host.answer(pair))
    except StopIteration:
        return search


def some(count: int, values: int = 2, *, rising: bool = False) -> list[Knob]:
    """Settings a, b, c, …, each with values 1, 2, …."""
    return [
        Knob(chr(ord("a") + number), "0", tuple(str(value + 1) for value in range(values)), rising=rising)
        for number in range(count)
    ]


def test_what_brings_nothing_is_accepted_no_more_often_than_is_stated() -> None:
    # 2000 changes in 500 searches, in all of which nothing helps. The limits are 4 standard deviations away.
    searches = [run(Search(some(2), 1e9, 1.0), Host(seed)) for seed in range(500)]
    changes = [step for search in searches for step in search.steps]
    accepted = sum(step.accepted for step in changes)
    assert len(changes) >= 2000
    assert accepted <= ERROR * len(changes) + 4 * math.sqrt(ERROR * len(changes))
    taken = sum(bool(search.taken) for search in searches)
    assert taken <= ERROR * len(searches) + 4 * math.sqrt(ERROR * len(searches))
    # The verification counts: more are accepted than are taken.
    assert taken < accepted


def test_a_host_that_becomes_slower_all_the_time_is_no_change_s_advantage() -> None:
    searches = [run(Search(some(2), 1e9, 1.0), Host(seed, drift=0.1)) for seed in range(200)]
    changes = [step for search in searches for step in search.steps]
    assert sum(step.accepted for step in changes) <= ERROR * len(changes) + 4 * math.sqrt(ERROR * len(changes))


@given(seed=st.integers(0, 2**32), factor=st.floats(1.5, 20), count=st.integers(1, 5), where=st.integers(0, 4))
@settings(max_examples=60, deadline=None)
def test_a_big_gain_is_found_and_verified_wherever_it_is(seed: int, factor: float, count: int, where: int) -> None:
    chosen = (some(count)[where % count].option, "2")
    search = run(Search(some(count), 1e9, 1.0), Host(seed, {chosen: factor}))
    assert search.taken.items() >= {chosen}
    assert search.verification is not None
    assert search.verification.low is not None
    assert search.verification.low > 1
    assert search.verification.value > math.sqrt(factor)


@given(
    seed=st.integers(0, 2**32), budget=st.floats(0, 400), slowest=st.floats(0.5, 4), count=st.integers(1, 6),
    effects=st.dictionaries(
        st.tuples(st.sampled_from("abcdef"), st.sampled_from("123")), st.floats(0.2, 5), max_size=6
    ),
    noise=st.floats(0, 0.5), rising=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_it_keeps_within_its_budget_ends_and_takes_only_what_was_verified(
    seed: int, budget: float, slowest: float, count: int, effects: dict[tuple[str, str], float], noise: float,
    rising: bool,
) -> None:
    host = Host(seed, effects, noise, seconds=(0.5, slowest))
    search = run(Search(some(count, 3, rising=rising), budget, slowest), host)
    assert host.now <= budget
    # Twice through all values, at most, and the verification.
    assert len(host.pairs) <= 2 * 3 * count * PAIRS + PAIRS_OF_VERIFICATION
    values = {(knob.option, value) for knob in search.knobs for value in knob.values}
    assert search.best.items() <= values
    assert search.taken in ({}, search.best)
    if search.taken:
        assert search.verified_pairs == PAIRS_OF_VERIFICATION
        assert search.verification is not None
        assert search.verification.low is not None
        assert search.verification.low > 1
    for step in search.steps:
        if step.accepted:
            assert step.pairs == PAIRS
            assert step.ratio is not None
            assert step.ratio.low is not None
            assert step.ratio.low > 1
    if budget < least_budget(slowest):
        assert not host.pairs
        assert search.untried


@given(seed=st.integers(0, 2**32))
@settings(max_examples=30, deadline=None)
def test_pairs_are_interleaved_and_differ_in_one_setting(seed: int) -> None:
    host = Host(seed, {("a", "1"): 2.0})
    search = run(Search(some(2), 1e9, 1.0), host)
    tried = host.pairs[:-PAIRS_OF_VERIFICATION]
    for pair in tried:
        assert len(pair.candidate.items() ^ pair.against.items()) in (1, 2)
        assert len({option for option, _ in pair.candidate.items() ^ pair.against.items()}) == 1
    assert [pair.candidate_first for pair in tried[:PAIRS]] == [True, False] * (PAIRS // 2)
    for pair in host.pairs[-PAIRS_OF_VERIFICATION:]:
        assert (dict(pair.candidate), dict(pair.against)) == (search.best, {})


def test_a_change_that_is_not_ahead_is_given_up_early_and_what_is_slower_ends_a_row_that_rises() -> None:
    host = Host(1, {("a", "1"): 0.5, ("a", "2"): 9.0}, noise=0.001)
    search = run(Search(some(1, rising=True), 1e9, 1.0), host)
    assert [(step.value, step.pairs, step.why) for step in search.steps] == [("1", 2, "slower")]
    assert search.taken == {}
    search = run(Search(some(1), 1e9, 1.0), Host(1, {("a", "1"): 0.5, ("a", "2"): 9.0}, noise=0.001))
    assert search.taken == {"a": "2"}


def test_what_cannot_be_set_up_here_is_told_and_the_rest_goes_on() -> None:
    host = Host(1, {("b", "1"): 2.0}, impossible=frozenset({("a", "1"), ("a", "2")}))
    search = run(Search(some(2), 1e9, 1.0), host)
    assert [step.why for step in search.steps[:2]] == ["not possible here: the kernel has none"] * 2
    assert all(step.ratio is None and not step.accepted for step in search.steps[:2])
    assert search.taken == {"b": "1"}


def test_a_gain_that_the_verification_does_not_see_is_not_taken() -> None:
    class Fading(Host):
        def answer(self, pair: Pair) -> Outcome:
            outcome = super().answer(pair)
            return Outcome(outcome.elapsed, 1.0) if pair.what.startswith("the best") else outcome

    search = run(Search(some(1, 1), 1e9, 1.0), Fading(1, {("a", "1"): 2.0}))
    assert search.best == {"a": "1"}
    assert search.taken == {}
    assert search.verified_pairs == PAIRS_OF_VERIFICATION


def test_what_was_found_is_there_whenever_it_is_left() -> None:
    search, host = Search(some(2), 1e9, 1.0), Host(1, {("a", "1"): 3.0}, noise=0.001)
    asked = search.pairs()
    pair = next(asked)
    while not search.best:
        pair = asked.send(host.answer(pair))
    asked.close()
    assert search.best == {"a": "1"}
    assert search.taken == {}
    assert [(step.option, step.value, step.accepted) for step in search.steps] == [("a", "1", True)]


def test_a_verification_that_cannot_be_finished_is_told_and_nothing_is_taken() -> None:
    class Breaking(Host):
        def answer(self, pair: Pair) -> Outcome:
            outcome = super().answer(pair)
            return Outcome(outcome.elapsed, problem="it broke") if pair.what.startswith("the best") else outcome

    search = run(Search(some(1, 1), 1e9, 1.0), Breaking(1, {("a", "1"): 2.0}))
    assert (search.best, search.taken, search.verification) == ({"a": "1"}, {}, None)
    assert search.unverified == "it broke"
    assert run(Search(some(1, 1), 1e9, 1.0), Host(1, {("a", "1"): 2.0})).unverified == ""


def test_a_verification_that_there_is_no_time_for_is_not_begun_and_told() -> None:
    class Slowing(Host):
        def answer(self, pair: Pair) -> Outcome:
            self.now += 50.0 if len(self.pairs) == PAIRS - 1 else 0.0
            return super().answer(pair)

    host = Slowing(1, {("a", "1"): 2.0})
    search = run(Search(some(1, 1), 60.0, 1.0), host)
    assert (search.best, search.taken) == ({"a": "1"}, {})
    assert "time" in search.unverified
    assert not [pair for pair in host.pairs if pair.what.startswith("the best")]
