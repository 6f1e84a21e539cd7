"""Those who wait are freed: rescue, with the device and without, and resume."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from storaged.host.process import identify
from tests.harness import Daemon, eventually, leftovers, run
from tests.vm.faults.cases import Case, fault
from tests.vm.faults.load import Site, nothing_is_stuck, under_load
from tests.vm.faults.test_qsd import stop


def _all_wait(site: Site, requests: int) -> None:
    """Wait until every request of the load is stuck, and no other."""
    eventually(lambda: site.load.status()["in_flight"] >= requests, "all requests wait", timeout=30)
    time.sleep(0.5)
    assert site.load.status()["in_flight"] >= requests


def _errors(site: Site) -> int:
    return sum(int(count) for count in site.load.status()["errors"].values())


@fault(
    "QSD is stopped with 64 requests in flight; `rescue`, `detach`", expected="I/O errors, nothing left",
    uses=("raw-64", "ext4-64"), in_ci=("vduse-raw-64", "nbd-raw-64"),
)
def test_a_rescue_ends_all_that_is_in_flight(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        qsd = daemon.qsd("a")
        stop(qsd)
        _all_wait(site, 64)
        begin = time.monotonic()
        daemon.call("Rescue", name="a", keep=False)
        eventually(lambda: _errors(site) >= 64, "all of them have ended", timeout=30)
        case.notes["ended_after"] = round(time.monotonic() - begin, 2)
        assert identify(qsd) is None
        assert daemon.show("a")["state"] == "rescued"
        site.saw_errors("nothing left")
        nothing_is_stuck()
        begin = time.monotonic()
        daemon.detach("a", timeout=60)
        case.notes["detached_after"] = round(time.monotonic() - begin, 2)
        assert leftovers(daemon.root) == []
        site.keeps_what_was_flushed(str(site.source))


@fault(
    "QSD is stopped; `rescue --keep`, `resume`", expected="I/O errors, then the same device works",
    in_ci=("vduse-raw-32", "nbd-ext4-1"),
)
def test_a_device_that_was_kept_works_again(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        qsd = daemon.qsd("a")
        stop(qsd)
        _all_wait(site, case.depth)
        daemon.call("Rescue", name="a", keep=True)
        assert identify(qsd) is None
        eventually(lambda: _errors(site) >= case.depth, "all of them have ended", timeout=30)
        assert daemon.show("a")["state"] == "rescued"
        works_again(site)


def works_again(site: Site) -> None:
    """Resume a volume whose device was kept, with its load still trying: the device works, and has all it should."""
    daemon, case = site.daemon, site.case
    daemon.call("Resume", name="a")
    assert daemon.online("a")
    assert daemon.show("a")["device"] == site.device
    if case.use == "raw":
        site.load.status()
        site.load.longest = 0.0
        site.goes_on()
    # (ext4 has stopped itself: it is mounted anew.)
    site.saw_errors("then the same device works")
    if case.use == "raw":
        wrong = site.load.wrong(site.device, "acked")
        assert wrong == [], wrong[:20]
    else:
        site.keeps_what_was_flushed(site.device)
    daemon.detach("a", timeout=60)


@fault(
    "QSD is killed and its source is gone; `rescue --keep`, `resume`", uses=("raw-32", "ext4-1"),
    expected="I/O errors, then the same device works", in_ci=("vduse-ext4-1",),
)
def test_a_rescue_where_no_successor_can_be(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        assert isinstance(site.source, Path)
        away = place / "away"
        site.source.rename(away)
        daemon.kill_qsd("a")
        _all_wait(site, case.depth)
        eventually(lambda: daemon.show("a")["state"] == "failed", "no successor can be had", timeout=60)
        daemon.call("Rescue", name="a", keep=True)
        eventually(lambda: _errors(site) >= case.depth, "all of them have ended", timeout=30)
        away.rename(site.source)
        works_again(site)


@pytest.mark.parametrize("transport", ["vduse", pytest.param("nbd", marks=pytest.mark.matrix)])
def test_another_volume_notices_nothing_of_a_rescue(daemon: Daemon, place: Path, transport: str) -> None:
    case = Case(transport, "raw", 4)
    with under_load(daemon, place, case) as site:
        other = place / "b.img"
        run("truncate", "-s", "32M", other)
        daemon.device("b", other, transport=transport)
        stop(daemon.qsd("b"))
        daemon.call("Rescue", name="b", keep=False)
        daemon.detach("b")
        site.goes_on()
        site.saw_no_error()
