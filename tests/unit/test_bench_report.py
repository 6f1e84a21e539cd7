"""What follows from the runs: the reference, the lines of the table, and what two reports have in common."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.bench.report import Report, changes, decoded, differences, encoded, failures, lines, reference
from storaged.cli.benchtable import comparison, table
from storaged.errors import ErrorCode, StoragedError
from tests.unit.bench_reports import LINEAR, RANDOM, report, run


def line(found: Report, way: str, job: str = RANDOM.name) -> dict[str, object]:
    """What the table says of a way."""
    (one,) = [one for one in lines(found) if (one.way, one.job.name) == (way, job)]
    return {"figure": one.figure.value, "ratio": one.ratio, "told": one.is_told, "rounds": one.rounds, "cpu": one.cpu}


def test_ratios_are_to_the_direct_way_round_by_round() -> None:
    found = line(report(), "vduse")
    ratio = found["ratio"]
    assert ratio is not None
    # Each round has 0.78, however far apart the rounds are.
    assert ratio.value == pytest.approx(0.78)  # type: ignore[attr-defined]
    assert found["told"] is True


def test_a_difference_within_the_spread_is_marked_and_explained() -> None:
    text = table(report())
    fuse = [row for row in text.splitlines() if row.split()[:1] == ["fuse"]]
    assert len(fuse) == 2
    assert all("~" in row for row in fuse)
    assert "~ the spread of the rounds is larger than the difference" in text
    vduse = [row for row in text.splitlines() if row.split()[:1] == ["vduse"]]
    assert all("0.78 (0.77 to 0.79)" in row and "~" not in row for row in vduse)


def test_without_a_direct_way_the_ratios_are_to_the_fastest() -> None:
    found = report({"nbd": [600, 600], "vduse": [900, 900], "fuse": [300, 300]})
    assert reference(found) == "vduse"
    assert "OF VDUSE" in table(found)


def test_a_direct_way_that_has_no_figures_is_no_reference() -> None:
    found = report({"direct": [0, 0], "vduse": [900, 900], "fuse": [1000, 1000]})
    assert reference(found) == "fuse"


def test_rounds_that_only_one_side_has_do_not_count_for_the_ratio() -> None:
    runs = [run("direct", RANDOM, 0, 1000), run("fuse", RANDOM, 0, 500), run("fuse", RANDOM, 1, 10)]
    found = line(report(runs=runs), "fuse")
    assert found["ratio"].value == pytest.approx(0.5)  # type: ignore[attr-defined]
    assert found["rounds"] == 2


def test_linear_jobs_are_told_in_megabytes_and_random_ones_in_requests() -> None:
    text = table(report())
    assert "1377 MB/s" in text
    assert "1377 IOPS" in text


def test_processor_time_is_told_for_each_request() -> None:
    assert line(report(), "vduse")["cpu"] == pytest.approx({"fio": 10, "qsd": 25, "daemon": 0, "host": 90})


def test_what_failed_and_that_not_all_was_measured_is_told() -> None:
    bad = run("nbd", LINEAR, 0, 0, error="fio failed: \x1b[31mI/O error")
    found = report(runs=[*report().runs, bad], partial="interrupted")
    assert failures(found) == [bad]
    text = table(found)
    assert "failed: nbd, 1M linear read, QD 16, round 1: fio failed" in text
    assert "\x1b" not in text
    assert "PARTIAL: not all was measured: interrupted" in text


@pytest.mark.parametrize("width", [70, 80, 100, 200])
def test_on_a_narrow_terminal_columns_are_left_out_and_no_figure_is_cut(width: int) -> None:
    rows = table(report(), width).split("\n\n")[0].splitlines()
    assert len(rows) == 7
    assert max(map(len, rows)) <= width
    assert "…" not in "".join(rows)
    assert all(word in rows[0] for word in ("JOB", "WAY", "FIGURE"))
    assert ("CPU/IO" in rows[0]) is (width >= 100)
    assert "0.78 (0.77 to 0.79)" in "".join(rows)


def test_a_report_is_the_same_after_it_was_written_and_read() -> None:
    assert decoded(encoded(report()), "a.json") == report()


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b'{"storaged_bench": 2}', b"\xff", encoded(report())[:-9]])
def test_what_is_no_report_is_refused(data: bytes) -> None:
    with pytest.raises(StoragedError) as caught:
        decoded(data, "a.json")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "a.json" in caught.value.message


@given(st.binary(max_size=200))
def test_garbage_is_refused_and_nothing_else(data: bytes) -> None:
    with pytest.raises(StoragedError):
        decoded(data, "a.json")


def test_two_reports_are_compared_job_by_job_and_way_by_way() -> None:
    before = report({"direct": [1000, 1010, 990, 1000], "fuse": [400, 404, 396, 400]})
    after = report({"direct": [1000, 1005, 995, 1000], "fuse": [600, 606, 594, 600]})
    found = {(change.way, change.job): change.ratio for change in changes(before, after)}
    assert found["fuse", RANDOM.name].value == pytest.approx(1.5)
    assert found["fuse", RANDOM.name].tells_a_difference
    assert not found["direct", RANDOM.name].tells_a_difference
    text = comparison(changes(before, after), differences(before, after))
    assert "1.50 (" in text
    assert "~ the spread" in text
    assert "not the same" not in text


def test_jobs_that_differ_are_not_compared_and_what_else_differs_is_told() -> None:
    from msgspec.structs import replace

    other = report(jobs=[replace(RANDOM, options={"rw": "randread", "bs": "8k"})], machine={"kernel": "6.1"})
    assert changes(report(), other) == []
    assert "kernel: 6.12, and then 6.1" in differences(report(), other)
    assert any(text.startswith("fio: ") for text in differences(report(), other))
