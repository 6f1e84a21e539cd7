"""What a benchmark found out: all of it as JSON, and what follows from it. Pure.

Nothing that can be computed from the runs is stored: ``lines`` makes the table of a report that was read from a file
as it does of one that was just measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from storaged.bench import statistics as ours
from storaged.bench.statistics import Estimate
from storaged.errors import ErrorCode, StoragedError

DIRECT = "direct"
#: Of those that a table shows.
SHOWN_PERCENTILES = ("50", "99", "99.9")
#: Who uses the processors, as far as it is told apart.
CONSUMERS = ("fio", "qsd", "daemon", "kernel")


class JobFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A job, as fio was told."""

    name: str
    options: dict[str, str]
    writes: bool
    unit: Literal["IOPS", "MB/s"]


class WayFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A way to the disk."""

    name: str
    what: str
    """How: the engine, or the device and what serves it."""
    engine: str = ""
    """fio's, where it is what the figures depend on: of the direct way."""
    missing: str = ""
    """Why it could not be measured; empty if it was."""
    volume: dict[str, Any] = {}
    """What the daemon said of the volume, in the first round."""
    queue: dict[str, str] = {}
    """The settings of the device's queue (/sys/block/X/queue)."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """One job, by one way, in one round."""

    round: int
    way: str
    job: str
    began: float
    """Seconds since the epoch."""
    load: float
    """The host's load average when it began."""
    error: str = ""
    """Why there are no figures; empty if there are."""
    iops: float = 0.0
    bytes_per_second: float = 0.0
    latency: dict[str, float] = {}
    """Percentile → nanoseconds from the submission of a request to its end; of a job that flushes, of the flushes."""
    requests: int = 0
    cpu: dict[str, float] = {}
    """Seconds of processor time that fio, QSD, the daemon and the kernel's threads used; ``host``: all processors,
    whoever used them."""
    fio: dict[str, Any] = {}
    """What fio printed of the job."""

    @property
    def is_good(self) -> bool:
        """Whether it has figures."""
        return not self.error and self.iops > 0


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """A benchmark of one source."""

    storaged_bench: Literal[1] = 1
    """The version of this form."""
    source: str
    """Without secrets."""
    format: str
    options: dict[str, str]
    size: int | None
    """Bytes."""
    began: float
    ended: float
    partial: str = ""
    """Why it ended before all was measured; empty if it did not."""
    runtime: float
    repeat: int
    """How many rounds there were to be."""
    job_set: str
    machine: dict[str, str]
    notes: list[str]
    """What a reader must know beside the figures."""
    jobs: list[JobFacts]
    ways: list[WayFacts]
    runs: list[Run]


@dataclass(frozen=True)
class Line:
    """A job by one way, over all rounds."""

    job: JobFacts
    way: str
    figure: Estimate
    """In the job's unit."""
    ratio: Estimate | None
    """How many times what the reference does; None for the reference itself, or where no round has both."""
    latency: dict[str, float]
    """Percentile → nanoseconds, the median over the rounds."""
    cpu: dict[str, float]
    """Who → microseconds of processor time for each request, the median over the rounds."""
    rounds: int

    @property
    def is_told(self) -> bool:
        """Whether its ratio is more than the spread."""
        return self.ratio is None or self.ratio.tells_a_difference


def figure_of(run: Run, job: JobFacts) -> float:
    """Return what a job is told by: requests or megabytes (10^6 bytes) a second."""
    return run.iops if job.unit == "IOPS" else run.bytes_per_second / 1e6


def reference(report: Report) -> str:
    """Return the way that others are compared with: the direct one, or if there is none the fastest over all jobs."""
    good: dict[str, dict[str, list[float]]] = {}
    for run in report.runs:
        if run.is_good:
            good.setdefault(run.way, {}).setdefault(run.job, []).append(run.iops)
    if DIRECT in good or not good:
        return DIRECT
    common = set.intersection(*(set(jobs) for jobs in good.values()))

    def speed(way: str) -> float:
        means = [ours.mean(good[way][job]).value for job in sorted(common)]
        return ours.mean(means).value if means else 0.0

    return max(good, key=speed)


