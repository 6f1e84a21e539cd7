"""storaged bench by the ways that this kernel has, which are all."""

from __future__ import annotations

import os
from pathlib import Path

from tests.benching import WRITES, bench, report_of, short
from tests.harness import Daemon, leftovers

ALL = ["direct", "nbd", "vduse", "fuse"]


def test_all_ways_are_measured_and_leave_nothing(daemon: Daemon, place: Path) -> None:
    done = bench(daemon, place, "--scratch", "8M", *short(place, WRITES))
    assert done.status == 0, done
    found = report_of(place)
    assert [way.name for way in found.ways] == ALL
    assert {(run.way, run.job) for run in found.runs if run.is_good} == {
        (way, job) for way in ALL for job in ("reads", "writes")
    }
    what = {way.name: way.what for way in found.ways}
    assert "/dev/nbd" in what["nbd"]
    assert "/dev/vd" in what["vduse"]
    assert daemon.names() == []
    assert leftovers(daemon.root) == []
    assert [path for path in os.listdir(place) if path.startswith("storaged-bench-")] == []
