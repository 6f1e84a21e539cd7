"""What fio is asked to do: the jobs of ``quick`` and ``full``, and those of a file. Pure.

A job is a set of fio's options (fio(1)) that say what the load is. Where it goes, by which engine, for how long, and
whether it may write at all is not its business: a file that says so is refused.
"""

from __future__ import annotations

import configparser
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import format_size, parse_size

#: From this block size on megabytes a second tell more than requests do.
_LINEAR = 128 * 1024
#: fio's directions, and whether they write.
_DIRECTIONS = {
    "read": False, "randread": False, "write": True, "randwrite": True, "rw": True, "readwrite": True, "randrw": True,
}
_NUMBER = r"[0-9]{1,9}"
#: What a job of a file may say, and the values of each.
OPTIONS = {
    "rw": "|".join(_DIRECTIONS),
    "bs": r"[0-9]{1,9}[kKmM]?",
    "iodepth": _NUMBER,
    "numjobs": _NUMBER,
    "rwmixread": _NUMBER,
    "fsync": _NUMBER,
    "fdatasync": _NUMBER,
    "percentage_random": _NUMBER,
    "random_distribution": r"random|(zipf|pareto|normal):[0-9]+(\.[0-9]+)?",
    "rate_iops": _NUMBER,
    "thinktime": _NUMBER,
    "buffer_compress_percentage": _NUMBER,
    "refill_buffers": "[01]",
    "direct": "[01]",
}
_SYNONYMS = {"readwrite": "rw", "blocksize": "bs"}
_MOST = {"iodepth": 4096, "numjobs": 128}
#: A request of QEMU's block layer, and of the NBD engine of fio, is not larger.
_LARGEST_BLOCK = 32 << 20
#: Of the names of jobs, which end up in tables.
_LONGEST_NAME = 40


@dataclass(frozen=True)
class Job:
    """A load: its name, and fio's options for it (``rw`` and ``bs`` always)."""

    name: str
    options: Mapping[str, str]

    @property
    def writes(self) -> bool:
        """Whether it changes what is on the disk."""
        return _DIRECTIONS[self.options["rw"]]

    @property
    def is_mixed(self) -> bool:
        """Whether it reads and writes."""
        return self.options["rw"] in ("rw", "readwrite", "randrw")

    @property
    def is_direct(self) -> bool:
        """Whether it passes the page cache by, as all do but those that say otherwise."""
        return self.options.get("direct") != "0"

    @property
    def ends_with_disk(self) -> bool:
        """Whether it goes over the disk once at most: the second time it would measure the page cache."""
        return not self.is_direct and not self.options["rw"].startswith("rand")

    @property
    def block(self) -> int:
        """Bytes of a request."""
        return parse_size(self.options["bs"])

    @property
    def is_linear(self) -> bool:
        """Whether it is told in MB/s. Else in IOPS."""
        return self.block >= _LINEAR

    @property
    def at_once(self) -> int:
        """Requests in flight."""
        return int(self.options.get("iodepth", "1")) * int(self.options.get("numjobs", "1"))

    @property
    def least_size(self) -> int:
        """Bytes of the smallest disk on which no two requests in flight need to be for one block."""
        return self.block * self.at_once


@dataclass(frozen=True)
class JobSet:
    """Jobs, and how long and how often each runs where the user did not say."""

    name: str
    jobs: tuple[Job, ...]
    runtime: float
    """Seconds."""
    repeat: int


def _job(name: str, **options: object) -> Job:
    return Job(name, {key: str(value) for key, value in options.items()})


_QUICK = (
    _job("1M linear read, QD 16", rw="read", bs="1M", iodepth=16),
    _job("1M linear write, QD 16", rw="write", bs="1M", iodepth=16),
    _job("4k random read, QD 1", rw="randread", bs="4k", iodepth=1),
    _job("4k random read, QD 128", rw="randread", bs="4k", iodepth=128),
    _job("4k random write, QD 1", rw="randwrite", bs="4k", iodepth=1),
    _job("4k random write, QD 128", rw="randwrite", bs="4k", iodepth=128),
)
_FULL = (
    _job("1M linear read, QD 16", rw="read", bs="1M", iodepth=16),
    _job("4M linear read, QD 16", rw="read", bs="4M", iodepth=16),
    _job("1M linear write, QD 16", rw="write", bs="1M", iodepth=16),
    _job("4M linear write, QD 16", rw="write", bs="4M", iodepth=16),
    *(
        _job(f"4k random {what}, {how}", rw=f"rand{what}", bs="4k", **options)
        for what in ("read", "write")
        for how, options in (
            ("QD 1", {"iodepth": 1}), ("QD 32", {"iodepth": 32}), ("QD 128", {"iodepth": 128}),
            ("16 jobs", {"iodepth": 1, "numjobs": 16}),
        )
    ),
    _job("4k mixed 70/30, QD 32", rw="randrw", bs="4k", iodepth=32, rwmixread=70),
    _job("4k write and fsync", rw="randwrite", bs="4k", iodepth=1, fsync=1),
)
#: By name. The numbers of rounds are even: each way is then as often before another as behind it.
SETS = {"quick": JobSet("quick", _QUICK, 2.0, 4), "full": JobSet("full", _FULL, 5.0, 6)}

