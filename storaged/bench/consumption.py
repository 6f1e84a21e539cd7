"""Who uses the processors while a job runs: proc(5)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from storaged.host.process import identify, usage

_KTHREADD = 2
_TICKS = os.sysconf("SC_CLK_TCK")


class Meter:
    """Counts the processor time of processes from its start on."""

    def __init__(self, processes: Mapping[str, int]) -> None:
        """``processes``: pids by the names under which they count."""
        found = {who: identify(pid) for who, pid in processes.items()}
        self._who = {who: identity for who, identity in found.items() if identity is not None}
        self._threads = _kernel_threads()
        self._before = self._now()

    def used(self) -> dict[str, float]:
        """Seconds since the start, by name; without those that are gone.

        ``kernel``: its threads, those of devices among them; ``host``: all that was not idle.
        """
        now, threads = self._now(), _kernel_threads()
        found = {who: max(0.0, now[who] - self._before[who]) for who in now if who in self._before}
        # One that has ended since takes its time with it; one that began since had none.
        used = sum(seconds - min(seconds, self._threads.get(who, 0.0)) for who, seconds in threads.items())
        return {**found, "kernel": used} if threads else found

    def _now(self) -> dict[str, float]:
        found = {"host": _busy()}
        for who, identity in self._who.items():
            used = usage(identity)
            if used is not None:
                found[who] = used.cpu
        return found


def _kernel_threads() -> dict[int, float]:
    """Pid → seconds that a thread of the kernel was on a processor: children of kthreadd, which is 2 where it is seen.

    The first field of /proc/PID/schedstat (Documentation/scheduler/sched-stats.rst). Empty in a container, or in a
    kernel without CONFIG_SCHED_INFO.
    """
    found = {}
    for name in os.listdir("/proc"):
        if name.isdecimal() and parent_of(int(name)) == _KTHREADD:
            with contextlib.suppress(OSError, ValueError, LookupError), open(f"/proc/{name}/schedstat", "rb") as file:
                found[int(name)] = int(file.read().split()[0]) / 1e9
    return found


def _busy() -> float:
    """Seconds that all processors were not idle (proc_stat(5)): user, nice, system, irq, softirq."""
    with open("/proc/stat", encoding="ascii") as file:
        fields = file.readline().split()
    return sum(int(fields[at]) for at in (1, 2, 3, 6, 7)) / _TICKS


def parent_of(pid: int) -> int:
    """Return the pid of a process's parent, 0 where there is none to be told."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return int(file.read().rpartition(b")")[2].split()[1])
    except (OSError, LookupError, ValueError):
        return 0
