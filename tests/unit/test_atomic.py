"""A state file is the old one or the new one, wherever the writer is killed."""

from __future__ import annotations

import contextlib
import os
import signal
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import commit, discard, remove_file, write_aside, write_atomic

OLD, NEW = b"old, and rather long", b"new"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.json"


def killed_at(number: int, work: Callable[[], None]) -> bool:
    """Run ``work`` in a child that is killed before its n-th system call that changes anything.

    Whether there was such a call. Data is written a byte at a time.
    """
    child = os.fork()
    if child == 0:
        left = number

        def counted(function: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                if left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                left -= 1
                return function(*args, **kwargs)

            return call

        write = os.write
        os.write = counted(lambda fd, data: write(fd, bytes(data[:1])))
        for name in ("open", "fchmod", "fsync", "rename", "unlink"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert status in (0, signal.SIGKILL)
    return status == signal.SIGKILL


@pytest.mark.parametrize("old", [None, OLD])
def test_a_writer_killed_anywhere_leaves_the_old_content_or_the_new(path: Path, old: bytes | None) -> None:
    seen, number = [], 0
    while True:
        if old is not None:
            path.write_bytes(old)
        else:
            path.unlink(missing_ok=True)
        killed = killed_at(number, lambda: write_atomic(str(path), NEW))
        content = path.read_bytes() if path.exists() else None
        assert content in (old, NEW)
        seen.append(content)
        if not killed:
            break
        number += 1
    assert number >= 5 + len(NEW), "open, write, fsync, rename, and two more for the directory"
    assert seen == sorted(seen, key=lambda content: content == NEW), "once new, always new"
    assert seen[-1] == NEW


def test_what_a_killed_writer_left_is_no_hindrance_to_the_next(path: Path) -> None:
    assert killed_at(3, lambda: write_atomic(str(path), OLD))
    (left,) = path.parent.iterdir()
    assert left.match(".a.json.*.tmp")
    write_atomic(str(path), NEW)
    assert path.read_bytes() == NEW
    assert sorted(path.parent.iterdir()) == sorted([left, path])


def test_the_file_is_synced_before_it_gets_its_name_and_the_directory_after(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    rename, fsync = os.rename, os.fsync

    def note_rename(source: str, target: str) -> None:
        calls.append("rename")
        rename(source, target)

    def note_fsync(fd: int) -> None:
        calls.append("directory" if os.path.isdir(f"/proc/self/fd/{fd}") else "file")
        fsync(fd)

    monkeypatch.setattr(os, "rename", note_rename)
    monkeypatch.setattr(os, "fsync", note_fsync)
    write_atomic(str(path), NEW)
    assert calls == ["file", "rename", "directory"]
    remove_file(str(path))
    assert calls[3:] == ["directory"]


def test_a_file_is_for_root_only_unless_said(path: Path) -> None:
    write_atomic(str(path), NEW)
    assert path.stat().st_mode & 0o777 == 0o600
    write_atomic(str(path), NEW, mode=0o400)
    assert path.stat().st_mode & 0o777 == 0o400


def test_the_mode_is_as_said_whatever_the_umask(path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_atomic(str(path), NEW, mode=0o644)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.fixture
def next_temporary(path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The name that the next writer would like for its temporary file."""
    monkeypatch.setattr(tempfile, "_get_candidate_names", lambda: iter(["first", "second"]))
    return path.parent / ".a.json.first.tmp"


def test_a_temporary_file_that_is_there_already_is_not_used(path: Path, next_temporary: Path) -> None:
    next_temporary.write_bytes(OLD)
    next_temporary.chmod(0o644)
    write_atomic(str(path), NEW)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (NEW, 0o600)
    assert next_temporary.read_bytes() == OLD


def test_an_empty_file_can_be_written(path: Path) -> None:
    write_atomic(str(path), b"")
    assert path.read_bytes() == b""


def test_no_link_is_followed(path: Path, tmp_path: Path, next_temporary: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(OLD)
    path.symlink_to(victim)
    write_atomic(str(path), NEW)
    assert (path.read_bytes(), victim.read_bytes()) == (NEW, OLD)
    next_temporary.symlink_to(victim)
    write_atomic(str(path), NEW)
    assert victim.read_bytes() == OLD


@pytest.mark.parametrize("old", [None, OLD])
def test_what_is_discarded_leaves_no_trace(path: Path, old: bytes | None) -> None:
    if old is not None:
        path.write_bytes(old)
    before = os.listdir(path.parent)
    discard(write_aside(str(path), NEW))
    assert os.listdir(path.parent) == before
    assert old is None or path.read_bytes() == old


def test_what_is_written_aside_counts_from_its_commit_on(path: Path) -> None:
    path.write_bytes(OLD)
    temporary = write_aside(str(path), NEW)
    assert path.read_bytes() == OLD
    commit(temporary, str(path))
    assert path.read_bytes() == NEW
    assert os.listdir(path.parent) == [path.name]


def test_removing_removes_and_is_no_error_when_there_is_nothing(path: Path) -> None:
    path.write_bytes(OLD)
    remove_file(str(path))
    remove_file(str(path))
    remove_file(str(path.parent / "missing" / "a.json"))
    assert not path.exists()


def test_what_cannot_be_written_is_a_failure_with_a_hint_and_leaves_nothing(path: Path) -> None:
    path.mkdir()
    for target in (path, path.parent / "missing" / "a.json"):
        with pytest.raises(StoragedError) as caught:
            write_atomic(str(target), NEW)
        assert caught.value.code is ErrorCode.INTERNAL
        assert str(target) in str(caught.value)
        assert caught.value.hint
    assert os.listdir(path.parent) == [path.name]
    with pytest.raises(StoragedError):
        remove_file(str(path))


def test_so_is_a_directory_that_is_none(path: Path) -> None:
    path.touch()
    with pytest.raises(StoragedError):
        write_atomic(str(path / "b.json"), NEW)


def test_a_writer_that_hung_does_not_spoil_what_a_later_one_wrote(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when a put is given up at its deadline, and the next one comes through."""
    hangs, goes_on, write = threading.Event(), threading.Event(), os.write

    def slow_write(fd: int, data: bytes) -> int:
        if threading.current_thread() is first:
            hangs.set()
            goes_on.wait(5)
        return write(fd, data)

    def write_first() -> None:
        with contextlib.suppress(StoragedError):
            write_atomic(str(path), NEW)

    first = threading.Thread(target=write_first)
    monkeypatch.setattr(os, "write", slow_write)
    first.start()
    assert hangs.wait(5)
    write_atomic(str(path), OLD)
    goes_on.set()
    first.join(5)
    assert path.read_bytes() in (OLD, NEW)