def lines(report: Report) -> list[Line]:
    """Return what the rounds say, job by job, of the ways in their order."""
    against = reference(report)
    found = []
    for job in report.jobs:
        by_way = {
            way.name: {
                run.round: run for run in report.runs if run.is_good and (run.way, run.job) == (way.name, job.name)
            }
            for way in report.ways
        }
        found += [
            _line(job, way, runs, by_way.get(against, {}) if way != against else {})
            for way, runs in by_way.items() if runs
        ]
    return found


def _line(job: JobFacts, way: str, runs: dict[int, Run], others: dict[int, Run]) -> Line:
    rounds = sorted(runs)
    both = [number for number in rounds if number in others]
    sides = [[figure_of(side[number], job) for number in both] for side in (runs, others)]
    return Line(
        job=job, way=way, figure=ours.mean([figure_of(runs[number], job) for number in rounds]),
        ratio=ours.paired(sides[0], sides[1]) if both else None,
        latency=_medians([runs[number].latency for number in rounds]),
        cpu=_medians([
            {who: 1e6 * seconds / run.requests for who, seconds in run.cpu.items()}
            for run in runs.values() if run.requests
        ]),
        rounds=len(rounds),
    )


def _medians(several: Sequence[dict[str, float]]) -> dict[str, float]:
    keys = dict.fromkeys(key for one in several for key in one)
    return {key: statistics.median([one[key] for one in several if key in one]) for key in keys}


def failures(report: Report) -> list[Run]:
    """The runs that have no figures."""
    return [run for run in report.runs if not run.is_good]


def encoded(report: Report) -> bytes:
    """Return the report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)


def decoded(data: bytes, path: str) -> Report:
    """Read a report. Raises INVALID_ARGUMENT where it is none."""
    try:
        return msgspec.json.decode(data, type=Report)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path} is no report of storaged bench", cause=str(error),
            hint="name a file that storaged bench --json has written",
        ) from error


@dataclass(frozen=True)
class Change:
    """A job by one way, in two reports."""

    job: str
    way: str
    unit: str
    before: Estimate
    after: Estimate
    ratio: Estimate
    """After to before."""


def changes(before: Report, after: Report) -> list[Change]:
    """Compare what two reports have in common: jobs of the same name and options, by ways of the same name."""
    mine = {(line.job.name, line.way): line for line in lines(before)}
    found = []
    for line in lines(after):
        other = mine.get((line.job.name, line.way))
        if other is None or other.job.options != line.job.options:
            continue
        sides = [_figures(report, line) for report in (after, before)]
        found.append(
            Change(line.job.name, line.way, line.job.unit, other.figure, line.figure, ours.unpaired(sides[0], sides[1]))
        )
    return found


def _figures(report: Report, line: Line) -> list[float]:
    return [
        figure_of(run, line.job) for run in report.runs
        if run.is_good and (run.way, run.job) == (line.way, line.job.name)
    ]


def differences(before: Report, after: Report) -> list[str]:
    """Say what else differs between two reports: what they were measured on, and how."""
    both = {way.name for way in before.ways if not way.missing} & {way.name for way in after.ways if not way.missing}
    facts = [
        {"source": one.source, "format": one.format, "size": one.size, "runtime": one.runtime, "options": one.options,
         **one.machine, **_of_ways(one, both)}
        for one in (before, after)
    ]
    keys = dict.fromkeys(key for one in facts for key in one)
    return [
        f"{key}: {facts[0].get(key)!s}, and then {facts[1].get(key)!s}" for key in keys
        if facts[0].get(key) != facts[1].get(key)
    ]


def _of_ways(report: Report, names: Set[str]) -> dict[str, str]:
    """How ways were set up, as far as figures depend on it."""
    found: dict[str, str] = {}
    for way in report.ways:
        if way.name in names:
            found |= {f"engine of {way.name}": way.engine} if way.engine else {}
            found |= {f"{key} of {way.name}": value for key, value in way.queue.items()}
    return found