#: What ``storaged tune`` measures; read-ahead shows with who reads in order through the page cache, and nowhere else.
TUNING = JobSet("quick", (
    _job("1M linear read, QD 16", rw="read", bs="1M", iodepth=16),
    _job("128k linear read, page cache", rw="read", bs="128k", iodepth=1, direct=0),
    _job("4k random read, QD 1", rw="randread", bs="4k", iodepth=1),
    _job("4k random read, QD 128", rw="randread", bs="4k", iodepth=128),
    _job("1M linear write, QD 16", rw="write", bs="1M", iodepth=16),
    _job("4k random write, QD 1", rw="randwrite", bs="4k", iodepth=1),
    _job("4k random write, QD 128", rw="randwrite", bs="4k", iodepth=128),
), 1.0, 1)


def jobs_of_file(text: str, path: str) -> JobSet:
    """Read the jobs of a file as fio has them: a section for each, and ``[global]`` for what all have in common.

    Raises INVALID_ARGUMENT, with the section and the option.
    """
    parser = configparser.RawConfigParser(
        delimiters=("=",), comment_prefixes=("#", ";"), default_section="global", strict=True,
    )
    try:
        parser.read_string(text, path)
    except configparser.Error as error:
        _refuse(path, " ".join(str(error).split()))
    jobs = []
    for section in parser.sections():
        if not section.isprintable() or len(section) > _LONGEST_NAME:
            _refuse(
                path, f"[{section[:_LONGEST_NAME]!a}] is no name: it is longer than {_LONGEST_NAME}, or unprintable"
            )
        jobs.append(Job(section, _options_of(parser.items(section), f"[{section}]", path)))
    if not jobs:
        _refuse(path, "there is no job in it")
    return JobSet(path, tuple(jobs), 5.0, 4)


def _options_of(items: Sequence[tuple[str, str]], where: str, path: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in items:
        name, value = _SYNONYMS.get(key, key), value.strip()
        if name not in OPTIONS:
            _refuse(path, f"{where}: {key} is not taken", f"a job says what the load is: {', '.join(OPTIONS)}; where it"
                    " goes, by which engine and for how long, storaged says")
        if not re.fullmatch(OPTIONS[name], value):
            _refuse(path, f"{where}: {key}={value!a} is no value of it")
        if name in _MOST and not 1 <= int(value) <= _MOST[name]:
            _refuse(path, f"{where}: {key}={value} is not between 1 and {_MOST[name]}")
        if found.setdefault(name, value) != value:
            _refuse(path, f"{where}: {key} is said twice")
    for name in ("rw", "bs"):
        if name not in found:
            _refuse(path, f"{where} does not say {name}")
    size = parse_size(found["bs"]) if int(re.sub(r"\D", "", found["bs"])) else 0
    if not 512 <= size <= _LARGEST_BLOCK or size % 512:
        _refuse(path, f"{where}: bs={found['bs']} is not between 512 and {format_size(_LARGEST_BLOCK)}, or no multiple "
                "of 512")
    return found


def _refuse(path: str, cause: str, hint: str = "docs/bench.md tells what a job can say") -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, f"the job file {path} is wrong", cause=cause, hint=hint)


def check_size(jobs: Sequence[Job], size: int) -> None:
    """Raise INVALID_ARGUMENT where the disk (bytes) is too small for one of the jobs."""
    for job in jobs:
        if size < job.least_size:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the disk is too small for the job {job.name!r}",
                cause=f"it has {format_size(size)}, and {job.at_once} requests of {format_size(job.block)} at once need"
                f" {format_size(job.least_size)}",
                hint="take a larger one, or --jobs with a file of smaller jobs",
            )
