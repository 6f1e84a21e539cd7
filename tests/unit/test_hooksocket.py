"""A socket where others look for it: made anew after a kill, taken away at the end, and nobody else's is touched."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from storaged.host.hooksocket import HookSocket


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "storaged").mkdir()
    (tmp_path / "systemd").mkdir()
    return tmp_path


def hook_of(run: Path) -> Path:
    return run / "systemd" / "io.hook" / "storaged"


def hook_socket(run: Path) -> HookSocket:
    return HookSocket(str(run / "storaged" / "socket"), str(hook_of(run)))


def registered(run: Path) -> socket.socket:
    listener = hook_socket(run).register()
    assert listener is not None
    return listener


def test_who_looks_in_the_directory_finds_a_socket_for_root_alone(run: Path) -> None:
    with registered(run), socket.socket(socket.AF_UNIX) as client:
        # What looks there asks for the type of the entry, and follows no link.
        (entry,) = os.scandir(hook_of(run).parent)
        assert stat.S_ISSOCK(entry.stat(follow_symlinks=False).st_mode)
        assert stat.S_IMODE(entry.stat(follow_symlinks=False).st_mode) == 0o600
        assert stat.S_IMODE(hook_of(run).parent.stat().st_mode) == 0o755
        client.connect(entry.path)


def test_it_is_gone_at_the_end(run: Path) -> None:
    with registered(run):
        hook_socket(run).withdraw()
    assert list(hook_of(run).parent.iterdir()) == list((run / "storaged").iterdir()) == []


def test_that_of_a_killed_daemon_is_replaced(run: Path) -> None:
    registered(run).close()
    with registered(run), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(hook_of(run)))


def test_without_the_directory_of_the_others_nothing_is_made(run: Path) -> None:
    (run / "systemd").rmdir()
    assert hook_socket(run).register() is None
    assert [path.name for path in run.rglob("*")] == ["storaged"]


@pytest.mark.parametrize("stale", [False, True])
def test_a_socket_of_somebody_else_is_left_alone(run: Path, stale: bool, caplog: pytest.LogCaptureFixture) -> None:
    hook_of(run).parent.mkdir()
    with socket.socket(socket.AF_UNIX) as foreign:
        foreign.bind(str(hook_of(run)))
        foreign.listen()
        if stale:
            foreign.close()
        before = hook_of(run).lstat()
        assert hook_socket(run).register() is None
        assert "not storaged's" in caplog.text
        hook_socket(run).withdraw()
        assert os.path.samestat(hook_of(run).lstat(), before)
        assert list((run / "storaged").iterdir()) == []


def test_what_took_its_place_meanwhile_is_left_alone_at_the_end(run: Path) -> None:
    with registered(run):
        hook_of(run).unlink()
        hook_of(run).write_text("somebody else's")
        hook_socket(run).withdraw()
    assert hook_of(run).read_text() == "somebody else's"


def test_a_directory_that_cannot_be_made_is_said_and_no_failure(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    hook_of(run).parent.write_text("a file")
    assert hook_socket(run).register() is None
    assert str(hook_of(run)) in caplog.text
