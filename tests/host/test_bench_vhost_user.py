"""The direct way by QSD's vhost-user-blk export, for what fio has no engine for.

Debian's fio is built without libblkio. In its place stands a program that asks the export what a client of vhost-user
asks first, and then has the real fio measure nothing; docs/benchmarks.md tells what a fio with libblkio did.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest

from storaged.bench import engines, measure, process
from storaged.bench.fio import Leave
from storaged.bench.jobs import Job
from storaged.bench.process import Fio
from storaged.bench.report import Run
from storaged.bench.ways import PREFIX, Target
from storaged.errors import ErrorCode
from tests.benching import JOBS, WRITES, bench, report_of, short
from tests.harness import Daemon, eventually, image, leftovers

#: VHOST_USER_GET_FEATURES, VHOST_USER_SET_OWNER, VHOST_USER_GET_QUEUE_NUM (docs/interop/vhost-user.rst in QEMU).
_FIO = '''\
#!{python}
import json, os, socket, struct, sys, time

words = sys.argv[1:]
if words == ["--enghelp"]:
    print("Available IO engines:\\n\\tlibblkio\\n\\tio_uring\\n\\tlibaio\\n\\tnull")
elif "--ioengine=libblkio" in words:
    path = next(word for word in words if word.startswith("--libblkio_path=")).partition("=")[2]
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(20)
        connection.connect(path)
        answers = connection.makefile("rb")

        def ask(request):
            connection.sendall(struct.pack("=III", request, 1, 0))
            return struct.unpack("=IIIQ", answers.read(20))[3]

        features = ask(1)
        connection.sendall(struct.pack("=III", 3, 1, 0))
        asked = {{"words": words, "features": features, "queues": ask(17)}}
    with open({log!r}, "a") as log:
        print(json.dumps(asked), file=log)
    while os.path.exists({hang!r}):
        time.sleep(0.1)
    rest = [word for word in words if not word.startswith(("--ioengine=", "--libblkio"))]
    os.execv({fio!r}, ["fio", *rest, "--ioengine=null", "--size=16M"])
else:
    os.execv({fio!r}, ["fio", *words])
'''
_READ_ONLY = 1 << 5
"""VIRTIO_BLK_F_RO."""


@pytest.fixture
def asked(place: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Such a program is first in the PATH; what it asked and was told it writes there."""
    real = shutil.which("fio")
    assert real is not None
    (place / "bin").mkdir()
    program, log = place / "bin" / "fio", place / "asked.json"
    program.write_text(_FIO.format(python=sys.executable, log=str(log), fio=real, hang=str(place / "hang")))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return log


def test_an_image_format_is_reached_by_an_export_for_virtual_machines(
    daemon: Daemon, place: Path, asked: Path
) -> None:
    source = image(place / "a.qcow2")
    jobs = f"{JOBS}[four]\nrw=randread\nbs=4k\nnumjobs=4\n"
    done = bench(daemon, source, *short(place, jobs), "--transports", "direct,fuse")
    assert done.status == 0, done
    found = report_of(place)
    assert {(run.way, run.job) for run in found.runs if run.is_good} == {
        (way, job) for way in ("direct", "fuse") for job in ("reads", "four")
    }
    (direct,) = [way for way in found.ways if way.name == "direct"]
    assert "libblkio" in direct.what
    assert direct.volume["transport"] == "vhost-user"
    assert "fio reads no qcow2" in direct.what
    for line in asked.read_text().splitlines():
        told = json.loads(line)
        assert told["queues"] == 4, "as many as fio has threads"
        assert told["features"] & _READ_ONLY
        assert "--readonly" in told["words"]
    assert daemon.names() == []
    assert not [line for line in leftovers(daemon.root) if "storaged-bench" in line]


