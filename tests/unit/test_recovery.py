"""A first death is repaired at once; a QSD that dies again and again is not restarted in a tight loop."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.recovery import STABLE_AFTER, backoff


def test_the_first_death_is_repaired_at_once() -> None:
    assert backoff(1) == 0


@pytest.mark.parametrize(("deaths", "seconds"), [(2, 1), (3, 2), (4, 4), (7, 32), (8, 60), (9, 60)])
def test_each_further_one_waits_twice_as_long_up_to_a_minute(deaths: int, seconds: float) -> None:
    assert backoff(deaths) == seconds


@given(st.integers(2, 10**9))
def test_the_wait_never_shrinks_never_vanishes_and_never_exceeds_a_minute(deaths: int) -> None:
    assert 0 < backoff(deaths) <= backoff(deaths + 1) <= 60


def test_a_qsd_must_live_at_least_as_long_as_the_longest_wait_to_count_as_stable() -> None:
    assert backoff(10**6) <= STABLE_AFTER
