"""The overlay of a snapshot: noted before it is made, so that it is never lost, and counted only when whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import MAX_SIZE
from storaged.model.spec import VolumeSpec
from storaged.supervisor import overlay

MIB = 1 << 20
#: Of the source.
PRINT = [[12, MIB, 1_700_000_000_000_000_000], [13, 5, -1]]


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "state" / "snapshots")


def limit(size: str | None) -> int:
    options = {} if size is None else {"snapshot-size": size}
    return overlay.limit_of(VolumeSpec(name="a", source="/a", snapshot=True, options=options))


@pytest.mark.parametrize(
    ("text", "size"),
    [(None, 10 << 30), ("4M", 4 * MIB), ("1G", 1 << 30), (str(4 * MIB + 1), 4 * MIB + 65536)],
)
def test_a_limit_is_as_said_rounded_up_to_whole_clusters(text: str | None, size: int) -> None:
    assert limit(text) == size


@pytest.mark.parametrize("text", ["0", "1", "3M", str(4 * MIB - 1), "many"])
def test_a_limit_that_is_too_small_or_no_size_is_refused(text: str) -> None:
    with pytest.raises(StoragedError) as caught:
        limit(text)
    assert caught.value.code is ErrorCode.INVALID_SIZE


def test_a_limit_is_never_more_than_the_kernel_can_address() -> None:
    assert limit(str(MAX_SIZE)) <= MAX_SIZE


def make(place: str, name: str, directory: str | None = None) -> Path:
    path = overlay.reserve(place, directory, name)
    overlay.create_new(path, MIB)
    overlay.finish(place, name, path, PRINT)
    return Path(path)


def test_an_overlay_is_known_before_it_is_there(place: str) -> None:
    path = overlay.reserve(place, None, "a")
    assert overlay.locate(place, "a") == overlay.Mark(path=path)
    assert overlay.check(place, "a", PRINT) is None
    assert overlay.all_names(place) == ["a"]
    assert not os.path.exists(path)


def test_an_overlay_counts_only_once_it_is_finished(place: str) -> None:
    path = overlay.reserve(place, None, "a")
    new = Path(overlay.create_new(path, MIB))
    assert not os.path.exists(path)
    assert (new.stat().st_size, new.stat().st_blocks, new.stat().st_mode & 0o777) == (MIB, 0, 0o600)
    new.write_bytes(b"whole")
    overlay.finish(place, "a", path, PRINT)
    assert Path(path).read_bytes() == b"whole"
    assert not new.exists()
    mark = overlay.check(place, "a", PRINT)
    assert mark == overlay.Mark(path=path, inode=Path(path).stat().st_ino, limit=5, fingerprint=PRINT)


def test_one_that_was_never_finished_is_made_anew(place: str) -> None:
    path = overlay.reserve(place, None, "a")
    Path(overlay.create_new(path, MIB)).write_bytes(b"half")
    assert Path(overlay.create_new(path, MIB)).read_bytes() == bytes(MIB)


def test_no_link_that_somebody_laid_is_followed(place: str, tmp_path: Path) -> None:
    path = overlay.reserve(place, None, "a")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    Path(f"{path}.new").symlink_to(victim)
    overlay.create_new(path, MIB)
    assert victim.read_text() == "precious"


def test_a_place_once_noted_stays_whatever_is_said_later(place: str, tmp_path: Path) -> None:
    path = overlay.reserve(place, str(tmp_path), "a")
    assert overlay.reserve(place, None, "a") == path
    assert overlay.reserve(place, "/elsewhere", "a") == path
    Path(path).write_bytes(b"half")  # our own is not in the way
    assert overlay.reserve(place, None, "a") == path


def test_a_complete_overlay_is_reserved_again_as_it_is(place: str) -> None:
    path = make(place, "a")
    path.write_bytes(b"x" * MIB)
    before = overlay.check(place, "a", PRINT)
    assert overlay.reserve(place, None, "a") == str(path)
    assert overlay.check(place, "a", PRINT) == before
    assert path.read_bytes() == b"x" * MIB


def test_what_was_renamed_but_never_counted_is_removed(place: str) -> None:
    """As after a crash between the two halves of finish."""
    path = overlay.reserve(place, None, "a")
    os.rename(overlay.create_new(path, MIB), path)
    assert overlay.check(place, "a", PRINT) is None
    overlay.create_new(path, MIB)
    assert not os.path.exists(path)


#: What somebody may have put where the overlay shall be.
OBSTACLES: dict[str, Callable[[Path], object]] = {
    "file": lambda path: path.write_text("precious"),
    "directory": lambda path: path.mkdir(),
    "link": lambda path: path.symlink_to("/etc/passwd"),
    "dangling link": lambda path: path.symlink_to("/nosuch"),
    "pipe": os.mkfifo,
}


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("lay", OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_is_in_the_way_is_refused_and_stays_and_nothing_is_noted(
    place: str, tmp_path: Path, lay: Callable[[Path], object], elsewhere: bool
) -> None:
    directory = str(tmp_path) if elsewhere else None
    path = Path(overlay.reserve(place, directory, "a"))
    overlay.remove(place, "a")
    lay(path)
    before = path.lstat()
    with pytest.raises(StoragedError) as caught:
        overlay.reserve(place, directory, "a")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert str(path) in str(caught.value)
    assert caught.value.hint
    assert (path.lstat().st_ino, path.lstat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    assert overlay.all_names(place) == []
    overlay.remove(place, "a")
    assert path.lstat().st_ino == before.st_ino


def missing(path: Path) -> None:
    path.unlink()


def copied(path: Path) -> None:
    copy = path.with_suffix(".copy")
    copy.write_bytes(path.read_bytes())
    copy.replace(path)


def cut(path: Path) -> None:
    os.truncate(path, MIB // 2)


def linked(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def hidden(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.mkdir()


@pytest.mark.parametrize("change", [missing, copied, cut, linked, hidden])
def test_a_complete_overlay_that_is_gone_or_another_file_is_an_error_and_stays_known(
    place: str, change: Callable[[Path], None]
) -> None:
    path = make(place, "a")
    mark = overlay.check(place, "a", PRINT)
    change(path)
    with pytest.raises(StoragedError) as caught:
        overlay.check(place, "a", PRINT)
    assert caught.value.code is ErrorCode.SOURCE_MISSING
    assert caught.value.hint
    assert overlay.locate(place, "a") == mark


def test_what_is_written_into_an_overlay_does_not_make_it_another(place: str) -> None:
    path = make(place, "a")
    with open(path, "r+b") as file:
        file.write(b"x" * 65536)
    assert overlay.check(place, "a", PRINT) is not None


@pytest.mark.parametrize("other", [[], PRINT[:1], [*PRINT, [1, 2, 3]], PRINT[::-1], [[12, MIB, 1], PRINT[1]]])
def test_an_overlay_of_another_source_is_refused_and_kept(place: str, other: list[list[int]]) -> None:
    path = make(place, "a")
    with pytest.raises(StoragedError) as caught:
        overlay.check(place, "a", other)
    assert caught.value.code is ErrorCode.SOURCE_CHANGED
    assert caught.value.hint
    assert path.exists()
    assert overlay.check(place, "a", PRINT) is not None


def test_no_mark_is_no_overlay(place: str) -> None:
    assert overlay.locate(place, "a") is None
    assert overlay.check(place, "a", PRINT) is None


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"[" * 100_000, b'{"path": 1}', b'{"path": "/x", "new": 1}'])
def test_a_complete_overlay_whose_mark_is_damaged_never_counts_as_one_to_be_made(place: str, content: bytes) -> None:
    """What check answers None to is made anew: create_new removes what is there."""
    make(place, "a")
    Path(place, "a.json").write_bytes(content)
    with pytest.raises(StoragedError):
        overlay.check(place, "a", PRINT)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_a_complete_overlay_whose_mark_cannot_be_read_at_the_moment_never_counts_as_one_to_be_made(
    place: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> object:
        raise OSError(number, os.strerror(number))

    make(place, "a")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        with pytest.raises(StoragedError):
            overlay.check(place, "a", PRINT)
    assert overlay.check(place, "a", PRINT) is not None


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_removing_an_overlay_whose_mark_cannot_be_read_at_the_moment_is_not_said_to_be_done(
    place: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> object:
        raise OSError(number, os.strerror(number))

    path = make(place, "a")
    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        with pytest.raises(StoragedError):
            overlay.remove(place, "a")
    overlay.remove(place, "a")
    assert not path.exists()


def test_only_root_can_look(place: str) -> None:
    make(place, "a")
    assert os.stat(place).st_mode & 0o077 == 0
    assert Path(place, "a.json").stat().st_mode & 0o077 == 0


def test_two_daemons_that_share_a_directory_do_not_share_an_overlay(tmp_path: Path) -> None:
    paths = {overlay.reserve(str(tmp_path / daemon), str(tmp_path), "a") for daemon in ("one", "two")}
    assert len(paths) == 2
    assert {os.path.dirname(path) for path in paths} == {str(tmp_path)}


@pytest.mark.parametrize("elsewhere", [False, True])
def test_removing_leaves_nothing(place: str, tmp_path: Path, elsewhere: bool) -> None:
    directory = tmp_path / "fast"
    directory.mkdir()
    path = make(place, "a", str(directory) if elsewhere else None)
    overlay.create_new(str(path), MIB)
    overlay.remove(place, "a")
    assert overlay.locate(place, "a") is None
    assert [*os.listdir(place), *os.listdir(directory)] == []


def test_removing_what_is_not_there_is_no_error(place: str) -> None:
    overlay.remove(place, "a")
    overlay.reserve(place, None, "a")
    overlay.remove(place, "a")
    overlay.remove(place, "a")
    assert overlay.all_names(place) == []


def test_an_overlay_that_cannot_be_removed_stays_known(place: str, tmp_path: Path) -> None:
    path = overlay.reserve(place, str(tmp_path), "a")
    (Path(path) / "in the way").mkdir(parents=True)
    with pytest.raises(StoragedError):
        overlay.remove(place, "a")
    assert overlay.locate(place, "a") == overlay.Mark(path=path)


def test_removing_one_leaves_the_others(place: str) -> None:
    make(place, "a")
    other = make(place, "b")
    overlay.remove(place, "a")
    assert overlay.all_names(place) == ["b"]
    assert other.exists()


#: Named like something that belongs to volume a.
ALIKE = ["a.qcow2", "a.json", "a.qcow2.new", "a.json.qcow2", "a.qcow2.json"]


@pytest.mark.parametrize("name", ALIKE)
def test_a_volume_named_like_what_belongs_to_another_has_its_own(place: str, name: str) -> None:
    first, second = make(place, "a"), make(place, name)
    assert first != second
    assert sorted(overlay.all_names(place)) == sorted(["a", name])
    overlay.remove(place, name)
    assert overlay.all_names(place) == ["a"]
    assert first.exists()


@pytest.mark.parametrize("name", ALIKE)
def test_a_volume_whose_overlay_is_not_made_yet_does_not_find_that_of_another(place: str, name: str) -> None:
    other = make(place, name)
    path = overlay.reserve(place, None, "a")
    assert not os.path.exists(path)
    overlay.create_new(path, MIB)
    overlay.remove(place, "a")
    assert other.exists()


@pytest.mark.parametrize("directory", ["missing", "file"])
def test_a_directory_that_is_none_is_refused_before_anything_is_noted(
    place: str, tmp_path: Path, directory: str
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StoragedError) as caught:
        overlay.reserve(place, str(tmp_path / directory), "a")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert str(tmp_path / directory) in str(caught.value)
    assert caught.value.hint
    assert overlay.all_names(place) == []


def test_a_directory_that_went_away_is_a_failure_with_a_hint(place: str, tmp_path: Path) -> None:
    directory = tmp_path / "fast"
    directory.mkdir()
    path = overlay.reserve(place, str(directory), "a")
    directory.rmdir()
    with pytest.raises(StoragedError) as caught:
        overlay.create_new(path, MIB)
    assert caught.value.hint
