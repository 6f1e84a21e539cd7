"""State files on a full and on a read-only filesystem."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import remove_file, write_atomic
from storaged.model.spec import Desired, VolumeSpec
from storaged.store.local import LocalStore

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")

SIZE = 64 * 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A filesystem with next to no room."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "none", str(place)], check=True, timeout=30)
    yield place
    subprocess.run(["umount", str(place)], check=True, timeout=30)


def fill(place: Path) -> None:
    free = os.statvfs(place).f_bavail * os.statvfs(place).f_bsize
    (place / "filler").write_bytes(bytes(free))


def make_read_only(place: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True, timeout=30)


def refused(path: Path, data: bytes) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        write_atomic(str(path), data)
    assert str(path) in str(caught.value)
    assert caught.value.hint
    return caught.value


def test_on_a_full_disk_the_old_content_stays_and_nothing_is_left_behind(small: Path) -> None:
    write_atomic(str(small / "a.json"), b"old")
    fill(small)
    assert refused(small / "a.json", b"new" * 5000).code is ErrorCode.NO_SPACE
    assert (small / "a.json").read_bytes() == b"old"
    assert sorted(os.listdir(small)) == ["a.json", "filler"]


def test_what_fits_only_in_part_is_not_there_at_all(small: Path) -> None:
    assert refused(small / "a.json", bytes(2 * SIZE)).code is ErrorCode.NO_SPACE
    assert os.listdir(small) == []
    write_atomic(str(small / "a.json"), bytes(SIZE // 2))


def test_on_a_full_disk_entries_can_still_be_loaded_and_deleted(small: Path) -> None:
    store = LocalStore(str(small))
    store.put(Desired(spec=VolumeSpec(name="a", source="/a")))
    fill(small)
    with pytest.raises(StoragedError) as caught:
        store.put(Desired(spec=VolumeSpec(name="a", source="/b" * 5000)))
    assert caught.value.code is ErrorCode.NO_SPACE
    assert store.load().volumes["a"].spec.source == "/a"
    store.delete("a")
    assert store.load().volumes == {}


def test_on_a_read_only_disk_a_write_is_a_failure_with_a_hint(small: Path) -> None:
    write_atomic(str(small / "a.json"), b"old")
    make_read_only(small)
    assert refused(small / "a.json", b"new").code is ErrorCode.INTERNAL
    assert (small / "a.json").read_bytes() == b"old"


def test_on_a_read_only_disk_a_removal_is_a_failure_with_a_hint(small: Path) -> None:
    write_atomic(str(small / "a.json"), b"old")
    make_read_only(small)
    with pytest.raises(StoragedError) as caught:
        remove_file(str(small / "a.json"))
    assert caught.value.hint
    assert (small / "a.json").read_bytes() == b"old"


def test_damage_on_a_read_only_disk_is_told_and_the_others_load(small: Path) -> None:
    store = LocalStore(str(small))
    store.put(Desired(spec=VolumeSpec(name="a", source="/a")))
    (small / "bad.json").write_bytes(b"{")
    make_read_only(small)
    loaded = store.load()
    assert set(loaded.volumes) == {"a"}
    (damaged,) = loaded.damaged
    assert damaged.set_aside == str(small / "bad.json")
    assert "set aside" in damaged.cause
