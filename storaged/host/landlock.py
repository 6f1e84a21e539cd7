"""Landlock(7): a process, and all that it starts, reaches only the files that it is told (linux/landlock.h).

It says nothing of what is open already, of unix sockets that have a path, of chmod and stat. Whoever is under it can
change no mounts, and trace none but those who are under the same.
"""

from __future__ import annotations

import ctypes
import os
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntFlag

from storaged.host import syscalls


class _Right(IntFlag):
    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_DIR = 1 << 3
    REMOVE_DIR = 1 << 4
    REMOVE_FILE = 1 << 5
    MAKE_CHAR = 1 << 6
    MAKE_DIR = 1 << 7
    MAKE_REG = 1 << 8
    MAKE_SOCK = 1 << 9
    MAKE_FIFO = 1 << 10
    MAKE_BLOCK = 1 << 11
    MAKE_SYM = 1 << 12
    REFER = 1 << 13
    TRUNCATE = 1 << 14
    IOCTL_DEV = 1 << 15


#: Since which ABI the kernel knows how many of these rights (landlock(7)).
_FIRST_RIGHTS = (1 << 13) - 1
_LATER = {2: _Right.REFER, 3: _Right.TRUNCATE, 5: _Right.IOCTL_DEV}
_OF_FILES = _Right.EXECUTE | _Right.WRITE_FILE | _Right.READ_FILE | _Right.TRUNCATE | _Right.IOCTL_DEV

#: What may be done with a file, or with all below a directory.
READ = int(_Right.READ_FILE | _Right.READ_DIR | _Right.IOCTL_DEV)
RUN = int(READ | _Right.EXECUTE)
WRITE = int(READ | _Right.WRITE_FILE | _Right.TRUNCATE)
#: No directories: who can nest them deep enough keeps others from removing them.
OWN = int(WRITE | _Right.REMOVE_FILE | _Right.MAKE_REG | _Right.MAKE_SOCK | _Right.MAKE_FIFO)
SOCKETS = int(_Right.MAKE_SOCK | _Right.REMOVE_FILE)

_RULE_PATH_BENEATH = 1
_CREATE_RULESET_VERSION = 1
#: LANDLOCK_SCOPE_*, ABI 6: neither abstract unix sockets nor signals reach who is not under it.
_SCOPED = 3


@dataclass(frozen=True)
class Rule:
    """What may be done (one of the above) with a file or directory, which need not be there."""

    path: str
    rights: int


#: Path → descriptor (None: it is not there) of what ``pin`` was told.
_pinned: dict[str, int | None] = {}


def pin(paths: Iterable[str]) -> None:
    """Look up paths once and for all, for the rules to come: none of these then waits for the storage below them.

    What is not there by now does not count later. Blocks.
    """
    for path in paths:
        if path not in _pinned:
            _pinned[path] = _look_up(path)


def _look_up(path: str) -> int | None:
    try:
        return os.open(path, os.O_PATH | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None


def abi() -> int:
    """Return the version of Landlock of this kernel; 0 where it has none, or it is switched off (``lsm=``)."""
    try:
        return syscalls.call("landlock_create_ruleset", None, 0, _CREATE_RULESET_VERSION)
    except OSError:
        return 0


def restrict(rules: Iterable[Rule]) -> int:
    """Confine the calling thread, and what it starts, to what the rules say; no_new_privs must be set.

    Returns the version of Landlock, 0 where there is none and nothing was done. Raises OSError.
    """
    version = abi()
    if not version:
        return 0
    handled = _FIRST_RIGHTS
    for since, right in _LATER.items():
        handled |= right if version >= since else 0
    # struct landlock_ruleset_attr: as much of it as this kernel knows.
    attributes = struct.pack("=QQQ", handled, 0, _SCOPED if version >= 6 else 0)[:8 if version < 4 else 24]
    attributes = attributes[:16] if version in (4, 5) else attributes
    ruleset = syscalls.call("landlock_create_ruleset", ctypes.c_char_p(attributes), len(attributes), 0)
    try:
        for rule in rules:
            _add(ruleset, rule, handled)
        syscalls.call("landlock_restrict_self", ruleset, 0)
    finally:
        os.close(ruleset)
    return version


def _add(ruleset: int, rule: Rule, handled: int) -> None:
    pinned = rule.path in _pinned
    place = _pinned[rule.path] if pinned else _look_up(rule.path)
    if place is None:
        return
    try:
        rights = rule.rights & handled
        if not stat.S_ISDIR(os.fstat(place).st_mode):
            rights &= _OF_FILES
        if rights:
            # struct landlock_path_beneath_attr, which is packed.
            what = ctypes.c_char_p(struct.pack("=Qi", rights, place))
            syscalls.call("landlock_add_rule", ruleset, _RULE_PATH_BENEATH, what, 0)
    finally:
        if not pinned:
            os.close(place)
