"""Means, ratios and intervals: what must hold for any figures, and how often the interval is right."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.bench.statistics import RESOLUTION, Estimate, mean, paired, student, unpaired

FIGURES = st.floats(min_value=1e-3, max_value=1e9)
ROUNDS = st.lists(FIGURES, min_size=2, max_size=12)
PAIRS = st.lists(st.tuples(FIGURES, FIGURES), min_size=2, max_size=12)


def sides(pairs: list[tuple[float, float]]) -> tuple[list[float], list[float]]:
    """The ones and the others."""
    return [one for one, _ in pairs], [other for _, other in pairs]


def bounds(estimate: Estimate) -> tuple[float, float]:
    """Both ends of an interval that is there."""
    assert estimate.low is not None
    assert estimate.high is not None
    return estimate.low, estimate.high


@given(ROUNDS)
def test_a_mean_is_between_the_least_and_the_greatest_and_within_its_interval(values: list[float]) -> None:
    found = mean(values)
    low, high = bounds(found)
    assert min(values) * (1 - 1e-9) <= found.value <= max(values) * (1 + 1e-9)
    assert low <= found.value <= high


@given(ROUNDS, FIGURES)
def test_of_equal_rounds_the_interval_is_the_resolution(values: list[float], figure: float) -> None:
    low, high = bounds(mean([figure] * len(values)))
    assert high / figure == pytest.approx(1 + RESOLUTION)
    assert figure / low == pytest.approx(1 + RESOLUTION)


@given(PAIRS)
def test_two_that_change_sides_have_the_inverse_ratio_and_interval(pairs: list[tuple[float, float]]) -> None:
    ones, others = sides(pairs)
    forth, back = paired(ones, others), paired(others, ones)
    assert forth.value == pytest.approx(1 / back.value)
    assert bounds(forth)[0] == pytest.approx(1 / bounds(back)[1])
    assert forth.tells_a_difference == back.tells_a_difference


@given(PAIRS, st.lists(st.floats(min_value=0.01, max_value=100), min_size=12, max_size=12))
def test_what_makes_both_of_a_round_faster_does_not_count(
    pairs: list[tuple[float, float]], factors: list[float]
) -> None:
    busy = [(one * factor, other * factor) for (one, other), factor in zip(pairs, factors, strict=False)]
    assert paired(*sides(busy)).value == pytest.approx(paired(*sides(pairs)).value, rel=1e-6)
    assert bounds(paired(*sides(busy))) == pytest.approx(bounds(paired(*sides(pairs))), rel=1e-6)


@given(ROUNDS)
def test_against_itself_nothing_is_told(values: list[float]) -> None:
    for found in (paired(values, values), unpaired(values, values)):
        assert found.value == pytest.approx(1)
        assert not found.tells_a_difference


@given(FIGURES, FIGURES)
def test_a_single_round_has_no_interval_and_tells_no_difference(one: float, other: float) -> None:
    for found in (mean([one]), paired([one], [other]), unpaired([one], [other])):
        assert (found.low, found.high, found.spread) == (None, None, None)
        assert not found.tells_a_difference


@given(ROUNDS, ROUNDS)
def test_two_runs_that_change_sides_have_the_inverse_ratio(ones: list[float], others: list[float]) -> None:
    assert unpaired(ones, others).value == pytest.approx(1 / unpaired(others, ones).value)


def test_students_t_is_that_of_the_tables() -> None:
    # Abramowitz and Stegun, table 26.10.
    known = {1: 12.706, 3: 3.182, 10: 2.228, 30: 2.042, 40: 2.021, 60: 2.000, 120: 1.980}
    for freedom, expected in known.items():
        assert student(freedom) == pytest.approx(expected, abs=0.001)
    assert student(10**9) == pytest.approx(1.95996, abs=1e-4)
    assert [student(n) for n in range(1, 200)] == sorted((student(n) for n in range(1, 200)), reverse=True)


@pytest.mark.parametrize("rounds", [2, 4, 6, 10])
def test_95_of_100_intervals_have_the_true_ratio_in_them(rounds: int) -> None:
    chance = random.Random(7)
    hits, tries, true = 0, 3000, 0.78
    for _ in range(tries):
        others = [1000 * math.exp(chance.gauss(0, 0.3)) for _ in range(rounds)]
        ones = [other * true * math.exp(chance.gauss(0, 0.1)) for other in others]
        low, high = bounds(paired(ones, others))
        hits += low <= true <= high
    # Three standard deviations of a share of 3000.
    assert hits / tries == pytest.approx(0.95, abs=0.012)


def test_pairs_tell_what_two_runs_apart_cannot() -> None:
    """Where the machine is several times as fast in one round as in another."""
    others = [1000.0, 3000.0, 500.0, 8000.0]
    ones = [0.8 * value for value in others]
    assert paired(ones, others).tells_a_difference
    assert not unpaired(ones, others).tells_a_difference


def test_a_ratio_is_told_with_its_interval_unless_that_says_nothing() -> None:
    assert Estimate(0.5, None, None).times == "0.50"
    assert Estimate(0.5, 0.4, 0.6).times == "0.50 (0.40 to 0.60)"
    assert Estimate(0.5, 0.0001, 2500).times == "0.50 (anything)"
