"""storaged bench by the ways that this kernel has, which are all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from storaged.bench import search
from tests.benching import WRITES, bench, report_of, short, tune
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


@pytest.mark.parametrize(("transport", "settings"), [
    ("vduse", ["queues=2", "queue-size=1024", "poll-max-ns=0"]),
    ("nbd", ["connections=2", "poll-max-ns=0"]),
])
def test_a_search_tries_what_only_a_transport_has(
    daemon: Daemon, place: Path, transport: str, settings: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(search, "PAIRS", 2)
    monkeypatch.setattr(search, "PAIRS_OF_VERIFICATION", 2)
    (place / "jobs.fio").write_text("[random]\nrw=randread\nbs=4k\niodepth=8\n")
    done = tune(
        daemon, place, "--scratch", "8M", "--jobs", place / "jobs.fio", "--runtime", 0.1, "--budget", 3000, "--unsafe",
        "--transport", transport, "--only", ",".join(setting.partition("=")[0] for setting in settings), "--json",
        place / "tuned.json",
    )
    assert done.status == 0, done
    found = json.loads((place / "tuned.json").read_text())
    assert found["volume"]["transport"] == transport
    tried = {f"{change['option']}={change['value']}": change for change in found["changes"]}
    for setting in settings:
        assert tried[setting]["pairs"] > 0, tried[setting]
    assert daemon.names() == []
    assert leftovers(daemon.root) == []
