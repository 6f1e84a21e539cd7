"""Which settings are tried, and why others are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from storaged.backends import BACKENDS
from storaged.bench.fio import words
from storaged.bench.jobs import TUNING, Job
from storaged.bench.knobs import UNSAFE, Host, knobs, names, pinned
from storaged.model.profile import known_options
from storaged.transports import TRANSPORTS, options_of

HOST = Host(4, {
    "scheduler": "[none] mq-deadline", "read_ahead_kb": "128", "max_sectors_kb": "1280", "max_hw_sectors_kb": "2048",
})
READS = [job for job in TUNING.jobs if not job.writes]
SMALL = [Job("small", {"rw": "randread", "bs": "4k"})]


def options(transport: str, backend: str) -> set[str]:
    """Those that both have."""
    return {*options_of(transport), *BACKENDS[backend].options}


def test_every_setting_is_an_option_that_there_is_and_that_a_profile_may_have() -> None:
    known = {key for transport in TRANSPORTS.values() for key in transport.options}
    assert set(names()) <= known_options(known)
    everything = known | {key for backend in BACKENDS.values() for key in backend.options}
    assert set(names()) <= everything
    assert set(UNSAFE) <= set(names())


@pytest.mark.parametrize(("transport", "backend", "wanted"), [
    ("fuse", "file", {"aio", "iothreads", "read-ahead-kb", "max-sectors-kb", "scheduler"}),
    ("fuse", "http", {"read-ahead", "iothreads", "read-ahead-kb", "max-sectors-kb", "scheduler"}),
    ("vduse", "rbd", {"queues", "queue-size", "poll-max-ns", "read-ahead-kb", "max-sectors-kb", "scheduler"}),
    ("nbd", "rbd", {"poll-max-ns", "read-ahead-kb", "max-sectors-kb", "scheduler"}),
])
def test_what_the_transport_and_the_source_have_is_tried(transport: str, backend: str, wanted: set[str]) -> None:
    found, _ = knobs(options(transport, backend), {}, HOST, READS, unsafe=False)
    assert {knob.option for knob in found} == wanted


def test_what_is_not_safe_is_tried_only_if_it_was_said() -> None:
    found, notes = knobs(options("nbd", "rbd"), {}, HOST, READS, unsafe=False)
    assert "connections" not in [knob.option for knob in found]
    assert any("connections" in note and "--unsafe" in note for note in notes)
    found, notes = knobs(options("nbd", "rbd"), {}, HOST, READS, unsafe=True)
    assert "connections" in [knob.option for knob in found]
    assert notes == []


def test_qsd_without_an_io_thread_does_not_poll() -> None:
    old = replace(HOST, polls=False)
    found, notes = knobs(options("nbd", "rbd"), {}, old, READS, unsafe=False)
    assert "poll-max-ns" not in [knob.option for knob in found]
    assert any(note.startswith("poll-max-ns was not tried: ") for note in notes)


def test_a_fuse_export_has_threads_of_its_own_only_where_qsd_can() -> None:
    found, _ = knobs(options("fuse", "rbd"), {}, HOST, READS, unsafe=False)
    assert [knob.values for knob in found if knob.option == "iothreads"] == [("1", "2", "4")]
    old = replace(HOST, several_threads=False)
    found, notes = knobs(options("fuse", "rbd"), {}, old, READS, unsafe=False)
    assert "iothreads" not in [knob.option for knob in found]
    assert any(note.startswith("iothreads was not tried: ") for note in notes)


def test_values_are_those_that_this_host_can_have() -> None:
    found, notes = knobs(options("vduse", "file"), {"cache": "none", "aio": "threads"}, HOST, READS, unsafe=False)
    values = {knob.option: knob.values for knob in found}
    assert values["queues"] == ("2", "4")
    assert values["scheduler"] == ("mq-deadline",)
    assert values["max-sectors-kb"] == ("128", "256", "512", "1024", "2048")
    assert values["read-ahead-kb"] == ("512", "2048", "8192", "32768")
    assert "aio" not in values
    assert "aio stays threads, as it was said." in notes


def test_native_needs_a_cache_mode_without_the_page_cache() -> None:
    for cache, wanted in (("none", ("io_uring", "native")), ("writeback", ("io_uring",))):
        found, _ = knobs({"aio"}, {"cache": cache}, HOST, READS, unsafe=False)
        assert [knob.values for knob in found] == [wanted]


def test_what_no_job_could_show_is_not_tried() -> None:
    found, notes = knobs(options("vduse", "file"), {}, Host(1, {"scheduler": "none"}), SMALL, unsafe=False)
    assert {knob.option for knob in found} == {"aio", "queue-size", "poll-max-ns"}
    assert {note.split()[0] for note in notes} == {"queues", "read-ahead-kb", "max-sectors-kb", "scheduler"}


def test_a_measurement_says_all_of_the_queue_since_another_device_may_have_been_left_otherwise() -> None:
    of_fuse, queue = options_of("fuse").keys(), {**HOST.queue, "nr_requests": "128"}
    assert pinned(of_fuse, queue, {}) == {
        "scheduler": "none", "read-ahead-kb": "128", "max-sectors-kb": "1280", "nr-requests": "128",
    }
    assert pinned(of_fuse, queue, {"read-ahead-kb": "512", "aio": "native"})["read-ahead-kb"] == "512"
    # Another scheduler brings its own.
    assert "nr-requests" not in pinned(of_fuse, queue, {"scheduler": "mq-deadline"})
    assert pinned(of_fuse, {"scheduler": "none", "read_ahead_kb": ""}, {}) == {}
    # So does a longer virtqueue.
    of_vduse = options_of("vduse").keys()
    assert "nr-requests" in pinned(of_vduse, queue, {"queues": "2"})
    assert "nr-requests" not in pinned(of_vduse, queue, {"queues": "2", "queue-size": "512"})


def test_who_reads_through_the_page_cache_goes_over_the_disk_once() -> None:
    (buffered,) = [job for job in TUNING.jobs if not job.is_direct]
    told = words(buffered, ["--direct=1", "--filename=/dev/loop9"], 1.0, None)
    # fio takes what comes last.
    assert told.index("--direct=0") > told.index("--direct=1")
    assert "--time_based=1" not in told
    assert "--runtime=1000ms" in told
    assert "--readonly" in told
    assert "--time_based=1" in words(SMALL[0], [], 1.0, None)
