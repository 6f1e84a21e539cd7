"""A QSD's own systemd scope: nothing of it is swapped, a minimum of it stays in memory, and it outlives the daemon.

Only where systemd is PID 1. The process is moved after it was started, and nobody waits for that: a successor that
all I/O waits for must not wait for PID 1. It takes no child either, for which there may be no memory.
docs/architecture.md has the reasons, and what cannot be protected so.
"""

from __future__ import annotations

import logging
import os
import threading

from storaged.errors import StoragedError
from storaged.host import protection
from storaged.host.blocking import BlockingCalls
from storaged.host.dbus import BUS, BusError, Connection, Message, Variant

#: Bytes of a QSD that are not reclaimed. Under load the scope of one holds 4 to 15 MiB beside the page cache of its
#: image; its program and libraries are 9 MiB, which count where they were read first; the rest is reserve.
MEMORY_MIN = 32 << 20
SLICE = "storaged.slice"
_SYSTEMD = ("org.freedesktop.systemd1", "/org/freedesktop/systemd1", "org.freedesktop.systemd1.Manager")
_JOBS = (
    "type='signal',sender='org.freedesktop.systemd1',interface='org.freedesktop.systemd1.Manager',member='JobRemoved'"
)
_PROPERTIES = "a(sv)"
#: Seconds. Nobody waits for it.
_PATIENCE = 30.0

log = logging.getLogger(__name__)
_calls = BlockingCalls("memory protection")
_told: set[str] = set()
#: The slice's minimum is counted and set by one at a time.
_counting = threading.Lock()


def available() -> bool:
    """Whether systemd is PID 1 (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def unit_name(name: str, pid: int) -> str:
    """The scope of a volume's QSD with that pid.

    Names of volumes need no escaping. Each process has its own: the scope of a dead QSD is still known to systemd when
    its successor runs. The dashes let drop-ins apply: storaged-qsd-.scope.d to all, storaged-qsd-NAME-.scope.d to one.
    """
    return f"storaged-qsd-{name}-{pid}.scope"


async def protect(pid: int, name: str, *, memory_min: int = MEMORY_MIN) -> None:
    """Protect a volume's QSD from the OOM killer, and move it into its scope where there is systemd.

    Meant for the background: it may take long, and never raises for what goes wrong (which is logged, once each).
    Nothing is changed for a process that has it all already, so an adopted one can be protected again.
    """
    protection.spare(pid)
    try:
        await _calls("keep qemu-storage-daemon's program in memory", _PATIENCE, protection.keep_program, pid)
        if available():
            await _calls("move qemu-storage-daemon into its scope", _PATIENCE + 5, enclose, pid, name, memory_min)
    except (StoragedError, BusError, OSError) as error:
        _complain(name, error)


def _complain(name: str, error: Exception) -> None:
    text = str(error)
    if text not in _told:
        _told.add(text)
        log.warning(
            "qemu-storage-daemon of %s has no systemd scope of its own, and may be swapped out: %s "
            "(said once; others may follow)", name, text,
        )


def enclose(pid: int, name: str, memory_min: int = MEMORY_MIN) -> None:
    """Move a process into its scope, unless it is there. Blocks. Raises BusError, OSError, TimeoutError."""
    unit = unit_name(name, pid)
    if _gone_or_in(unit, pid):
        return
    with Connection(_PATIENCE) as bus:
        bus.call(BUS, "AddMatch", "s", _JOBS)
        bus.call(_SYSTEMD, "Subscribe")
        properties = [
            ("Description", Variant("s", f"qemu-storage-daemon of the storaged volume {name}")),
            ("Slice", Variant("s", SLICE)),
            ("PIDs", Variant("au", [pid])),
            # At the shutdown it has to outlive the filesystems on its disk. So has the slice, whose unit file says so.
            ("DefaultDependencies", Variant("b", False)),
            ("CollectMode", Variant("s", "inactive-or-failed")),
            ("MemorySwapMax", Variant("t", 0)),
            ("MemoryMin", Variant("t", memory_min)),
            # systemd-oomd does not look at oom_score_adj.
            ("ManagedOOMPreference", Variant("s", "omit")),
        ]
        try:
            job = bus.call(_SYSTEMD, "StartTransientUnit", f"ss{_PROPERTIES}a(s{_PROPERTIES})", unit, "fail",
                           properties, [])[0]
            _wait_for(bus, job)
        except BusError:
            if cgroup_of(pid):
                raise
            return  # it died meanwhile
        if not _gone_or_in(unit, pid):
            raise OSError(f"systemd has not moved it, see systemctl status {unit}")
        _set_minimum(bus, cgroup_of(pid), memory_min)


def _wait_for(bus: Connection, job: str) -> None:
    for signal in bus.signals():
        if _is_end_of(signal, job):
            if signal.body[3] != "done":
                raise OSError(f"systemd's job to move it has ended with {signal.body[3]!r}")
            return


def _is_end_of(signal: Message, job: str) -> bool:
    # (id, path of the job, unit, result)
    return signal.member == "JobRemoved" and len(signal.body) == 4 and signal.body[1] == job


def _set_minimum(bus: Connection, cgroup: str, memory_min: int) -> None:
    """A minimum counts only as far as that of the slice reaches (cgroup-v2.rst, memory.min)."""
    with _counting:
        try:
            entries = os.listdir(f"/sys/fs/cgroup{os.path.dirname(cgroup)}")
        except FileNotFoundError:
            return  # no cgroup v2, or it is gone
        scopes = sum(entry.endswith(".scope") for entry in entries)
        bus.call(_SYSTEMD, "SetUnitProperties", f"sb{_PROPERTIES}", SLICE, True,
                 [("MemoryMin", Variant("t", scopes * memory_min))])


def _gone_or_in(unit: str, pid: int) -> bool:
    cgroup = cgroup_of(pid)
    return not cgroup or os.path.basename(cgroup) == unit


def cgroup_of(pid: int) -> str:
    """The path of a process's control group (cgroup v2, or systemd's own), empty if it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" or controllers == "name=systemd":
            return path
    return ""
