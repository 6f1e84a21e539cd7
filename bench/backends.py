"""How fast an attached device is: against the same server through the backend's own library, by fio's own engine.

    make bench-backends    (or: python bench/backends.py --fio FIO [--json FILE] [--transport T] [KIND …])

fio runs on storaged's device (libaio), and with the engines rbd, libiscsi, nbd and nfs on an equal disk of the same
server, job by job in turns; the two disks change sides after each round. bench/fio-engines builds a fio that has them
all. Queue depth 32. No block is read twice in one run, what the kernel has kept of the device's file is thrown away
before it, and what is written is flushed within the time that counts: a page cache is not measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sources
from common import Daemon, machine, middle, ratios

JOBS = {
    "4k random read, IOPS": ["--rw=randread", "--bs=4k"],
    "4k random write, IOPS": ["--rw=randwrite", "--bs=4k"],
    "1M linear read, MB/s": ["--rw=read", "--bs=1M"],
    "1M linear write, MB/s": ["--rw=write", "--bs=1M"],
}
SIDES = ("storaged", "engine")
WANTED = 0.9
_TICK = os.sysconf("SC_CLK_TCK")


def note(text: str) -> None:
    """Say where it is."""
    print(text, file=sys.stderr, flush=True)


def processor_times(pids: Mapping[int, str]) -> dict[str, float]:
    """Seconds of processor time that each of these processes has used, by name; ``busy``: the whole machine."""
    found: dict[str, float] = {}
    for pid, name in pids.items():
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        found[name] = found.get(name, 0) + (int(fields[11]) + int(fields[12])) / _TICK
    busy = Path("/proc/stat").read_text().splitlines()[0].split()
    # user nice system - - irq softirq
    found["busy"] = sum(int(busy[at]) for at in (1, 2, 3, 6, 7)) / _TICK
    return found


def servers() -> dict[int, str]:
    """Our children: the servers; but not the daemon."""
    found = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().partition("(")[2].rpartition(")")
            if int(rest.split()[1]) == os.getpid() and name not in ("storaged", "python", "python3"):
                found[int(path.parent.name)] = "server"
    return found


def forget(device: str) -> None:
    """Throw away what the kernel keeps of the file below a loop device."""
    backing = Path(f"/sys/block/{os.path.basename(device)}/loop/backing_file")
    if backing.exists():
        fd = os.open(backing.read_text().strip(), os.O_RDONLY)
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


@dataclass
class Figures:
    """What one side did in one job: a value for each round."""

    values: list[float] = field(default_factory=list)
    loads: list[float] = field(default_factory=list)
    """Load average of the machine when the round began."""
    processor: list[dict[str, float]] = field(default_factory=list)
    """Microseconds of processor time for each request, by who used it."""


@dataclass(frozen=True)
class Bench:
    """How the jobs are run."""

    fio: str
    mib: int
    seconds: float
    patience: float = 60
    """Seconds after which fio is taken to hang."""

    def once(self, words: list[str], seconds: float) -> dict[str, Any]:
        """Run fio through the disk, or for so long; return its one job."""
        command = [
            self.fio, "--name=x", "--iodepth=32", "--direct=1", f"--size={self.mib}M", "--randrepeat=0",
            "--output-format=json", *words,
        ]
        if "--ioengine=nfs" not in words:  # which cannot flush; below the server is memory, nothing is gained by that
            command.append("--end_fsync=1")
        if seconds:
            command.append(f"--runtime={round(seconds * 1000)}ms")
        done = subprocess.run(command, capture_output=True, text=True, timeout=self.patience)
        # What an engine's library prints stands before it.
        begin = done.stdout.find("{")
        if done.returncode or begin < 0:
            raise SystemExit(f"{command}: {done.stdout}{done.stderr}")
        job: dict[str, Any] = json.loads(done.stdout[begin:])["jobs"][0]
        if job["error"]:
            raise SystemExit(f"{command}: {done.stderr}")
        return job

    def measure(self, words: list[str], device: str, pids: Mapping[int, str], figures: Figures) -> None:
        """Run a job, again if it comes to its end too soon, until it has run long enough."""
        figures.loads.append(os.getloadavg()[0])
        kib = ios = elapsed = fio_time = 0.0
        before = processor_times(pids)
        while elapsed < 0.7 * self.seconds:
            if device:
                forget(device)
            try:
                job = self.once(words, self.seconds - elapsed)
            except subprocess.TimeoutExpired:
                # Of fio itself: its engine nfs, with large blocks; with libnfs 6 always.
                figures.values.append(math.nan)
                figures.processor.append({})
                return
            seconds = (job["read"]["runtime"] + job["write"]["runtime"]) / 1000
            fio_time += (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000
            kib += job["read"]["io_kbytes"] + job["write"]["io_kbytes"]
            ios += job["read"]["total_ios"] + job["write"]["total_ios"]
            elapsed += seconds
        after = processor_times(pids)
        used = {name: after[name] - before[name] for name in after} | {"fio": fio_time}
        figures.processor.append({name: round(1e6 * value / ios, 1) for name, value in used.items()})
        figures.values.append(kib * 1024 / 1e6 / elapsed if "--bs=1M" in words else ios / elapsed)

    def compare(
        self, daemon: Daemon, kind: str, transport: str, options: Mapping[str, str], rounds: int
    ) -> dict[str, dict[str, Figures]]:
        """Both sides, job by job in turns."""
        figures = {job: {side: Figures() for side in SIDES} for job in JOBS}
        with sources.disks(kind, self.mib) as disks:
            for disk in disks:
                # Blocks that were never written are read faster than others.
                self.once([*disk.engine, *JOBS["1M linear write, MB/s"]], 0)
            for turn in range(rounds):
                volume = daemon.call("Attach", {
                    "name": "b", "source": disks[0].source, "format": "raw", "transport": transport,
                    "options": dict(options),
                })["volume"]
                device = str(volume["device"])
                sides = {
                    "storaged": ((f"--filename={device}", "--ioengine=libaio"), device),
                    "engine": (disks[1].engine, ""),
                }
                pids = servers() | {int(volume["qsd_pid"]): "qsd"}
                for job, words in JOBS.items():
                    for side in sorted(sides, reverse=turn % 2 == 0):
                        engine, of_device = sides[side]
                        self.measure([*engine, *words], of_device, pids, figures[job][side])
                    mine, other = (figures[job][side] for side in SIDES)
                    note(
                        f"{kind} {transport} round {turn + 1}, load {mine.loads[-1]:.1f}, {job}: {mine.values[-1]:.0f} "
                        f"of {other.values[-1]:.0f}, {mine.values[-1] / other.values[-1]:.2f}; "
                        f"us/request {mine.processor[-1]} {other.processor[-1]}"
                    )
                daemon.call("Detach", {"name": "b"})
                disks.reverse()
        return figures


def print_table(title: str, found: Mapping[str, Mapping[str, Mapping[str, Figures]]]) -> None:
    """Medians, the ratio with its spread, and where the processors' time went (µs for each request)."""
    print(f"\n{title}\n\n| | | device | engine | ratio of medians; pair by pair |\n|---|---|---|---|---|")
    for kind, jobs in found.items():
        for job, sides in jobs.items():
            mine, other = (sides[side].values for side in SIDES)
            pairs = [pair for pair in zip(mine, other, strict=True) if not any(map(math.isnan, pair))]
            if not pairs:
                print(f"| {kind} | {job} | fio hung | | |")
                continue
            mine, other = ([pair[side] for pair in pairs] for side in range(2))
            print(f"| {kind} | {job} | {middle(mine, 0)} | {middle(other, 0)} | {ratios(mine, other)} |", flush=True)


