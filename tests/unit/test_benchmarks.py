"""What the benchmarks of bench/ make of what they have seen."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def restart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """bench/restart.py, which is a program."""
    monkeypatch.syspath_prepend(str(BENCH))
    import restart

    yield restart
    for name in ("restart", "common"):
        sys.modules.pop(name, None)


def steady(restart: Any, until: int, *, waits_at: int = -1, waits: int = 0) -> list[Any]:
    """An I/O of 2 ms each 100 ms, as five reads and five writes a second have it.

    The one that ends at ``waits_at`` took longer, and the next ones are late.
    """
    done, late = [], 0
    for at in range(100, until, 100):
        late += waits if at == waits_at else 0
        done.append(restart.Done(float(at + late), 2.0 + (waits if at == waits_at else 0)))
    return done


def test_a_pause_of_one_volume_is_found_where_it_counts_and_only_there(restart: Any) -> None:
    quiet = [steady(restart, 9000) for _ in range(4)]
    told = restart.figures_of(quiet, 3000, 6000, 5)
    assert told["one I/O, longest of all"] == 2
    assert told["between two of a volume, longest of all"] == 100
    assert told["of the I/O asked for, done"] == pytest.approx(1, abs=0.02)
    for at, counts in ((1000, False), (3000, True), (4500, True), (5900, True), (8000, False)):
        told = restart.figures_of([*quiet, steady(restart, 9000, waits_at=at, waits=700)], 3000, 6000, 5)
        assert told["one I/O, longest of all"] == (702 if counts else 2), at
        assert told["between two of a volume, longest of all"] == (800 if counts else 100), at
        assert told["between two of a volume, longest of the median volume"] == 100


def test_a_volume_without_any_io_is_no_figure(restart: Any) -> None:
    with pytest.raises(SystemExit):
        restart.figures_of([steady(restart, 9000), []], 3000, 6000, 5)


def test_what_a_machine_was_too_slow_for_is_told(restart: Any) -> None:
    told = restart.figures_of([steady(restart, 9000)], 3000, 6000, 10)
    assert told["of the I/O asked for, done"] == pytest.approx(0.5, abs=0.02)
