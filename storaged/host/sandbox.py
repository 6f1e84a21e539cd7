"""What a process that is started may still do: user, capabilities, files, system calls. capabilities(7), prctl(2).

Linux has all of this per thread, and a child inherits from the thread that makes it. So a thread of its own gives up
what the child must not have, makes the child, and ends. No program stands in between, which would cost time.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from storaged.errors import ErrorCode, StoragedError
from storaged.host import landlock, seccomp, syscalls
from storaged.host.landlock import Rule

T = TypeVar("T")

#: include/uapi/linux/capability.h: those that are named somewhere here.
CAPABILITIES = {
    "DAC_OVERRIDE": 1, "DAC_READ_SEARCH": 2, "KILL": 5, "SETGID": 6, "SETUID": 7, "SETPCAP": 8,
    "NET_BIND_SERVICE": 10, "IPC_LOCK": 14, "SYS_PTRACE": 19, "SYS_ADMIN": 21, "SYS_RESOURCE": 24,
}
_VERSION_3 = 0x20080522
#: include/uapi/linux/prctl.h.
_PR_SET_KEEPCAPS, _PR_CAPBSET_READ, _PR_CAPBSET_DROP = 8, 23, 24
_PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _AMBIENT_RAISE = 38, 47, 2

_libc = ctypes.CDLL(None, use_errno=True)
_Words = ctypes.c_uint32 * 6


class CannotConfine(StoragedError):
    """Something cannot be given up, and nothing was started."""

    def __init__(self, error: OSError) -> None:
        """``error``: what the kernel said."""
        super().__init__(
            ErrorCode.INTERNAL, "qemu-storage-daemon cannot be kept to what its volume needs", cause=str(error),
            hint="say sandbox = false in [qsd] of storaged.toml, and report this",
        )


@dataclass(frozen=True)
class Sandbox:
    """What a process keeps."""

    uid: int = 0
    """Its user, and its only group."""
    capabilities: frozenset[str] = frozenset()
    rules: Sequence[Rule] | None = None
    """The files that it reaches; None for all."""
    filter: bytes = b""
    """The system calls that it is refused (``seccomp.program``); empty for none."""


def confined(sandbox: Sandbox, work: Callable[[], T]) -> T:
    """Return what ``work`` returns, done in a thread that has given up all but what ``sandbox`` leaves it.

    What ``work`` starts has no more than that. Raises what ``work`` raises; CannotConfine where it was not done.
    """

    def confined_work() -> T:
        try:
            _enter(sandbox)
        except OSError as error:
            raise CannotConfine(error) from error
        return work()

    return _in_a_thread(confined_work)


def unreachable(sandbox: Sandbox, files: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """Return those of the ``files`` (path, and os.R_OK and the like) that a process could not open by its rights.

    Of the sandbox, user and capabilities count. The kernel is asked, in their name. May block as an open does. Raises
    CannotConfine.
    """
    files = list(files)
    if not files:
        return []

    def work() -> list[tuple[str, int]]:
        try:
            _become(sandbox)
        except OSError as error:
            raise CannotConfine(error) from error
        return [(path, mode) for path, mode in files if not os.access(path, mode, effective_ids=True)]

    return _in_a_thread(work)


def lacking(user: int) -> str:
    """Return why processes cannot be given users such as this one here, empty where they can."""
    mine = effective()
    missing = [name for name in ("SETUID", "SETGID", "KILL", "SYS_PTRACE") if not mine >> CAPABILITIES[name] & 1]
    if missing:
        return f"the daemon lacks CAP_{' and CAP_'.join(missing)}"
    if not all(_is_mapped(f"/proc/self/{kind}_map", user) for kind in ("uid", "gid")):
        return "this container has no such users"
    return "" if syscalls.numbers() else f"this machine's system calls are not known ({os.uname().machine})"


def _is_mapped(path: str, user: int) -> bool:
    """Whether the user namespace has that number (user_namespaces(7))."""
    with open(path, encoding="ascii") as file:
        ranges = [[int(word) for word in line.split()] for line in file]
    return any(begin <= user < begin + count for begin, _, count in ranges)


def had(names: Iterable[str]) -> frozenset[str]:
    """Return those of the capabilities that this process has itself: no others can be left to what it starts."""
    mine = effective()
    return frozenset(name for name in names if mine >> CAPABILITIES[name] & 1)


def effective() -> int:
    """Return the effective capabilities of this process, a bit each."""
    with open("/proc/thread-self/status", encoding="ascii") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def _in_a_thread(work: Callable[[], T]) -> T:
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    # Not one of a pool: nobody else may come after what it has given up. Daemonic: it may hang, as who waits for it.
    thread = threading.Thread(target=run, name="sandbox", daemon=True)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def _enter(sandbox: Sandbox) -> None:
    _prctl(_PR_SET_NO_NEW_PRIVS, 1)
    kept = {CAPABILITIES[name] for name in sandbox.capabilities}
    if effective() >> CAPABILITIES["SETPCAP"] & 1:
        # Else the set stays, and no_new_privs keeps what is in it from being had (cap_bprm_creds_from_file).
        for capability in itertools.count():
            had = _libc.prctl(_PR_CAPBSET_READ, capability, 0, 0, 0)
            if had < 0:
                break  # the kernel has no more
            if had and capability not in kept:
                _prctl(_PR_CAPBSET_DROP, capability)
    if sandbox.rules is not None:
        # While it can still reach them.
        landlock.restrict(sandbox.rules)
    _become(sandbox)
    if sandbox.filter:
        seccomp.load(sandbox.filter)


def _become(sandbox: Sandbox) -> None:
    """Take the user and the capabilities, and no others."""
    if sandbox.uid:
        _prctl(_PR_SET_KEEPCAPS, 1)
        syscalls.call("setgroups", 0, None)
        syscalls.call("setresgid", sandbox.uid, sandbox.uid, sandbox.uid)
        syscalls.call("setresuid", sandbox.uid, sandbox.uid, sandbox.uid)
    mask = sum(1 << CAPABILITIES[name] for name in sandbox.capabilities)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    # Root gets by execve(2) what it is permitted; another user what is ambient, which must be inheritable.
    inherited = (low, high) if sandbox.uid else (0, 0)
    header = (ctypes.c_uint32 * 2)(_VERSION_3, 0)
    if _libc.capset(header, _Words(low, low, inherited[0], high, high, inherited[1])) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"capset: {os.strerror(error)}")
    if sandbox.uid:
        for name in sandbox.capabilities:
            _prctl(_PR_CAP_AMBIENT, _AMBIENT_RAISE, CAPABILITIES[name])


def _prctl(option: int, *arguments: int) -> None:
    filled = [*arguments, 0, 0, 0, 0][:4]
    if _libc.prctl(option, *(ctypes.c_ulong(argument) for argument in filled)) != 0:
        error = ctypes.get_errno()
        raise OSError(error, f"prctl({option}): {os.strerror(error)}")
