"""The pauses of a volume: what I/O has waited for is added up however the wait ended."""

from __future__ import annotations

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from storaged.supervisor.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    held: Any = SimpleNamespace(directory=str(tmp_path), spec=SimpleNamespace(name="a"))
    return Journal(held)


def test_a_pause_counts_while_it_lasts_and_when_it_is_over(journal: Journal) -> None:
    assert journal.pause == 0
    journal.begin_pause(time.monotonic() - 20)
    journal.begin_pause(time.monotonic())  # it waits already
    assert 20 <= journal.pause < 25
    assert journal.history.waited == 0
    journal.end_pause("online again")
    assert journal.pause == 0
    assert 20 <= journal.history.waited < 25
    assert journal.history.pause_seconds == journal.history.waited == journal.history.paused
    journal.end_pause("online again")
    assert journal.history.counts() == {"recovered": 1}


def test_a_wait_that_ended_with_errors_was_one_but_is_no_recovery(journal: Journal) -> None:
    journal.begin_pause(time.monotonic() - 20)
    journal.forget_pause()
    journal.forget_pause()
    assert 20 <= journal.history.waited < 25
    assert journal.history.counts() == {}
    assert sum(journal.history.pauses) == 0
