"""Unix sockets at paths of any length."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import threading
from pathlib import Path

import pytest

from storaged.errors import StoragedError
from storaged.host.unixsock import bind_unix, connect_unix
from storaged.qsd.session import Session


@pytest.fixture
def deep(tmp_path: Path) -> Path:
    """A directory whose path is much longer than sun_path."""
    path = tmp_path / ("d" * 200) / ("e" * 200)
    path.mkdir(parents=True)
    return path


def talk(path: Path, listener: socket.socket) -> bytes:
    with connect_unix(str(path)) as client:
        server, _ = listener.accept()
        with server:
            server.sendall(b"hello")
        return client.recv(10)


def test_a_path_longer_than_108_bytes_can_be_bound_and_connected_to(deep: Path) -> None:
    path = deep / "qmp.sock"
    assert len(str(path)) > 400
    with bind_unix(str(path), mode=0o600) as listener:
        assert talk(path, listener) == b"hello"


def test_it_gets_its_mode(tmp_path: Path) -> None:
    for mode in (0o600, 0o660):
        with bind_unix(str(tmp_path / "s"), mode=mode):
            assert (tmp_path / "s").stat().st_mode & 0o777 == mode


def test_a_socket_that_nobody_serves_any_more_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    bind_unix(str(path), mode=0o600).close()
    with pytest.raises(ConnectionRefusedError):
        connect_unix(str(path))
    with bind_unix(str(path), mode=0o600) as listener:
        assert talk(path, listener) == b"hello"


def test_where_nothing_is_an_oserror_says_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        connect_unix(str(tmp_path / "s"))
    with pytest.raises(FileNotFoundError):
        connect_unix(str(tmp_path / "missing" / "s"))
    with pytest.raises(FileNotFoundError):
        bind_unix(str(tmp_path / "missing" / "s"), mode=0o600)


def test_no_descriptor_is_left_open_nor_inherited(tmp_path: Path) -> None:
    path = tmp_path / "s"
    before = os.listdir("/proc/self/fd")
    with bind_unix(str(path), mode=0o600) as listener, connect_unix(str(path)) as client:
        assert len(os.listdir("/proc/self/fd")) == len(before) + 2
        assert not os.get_inheritable(listener.fileno())
        assert not os.get_inheritable(client.fileno())
    for nobody in (str(path), "/", str(tmp_path / "missing")):
        with pytest.raises(OSError, match=r"refused|directory|No such"):
            connect_unix(nobody)
    with pytest.raises(OSError, match=r"No such|not permitted"):
        bind_unix("/proc/x", mode=0)
    assert os.listdir("/proc/self/fd") == before


def test_a_full_backlog_is_an_error_at_once_and_a_connection_blocks_otherwise(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with bind_unix(path, mode=0o600), contextlib.ExitStack() as clients:
        first = clients.enter_context(connect_unix(path))
        assert first.getblocking()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(64):  # with the first, as many as listen() takes and one
            clients.enter_context(connect_unix(path))
        with pytest.raises(BlockingIOError):
            connect_unix(path)
        assert len(os.listdir("/proc/self/fd")) == before + 64


def test_a_qsd_that_accepts_nobody_does_not_hold_up_the_event_loop(tmp_path: Path) -> None:
    """Session.connect promises an answer at its deadline, however often a hung QSD was looked at before."""
    path = str(tmp_path / "qmp.sock")
    looks = 0

    async def look_again_and_again() -> None:
        nonlocal looks
        for _ in range(80):
            with contextlib.suppress(StoragedError):
                await Session.connect(path, timeout=0.005)
            looks += 1

    with bind_unix(path, mode=0o600):
        thread = threading.Thread(target=lambda: asyncio.run(look_again_and_again()), daemon=True)
        thread.start()
        thread.join(3)
        looked = looks
    thread.join(5)  # without the listener it ends
    assert looked == 80