def test_what_is_overwritten_is_exported_writable(
    daemon: Daemon, place: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As if it were a source that fio has no engine for.
    monkeypatch.setattr(engines, "LOCAL_ENGINES", ("none",))
    done = bench(daemon, place, "--scratch", "16M", *short(place, WRITES), "--transports", "direct")
    assert done.status == 0, done
    assert {run.job for run in report_of(place).runs if run.is_good} == {"reads", "writes"}
    assert not any(json.loads(line)["features"] & _READ_ONLY for line in asked.read_text().splitlines())
    assert daemon.names() == []


def test_an_export_that_flushes_each_write_is_no_measure_for_writes(daemon: Daemon, place: Path, asked: Path) -> None:
    words = [place, "--scratch", "16M", "--format", "qcow2"]
    done = bench(daemon, *words, *short(place, WRITES), "--transports", "direct,fuse")
    assert done.status == 0, done
    found = report_of(place)
    assert {(run.way, run.job) for run in found.runs} == {("direct", "reads"), ("fuse", "reads"), ("fuse", "writes")}
    assert "direct did none of the jobs that write" in done.stdout
    done = bench(daemon, *words, *short(place, "[writes]\nrw=randwrite\nbs=4k\n"), "--transports", "direct")
    assert done.status == 1
    assert "each write would be a flush" in done.stderr


def test_a_host_without_the_export_goes_on_without_the_direct_way(
    stopped: Daemon, place: Path, asked: Path
) -> None:
    # Its sockets would have a longer path than QEMU takes.
    long = Daemon(place / ("long" * 14))
    long.root.mkdir()
    long.start()
    try:
        done = bench(long, image(place / "a.qcow2"), *short(place))
        assert done.status == 0, done
        assert "direct: not measured: the socket would be" in done.stdout
        assert {run.way for run in report_of(place).runs} == {"fuse"}
    finally:
        long.end()


def test_without_a_daemon_nothing_is_said_to_be_left(stopped: Daemon, place: Path, asked: Path) -> None:
    done = bench(stopped, image(place / "a.qcow2"), *short(place), "--transports", "direct")
    assert done.status == 1
    assert str(ErrorCode.DAEMON_UNREACHABLE) in done.stderr
    assert "is left" not in done.stderr


def test_what_a_killed_one_left_is_named_by_the_next(daemon: Daemon, place: Path, asked: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.attach(f"{PREFIX}gone1234-direct", source, format="qcow2", transport="vhost-user", read_only=True)
    done = bench(daemon, source, *short(place), "--transports", "direct")
    assert done.status == 0, done
    assert "is left of a benchmark that was killed" in done.stderr


def test_a_qsd_that_dies_under_fio_ends_it_at_once(daemon: Daemon, place: Path, asked: Path) -> None:
    (place / "hang").touch()
    source = image(place / "a.qcow2")

    def kill() -> None:
        eventually(asked.exists, "fio is at it")
        daemon.kill_qsd(daemon.names()[0])

    killer = threading.Thread(target=kill)
    killer.start()
    began = time.monotonic()
    done = bench(daemon, source, *short(place), "--transports", "direct")
    killer.join()
    assert done.status == 1
    assert time.monotonic() - began < process.PATIENCE / 2
    (run,) = report_of(place).runs
    assert "died meanwhile" in run.error
    assert daemon.names() == []


def test_a_source_with_an_engine_of_its_own_is_measured_by_that(daemon: Daemon, place: Path, asked: Path) -> None:
    source = image(place / "a.raw", "raw")
    done = bench(daemon, source, *short(place), "--transports", "direct")
    assert done.status == 0, done
    assert "libblkio" not in done.stdout
    assert not asked.exists()


def test_a_qsd_that_is_another_one_by_now_is_not_measured(
    daemon: Daemon, place: Path, asked: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = measure.runner

    def runner(fio: Fio, cwd: str) -> measure.Runner:
        run = real(fio, cwd)

        def run_and_kill(job: Job, target: Target, runtime: float, leave: Leave | None) -> Run:
            done = run(job, target, runtime, leave)
            (name,) = daemon.names()
            daemon.replace_qsd(name)
            return done

        return run_and_kill

    monkeypatch.setattr(measure, "runner", runner)
    jobs = f"{JOBS}[four]\nrw=randread\nbs=4k\nnumjobs=4\n"
    done = bench(daemon, image(place / "a.qcow2"), *short(place, jobs), "--transports", "direct")
    assert done.status == 1
    good, bad = report_of(place).runs
    assert good.is_good
    assert "what served it died" in bad.error
    assert daemon.names() == []


def test_it_is_refused_where_others_write(daemon: Daemon, place: Path, asked: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.device("mine", source, format="qcow2")
    done = bench(daemon, source, *short(place), "--transports", "direct")
    assert done.status == 1
    assert str(ErrorCode.SOURCE_IN_USE) in done.stderr
    assert daemon.names() == ["mine"]
