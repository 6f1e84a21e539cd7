"""Names of volumes. They reach paths, netlink messages and command lines, so they are checked first of all."""

from __future__ import annotations

import re

from storaged.errors import ErrorCode, StoragedError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
_PARTITION = re.compile(r"-part[0-9]+\Z")


def check_name(name: str) -> str:
    """Return ``name`` if it is a valid volume name, else raise INVALID_NAME.

    ``-partN`` at the end is refused because /dev/storaged/NAME-partN is the name of a partition.
    """
    if not _NAME.fullmatch(name):
        shown = name if len(name) <= 80 else name[:77] + "..."
        raise StoragedError(
            ErrorCode.INVALID_NAME,
            f"{shown!r} is not a valid volume name",
            hint="use 1 to 63 of A-Z a-z 0-9 . _ - and begin with a letter or digit",
        )
    if _PARTITION.search(name):
        raise StoragedError(
            ErrorCode.INVALID_NAME,
            f"{name!r} is not a valid volume name",
            cause="names that end in -partN are those of partitions",
            hint="choose a name that does not end in -part and a number",
        )
    return name
