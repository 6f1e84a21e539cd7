"""The rounds: their order, what is kept of a failure and of an interruption, and that every way is taken down."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.bench.fio import Leave
from storaged.bench.jobs import Job
from storaged.bench.measure import WARM_UP, Found, Plan, measure, order
from storaged.bench.report import Run
from storaged.bench.ways import Target, Way
from storaged.errors import ErrorCode, StoragedError

READ = Job("read", {"rw": "randread", "bs": "4k"})
WRITE = Job("write", {"rw": "randwrite", "bs": "4k"})


class Stage:
    """Ways that say what is done with them."""

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.refusal: dict[str, StoragedError] = {}
        self.size: int | None = 1 << 30
        self.there = True
        self.on_run: Callable[[str, Job], None] = lambda way, job: None

    def way(self, name: str, *, optional: bool = True) -> Way:
        """A way of that name."""

        @contextmanager
        def up() -> Iterator[Target]:
            if name in self.refusal:
                raise self.refusal[name]
            self.seen.append(f"up {name}")
            try:
                yield Target((name,), f"by {name}", size=self.size, is_still_there=lambda: self.there)
            finally:
                self.seen.append(f"down {name}")

        return Way(name, up, optional)

    def run(self, job: Job, target: Target, runtime: float, leave: Leave | None) -> Run:
        """Pretend to run a job."""
        self.seen.append(f"{job.name} {target.words[0]}{' may write' if leave else ''}")
        self.on_run(target.words[0], job)
        return Run(round=0, way="", job=job.name, began=0, load=0, iops=5.0, requests=5)

    def measure(self, plan: Plan) -> Found:
        """Measure, quietly."""
        found = Found()
        measure(plan, self.run, found, lambda text, percentage: None)
        return found


def plan(*ways: Way, jobs: tuple[Job, ...] = (READ,), rounds: int = 2, leave: Leave | None = None) -> Plan:
    """Few short rounds."""
    return Plan(ways, jobs, 0.5, rounds, leave)


@given(st.integers(1, 9), st.integers(1, 4))
def test_each_round_has_each_way_once_and_goes_the_other_way_round(rounds: int, count: int) -> None:
    stage = Stage()
    names = [f"w{n}" for n in range(count)]
    seen = [(number, way.name) for number, way in order(rounds, [stage.way(name) for name in names])]
    for number in range(rounds):
        of_round = [name for at, name in seen if at == number]
        assert of_round == (names if number % 2 == 0 else names[::-1])


def test_a_way_is_set_up_warmed_up_measured_and_taken_down_before_the_next() -> None:
    stage = Stage()
    found = stage.measure(plan(stage.way("a"), stage.way("b")))
    warm = WARM_UP.name
    once = {way: [f"up {way}", f"{warm} {way}", f"read {way}", f"down {way}"] for way in "ab"}
    assert stage.seen == [*once["a"], *once["b"], *once["b"], *once["a"]]
    assert [(run.round, run.way) for run in found.runs] == [(0, "a"), (0, "b"), (1, "b"), (1, "a")]


def test_the_warming_up_never_writes() -> None:
    stage = Stage()
    stage.measure(plan(stage.way("a"), jobs=(WRITE,), leave=Leave.OWN))
    assert not WARM_UP.writes
    assert f"{WARM_UP.name} a" in stage.seen
    assert "write a may write" in stage.seen


def test_a_job_that_fails_is_kept_as_a_failure_and_the_rest_goes_on() -> None:
    stage = Stage()

    def fail(way: str, job: Job) -> None:
        if way == "a" and job is READ:
            raise StoragedError(ErrorCode.UNSUPPORTED, "fio failed", cause="I/O error")

    stage.on_run = fail
    found = stage.measure(plan(stage.way("a"), stage.way("b"), rounds=1))
    assert [(run.way, run.error) for run in found.runs] == [("a", "fio failed: I/O error"), ("b", "")]
    assert [run.iops for run in found.runs] == [0.0, 5.0]
    assert stage.seen[-1] == "down b"


def test_after_a_job_that_hangs_the_way_is_taken_down_and_the_next_is_measured() -> None:
    stage = Stage()

    def hang(way: str, job: Job) -> None:
        if way == "a" and job is READ:
            raise StoragedError(ErrorCode.TIMEOUT, "fio does not end")

    stage.on_run = hang
    found = stage.measure(plan(stage.way("a"), stage.way("b"), jobs=(READ, WRITE), rounds=1, leave=Leave.OWN))
    assert [(run.way, run.job, run.error) for run in found.runs] == [
        ("a", "read", "fio does not end"), ("b", "read", ""), ("b", "write", ""),
    ]


def test_a_result_that_cannot_be_read_is_a_failure_too() -> None:
    stage = Stage()

    def fail(way: str, job: Job) -> None:
        raise ValueError("fio printed no JSON")

    stage.on_run = fail
    assert [run.error for run in stage.measure(plan(stage.way("a"), rounds=1)).runs] == ["fio printed no JSON"]


def test_what_this_host_does_not_have_is_left_out_with_the_reason() -> None:
    stage = Stage()
    stage.refusal["b"] = StoragedError(ErrorCode.TRANSPORT_UNAVAILABLE, "no vduse", cause="no module")
    found = stage.measure(plan(stage.way("a"), stage.way("b")))
    assert {run.way for run in found.runs} == {"a"}
    assert found.ways["b"].missing == "no vduse: no module"
    assert found.ways["a"].missing == ""


def test_what_was_asked_for_must_be_there() -> None:
    stage = Stage()
    stage.refusal["b"] = StoragedError(ErrorCode.TRANSPORT_UNAVAILABLE, "no vduse")
    with pytest.raises(StoragedError, match="no vduse"):
        stage.measure(plan(stage.way("a"), stage.way("b", optional=False)))


def test_a_source_that_is_in_use_is_never_left_out() -> None:
    stage = Stage()
    stage.refusal["a"] = StoragedError(ErrorCode.SOURCE_IN_USE, "in use")
    with pytest.raises(StoragedError, match="in use"):
        stage.measure(plan(stage.way("a")))


@pytest.mark.parametrize("end", [KeyboardInterrupt(), StoragedError(ErrorCode.HOST_STUCK, "fio cannot be ended")])
def test_what_was_measured_before_an_interruption_is_kept_and_the_way_is_taken_down(end: BaseException) -> None:
    stage, found = Stage(), Found()

    def interrupt(way: str, job: Job) -> None:
        if way == "b":
            raise end

    stage.on_run = interrupt
    with pytest.raises(type(end)):
        measure(plan(stage.way("a"), stage.way("b")), stage.run, found, lambda text, percentage: None)
    assert [run.way for run in found.runs] == ["a"]
    assert stage.seen[-1] == "down b"


def test_a_disk_that_is_too_small_is_refused_before_anything_runs() -> None:
    stage = Stage()
    stage.size = 2048
    with pytest.raises(StoragedError) as caught:
        stage.measure(plan(stage.way("a")))
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert stage.seen == ["up a", "down a"]


def test_nothing_runs_on_a_device_that_is_another_one_by_now() -> None:
    """With fuse, QSD's death leads to another loop device; what has the old one's name is somebody else's."""
    stage = Stage()
    stage.there = False
    found = stage.measure(plan(stage.way("a"), jobs=(WRITE,), rounds=1, leave=Leave.DESTRUCTIVE))
    assert "another one" in found.runs[0].error
    assert not any(seen.startswith("write") for seen in stage.seen)
