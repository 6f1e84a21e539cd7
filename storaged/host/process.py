"""Processes by identity, not by number: pidfd_open(2), proc(5)."""

from __future__ import annotations

import os
import signal
import stat
from dataclasses import dataclass

from storaged.model.record import ProcessIdentity

_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")


def identify(pid: int) -> ProcessIdentity | None:
    """Return what tells this process from any other, None if there is none or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The command name is in parentheses and may itself hold any character but NUL.
            fields = file.read().rpartition(b")")[2].split()
        if fields[0] in (b"Z", b"X"):
            return None
        executable = os.stat(f"/proc/{pid}/exe")
    except (FileNotFoundError, ProcessLookupError, IndexError):
        return None
    return ProcessIdentity(
        pid=pid, start_time=int(fields[19]), exe_device=executable.st_dev, exe_inode=executable.st_ino
    )


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used of the processors (seconds), and has in memory now (bytes)."""

    cpu: float
    resident: int


def usage(who: ProcessIdentity) -> Usage | None:
    """Return what exactly this process uses, None if it is gone. Never blocks, as :func:`thread_states`.

    Fields 14, 15, 22 and 24 of /proc/PID/stat (proc_pid_stat(5)). Whose start time is another one got its number.
    """
    try:
        fd = os.open(f"/proc/{who.pid}/stat", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fields = os.read(fd, 4096).rpartition(b")")[2].split()
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError):
        return None
    if len(fields) < 22 or int(fields[19]) != who.start_time:
        return None
    return Usage((int(fields[11]) + int(fields[12])) / _TICKS, int(fields[21]) * _PAGE)


def thread_states(pid: int) -> str:
    """Return the state of each thread of a process, a letter each (proc_pid_stat(5): R, S, D, T, t, Z, X, I).

    Empty when it is gone. Never blocks: unlike ``cmdline``, this file needs no lock that a thread in D may hold.
    """
    directory = f"/proc/{pid}/task"
    states = []
    try:
        threads = os.listdir(directory)
    except (FileNotFoundError, ProcessLookupError):
        return ""
    for thread in threads:
        try:
            with open(f"{directory}/{thread}/stat", "rb") as file:
                states.append(file.read().rpartition(b")")[2].split()[0].decode())
        except (FileNotFoundError, ProcessLookupError, IndexError):
            continue  # this one ended meanwhile
    return "".join(states)


def open_pidfd(process: ProcessIdentity) -> int | None:
    """Return a pidfd of exactly this process (readable once it is dead), None if it is gone.

    The identity is compared again after the descriptor is there, so that a recycled number is found out.
    """
    try:
        pidfd = os.pidfd_open(process.pid)
    except ProcessLookupError:
        return None
    if identify(process.pid) != process:
        os.close(pidfd)
        return None
    return pidfd


def kill(pidfd: int) -> None:
    """SIGKILL; no error when the process is gone."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        return


def reap(pidfd: int) -> str:
    """Collect a dead child and say how it ended; an adopted process is not ours to collect: empty text."""
    try:
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    except ChildProcessError:
        return ""
    if result is None:
        return ""
    if result.si_code == os.CLD_EXITED:
        return f"it exited with status {result.si_status}"
    try:
        name = signal.Signals(result.si_status).name
    except ValueError:
        name = f"signal {result.si_status}"
    return f"it was ended by {name}"


def find_by_arguments(*wanted: str) -> list[ProcessIdentity]:
    """Return the processes that have exactly these arguments, one after another, on their command line."""
    found = []
    needle = b"".join(b"\0" + os.fsencode(word) for word in wanted) + b"\0"
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            with open(f"/proc/{entry}/cmdline", "rb") as file:
                command_line = file.read()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if needle in command_line:
            process = identify(int(entry))
            if process is not None:
                found.append(process)
    return found


def open_files(pid: int, apart_from: tuple[str, ...] = ()) -> set[tuple[int, int, int]]:
    """Return (device, inode, number of the block device or 0) of each file and block device a process has open.

    Without those below the directories ``apart_from``.
    """
    others = tuple(f"{directory}/" for directory in apart_from)
    found = set()
    directory = f"/proc/{pid}/fd"
    for descriptor in os.listdir(directory):
        try:
            path = os.readlink(f"{directory}/{descriptor}")
            if path.startswith("/") and not path.startswith(others):
                seen = os.stat(f"{directory}/{descriptor}")
                number = seen.st_rdev if stat.S_ISBLK(seen.st_mode) else 0
                found.add((seen.st_dev, seen.st_ino, number))
        except FileNotFoundError:
            continue
    return found


def boot_id() -> str:
    """Return the kernel's identity of this boot (random(4)): records of another boot say nothing any more."""
    with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
        return file.read().strip()
