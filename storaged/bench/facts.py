"""What a benchmark ran on, as far as a reader of its figures has to know."""

from __future__ import annotations

import os
import platform
import stat

import storaged
from storaged.bench.process import Fio


def machine(fio: Fio, qsd: str) -> dict[str, str]:
    """Return the facts by name; ``qsd`` is the version of QSD, empty if there was none."""
    return {
        "host": platform.node(),
        "kernel": platform.release(),
        "architecture": platform.machine(),
        "processors": f"{os.cpu_count()} x {_of('/proc/cpuinfo', 'model name') or 'unknown'}",
        "memory": f"{int((_of('/proc/meminfo', 'MemTotal') or '0').split()[0]) >> 10} MiB",
        "qemu-storage-daemon": qsd or "none",
        "fio": fio.version,
        "storaged": storaged.__version__,
        "python": platform.python_version(),
    }


def notes_on_host() -> list[str]:
    """Say what of this host makes figures doubtful."""
    notes = []
    if "hypervisor" in (_of("/proc/cpuinfo", "flags") or "").split():
        notes.append(
            "This host is a virtual machine: what others on its host do shows in the figures. If its processors are "
            "emulated, not even the ratios are those of a real host."
        )
    load, processors = os.getloadavg()[0], os.cpu_count() or 1
    if load > processors / 2:
        notes.append(f"The host was busy when it began: load {load:.1f} on {processors} processors.")
    return notes


def notes_on_file(path: str) -> list[str]:
    """Say what of a file of this host makes figures doubtful."""
    try:
        seen = os.stat(path)
    except OSError:
        return []
    if not stat.S_ISREG(seen.st_mode) or not seen.st_size or seen.st_blocks * 512 >= 0.99 * seen.st_size:
        return []
    part = 100 * (1 - seen.st_blocks * 512 / seen.st_size)
    return [f"{part:.0f} % of {path} were never written: what is read there comes from no disk."]


def _of(path: str, key: str) -> str | None:
    """The value of the first line that begins with ``key``."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            for line in file:
                name, _, value = line.partition(":")
                if name.strip() == key:
                    return value.strip()
    except OSError:
        pass
    return None
