"""Relative paths: what the user names is what the daemon, in another directory, opens."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from storaged.cli.paths import absolute, absolute_option, absolute_source
from storaged.errors import ErrorCode, StoragedError

PATHS = st.text(st.characters(exclude_characters="\0"), min_size=1)
CWD = "/home/ann"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("disk.img", "/home/ann/disk.img"),
        ("./disk.img", "/home/ann/disk.img"),
        ("images/disk.img", "/home/ann/images/disk.img"),
        ("../disk.img", "/home/ann/../disk.img"),
        ("/srv/disk.img", "/srv/disk.img"),
        ("//srv//disk.img", "/srv/disk.img"),
        ("./we:ird.img", "/home/ann/we:ird.img"),
        ("images/we:ird.img", "/home/ann/images/we:ird.img"),
        ("/srv/we:ird.img", "/srv/we:ird.img"),
        ("UPPER:x", "/home/ann/UPPER:x"),
        ("1:x", "/home/ann/1:x"),
        ("file:disk.img", "file:/home/ann/disk.img"),
        ("file:/srv/disk.img", "file:/srv/disk.img"),
        ("file:///srv/disk.img", "file:/srv/disk.img"),
        ("file:we:ird.img", "file:/home/ann/we:ird.img"),
        ("host_device:sdb", "host_device:/home/ann/sdb"),
        ("host_device:/dev/sdb", "host_device:/dev/sdb"),
        ("rbd:pool/image", "rbd:pool/image"),
        ("we:ird.img", "we:ird.img"),
        ("nbd+unix://x?socket=y", "nbd+unix://x?socket=y"),
        ("iscsi://h/iqn.2024-01.x:y/0", "iscsi://h/iqn.2024-01.x:y/0"),
    ],
)
def test_a_path_becomes_absolute_and_another_scheme_stays(source: str, expected: str) -> None:
    assert absolute_source(source, cwd=CWD) == expected


@pytest.mark.parametrize("source", ["", "file:", "host_device:"])
def test_an_empty_source_is_refused_and_never_the_working_directory(source: str) -> None:
    with pytest.raises(StoragedError) as caught:
        absolute_source(source, cwd=CWD)
    assert caught.value.code is ErrorCode.INVALID_SOURCE


@given(PATHS)
def test_absolute_paths_are_absolute_and_stay_so(path: str) -> None:
    once = absolute(path, cwd=CWD)
    assert once.startswith("/")
    assert "//" not in once
    assert absolute(once, cwd="/elsewhere") == once


@given(PATHS)
def test_any_path_can_be_named_with_a_dot_and_a_slash(path: str) -> None:
    assert absolute_source(f"./{path}", cwd=CWD) == absolute(path if path[0] != "/" else f".{path}", cwd=CWD)


@given(PATHS)
def test_a_source_without_a_scheme_is_always_a_path(path: str) -> None:
    head = path.partition(":")[0]
    assume(not head or not head[0].islower() or not head[0].isascii())
    assert absolute_source(path, cwd=CWD) == absolute(path, cwd=CWD)


def test_two_dots_after_a_symlink_mean_what_the_kernel_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "far/away").mkdir(parents=True)
    (tmp_path / "far/disk.img").write_text("the right one")
    (tmp_path / "disk.img").write_text("the wrong one")
    (tmp_path / "link").symlink_to("far/away")
    monkeypatch.chdir(tmp_path)
    assert Path(absolute_source("link/../disk.img")).read_text() == "the right one"


def test_bytes_that_are_no_utf8_survive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = os.fsdecode(b"caf\xe9.img")
    (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert os.path.exists(absolute_source(name))


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("backing", "allow:base", "allow:/home/ann/base"),
        ("backing", "allow:base:/srv:./x", "allow:/home/ann/base:/srv:/home/ann/x"),
        ("backing", "allow:", "allow:"),
        ("backing", "allow:a::b", "allow:/home/ann/a::/home/ann/b"),
        ("backing", "deny", "deny"),
        ("key-file", "./pass", "/home/ann/pass"),
        ("key-file", "pass", "pass"),
        ("key-file", "credential:a", "credential:a"),
        ("tls-certificates", "./pki", "/home/ann/pki"),
        ("key-file", "", ""),
        ("cache", "none", "none"),
    ],
)
def test_paths_in_options_become_absolute(key: str, value: str, expected: str) -> None:
    assert absolute_option(key, value, cwd=CWD) == expected


def test_a_working_directory_with_a_colon_never_allows_other_directories() -> None:
    with pytest.raises(StoragedError) as caught:
        absolute_option("backing", "allow:base", cwd="/home/ann:/etc")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert absolute_option("backing", "allow:/srv", cwd="/home/ann:/etc") == "allow:/srv"


def test_a_relative_path_in_a_directory_that_is_gone_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    shutil.rmtree(gone)
    try:
        with pytest.raises(StoragedError) as caught:
            absolute_source("disk.img")
    finally:
        os.chdir(tmp_path)
    assert "gone" in caught.value.cause
