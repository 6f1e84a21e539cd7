"""Tells at once when a TCP connection of another process ends: pidfd_getfd(2), epoll(7).

Nobody else does: QEMU's ssh driver looks at its socket only while a request waits for a reply, and finds out with the
next request, which then fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import select
import socket
import struct
from collections.abc import Callable

from storaged.host import process
from storaged.host.tcp import socket_descriptors
from storaged.model.record import ProcessIdentity

#: include/uapi/asm-generic/unistd.h, Linux 5.6; the same number on all architectures. glibc has it since 2.36.
_PIDFD_GETFD = 438
#: A server that was restarted answers the first probe with a reset: so it is found out within 10 seconds. One that is
#: out of reach is waited for, half an hour: with nothing in flight no data is at stake.
_IDLE, _INTERVAL, _PROBES = 10, 15, 120

_libc = ctypes.CDLL(None, use_errno=True)


class ConnectionWatch:
    """Holds duplicates of the TCP sockets of one process, and looks at nothing but whether they end."""

    def __init__(self, wake: Callable[[], None]) -> None:
        """``wake`` is called when a connection has ended."""
        self._wake = wake
        self._of: ProcessIdentity | None = None
        self._sockets: dict[int, socket.socket] = {}
        self._pidfd = -1
        self._epoll: select.epoll | None = None

    @property
    def active(self) -> bool:
        """Whether there is a connection that is watched."""
        return bool(self._sockets)

    def watch(self, who: ProcessIdentity) -> None:
        """Watch the connections that a process has now, unless that is done. Never waits.

        Without CAP_SYS_PTRACE, or the system call, there is nothing to be had: then :attr:`active` stays false.
        """
        if who == self._of:
            return
        self.close()
        self._of = who
        pidfd = process.open_pidfd(who)
        if pidfd is None:
            return
        self._pidfd = pidfd
        self._epoll = select.epoll()
        for number in socket_descriptors(who.pid):
            duplicate = _duplicate(pidfd, number)
            if duplicate is not None:
                self._sockets[duplicate.fileno()] = duplicate
                # Nothing of what arrives: that would be each reply.
                self._epoll.register(duplicate, select.EPOLLRDHUP)
        self._epoll.register(pidfd, select.EPOLLIN)
        asyncio.get_running_loop().add_reader(self._epoll.fileno(), self._on_event)

    def close(self) -> None:
        """Let go of everything."""
        if self._epoll is not None:
            asyncio.get_running_loop().remove_reader(self._epoll.fileno())
            self._epoll.close()
            os.close(self._pidfd)
        for duplicate in self._sockets.values():
            duplicate.close()
        self._of, self._epoll, self._pidfd = None, None, -1
        self._sockets.clear()

    def _on_event(self) -> None:
        assert self._epoll is not None
        ended = {number for number, _ in self._epoll.poll(0)}
        if self._pidfd in ended:
            # What it had sent and its server had not taken must not arrive after what its successor writes: a close
            # would leave that to the kernel, a reset drops it.
            for duplicate in self._sockets.values():
                _reset_at_close(duplicate)
            self.close()
            return
        for number in ended:
            self._epoll.unregister(number)
            self._sockets.pop(number).close()
        if ended:
            self._wake()


def reset_at_death(pidfd: int) -> None:
    """Before a process is killed: let its TCP connections end with a reset. Never waits.

    A close would leave it to the kernel to go on sending what the process has sent and its server has not taken, for
    minutes: an old write could arrive after what a successor writes. Nothing where the process is gone, or where
    CAP_SYS_PTRACE is missing.
    """
    pid = _pid_of(pidfd)
    for number in socket_descriptors(pid) if pid > 0 else ():
        duplicate = _duplicate(pidfd, number)
        if duplicate is not None:
            with duplicate:
                _reset_at_close(duplicate)


def _reset_at_close(connection: socket.socket) -> None:
    # tcp(7), __tcp_close in net/ipv4/tcp.c: with a linger time of 0 what was not sent is dropped.
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def _pid_of(pidfd: int) -> int:
    """The process of a pidfd (pidfd_open(2), fdinfo), -1 if it is gone."""
    with contextlib.suppress(OSError), open(f"/proc/self/fdinfo/{pidfd}", encoding="ascii") as file:
        for line in file:
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return -1


def _duplicate(pidfd: int, number: int) -> socket.socket | None:
    """Return a duplicate of a descriptor of another process if it is a TCP connection, with keepalive switched on."""
    found = _libc.syscall(_PIDFD_GETFD, pidfd, number, 0)
    if found < 0:
        return None
    duplicate: socket.socket | None = None
    try:
        duplicate = socket.socket(fileno=found)
        if duplicate.family not in (socket.AF_INET, socket.AF_INET6) or duplicate.type != socket.SOCK_STREAM:
            raise OSError
        duplicate.getpeername()
        for level, option, value in (
            (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _IDLE), (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _INTERVAL),
            (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES), (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        ):
            duplicate.setsockopt(level, option, value)
    except OSError:
        if duplicate is None:
            os.close(found)
        else:
            duplicate.close()
        return None
    return duplicate
