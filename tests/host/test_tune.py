"""storaged tune with a real daemon and a real QSD: what it tries, accepts, writes, refuses, and leaves behind.

fio is real where it is said; a busy machine makes its figures anything, so nothing depends on which setting is faster.
Where a setting has to be, the device is asked what it has, and the figure follows from that.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.bench import measure, search
from storaged.bench.fio import Leave
from storaged.bench.jobs import Job
from storaged.bench.process import Fio
from storaged.bench.report import Run
from storaged.bench.ways import Target
from storaged.errors import ErrorCode
from storaged.host import disk as disks
from tests.benching import tune
from tests.harness import Daemon, eventually, leftovers

JOBS = "[linear]\nrw=read\nbs=128k\niodepth=1\ndirect=0\n[random]\nrw=randread\nbs=4k\niodepth=4\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def of_all() -> Iterator[Daemon]:
    """One daemon for all tests here."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name:
        daemon = Daemon(Path(os.path.realpath(name)) / "root")
        daemon.root.mkdir()
        daemon.start()
        yield daemon
        daemon.end()
        assert leftovers(daemon.root) == []


@pytest.fixture
def daemon(of_all: Daemon) -> Iterator[Daemon]:
    """A running daemon with no volumes; nothing of a search may be left."""
    yield of_all
    of_all.forget_all()
    assert not [line for line in leftovers(of_all.root) if "storaged-bench" in line]
    assert not list(Path(of_all.layout.run_dir).glob("images/*"))


@pytest.fixture
def disk(place: Path) -> Path:
    """A raw image without zeroes."""
    path = place / "disk.raw"
    path.write_bytes(os.urandom(MIB) * 16)
    return path


