"""A filter of system calls (seccomp(2)): what a process, and all that it starts, is refused for good. Classic BPF."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from collections.abc import Iterable, Sequence

from storaged.host import syscalls

#: include/uapi/linux/bpf_common.h and seccomp.h.
_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
#: struct seccomp_data: the number of the call, the architecture, the low half of the first argument.
_NUMBER, _ARCHITECTURE, _FIRST = 0, 4, 16
#: arch/x86/include/uapi/asm/unistd.h: a call of the x32 ABI, which has numbers of its own.
_X32 = 0x40000000
#: include/uapi/linux/prctl.h, seccomp.h.
_PR_SET_SECCOMP, _MODE_FILTER = 22, 2

_libc = ctypes.CDLL(None, use_errno=True)


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def program(denied: Iterable[str], families: Sequence[int] | None = None, *, machine: str = "") -> bytes:
    """Return a filter that refuses the ``denied`` calls with EPERM, and sockets of other than these ``families``.

    A call of another architecture, whose numbers mean something else, ends the process. A name that the machine has not
    is left out. Empty where the machine's numbers are not known.
    """
    numbers = syscalls.numbers(machine)
    architecture = syscalls.architecture() if not machine else syscalls.MACHINES[machine][0]
    if architecture is None:
        return b""

    def act(code: int, value: int = 0, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)  # struct sock_filter

    refuse = act(_RETURN, _ERRNO | errno.EPERM)
    parts = [
        act(_LOAD, _ARCHITECTURE), act(_JUMP_EQUAL, architecture, 1, 0), act(_RETURN, _KILL),
        act(_LOAD, _NUMBER), act(_JUMP_SET, _X32, 0, 1), act(_RETURN, _KILL),
    ]
    for name in denied:
        if name in numbers:
            parts += [act(_JUMP_EQUAL, numbers[name], 0, 1), refuse]
    if families is not None:
        known = [act(_JUMP_EQUAL, family, len(families) - place, 0) for place, family in enumerate(families)]
        inner = [act(_LOAD, _FIRST), *known, act(_RETURN, _ERRNO | errno.EAFNOSUPPORT)]
        parts += [act(_JUMP_EQUAL, numbers["socket"], 0, len(inner)), *inner]
    return b"".join([*parts, act(_RETURN, _ALLOW)])


def load(filter: bytes) -> None:
    """Put the calling thread, and what it starts, under a filter; no_new_privs must be set. Raises OSError."""
    what = _Program(len(filter) // 8, filter)
    if _libc.prctl(_PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(what), 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"seccomp: {os.strerror(error)}")


#: Families of sockets, for ``program``.
UNIX, NETWORK = (socket.AF_UNIX,), (socket.AF_INET, socket.AF_INET6, socket.AF_NETLINK)
