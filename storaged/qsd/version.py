"""Which qemu-storage-daemon this is, and which of its known bugs it has. Pure."""

from __future__ import annotations

import re
from typing import NamedTuple

_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)")


class QsdVersion(NamedTuple):
    """A QEMU release, ordered."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


def parse_version(text: str) -> QsdVersion | None:
    """Return the version from the output of ``qemu-storage-daemon --version``, None if there is none."""
    match = _VERSION.search(text)
    return QsdVersion(*map(int, match.groups())) if match else None


def loop_direct_io_is_safe(version: QsdVersion) -> bool:
    """Whether this QSD's FUSE export keeps data intact under a loop device with direct I/O.

    Older ones overwrite the buffer of a request while it is in flight: measured with 7.2 and 10.0.2 (wrong
    blocks), and not seen with 10.0.13 and 11.1. Debian's changelog names the fix ("fuse: Copy write buffer
    content before polling") from 10.0.10 in the 10.0 series.
    """
    if version[:2] == (10, 0):
        return version.micro >= 10
    return version.major >= 11
