"""/etc/storaged/volumes/NAME.toml: understood, or refused with a place; and what was detached stays so."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec
from storaged.model.volumefile import parse_volume_file
from storaged.store.files import VolumeFiles

PATH = "/etc/storaged/volumes/a.toml"


def refused(text: bytes) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        parse_volume_file(text, PATH, "a")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.volume == "a"
    assert PATH in f"{caught.value} {caught.value.hint}"
    return caught.value


def test_a_tree_of_nodes_becomes_the_source_that_it_names_or_is_refused_without_its_secrets() -> None:
    found = parse_volume_file(b"""source = 'json:{"driver":"qcow2","file.driver":"nbd","file.host":"h"}'""", PATH, "a")
    assert found == VolumeSpec(name="a", source="nbd://h:10809/", format=Format.QCOW2)
    tree = b"""source = 'json:{"driver":"luks","key-secret":"hunter2","file.filename":"/a"}'"""
    assert "hunter2" not in str(refused(tree))
    refused(b"""format = "vdi"\nsource = 'json:{"driver":"qcow2","file.filename":"/a"}'""")


def test_every_key_is_taken_over_and_only_the_source_is_needed() -> None:
    text = b"""
        source = "nbd://h/x"
        format = "qcow2"
        transport = "nbd"
        snapshot = true
        snapshot_dir = "/srv"
        [options]
        cache = "none"
        snapshot-size = "2G"
        queues = 4
        tls = false
    """
    assert parse_volume_file(text, PATH, "a") == VolumeSpec(
        name="a", source="nbd://h/x", format=Format.QCOW2, transport="nbd", snapshot=True, snapshot_dir="/srv",
        options={"cache": "none", "snapshot-size": "2G", "queues": "4", "tls": "off"},
    )
    assert parse_volume_file(b"source = '/x'", PATH, "a") == VolumeSpec(name="a", source="/x")


@pytest.mark.parametrize(("text", "what"), [
    (b"", "source"), (b"source = 3", "source"), (b"source = '/x'\nformat = 'vhd'", "format"), (b"a = = b", "line 1"),
    (b"source = '/x'\noptions = { cache = [] }", "options"), (b'source = "\xff"', "decode"),
    (b"source = '/x'\nread_only = 'yes'", "read_only"),
])
def test_what_is_wrong_is_named(text: bytes, what: str) -> None:
    assert what in str(refused(text))


@pytest.mark.parametrize(("key", "meant"), [("sorce", "source"), ("read-only", "read_only"), ("fmt", "format")])
def test_of_an_unknown_key_the_nearest_is_named(key: str, meant: str) -> None:
    error = refused(f"source = '/x'\n{key} = true".encode() if key != "sorce" else b"sorce = '/x'")
    assert key in error.message
    assert meant in error.hint


def test_of_a_key_that_is_like_none_all_are_named() -> None:
    assert "snapshot_dir" in refused(b"source = '/x'\nzzz = 1").hint


@given(st.binary(max_size=80) | st.text(max_size=80).map(lambda text: text.encode(errors="surrogatepass")))
def test_any_content_is_a_volume_or_is_refused(text: bytes) -> None:
    try:
        fine = isinstance(parse_volume_file(text, PATH, "a"), VolumeSpec)
    except StoragedError as error:
        fine = error.code is ErrorCode.INVALID_ARGUMENT
    assert fine


@pytest.fixture
def files(tmp_path: Path) -> VolumeFiles:
    (tmp_path / "volumes").mkdir()
    return VolumeFiles(str(tmp_path / "volumes"), str(tmp_path / "run" / "detached"))


def write(tmp_path: Path, name: str, text: str = "source = '/x'") -> Path:
    path = tmp_path / "volumes" / name
    path.write_text(text)
    return path


def test_a_bad_file_concerns_its_own_volume_only(files: VolumeFiles, tmp_path: Path) -> None:
    write(tmp_path, "good.toml")
    write(tmp_path, "bad.toml", "sorce = '/x'")
    write(tmp_path, "-bad-name.toml")
    write(tmp_path, "long.toml", "#" * (2 << 20))
    os.mkfifo(tmp_path / "volumes" / "fifo.toml")
    os.mkdir(tmp_path / "volumes" / "directory.toml")
    for name in ("editor.toml~", ".hidden.toml", "README"):
        write(tmp_path, name)
    found = files.load()
    assert set(found.volumes) == {"good"}
    assert set(found.bad) == {"bad", "-bad-name", "long", "fifo", "directory"}
    assert "source" in found.bad["bad"].hint


def test_no_directory_is_no_volumes(tmp_path: Path) -> None:
    assert VolumeFiles(str(tmp_path / "none"), str(tmp_path / "marks")).load().volumes == {}


def test_a_mark_lasts_until_it_is_taken_away_or_the_file_goes(files: VolumeFiles, tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml")
    files.unmark("a")
    files.mark_detached("a")
    assert files.load().detached == {"a"}
    assert files.load().volumes.keys() == {"a"}
    path.unlink()
    assert files.load().detached == frozenset()
    write(tmp_path, "a.toml")
    assert files.load().detached == frozenset()
    files.mark_detached("a")
    files.unmark("a")
    assert files.load().detached == frozenset()


def test_a_file_that_was_changed_or_came_anew_is_a_new_wish(files: VolumeFiles, tmp_path: Path) -> None:
    path = write(tmp_path, "a.toml")
    files.mark_detached("a")
    assert files.load().detached == {"a"}
    write(tmp_path, "a.toml", "source = '/another'")
    assert files.load().detached == frozenset()
    files.mark_detached("a")
    path.unlink()
    write(tmp_path, "a.toml")
    assert files.load().detached == frozenset()
