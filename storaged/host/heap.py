"""Has the C library give memory back that the daemon does not need any more: mallopt(3)."""

from __future__ import annotations

import ctypes

#: malloc.h of glibc.
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8
#: Each thread that waits for another's heap is given one of its own, 8 for each processor, and the daemon starts one
#: for each call that may hang.
_HEAPS = 2
#: Bytes. What is larger has pages of its own, and they are gone with it: the text of a scrape, a list of all volumes.
#: Said, so that glibc does not raise it to the size of such a text as soon as one was freed.
_LARGE = 256 << 10


def keep_small() -> None:
    """Set up this process's allocation; without effect where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_ARENA_MAX, _HEAPS)
        mallopt(_M_MMAP_THRESHOLD, _LARGE)