@pytest.fixture
def few_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough to try the way of a search; how sure it is is the business of the unit tests."""
    monkeypatch.setattr(search, "PAIRS", 2)
    monkeypatch.setattr(search, "PAIRS_OF_VERIFICATION", 2)


def short(place: Path, *words: object, runtime: float = 0.1) -> list[object]:
    """The words for a short search whose report goes to ``place``/tuned.json."""
    (place / "jobs.fio").write_text(JOBS)
    return [
        "--jobs", place / "jobs.fio", "--runtime", runtime, "--budget", 600, "--json", place / "tuned.json", *words
    ]


def report(place: Path) -> dict[str, Any]:
    """What was written."""
    return dict(json.loads((place / "tuned.json").read_text()))


def profiles(daemon: Daemon) -> list[str]:
    """The profiles that there are."""
    directory = daemon.layout.profiles
    return sorted(os.listdir(directory)) if os.path.isdir(directory) else []


def figures_of_device(monkeypatch: pytest.MonkeyPatch, figure: Callable[[str], float]) -> None:
    """In the place of fio: what a figure would be, from what the device has."""

    def runner(fio: Fio, cwd: str) -> measure.Runner:
        def run(job: Job, target: Target, runtime: float, leave: Leave | None) -> Run:
            device = str(target.volume["device"])
            return Run(round=0, way="", job=job.name, began=0, load=0, iops=figure(device))

        return run

    monkeypatch.setattr(measure, "runner", runner)


def read_ahead(device: str) -> float:
    """KiB."""
    return float(disks.attribute(device, "queue/read_ahead_kb") or 0)


def test_what_is_faster_becomes_a_profile_that_volumes_are_attached_with(
    daemon: Daemon, place: Path, disk: Path, monkeypatch: pytest.MonkeyPatch, few_pairs: None
) -> None:
    figures_of_device(monkeypatch, lambda device: min(read_ahead(device), 8192))
    done = tune(daemon, disk, *short(place), "--only", "read-ahead-kb", "--write", "fast")
    assert done.status == 0, done
    found = report(place)
    assert found["settings"] == {"read-ahead-kb": "8192"}
    assert found["transport"] == "fuse"
    assert found["verification"]["taken"]
    assert found["verification"]["ratio"]["low"] > 1
    assert [change["value"] for change in found["changes"] if change["accepted"]][-1] == "8192"
    assert not [change for change in found["changes"] if change["value"] == "32768" and change["accepted"]]
    assert {one["settings"].get("read-ahead-kb") for one in found["measured"]} >= {None, "8192", "32768"}
    assert "-o read-ahead-kb=8192: " in done.stdout
    assert "--profile fast" in done.stdout
    assert daemon.names() == []

    # What was measured is what volumes get, with the cache mode that was measured.
    text = Path(daemon.layout.profiles, "fast.toml").read_text()
    assert "for the jobs linear, random" in text
    volume = daemon.attach("a", disk, profile="fast", read_only=True)
    assert read_ahead(volume["device"]) == 8192
    assert volume["options"] == {"cache": "none", "read-ahead-kb": "8192"}
    daemon.detach("a")

    again = tune(daemon, disk, *short(place), "--write", "fast")
    assert again.status == 1
    assert "there is a profile 'fast' already" in again.stderr
    assert Path(daemon.layout.profiles, "fast.toml").read_text() == text
    os.unlink(Path(daemon.layout.profiles, "fast.toml"))


def test_a_real_search_measures_in_pairs_and_takes_nothing_that_was_not_verified(
    daemon: Daemon, place: Path, disk: Path, few_pairs: None
) -> None:
    before = disk.read_bytes()
    # What was said of the transport stays as it is.
    words = short(place, "--only", "aio,scheduler", "-o", "scheduler=none", "--write", "real")
    done = tune(daemon, disk, *words)
    assert done.status == 0, done
    assert disk.read_bytes() == before
    found = report(place)
    assert found["partial"] == ""
    assert found["size"] == 16 * MIB
    assert {change["option"] for change in found["changes"]} == {"aio"}
    assert any("scheduler stays none" in note for note in found["notes"])
    assert found["options"] == {"cache": "none", "scheduler": "none"}
    for one in found["measured"]:
        assert set(one["iops"]) == {"linear", "random"}
        assert all(figure > 0 for figure in one["iops"].values())
    for change in found["changes"]:
        assert not change["accepted"] or change["ratio"]["low"] > 1
        assert f"aio={change['value']}" in done.stdout
    taken = found["verification"] is not None and found["verification"]["ratio"]["low"] > 1
    assert bool(found["settings"]) == taken
    assert profiles(daemon) == (["real.toml"] if taken else [])
    for name in profiles(daemon):
        os.unlink(Path(daemon.layout.profiles, name))


def test_an_interruption_takes_everything_down_and_reports_what_was_found(
    daemon: Daemon, place: Path, disk: Path
) -> None:
    words = [*daemon.cli_command(), "tune", str(place), "--scratch", "16M", *map(str, short(place, "--only", "aio"))]
    child = subprocess.Popen([*words, "--write", "half"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if "values of aio" in line:
            break
    eventually(daemon.names, "a candidate is attached")
    child.send_signal(signal.SIGINT)
    printed, said = child.communicate(timeout=60)
    assert child.returncode == 130, said
    assert "PARTIAL: not all was done: interrupted" in printed
    assert "The profile half was not written." in printed
    assert report(place)["partial"] == "interrupted"
    assert report(place)["settings"] == {}
    assert profiles(daemon) == []
    assert daemon.names() == []
    assert not list(place.glob("storaged-bench-*"))


def test_what_makes_no_sense_is_refused_with_nothing_left(daemon: Daemon, place: Path, disk: Path) -> None:
    def refused(code: ErrorCode, *words: object) -> str:
        done = tune(daemon, *words)
        assert done.status == 1, done
        assert f"[{code}]" in done.stderr, done.stderr
        assert "hint: " in done.stderr
        assert daemon.names() in ([], ["a"])
        return done.stderr

    assert "--budget" in refused(ErrorCode.INVALID_ARGUMENT, disk, *short(place), "--budget", 2)
    said = refused(ErrorCode.INVALID_ARGUMENT, disk, *short(place), "--only", "queues")
    assert "nothing to be tried by fuse" in said
    (place / "writes.fio").write_text("[a]\nrw=randwrite\nbs=4k\n")
    assert "--destructive" in refused(ErrorCode.INVALID_ARGUMENT, disk, "--jobs", place / "writes.fio")
    assert "name of a profile" in refused(ErrorCode.INVALID_NAME, disk, "--write", "../x")
    daemon.attach("a", disk)
    assert refused(ErrorCode.SOURCE_IN_USE, disk, *short(place))
    assert "detach it" in refused(ErrorCode.INVALID_ARGUMENT, "a", *short(place))
    daemon.detach("a")
