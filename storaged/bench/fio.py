"""What fio is told on its command line, and what its JSON says. Pure.

No job may write unless somebody has said that the disk may be overwritten (``Leave``). All else runs with --readonly,
with which fio refuses to write, and to make a file larger that it is to read (setup_files in filesetup.c of fio).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import msgspec

from storaged.bench.jobs import Job
from storaged.errors import ErrorCode, StoragedError

#: Debian 12's; nobody has tried an older one.
OLDEST = (3, 33)
#: At most 20 (FIO_IO_U_LIST_MAX_LEN in fio).
PERCENTILES = ("1", "5", "10", "25", "50", "75", "90", "95", "99", "99.5", "99.9", "99.95", "99.99")


class Leave(Enum):
    """Why a disk may be overwritten."""

    DESTRUCTIVE = "the user said --destructive"
    OWN = "the benchmark has made it"


class Measured(msgspec.Struct, frozen=True):
    """What fio says of one job."""

    iops: float
    bytes_per_second: float
    latency: dict[str, float]
    requests: int
    cpu: float
    """Seconds of processor time that fio itself used."""


def words(job: Job, target: Sequence[str], runtime: float, leave: Leave | None) -> list[str]:
    """Return fio's arguments for a job on a target for ``runtime`` seconds.

    Raises INVALID_ARGUMENT for one that writes without leave.
    """
    if job.writes and leave is None:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"the job {job.name!r} writes",
            cause="nobody said that data may be overwritten",
            hint="say --destructive, or have the benchmark make an image of its own with --scratch",
        )
    return [
        "--name=storaged", *target, *(f"--{key}={value}" for key, value in job.options.items()),
        *(["--readonly"] if leave is None or not job.writes else []),
        # One process, of threads: it is ended as a whole, and its processor time is that of all jobs.
        "--thread=1", "--group_reporting=1",
        # Reads and writes of a mixed job count together. (Of others it would hide how long flushes took.)
        *(["--unified_rw_reporting=mixed"] if job.is_mixed else []),
        *([] if job.ends_with_disk else ["--time_based=1"]), f"--runtime={max(1, round(runtime * 1000))}ms",
        # Blocks of its own choice in each run, and no map of those that it had.
        "--randrepeat=0", "--norandommap=1",
        "--allow_file_create=0", "--invalidate=1", "--fallocate=none", "--create_on_open=0",
        "--lat_percentiles=1", "--clat_percentiles=0", f"--percentile_list={':'.join(PERCENTILES)}",
        "--output-format=json",
    ]


def measured(text: str, job: Job) -> tuple[Measured, dict[str, Any]]:
    """Read what fio printed of a job. Raises ValueError, with what is wrong; an engine's library may have printed
    before it.
    """
    begin = text.find("{\n")
    if begin < 0:
        raise ValueError("fio printed no JSON")
    found, _ = json.JSONDecoder().raw_decode(text[begin:])
    try:
        told: dict[str, Any] = found["jobs"][0]
        if told["error"]:
            raise ValueError(f"fio ended with the error {told['error']}")
        requests = told["mixed" if job.is_mixed else "write" if job.writes else "read"]
        flushes = told.get("sync", {})
        if not requests["total_ios"]:
            raise ValueError("not one request ended in that time")
        timed = flushes if flushes.get("total_ios") else requests
        return Measured(
            iops=float(requests["iops"]), bytes_per_second=float(requests["bw_bytes"]),
            latency=_percentiles(timed["lat_ns"].get("percentile", {})), requests=int(requests["total_ios"]),
            cpu=(told["usr_cpu"] + told["sys_cpu"]) / 100 * told["job_runtime"] / 1000,
        ), told
    except (LookupError, TypeError) as error:
        raise ValueError(f"fio's JSON lacks {error}") from error


def _percentiles(found: Mapping[str, float]) -> dict[str, float]:
    """``99.900000`` → ``99.9``."""
    return {f"{float(key):g}": float(value) for key, value in found.items()}


def version_of(text: str) -> tuple[int, ...] | None:
    """Return the version in what ``fio --version`` prints, None where it is none."""
    found = re.search(r"fio-(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else None


def engines_of(text: str) -> frozenset[str]:
    """Return the engines that ``fio --enghelp`` lists."""
    return frozenset(line.strip() for line in text.splitlines() if line.startswith("\t"))
