"""Which lines of the kernel's table say that a peer is away; the table of a real kernel is read in tests/host."""

from __future__ import annotations

import builtins
import io
import os
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.host import tcp

ESTABLISHED, SYN_SENT, FIN_WAIT1, TIME_WAIT, CLOSE, CLOSE_WAIT, LISTEN = 1, 2, 4, 6, 7, 8, 10
HEADER = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n"


def words(address: str) -> str:
    """As the kernel writes it: words of the host's byte order."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    packed = socket.inet_pton(family, address)
    return "".join(f"{word:08X}" for word in struct.unpack(f"={len(packed) // 4}I", packed))


def line(
    state: int = ESTABLISHED, *, peer: str = "192.0.2.1", port: int = 3260, unacknowledged: int = 0,
    sent_again: int = 0, probes: int = 0, inode: int = 77,
) -> str:
    """A line as get_tcp4_sock() and get_tcp6_sock() of the kernel write it."""
    return (
        f"   0: {words('::1' if ':' in peer else '127.0.0.1')}:8000 {words(peer)}:{port:04X} {state:02X}"
        f" {unacknowledged:08X}:00000000 01:00000014 {sent_again:08X}     0 {probes:8d} {inode} 2 00000000d1b5c1a4 20\n"
    )


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What /proc/42/net/… hold; the process has the sockets 77 and 78 open."""
    found: dict[str, str] = {}
    real = builtins.open

    def opened(path: str, *arguments: Any, **named: Any) -> Any:
        if str(path).startswith("/proc/42/net/"):
            name = Path(path).name
            if name not in found:
                raise FileNotFoundError(path)
            return io.StringIO(HEADER + found[name])
        return real(path, *arguments, **named)

    monkeypatch.setattr(builtins, "open", opened)
    monkeypatch.setattr(tcp, "_sockets", lambda pid: {"77", "78"} if pid == 42 else set())
    return found


@pytest.mark.parametrize(
    "away",
    [
        line(unacknowledged=100, sent_again=3),
        line(unacknowledged=100, sent_again=15),
        line(FIN_WAIT1, unacknowledged=1, sent_again=4),
        line(CLOSE_WAIT, unacknowledged=1, sent_again=4),
        line(SYN_SENT, unacknowledged=1, sent_again=3),
        line(SYN_SENT, sent_again=3),
        line(probes=3),
        line(unacknowledged=9000, probes=3),
        line(unacknowledged=4096, sent_again=10, probes=0),
    ],
)
def test_what_is_sent_again_and_again_without_an_answer_is_away(tables: dict[str, str], away: str) -> None:
    tables["tcp"] = away
    assert tcp.silent_peers(42) == ["192.0.2.1:3260"]


@pytest.mark.parametrize(
    "present",
    [
        line(),
        line(unacknowledged=1 << 20),
        line(unacknowledged=100, sent_again=2),
        line(SYN_SENT, sent_again=2),
        line(probes=2),
        line(LISTEN, unacknowledged=9, sent_again=9),
        line(TIME_WAIT, sent_again=9, probes=9),
        line(CLOSE, unacknowledged=9, sent_again=9, probes=9),
        line(unacknowledged=100, sent_again=9, inode=79),
        line(unacknowledged=100, sent_again=9, inode=0),
    ],
)
def test_a_loss_or_two_another_process_or_what_is_no_connection_is_not(tables: dict[str, str], present: str) -> None:
    tables["tcp"] = present
    assert tcp.silent_peers(42) == []


def test_each_peer_is_named_once_and_in_order(tables: dict[str, str]) -> None:
    tables["tcp"] = "".join([
        line(peer="192.0.2.9", unacknowledged=1, sent_again=5), line(),
        line(peer="192.0.2.1", unacknowledged=1, sent_again=5, inode=78),
        line(peer="192.0.2.1", unacknowledged=1, sent_again=5),
    ])
    tables["tcp6"] = line(peer="2001:db8::1", port=2049, probes=3)
    assert tcp.silent_peers(42) == ["192.0.2.1:3260", "192.0.2.9:3260", "[2001:db8::1]:2049"]


def test_an_ipv4_peer_of_an_ipv6_socket_is_named_as_such(tables: dict[str, str]) -> None:
    tables["tcp6"] = line(peer="::ffff:192.0.2.7", probes=3)
    assert tcp.silent_peers(42) == ["192.0.2.7:3260"]


def test_a_kernel_without_ipv6_has_one_table(tables: dict[str, str]) -> None:
    tables["tcp"] = line(probes=5)
    assert tcp.silent_peers(42) == ["192.0.2.1:3260"]


def test_a_process_that_is_gone_or_has_no_sockets_has_no_peers(tables: dict[str, str]) -> None:
    assert tcp.silent_peers(42) == []
    tables["tcp"] = line(probes=5)
    assert tcp.silent_peers(43) == []


@given(st.ip_addresses(), st.integers(0, 65535))
def test_addresses_are_read_as_the_kernel_writes_them(address: Any, port: int) -> None:
    family = socket.AF_INET6 if address.version == 6 else socket.AF_INET
    mapped = address.ipv4_mapped if address.version == 6 else None
    plain = socket.inet_ntop(family, address.packed)
    expected = str(mapped) if mapped else f"[{plain}]" if address.version == 6 else plain
    assert tcp._address(f"{words(str(address))}:{port:04X}", family) == f"{expected}:{port}"


def test_this_process_has_real_sockets_and_all_of_them_are_well() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert str(os.fstat(client.fileno()).st_ino) in tcp._sockets(os.getpid())
        assert tcp.silent_peers(os.getpid()) == []


# Whether there is a connection at all


@pytest.fixture
def alive(monkeypatch: pytest.MonkeyPatch) -> None:
    """The process 42 is there."""
    real = os.path.isdir
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/proc/42/fd" or real(path))


@pytest.mark.parametrize("state", [ESTABLISHED, SYN_SENT, 3])
@pytest.mark.parametrize("table", ["tcp", "tcp6"])
def test_a_connection_is_one_in_either_table(alive: None, tables: dict[str, str], table: str, state: int) -> None:
    tables["tcp"] = line(CLOSE_WAIT)
    tables[table] = line(state, peer="2001:db8::1" if table == "tcp6" else "192.0.2.1")
    assert tcp.is_connected(42)


@pytest.mark.parametrize(
    "lines",
    ["", line(CLOSE_WAIT), line(FIN_WAIT1), line(TIME_WAIT), line(CLOSE), line(LISTEN), line(ESTABLISHED, inode=99)],
)
def test_what_is_closed_or_anothers_is_no_connection(alive: None, tables: dict[str, str], lines: str) -> None:
    tables["tcp"] = lines
    assert not tcp.is_connected(42)
    tables["tcp6"] = ""
    assert not tcp.is_connected(42)


def test_of_a_process_that_is_gone_nothing_is_said_to_be_lost(
    tables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: False)
    assert tcp.is_connected(42)  # without its tables
    tables["tcp"] = ""
    assert tcp.is_connected(42)  # without its descriptors
