"""Reports as a benchmark would have made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace

from storaged.bench.report import JobFacts, Report, Run, WayFacts

LINEAR = JobFacts(name="1M linear read, QD 16", options={"rw": "read", "bs": "1M"}, writes=False, unit="MB/s")
RANDOM = JobFacts(name="4k random read, QD 32", options={"rw": "randread", "bs": "4k"}, writes=False, unit="IOPS")


def run(way: str, job: JobFacts, number: int, figure: float, **changes: Any) -> Run:
    """A run with a figure in the job's unit."""
    good = Run(
        round=number, way=way, job=job.name, began=1.7e9 + number, load=0.5, iops=figure,
        bytes_per_second=figure * (1e6 if job.unit == "MB/s" else 4096),
        latency={"50": 8e4, "90": 1e5, "99": 3e5, "99.9": 2e6, "99.99": 1e7}, requests=10000,
        cpu={"fio": 0.1, "host": 0.9, **({} if way == "direct" else {"qsd": 0.25, "daemon": 0.0})},
        fio={"jobname": "storaged"},
    )
    return replace(good, **changes)


def report(figures: Mapping[str, Sequence[float]] | None = None, **changes: Any) -> Report:
    """A report of both jobs, with the figures of each way round by round."""
    figures = figures or {
        "direct": [1000, 2000, 1500, 1200], "vduse": [780, 1560, 1170, 936], "fuse": [990, 2100, 1300, 1300],
    }
    made = Report(
        source="rbd:rbd/web1", format="raw", options={"cache": "none"}, size=1 << 30, began=1.7e9, ended=1.7e9 + 60,
        runtime=2.0, repeat=4, job_set="quick", machine={"kernel": "6.12", "fio": "fio-3.33"}, notes=["A note."],
        jobs=[LINEAR, RANDOM], ways=[WayFacts(name=name, what=f"by {name}") for name in figures],
        runs=[
            run(way, job, number, figure) for job in (LINEAR, RANDOM) for way, several in figures.items()
            for number, figure in enumerate(several)
        ],
    )
    return replace(made, **changes)
