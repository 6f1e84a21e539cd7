"""Sizes as people write them."""

from __future__ import annotations

import re

from storaged.errors import ErrorCode, StoragedError

_SIZE = re.compile(r"([0-9]{1,19})([KMGTP]?)(?:i?B)?", re.IGNORECASE | re.ASCII)
_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}
#: What a kernel block device can address (loff_t).
MAX_SIZE = 2**63 - 512


def parse_size(text: str) -> int:
    """Return bytes for ``10G``, ``512M``, ``1048576``; units are powers of 1024.

    Raises INVALID_SIZE for anything else, for 0, and for more than the kernel can address.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"{text!r} is not a size", hint="write bytes or a number with K, M, G, T or P"
        )
    size = int(match[1]) << _UNITS[match[2].upper()]
    if not 0 < size <= MAX_SIZE:
        raise StoragedError(
            ErrorCode.INVALID_SIZE, f"{text!r} is not a usable size", hint="the size must be above 0 and below 8192P"
        )
    return size


def format_size(size: int) -> str:
    """Return a short text with a unit (powers of 1024), ``1.5G`` for 1610612736."""
    value = float(size)
    for unit in ("B", "K", "M", "G", "T"):
        if value < 1024:
            return f"{size}B" if unit == "B" else f"{value:.4g}{unit}"
        value /= 1024
    return f"{value:.4g}P"
