"""What fio is asked to do: the jobs that are there, those of a file, and that none writes without leave."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.bench.fio import Leave, engines_of, measured, version_of, words
from storaged.bench.jobs import SETS, TUNING, Job, check_size, jobs_of_file
from storaged.bench.process import Fio, check_words
from storaged.errors import ErrorCode, StoragedError

ALL = [job for one in (*SETS.values(), TUNING) for job in one.jobs]
MIB = 1 << 20


def options(**wanted: str) -> list[str]:
    """The names of the jobs of ``full`` that have these options."""
    return [job.name for job in SETS["full"].jobs if wanted.items() <= job.options.items()]


@pytest.mark.parametrize("what", ["read", "write"])
def test_full_has_linear_and_random_jobs_at_every_depth(what: str) -> None:
    for block in ("1M", "4M"):
        assert options(rw=what, bs=block, iodepth="16")
    for depth in ("1", "32", "128"):
        assert options(rw=f"rand{what}", bs="4k", iodepth=depth)
    assert options(rw=f"rand{what}", bs="4k", numjobs="16")


def test_full_has_a_mixed_job_and_one_that_flushes_each_write() -> None:
    assert options(rw="randrw", rwmixread="70")
    assert options(rw="randwrite", fsync="1")


def test_each_way_is_as_often_before_another_as_behind_it() -> None:
    assert [one.repeat % 2 for one in SETS.values()] == [0, 0]


def test_the_names_of_jobs_are_their_own() -> None:
    for one in SETS.values():
        assert len({job.name for job in one.jobs}) == len(one.jobs)


@pytest.mark.parametrize("job", ALL, ids=lambda job: job.name)
def test_a_job_that_reads_is_told_to_write_nothing_and_one_that_writes_is_refused(job: Job) -> None:
    if job.writes:
        with pytest.raises(StoragedError) as caught:
            words(job, ["--filename=/dev/x"], 1, None)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert "--destructive" in caught.value.hint
        assert "--readonly" not in words(job, ["--filename=/dev/x"], 1, Leave.OWN)
    else:
        for leave in (None, *Leave):
            assert "--readonly" in words(job, ["--filename=/dev/x"], 1, leave)


@pytest.mark.parametrize("key", ["rw", "readwrite"])
@pytest.mark.parametrize("direction", ["read", "write", "randread", "randwrite", "rw", "readwrite", "randrw"])
def test_whether_a_job_of_a_file_writes_is_told_from_each_spelling(key: str, direction: str) -> None:
    (job,) = jobs_of_file(f"[a]\n{key}={direction}\nbs=4k\n", "f").jobs
    assert job.writes is (direction not in ("read", "randread"))


def test_a_file_has_a_job_in_each_section_and_what_they_have_in_common() -> None:
    found = jobs_of_file("; of mine\n[global]\nbs=8k\n[reads]\nrw=randread\niodepth=4\n[more]\nrw=read\nbs=64k\n", "f")
    assert [(job.name, dict(job.options)) for job in found.jobs] == [
        ("reads", {"bs": "8k", "rw": "randread", "iodepth": "4"}), ("more", {"bs": "64k", "rw": "read"}),
    ]


@pytest.mark.parametrize(("text", "says"), [
    ("", "no job"),
    ("[global]\nbs=4k\n", "no job"),
    ("rw=read\n", "no section"),
    ("[a]\nrw=read\n", "bs"),
    ("[a]\nbs=4k\n", "rw"),
    ("[a]\nrw=erase\nbs=4k\n", "erase"),
    ("[a]\nrw=randtrim\nbs=4k\n", "randtrim"),
    ("[a]\nrw=read\nbs=0\n", "bs=0"),
    ("[a]\nrw=read\nbs=1000\n", "1000"),
    ("[a]\nrw=read\nbs=64M\n", "64M"),
    ("[a]\nrw=read\nbs=4k\niodepth=0\n", "iodepth"),
    ("[a]\nrw=read\nbs=4k\nnumjobs=5000\n", "numjobs"),
    ("[a]\nrw=read\nrw=write\nbs=4k\n", "rw"),
    ("[a]\nrw=read\nreadwrite=write\nbs=4k\n", "twice"),
    ("[a]\nrw=read\nbs=4k\n[a]\nrw=read\nbs=4k\n", "a"),
    # What says where it goes, and by what, could go anywhere.
    ("[a]\nrw=read\nbs=4k\nfilename=/dev/vda\n", "filename"),
    ("[a]\nrw=read\nbs=4k\nioengine=libaio\n", "ioengine"),
    ("[a]\nrw=read\nbs=4k\nexec_prerun=reboot\n", "exec_prerun"),
    ("[a]\nrw=read\nbs=4k\ndirectory=/\n", "directory"),
    ("[a]\nrw=read\nbs=4k\nsize=1G\n", "size"),
    ("[a]\nrw=read\nbs=4k\nreadonly=0\n", "readonly"),
    (f"[{'a' * 99}]\nrw=read\nbs=4k\n", "longer"),
    ("[a\x1bb]\nrw=read\nbs=4k\n", "name"),
])
def test_a_wrong_file_is_refused_with_what_is_wrong(text: str, says: str) -> None:
    with pytest.raises(StoragedError) as caught:
        jobs_of_file(text, "my.fio")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "my.fio" in caught.value.message
    assert says in caught.value.cause
    assert caught.value.hint


@given(st.text(max_size=200))
def test_whatever_is_in_a_file_it_is_taken_or_refused(text: str) -> None:
    with contextlib.suppress(StoragedError):
        assert jobs_of_file(text, "f").jobs


def test_a_disk_that_is_too_small_is_refused() -> None:
    linear = next(job for job in ALL if job.options["bs"] == "4M")
    check_size([linear], 64 * MIB)
    with pytest.raises(StoragedError) as caught:
        check_size([linear], 63 * MIB)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "64M" in caught.value.cause


JSON = """nbd: connected
{
  "fio version" : "fio-3.33",
  "jobs" : [{
    "error" : 0, "job_runtime" : 2000, "usr_cpu" : 10.0, "sys_cpu" : 15.0,
    "read" : {"iops" : 5.0, "bw_bytes" : 20480, "total_ios" : 10, "lat_ns" : {"percentile" : {"99.900000" : 7}}},
    "write" : {"iops" : 3.0, "bw_bytes" : 12288, "total_ios" : 6, "lat_ns" : {"percentile" : {"50.000000" : 9}}},
    "sync" : {"total_ios" : 6, "lat_ns" : {"percentile" : {"50.000000" : 90}}}
  }]
}
disk stats
"""
READS, WRITES = Job("r", {"rw": "read", "bs": "4k"}), Job("w", {"rw": "randwrite", "bs": "4k", "fsync": "1"})


def test_of_what_fio_prints_the_figures_of_the_job_are_taken() -> None:
    found, raw = measured(JSON.replace('"total_ios" : 6, "lat_ns" : {"percentile" : {"50.000000" : 90}}', ""), READS)
    assert (found.iops, found.bytes_per_second, found.requests, found.latency) == (5.0, 20480.0, 10, {"99.9": 7.0})
    assert found.cpu == pytest.approx(0.5)
    assert raw["job_runtime"] == 2000


def test_where_each_write_is_flushed_the_latency_is_that_of_the_flushes() -> None:
    found, _ = measured(JSON, WRITES)
    assert (found.iops, found.requests, found.latency) == (3.0, 6, {"50": 90.0})


@pytest.mark.parametrize("text", [
    "", "fio: cannot", "{\n}", '{\n"jobs": []}', '{\n"jobs": [{"error": 5}]}', JSON.replace('"iops"', '"ops"'),
    JSON.replace('"total_ios" : 10', '"total_ios" : 0'), JSON[:200],
])
def test_what_is_no_result_is_told_as_such(text: str) -> None:
    with pytest.raises(ValueError, match=r"\w+"):
        measured(text, READS)


def test_versions_and_engines_are_read_as_fio_prints_them() -> None:
    assert version_of("fio-3.33\n") == (3, 33)
    assert version_of("fio-3.36-31-gabcd") == (3, 36)
    assert version_of("no such thing") is None
    assert engines_of("Available IO engines:\n\tcpuio\n\tlibaio\n") == {"cpuio", "libaio"}


OF_REPOSITORY = sorted((Path(__file__).parents[2] / "bench/jobs").glob("*.fio"))


def test_the_repository_has_the_files_of_jobs_that_its_documentation_names() -> None:
    told = (Path(__file__).parents[2] / "docs/bench.md").read_text()
    assert OF_REPOSITORY
    assert [path.name for path in OF_REPOSITORY if f"`{path.name}`" not in told] == []


def test_fio_takes_the_usual_jobs_as_they_are_told_and_says_what_is_wrong_with_others() -> None:
    program = shutil.which("fio")
    assert program is not None
    fio = Fio(program, "", frozenset())
    jobs = [*ALL, *(job for path in OF_REPOSITORY for job in jobs_of_file(path.read_text(), path.name).jobs)]
    # --readonly is of the whole command line.
    together = [
        word for job in jobs for word in words(job, ["--ioengine=null", "--size=1G"], 1, Leave.OWN)
        if word != "--readonly"
    ]
    assert check_words(fio, together) == ""
    assert "rw=none" in check_words(fio, [*together, "--rw=none"])
