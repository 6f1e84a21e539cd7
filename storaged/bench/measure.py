"""The rounds: each way in turn, in an order that turns round, with what was measured kept whatever happens next."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from storaged.bench import process
from storaged.bench.consumption import Meter
from storaged.bench.fio import Leave, measured, words
from storaged.bench.jobs import Job, check_size
from storaged.bench.process import Fio
from storaged.bench.report import Run, WayFacts
from storaged.bench.ways import Target, Way
from storaged.errors import ErrorCode, StoragedError

#: Before anything counts: devices get several times as fast in their first second.
WARM_UP = Job("warming up", {"rw": "randread", "bs": "4k", "iodepth": "16"})
#: Seconds of it at most; who measures for less than the second only tries the benchmark itself.
_WARM, _WORTH_WARMING = 1.0, 0.5
#: Seconds that a way takes beyond its jobs, about.
_SET_UP = 0.7
#: Seconds that fio takes to start, and to end, about.
_START = 0.4


class Runner(Protocol):
    """Runs one job on a target, and says what came of it; raises StoragedError, ValueError where nothing did."""

    def __call__(self, job: Job, target: Target, runtime: float, leave: Leave | None) -> Run:
        """Of what is returned, the round, the way and when it was are filled in by the caller."""
        ...


@dataclass
class Found:
    """What was measured so far."""

    runs: list[Run] = field(default_factory=list)
    ways: dict[str, WayFacts] = field(default_factory=dict)
    size: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is to be measured."""

    ways: Sequence[Way]
    jobs: Sequence[Job]
    runtime: float
    rounds: int
    leave: Leave | None

    @property
    def seconds(self) -> float:
        """How long it takes, about."""
        of_ways = len(self.ways) * (min(_WARM, self.runtime) + _SET_UP)
        return self.rounds * (of_ways + sum(len(self.jobs_of(way)) for way in self.ways) * (self.runtime + _START))

    def jobs_of(self, way: Way) -> list[Job]:
        """The jobs that a way can do."""
        return [job for job in self.jobs if not (way.only_reads and job.writes)]


def order(rounds: int, ways: Sequence[Way]) -> Iterator[tuple[int, Way]]:
    """A B C, C B A, A B C, …: what changes evenly with time is then no way's advantage."""
    for number in range(rounds):
        for way in ways if number % 2 == 0 else reversed(ways):
            yield number, way


def measure(plan: Plan, run: Runner, found: Found, tell: Callable[[str, float], None]) -> None:
    """Measure, and add to ``found`` what came of it as soon as it did.

    A job that fails is kept as a failure, and the rest goes on; after one that hangs, with the next way. Raises
    StoragedError where a way cannot be set up that is not optional, and what setting up any of them raises; the disk
    is too small.
    """
    done, count = 0, plan.rounds * sum(len(plan.jobs_of(way)) for way in plan.ways)
    for number, way in order(plan.rounds, plan.ways):
        jobs = plan.jobs_of(way)
        if way.name in found.ways and found.ways[way.name].missing:
            count -= len(jobs)
            continue
        tell(f"round {number + 1} of {plan.rounds}, {way.name}: setting up", 100 * done / count)
        with contextlib.ExitStack() as stack:
            try:
                target = stack.enter_context(way.up())
            except StoragedError as error:
                if not way.optional or error.code not in way.lacking:
                    raise
                found.ways[way.name] = WayFacts(name=way.name, what="", missing=f"{error.message}: {error.cause}")
                count -= len(jobs)
                continue
            if target.size is not None:
                check_size(plan.jobs, target.size)
                found.size = target.size
            found.ways.setdefault(way.name, WayFacts(
                name=way.name, what=target.what, engine=target.engine, volume=dict(target.volume),
                queue=dict(target.queue),
            ))
            if plan.runtime >= _WORTH_WARMING:
                with contextlib.suppress(StoragedError, ValueError):  # it fails with the first job, too, which tells
                    run(WARM_UP, target, min(_WARM, plan.runtime), None)
            for job in jobs:
                tell(f"round {number + 1} of {plan.rounds}, {way.name}: {job.name}", 100 * done / count)
                one, hangs = _one(run, job, target, plan, number, way.name)
                found.runs.append(one)
                done += 1
                if hangs:
                    # The next job would wait as long.
                    done += len(jobs) - 1 - jobs.index(job)
                    break
    tell("done", 100.0)


def _one(run: Runner, job: Job, target: Target, plan: Plan, number: int, way: str) -> tuple[Run, bool]:
    """Return what came of a job, and whether it hangs."""
    blank = Run(round=number, way=way, job=job.name, began=time.time(), load=os.getloadavg()[0])
    if not target.is_still_there():
        return replace(blank, error="the device is another one by now: what served it died"), False
    try:
        done = run(job, target, plan.runtime, plan.leave)
    except StoragedError as error:
        if error.code is ErrorCode.HOST_STUCK:
            raise
        return replace(blank, error=str(error)), error.code is ErrorCode.TIMEOUT
    except ValueError as error:
        return replace(blank, error=str(error)), False
    return replace(done, round=number, way=way, began=blank.began, load=blank.load), False


def runner(fio: Fio, cwd: str) -> Runner:
    """Return what runs jobs with this fio, in the directory ``cwd``."""

    def run(job: Job, target: Target, runtime: float, leave: Leave | None) -> Run:
        meter = Meter(target.processes)
        text = process.run(
            fio, words(job, target.words, runtime, leave), timeout=runtime + process.PATIENCE, cwd=cwd,
            environment=target.environment, inherited=target.inherited, server=target.server,
        )
        cpu = meter.used()
        told, raw = measured(text, job)
        return Run(
            round=0, way="", job=job.name, began=0, load=0, iops=told.iops, bytes_per_second=told.bytes_per_second,
            latency=told.latency, requests=told.requests, cpu={"fio": told.cpu, **cpu}, fio=raw,
        )

    return run