def main() -> int:
    """Measure and print tables (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fio", default="fio", help="a fio with all engines (default: %(default)s)")
    parser.add_argument("--transport", default="fuse", help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=6, help="of each kind (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=4, help="for each job of fio (default: %(default)s)")
    parser.add_argument("--mib", type=int, default=768, help="size of a disk (default: %(default)s)")
    parser.add_argument("-o", metavar="OPTION=VALUE", dest="options", action="append", default=[], help="of the volume")
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    parser.add_argument("kinds", nargs="*", default=[*sources.KINDS], help="(default: %(default)s)")
    arguments = parser.parse_args()
    bench = Bench(arguments.fio, arguments.mib, arguments.seconds)
    options = dict(word.split("=", 1) for word in arguments.options)
    found: dict[str, dict[str, dict[str, dict[str, Figures]]]] = {}
    began = time.strftime("%H:%M")
    with contextlib.closing(Daemon()) as daemon:
        for transport in arguments.transport.split(","):
            of_transport = found[transport] = {}
            for kind in arguments.kinds:
                of_transport[kind] = bench.compare(daemon, kind, transport, options, arguments.rounds)
            print_table(f"{transport} {options or ''}", of_transport)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(
            {"machine": machine(), "began": began, "options": options, "figures": found},
            indent=1, default=vars,
        ))
    return 0


if __name__ == "__main__":
    sys.exit(main())
