"""What people see: aligned, cut only on a terminal, and never obeyed by it."""

from __future__ import annotations

import builtins
import re
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.cli import render
from storaged.model.diagnosis import Finding, Status
from tests.unit.fake_daemon import event, volume

NOW = 1_700_000_000.0
ANY = st.text(st.characters())


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


FAILED = volume(
    "db",
    state="failed",
    device=None,
    size=None,
    qsd_pid=None,
    transport_reason="",
    read_only=True,
    persist=True,
    failure={
        "code": "open-failed",
        "message": "cannot open the image",
        "step": "open",
        "cause": "Permission denied",
        "hint": "check the owner",
    },
)


def test_list_is_a_table_with_a_row_per_volume() -> None:
    table = render.volume_table([FAILED, volume("web1", snapshot=True)], width=200)
    assert table.splitlines() == [
        "NAME  STATE                DEVICE      SIZE  TRANSPORT  FORMAT  MODE         SOURCE",
        "db    failed(open-failed)  -           -     fuse       qcow2   ro,persist   /srv/images/db.qcow2",
        "web1  online               /dev/loop3  10G   fuse       qcow2   rw,snapshot  /srv/images/web1.qcow2",
    ]


def test_list_of_nothing_is_the_header() -> None:
    assert render.volume_table([]).split() == list(render._COLUMNS)


def test_on_a_narrow_terminal_the_source_keeps_its_end() -> None:
    table = render.volume_table([volume("web1", source="/srv/" + "x" * 200 + "/web1.qcow2")], width=80)
    assert all(len(line) <= 80 for line in table.splitlines())
    assert re.search(r"…x+/web1\.qcow2$", table)


def test_on_a_terminal_too_narrow_for_all_columns_the_least_needed_are_left_out() -> None:
    volumes = [FAILED, volume("web1", snapshot=True, persist=True)]
    header, *rows = render.volume_table(volumes, width=78).splitlines()
    assert header.split() == ["NAME", "STATE", "DEVICE", "SIZE", "MODE", "SOURCE"]
    assert all(len(row) <= 78 for row in rows)


def test_what_is_no_terminal_gets_everything() -> None:
    source = "/srv/" + "x" * 5000
    assert source in render.volume_table([volume("web1", source=source)], width=render._ENDLESS)


def test_wide_letters_are_counted_as_wide() -> None:
    header, wide, narrow = render.volume_table([volume("日本"), volume("web1")], width=200).splitlines()
    assert header.index("STATE") == narrow.index("online") == wide.index("online") + 2


@given(st.lists(st.dictionaries(st.sampled_from(["name", "state", "source", "device"]), ANY)))
def test_list_draws_whatever_the_daemon_says(volumes: list[dict[str, Any]]) -> None:
    lines = render.volume_table(volumes, width=100).split("\n")
    assert len(lines) == len(volumes) + 1
    assert all(line.isprintable() for line in lines)


@given(ANY)
def test_clean_text_is_one_line_that_no_terminal_obeys(text: str) -> None:
    assert render.clean(text).isprintable()
    assert render.clean(render.clean(text)) == render.clean(text)


def test_clean_leaves_good_text_alone_and_shows_bad() -> None:
    assert render.clean("naïve 日本") == "naïve 日本"
    assert render.clean("a\x1b[31mb") == r"a\x1b[31mb"
    assert render.clean("one\ntwo\n") == "one two"


def test_show_aligns_the_facts_and_leaves_out_what_there_is_not() -> None:
    text = render.volume_details(volume("web1", options={"cache": "none"}), now=NOW + 130)
    assert text.splitlines() == [
        "name:         web1",
        "state:        online",
        "since:        2023-11-15T00:13:20+02:00 (2m ago)",
        "device:       /dev/loop3",
        "link:         /dev/storaged/web1",
        "size:         10G (10737418240 bytes)",
        "block size:   512",
        "source:       /srv/images/web1.qcow2",
        "format:       qcow2",
        "mode:         rw",
        "kept:         until it is detached, or the host reboots (storaged persist web1 on changes that)",
        "transport:    fuse (auto: this kernel has no vduse and no nbd)",
        "option cache: none",
        "qsd:          pid 4711, version 10.0.13",
    ]


def test_show_tells_of_a_failure_its_code_cause_and_hint() -> None:
    lines = render.volume_details(FAILED).splitlines()
    assert lines[-3:] == [
        "failure:    cannot open the image (at step open) [open-failed]",
        "cause:      Permission denied",
        "hint:       check the owner",
    ]


@pytest.mark.parametrize(
    ("ago", "shown"),
    [(-5, "0s"), (0, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h"), (86400, "1d")],
)
def test_times_are_local_and_say_how_long_ago(ago: float, shown: str) -> None:
    assert render.moment(NOW, NOW + ago) == f"2023-11-15T00:13:20+02:00 ({shown} ago)"


def test_a_time_that_is_none_is_a_dash() -> None:
    assert render.moment(None) == render.timestamp("x") == "-"


def test_events_are_one_line_each() -> None:
    when = "2023-11-15T00:13:20+02:00"
    assert render.event_line(event("web1", "step", "opening")) == f"{when}  web1  step  opening"
    assert render.event_line(event("web1", "state", state="online")) == f"{when}  web1  state  online"
    assert render.event_line({}) == "-  -  -"


FINDINGS = [
    Finding("root", Status.OK, "running as root"),
    Finding("qsd", Status.FAIL, "not installed", "apt install qemu-system-common"),
]


def test_findings_are_a_table_with_hints(capsys: pytest.CaptureFixture[str]) -> None:
    render.findings(FINDINGS)
    assert capsys.readouterr().out.splitlines() == [
        "STATUS  CHECK  DETAIL",
        "ok      root   running as root",
        "fail    qsd    not installed",
        "               hint: apt install qemu-system-common",
    ]


def test_findings_are_shown_without_rich_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_rich(name: str, *args: Any) -> Any:
        if name.partition(".")[0] == "rich":
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without_rich)
    render.findings(FINDINGS)
    assert capsys.readouterr().out.splitlines() == [
        "ok    root: running as root",
        "fail  qsd: not installed",
        "      hint: apt install qemu-system-common",
    ]


def layer(source: str, format: str = "qcow2", **more: Any) -> dict[str, Any]:
    """An image as the API describes it."""
    return {"source": source, "format": format, "virtual_size": 10 << 30, "backing": None, "data_file": None} | more


def test_the_images_of_a_chain_are_a_table_and_one_image_alone_is_none() -> None:
    alone = [layer("/srv/a")]
    assert "IMAGE" not in render.volume_details(volume("a", layers=alone), NOW)
    assert "IMAGE" not in render.volume_details({**volume("a"), "layers": None}, NOW)
    chain = [layer("/srv/a", backing="nbd://h:1/b"), layer("nbd://h:1/b", data_file="/srv/\x1bd"), layer("/c", "raw")]
    lines = render.volume_details(volume("a", layers=chain), NOW).partition("images:\n")[2].splitlines()
    assert [line.split() for line in lines] == [
        ["IMAGE", "FORMAT", "SIZE", "SOURCE"], ["disk", "qcow2", "10G", "/srv/a"],
        ["backing", "1", "qcow2", "10G", "nbd://h:1/b"], ["its", "data", "raw", "/srv/\\x1bd"],
        ["backing", "2", "raw", "10G", "/c"],
    ]
    sources = ("SOURCE", "/srv/a", "nbd", "/srv", "/c")
    assert len({line.index(word) for line, word in zip(lines, sources, strict=True)}) == 1
