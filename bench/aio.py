"""Direct reads in flight, by the kernel's own interface (io_submit(2)): many at a time, without a thread for each.

One process with nothing but system calls tells to the moment when each of them has ended. Threads or 64 readers would
measure the machine's scheduler, where processors are few and emulated.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass

BLOCK = 4096
_SETUP, _DESTROY, _GETEVENTS, _SUBMIT = {
    "x86_64": (206, 207, 208, 209), "aarch64": (0, 1, 4, 2),
}[platform.machine()]
_PREAD = 0
#: struct iocb and struct io_event (include/uapi/linux/aio_abi.h), little endian.
_IOCB = struct.Struct("<QIiHhIQQqQII")
_EVENT = struct.Struct("<QQqq")

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _call(number: int, *arguments: object) -> int:
    while True:
        result = int(_libc.syscall(ctypes.c_long(number), *arguments))
        if result >= 0:
            return result
        error = ctypes.get_errno()
        if error != 4:  # EINTR
            raise OSError(error, os.strerror(error))


@dataclass(frozen=True)
class Ended:
    """How a read ended: the bytes that it gave, or minus its errno; and when (monotonic)."""

    number: int
    result: int
    at: float


class Reads:
    """Reads of one block each, at (descriptor, offset); the descriptors are O_DIRECT ones. Number i is places[i]."""

    def __init__(self, places: Sequence[tuple[int, int]]) -> None:
        self._count = len(places)
        self._context = ctypes.c_ulong(0)
        _call(_SETUP, ctypes.c_uint(self._count), ctypes.byref(self._context))
        self._memory = mmap.mmap(-1, self._count * BLOCK)
        base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._blocks = [
            ctypes.create_string_buffer(
                _IOCB.pack(number, 0, 0, _PREAD, 0, fd, base + number * BLOCK, BLOCK, offset, 0, 0, 0), _IOCB.size
            )
            for number, (fd, offset) in enumerate(places)
        ]
        self._pointers = (ctypes.c_void_p * self._count)(*[ctypes.addressof(block) for block in self._blocks])
        self._events = ctypes.create_string_buffer(self._count * _EVENT.size)

    def submit(self) -> None:
        """Have all of them begin."""
        done = 0
        while done < self._count:
            rest = ctypes.byref(self._pointers, done * ctypes.sizeof(ctypes.c_void_p))
            done += _call(_SUBMIT, self._context, ctypes.c_long(self._count - done), rest)

    def wait(self, seconds: float) -> list[Ended]:
        """Return how they ended, in that order. Raises SystemExit where they have not within ``seconds``."""
        deadline = time.monotonic() + seconds
        ended: list[Ended] = []
        while len(ended) < self._count:
            left = deadline - time.monotonic()
            if left <= 0:
                raise SystemExit(f"{self._count - len(ended)} of {self._count} reads have not ended in {seconds} s")
            limit = struct.pack("<qq", int(left), int(left % 1 * 1e9))
            count = _call(
                _GETEVENTS, self._context, ctypes.c_long(1), ctypes.c_long(self._count), self._events,
                ctypes.c_char_p(limit),
            )
            now = time.monotonic()
            for number in range(count):
                data, _, result, _ = _EVENT.unpack_from(self._events, number * _EVENT.size)
                ended.append(Ended(data, result, now))
        _call(_DESTROY, self._context)
        return ended


def open_direct(device: str) -> int:
    """A descriptor for :class:`Reads`."""
    return os.open(device, os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)
