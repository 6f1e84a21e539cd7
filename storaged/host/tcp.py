"""A process's TCP connections, and which peers do not acknowledge: /proc/PID/net/tcp (proc_net_tcp.rst in the kernel).

Not sock_diag(7), which tells the same numbers: it is about the asker's network namespace only, loads a module
(tcp_diag) where that is not there yet, and takes each socket's lock. This takes no lock, and so never waits.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

#: States of include/net/tcp_states.h.
_ESTABLISHED, _SYN_SENT, _SYN_RECV, _TIME_WAIT, _CLOSE, _LISTEN = 1, 2, 3, 6, 7, 10
#: This many in a row without an answer: with the shortest timeout (200 ms, doubled each time) 1.4 seconds have passed,
#: for an attempt to connect at least 3. One or two are lost on any network that is under load.
_UNANSWERED = 3


def silent_peers(pid: int) -> list[str]:
    """Return the peers ("192.0.2.1:3260", "[2001:db8::1]:3260") of a process that acknowledge nothing, sorted.

    That is: data were sent again and again, or an attempt to connect was, or probes (keepalive, closed window) were,
    and nothing came back. A server that is stopped is none of them, as long as its kernel acknowledges for it. Not
    seen is a network that went away while all that was sent had been acknowledged, unless the socket has keepalive. An
    empty list for a process that is gone.
    """
    sockets = _sockets(pid)
    if not sockets:
        return []
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        # None without IPv6, or when the process ends meanwhile.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
            next(file, None)
            for line in file:
                fields = line.split()
                if fields[9] in sockets and _is_silent(fields):
                    found.add(_address(fields[2], family))
    return sorted(found)


def is_connected(pid: int) -> bool:
    """Whether a process has a TCP connection, or is about to have one. True where that cannot be told.

    Neither one that its peer has closed counts (CLOSE_WAIT) nor one that was reset, which is in no table any more.
    """
    sockets = _sockets(pid)
    for table in ("tcp", "tcp6"):
        try:
            with open(f"/proc/{pid}/net/{table}", encoding="ascii") as file:
                next(file, None)
                for line in file:
                    fields = line.split()
                    if int(fields[3], 16) in (_ESTABLISHED, _SYN_SENT, _SYN_RECV) and fields[9] in sockets:
                        return True
        except OSError:
            if table == "tcp":
                return True  # it has ended, perhaps; without IPv6 there is no other table
    # One that has ended meanwhile is no news here.
    return not os.path.isdir(f"/proc/{pid}/fd")


def _is_silent(fields: list[str]) -> bool:
    """Judge a line of the table (get_tcp4_sock in net/ipv4/tcp_ipv4.c).

    The counts begin anew with each acknowledgment. The backoff of the timer would not do: it grows as well while a
    peer that is alive says again and again that its window is closed.
    """
    state = int(fields[3], 16)
    if state in (_TIME_WAIT, _CLOSE, _LISTEN):
        return False
    unacknowledged, _, _ = fields[4].partition(":")
    sent_again, probes = int(fields[6], 16), int(fields[8])
    if probes >= _UNANSWERED:
        return True
    return sent_again >= _UNANSWERED and (state == _SYN_SENT or int(unacknowledged, 16) > 0)


def _address(text: str, family: socket.AddressFamily) -> str:
    """"0100007F:0CBC" → "127.0.0.1:3260": the address in words of the host's byte order, the port in plain hex."""
    address, _, port = text.partition(":")
    words = [int(address[at:at + 8], 16) for at in range(0, len(address), 8)]
    packed = struct.pack(f"={len(words)}I", *words)
    if family == socket.AF_INET6:
        if packed[:12] == bytes(10) + b"\xff\xff":  # an IPv4 peer of an IPv6 socket
            return f"{socket.inet_ntop(socket.AF_INET, packed[12:])}:{int(port, 16)}"
        return f"[{socket.inet_ntop(family, packed)}]:{int(port, 16)}"
    return f"{socket.inet_ntop(family, packed)}:{int(port, 16)}"


def _sockets(pid: int) -> set[str]:
    """The inodes of a process's sockets; none of one that is gone."""
    return set(socket_descriptors(pid).values())


def socket_descriptors(pid: int) -> dict[int, str]:
    """Return descriptor → inode of a process's sockets, of all families; none of one that is gone."""
    found = {}
    directory = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for descriptor in os.listdir(directory):
            with contextlib.suppress(OSError):
                target = os.readlink(f"{directory}/{descriptor}")
                if target.startswith("socket:["):
                    found[int(descriptor)] = target[8:-1]
    return found
