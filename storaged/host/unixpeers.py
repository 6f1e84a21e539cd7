"""Who is connected to a listening unix socket: sock_diag(7), and proc(5) where the kernel has no sock_diag."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import time

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLM_F_REQUEST_DUMP = 0x301
_NLMSG_ERROR = 2
_NLMSG_DONE = 3
# include/uapi/linux/unix_diag.h
_SHOW_NAME, _SHOW_PEER, _SHOW_WAITING = 1, 4, 8
_NAME, _PEER, _WAITING = 0, 2, 3
_HEADER = struct.Struct("=IHHII")
_REQUEST = struct.Struct("=BBHIIIII")
_ENTRY = struct.Struct("=BBBBIII")
_ATTRIBUTE = struct.Struct("=HH")
#: Tables of the sockets of other families that a server may have; the inode is in the column that is named.
_TABLES = (("tcp", 9), ("tcp6", 9), ("udp", 9), ("udp6", 9), ("netlink", 9), ("packet", 8))
#: Seconds that a connection may be nobody's: a process that dies loses its descriptors before they are closed.
_ENDING = 2.0
_STEP = 0.02
_UNKNOWN = "a process that cannot be told"
_ELSEWHERE = "a process in another network namespace"


def clients_of(path: str, server: int, bound: str = "") -> list[str]:
    """Return a line for each connection to the socket at exactly this path: who has it, as far as can be told.

    ``bound`` is the path that it was made at, where it was moved since: so the kernel calls it.
    Those that wait to be accepted count. ``server`` is the process that listens: what it is connected to in another
    network namespace (a container's) is seen by its descriptors alone. One whose client is gone does not count, though
    the server may not have noticed. Blocks shortly. Raises OSError.
    """
    deadline, pause = time.monotonic() + _ENDING, _STEP
    while True:
        users = _clients_now(path, server, bound or path)
        if not {_UNKNOWN, _ELSEWHERE} & set(users) or time.monotonic() >= deadline:
            return users
        time.sleep(pause)  # nothing tells when
        pause *= 2


def _clients_now(path: str, server: int, bound: str) -> list[str]:
    known, peers = _look(bound)
    strangers = _socket_inodes(server) - known
    if strangers:
        # The second look: one that came or went meanwhile is not in both.
        strangers &= _socket_inodes(server) - _look(bound)[0] - _others(server)
    if not peers and not strangers:
        return []
    users = []
    for inode in peers:
        users += (_holders(inode) if inode else _that_name(path)) or [_UNKNOWN]
    if strangers:
        users += _that_name(path) or [_ELSEWHERE]
    return list(dict.fromkeys(users))


def _look(path: str) -> tuple[set[int], list[int]]:
    """Return the inodes of all unix sockets, and those of the peers of the connections to a path (0: not told)."""
    try:
        return _ask(path)
    except OSError:
        return _read(path)


def _read(path: str) -> tuple[set[int], list[int]]:
    """From /proc/net/unix, which does not tell the peers."""
    known: set[int] = set()
    peers: list[int] = []
    with open("/proc/net/unix", encoding="utf-8", errors="surrogateescape") as file:
        for line in file.readlines()[1:]:
            fields = line.rstrip("\n").split(maxsplit=7)
            known.add(int(fields[6]))
            # 01 is the one that listens.
            if len(fields) == 8 and fields[7] == path and fields[5] != "01":
                peers.append(0)
    return known, peers


def _ask(path: str) -> tuple[set[int], list[int]]:
    known: set[int] = set()
    peers: list[int] = []
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_SOCK_DIAG) as sock:
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, 0xFFFFFFFF, 0, _SHOW_NAME | _SHOW_PEER | _SHOW_WAITING, 0, 0)
        sock.send(
            _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_DUMP, 1, 0) + request
        )
        while True:
            data = sock.recv(1 << 16)
            while data:
                length, kind, *_ = _HEADER.unpack_from(data)
                message, data = data[_HEADER.size:length], data[_aligned(length):]
                if kind == _NLMSG_DONE:
                    return known, peers
                if kind == _NLMSG_ERROR:
                    number = -struct.unpack_from("=i", message)[0]
                    raise OSError(number, os.strerror(number))
                known.add(_ENTRY.unpack_from(message)[4])
                attributes = _attributes(message[_ENTRY.size:])
                if attributes.get(_NAME, b"").rstrip(b"\0") == os.fsencode(path):
                    # An end that was accepted has the name of the socket that listens, which has the others.
                    found = attributes.get(_PEER, b"") + attributes.get(_WAITING, b"")
                    # 0: the other end is closed already (sk_diag_dump_peer in net/unix/diag.c).
                    peers += filter(None, struct.unpack(f"={len(found) // 4}I", found))


def _attributes(data: bytes) -> dict[int, bytes]:
    found = {}
    while len(data) >= _ATTRIBUTE.size:
        length, kind = _ATTRIBUTE.unpack_from(data)
        found[kind] = data[_ATTRIBUTE.size:length]
        data = data[_aligned(max(length, _ATTRIBUTE.size)):]
    return found


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def _socket_inodes(pid: int) -> set[int]:
    """The inodes of a process's sockets; none of one that is gone."""
    found = set()
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(directory):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{directory}/{descriptor}")
                if target.startswith("socket:["):
                    found.add(int(target[8:-1]))
    return found


def _others(pid: int) -> set[int]:
    """The inodes of the sockets of other families in a process's network namespace."""
    found = set()
    for table, column in _TABLES:
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                if len(fields) > column and fields[column].isdigit():
                    found.add(int(fields[column]))
    return found


def _holders(inode: int) -> list[str]:
    """A line for each process that has a socket open."""
    return [_described(pid) for pid in _pids() if inode in _socket_inodes(pid)]


def _that_name(path: str) -> list[str]:
    """A line for each process that has this path on its command line."""
    found, needle = [], os.fsencode(path)
    for pid in _pids():
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
            if needle in file.read():
                found.append(_described(pid))
    return found


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit() and int(entry) != os.getpid()]


def _described(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return f"process {pid} ({file.read().strip()})"
    except OSError:
        return f"process {pid}"
