"""``storaged bench`` as tests run it: short, and with its report at hand."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from storaged.__main__ import main
from storaged.bench.report import Report, decoded
from tests.harness import Daemon, Printed

#: Short, small, and of both kinds.
JOBS = "[reads]\nrw=randread\nbs=4k\niodepth=4\n"
WRITES = f"{JOBS}[writes]\nrw=randwrite\nbs=4k\nfsync=1\n"


def bench(daemon: Daemon, *words: object) -> Printed:
    """``storaged --root ROOT bench WORDS`` in this process."""
    return _command(daemon, "bench", *words)


def tune(daemon: Daemon, *words: object) -> Printed:
    """The same with ``tune``."""
    return _command(daemon, "tune", *words)


def _command(daemon: Daemon, *words: object) -> Printed:
    out, errors = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
        status = main(["--root", str(daemon.root), *map(str, words)])
    return Printed(status, out.getvalue(), errors.getvalue())


def short(place: Path, jobs: str = JOBS, seconds: float = 0.1, rounds: int = 1) -> list[object]:
    """The words for a short run with these jobs, whose report goes to ``place``/report.json."""
    (place / "jobs.fio").write_text(jobs)
    return ["--jobs", place / "jobs.fio", "--runtime", seconds, "--repeat", rounds, "--json", place / "report.json"]


def report_of(place: Path) -> Report:
    """What was written."""
    return decoded((place / "report.json").read_bytes(), "report.json")
