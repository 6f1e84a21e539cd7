"""Who is connected to a socket is told by the kernel, with real sockets and processes."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storaged.host import unixpeers
from storaged.host.unixpeers import clients_of

OURSELVES = os.getpid()
CLIENT = """
import socket, sys
sock = socket.socket(socket.AF_UNIX)
sock.connect(sys.stdin.readline().rstrip("\\n"))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "vm.sock")


@pytest.fixture
def listener(path: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen(4)
        yield sock


@contextmanager
def client(path: str, *before: str) -> Iterator[int]:
    """A process that is connected, and does not have the path on its command line; its pid."""
    program = [*before, sys.executable, "-c", CLIENT]
    with subprocess.Popen(program, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        child.stdin.write(f"{path}\n")
        child.stdin.flush()
        assert child.stdout.readline() == "\n"
        yield child.pid
        child.stdin.close()


def test_nobody_is_connected_to_a_socket_that_only_listens_or_is_not_there(
    path: str, listener: socket.socket
) -> None:
    assert clients_of(path, OURSELVES) == []
    assert clients_of(f"{path}.other", OURSELVES) == []


def test_a_client_is_named_before_and_after_it_is_accepted_and_no_more_when_it_is_gone(
    path: str, listener: socket.socket
) -> None:
    with client(path) as pid:
        (line,) = clients_of(path, OURSELVES)
        assert line.startswith(f"process {pid} (python"), "in the backlog"
        with listener.accept()[0]:
            assert clients_of(path, OURSELVES) == [line], "accepted"
    assert clients_of(path, OURSELVES) == []


def test_a_client_that_is_gone_does_not_count_though_the_server_has_not_noticed(
    path: str, listener: socket.socket
) -> None:
    with client(path):
        accepted = listener.accept()[0]
    with accepted:
        assert clients_of(path, OURSELVES) == [], "accepted"
    with client(path):
        pass
    assert clients_of(path, OURSELVES) == [], "in the backlog"


def test_a_client_that_is_about_to_go_is_waited_for(
    path: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As of a process that dies: its descriptors are gone from /proc before its sockets are closed."""
    monkeypatch.setattr(unixpeers, "_holders", lambda _inode: [])
    with client(path) as pid:
        threading.Timer(0.3, os.kill, (pid, signal.SIGKILL)).start()
        assert clients_of(path, OURSELVES) == []


def test_without_sock_diag_a_client_counts_all_the_same(
    path: str, listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(_path: str) -> None:
        raise OSError(errno.ENOENT, "no module unix_diag")

    monkeypatch.setattr(unixpeers, "_ask", missing)
    assert clients_of(path, OURSELVES) == []
    with client(path):
        assert clients_of(path, OURSELVES) == ["a process that cannot be told"], "in the backlog"
        with listener.accept()[0]:
            assert clients_of(path, OURSELVES) == ["a process that cannot be told"], "accepted"


def test_each_client_is_named(path: str, listener: socket.socket) -> None:
    with client(path) as one, client(path) as other, listener.accept()[0]:
        found = clients_of(path, OURSELVES)
        assert sorted(line.partition(" (")[0] for line in found) == sorted(f"process {pid}" for pid in (one, other))


def test_a_client_counts_by_the_name_that_it_came_by_wherever_the_socket_was_moved(
    path: str, listener: socket.socket
) -> None:
    with client(path):
        os.rename(path, f"{path}.aside")
        assert len(clients_of(path, OURSELVES)) == 1
        assert clients_of(f"{path}.aside", OURSELVES) == []


def test_a_socket_whose_path_only_begins_in_the_same_way_is_another(path: str, listener: socket.socket) -> None:
    longer = f"{path} 2"
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(longer)
        other.listen()
        with client(longer):
            assert clients_of(path, OURSELVES) == []
            assert len(clients_of(longer, OURSELVES)) == 1


def test_the_sockets_of_a_server_for_others_do_not_count(path: str, listener: socket.socket) -> None:
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.create_connection(tcp.getsockname()):
        one, other = socket.socketpair()
        with one, other, tcp.accept()[0]:
            assert clients_of(path, OURSELVES) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, which needs root")
def test_a_client_in_another_network_namespace_counts_once_it_is_accepted(
    path: str, listener: socket.socket
) -> None:
    with client(path, "unshare", "--net"), listener.accept()[0]:
        assert clients_of(path, OURSELVES) == ["a process in another network namespace"]


def test_a_server_that_is_gone_has_no_clients(path: str) -> None:
    assert clients_of(path, 0) == []
