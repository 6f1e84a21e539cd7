"""What a request costs by each way, and where: processor time, system calls, switches, and a profile.

    python bench/costs.py [--ways direct,fuse,nbd,vduse,vduse:io_uring] [--depths 1,32] [--seconds 2] [--json FILE]
    python bench/costs.py --table FILE [FILE …]         what was written so, as Markdown

As root, on an image in memory (a tmpfs, O_DIRECT), with a daemon of its own; 4k random reads by default. Each figure
has a run of fio of its own:

- processor time, from /proc: of fio, QSD, the daemon, threads of the kernel, and of all that was not idle;
- system calls and switches (the processor is given away: somebody sleeps), by histograms of the kernel's tracing,
  where it has them (CONFIG_HIST_TRIGGERS): they cost little, and change nothing of the order of things, as strace does;
- the profile, by ``perf record`` (cpu-clock), where perf is there: its shares are multiplied by the first figure, that
  of those four.

In a steady machine of one processor (scripts/vm run --steady --processors 1) 8 ns of time are one instruction.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common import Daemon, machine, run

from storaged.bench.consumption import Meter, parent_of

#: Behind a colon how QSD reads the image; threads if nothing is said.
WAYS = ("direct", "fuse", "nbd", "vduse", "vduse:io_uring")
SIZE = 64 << 20
TRACING = Path("/sys/kernel/tracing")
#: Histograms: which event, its trigger.
CALLS = ("raw_syscalls/sys_enter", "hist:keys=common_pid.execname,id.syscall:size=4096")
SLEEPS = ("sched/sched_switch", "hist:keys=prev_comm,prev_pid:size=4096 if prev_state > 0 && prev_pid > 0")
ALL = "all that was not idle"
#: By what fio's thread that does the I/O is known.
SUBMISSIONS = ("io_uring_enter", "io_submit")
_ENTRIES = ("do_syscall_64", "entry_SYSCALL_64_after_hwframe", "entry_SYSCALL_64")
#: Nanoseconds between two samples.
PERIOD = 250_000


class Who:
    """Tells by a thread's id and name whose it is."""

    def __init__(self, qsd: int | None, daemon: int | None) -> None:
        """By the pids of those who serve the disk."""
        self.qsd, self.daemon = qsd, daemon
        #: The one of fio that does the I/O: the others start and end, which is no part of a request.
        self.fio = 0
        self.threads: dict[int, str] = {}
        self.look()

    def look(self) -> None:
        """Remember which threads they have now: QSD's workers come and go."""
        for name, pid in (("QSD", self.qsd), ("the daemon", self.daemon)):
            if pid is not None:
                with contextlib.suppress(FileNotFoundError):
                    self.threads.update((int(tid), name) for tid in os.listdir(f"/proc/{pid}/task"))

    def of(self, tid: int, comm: str, pid: int = 0) -> str:
        """Whose it is; empty where it has nothing to do with the disk. Without the process's id by the name alone."""
        if comm == "fio":
            return "fio" if tid == self.fio else ""
        # Workers of the kernel for io_uring; their names have the thread whose they are.
        if matched := re.fullmatch(r"iou-[a-z]+-(\d+)", comm):
            return self.threads.get(int(matched[1]), "fio")
        if pid == self.qsd or (not pid and (comm in ("worker", "qemu-storage-da") or comm.startswith("IO "))):
            return "QSD"
        if tid in self.threads:
            return self.threads[tid]
        return "kernel" if comm.startswith(("kworker", "ksoftirqd", "nbd", "loop", "rcu")) else ""


def kernel_seconds() -> float:
    """Processor time of all threads of the kernel so far."""
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_bytes().rpartition(b")")[2].split()
            if int(fields[6]) & 0x00200000:  # PF_KTHREAD
                ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


def fio(device: str, arguments: argparse.Namespace, depth: int, below: Sequence[str] = ()) -> dict[str, Any]:
    """Run the job once, ``below`` another program; return how many requests there were, and the time of fio."""
    command = [
        *below,
        "fio", "--name=x", f"--filename={device}", f"--ioengine={arguments.engine}", "--direct=1",
        f"--rw={arguments.rw}", "--bs=4k", f"--iodepth={depth}", f"--size={SIZE}", "--time_based",
        f"--runtime={round(arguments.seconds * 1000)}ms", "--norandommap", "--randrepeat=0", "--disk_util=0",
        "--output-format=json",
    ]
    said = run(*command)
    job = json.loads(said[said.index("{"):])["jobs"][0]
    return {
        "requests": job["read"]["total_ios"] + job["write"]["total_ios"],
        "iops": job["read"]["iops"] + job["write"]["iops"],
        "seconds": (job["usr_cpu"] + job["sys_cpu"]) / 100 * job["job_runtime"] / 1000,
    }


def processor_time(device: str, who: Who, arguments: argparse.Namespace, depth: int) -> dict[str, Any]:
    """Microseconds for each request, by whose they are."""
    processes = {name: pid for name, pid in (("QSD", who.qsd), ("the daemon", who.daemon)) if pid is not None}
    kernel, meter = kernel_seconds(), Meter(processes)
    done = fio(device, arguments, depth)
    used = {"fio": done["seconds"], **meter.used(), "the kernel's threads": kernel_seconds() - kernel}
    used[ALL] = used.pop("host")
    return {"iops": done["iops"], "us": {name: 1e6 * value / done["requests"] for name, value in used.items()}}


def busiest(threads: Counter[int]) -> int:
    """The thread that did most."""
    return threads.most_common(1)[0][0] if threads else 0


# System calls and switches ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def traced() -> Iterator[None]:
    """The kernel's tracing at hand, if it has any."""
    mounted = not (TRACING / "events").exists() and not subprocess.run(
        ["mount", "-t", "tracefs", "tracefs", TRACING], check=False, stderr=subprocess.DEVNULL
    ).returncode
    try:
        yield
    finally:
        if mounted:
            subprocess.run(["umount", TRACING], check=False)


@contextlib.contextmanager
def histogram(event: str, trigger: str) -> Iterator[Path]:
    """Count an event meanwhile; the file has the counts."""
    place = TRACING / "events" / event
    (place / "trigger").write_text(trigger)
    try:
        yield place / "hist"
    finally:
        (place / "trigger").write_text(f"!{trigger}")


def counts(device: str, who: Who, arguments: argparse.Namespace, depth: int) -> dict[str, Any]:
    """System calls and switches for each request."""
    with histogram(*CALLS) as calls, histogram(*SLEEPS) as sleeps:
        requests = fio(device, arguments, depth)["requests"]
        who.look()
        told, switched = calls.read_text(), sleeps.read_text()
    found: dict[str, Counter[str]] = {"calls": Counter(), "sleeps": Counter()}
    called = re.findall(
        r"common_pid: (.+?)\s*\[\s*(\d+)\], id: sys_(\w+)\s*\[\s*\d+\] } hitcount:\s+(\d+)", told
    )
    who.fio = busiest(Counter({
        int(tid): int(hits) for comm, tid, call, hits in called if comm == "fio" and call in SUBMISSIONS
    }))
    for comm, tid, call, hits in called:
        if owner := who.of(int(tid), comm):
            found["calls"][f"{owner}: {call}"] += int(hits)
    for comm, tid, hits in re.findall(r"prev_comm: (.+?)\s*, prev_pid:\s+(\d+) } hitcount:\s+(\d+)", switched):
        if owner := who.of(int(tid), comm):
            found["sleeps"][owner] += int(hits)
    return {
        kind: {name: hits / requests for name, hits in counter.most_common() if hits >= requests / 200}
        for kind, counter in found.items()
    }


# The profile ------------------------------------------------------------------------------------------------------


def profile(device: str, who: Who, arguments: argparse.Namespace, depth: int, place: str) -> dict[str, Any]:
    """Shares of the samples, by whose they are and what the kernel does for them; and of the functions."""
    data = f"{place}/perf.data"
    recorder = ["perf", "record", "-q", "-a", "-g", "--kernel-callchains", "-e", "cpu-clock", "-c", str(PERIOD)]
    fio(device, arguments, depth, [*recorder, "-o", data, "--"])
    who.look()
    text = run("perf", "script", "-i", data, "-F", "comm,pid,tid,ip,sym,dso", "--no-inline")
    os.unlink(data)
    samples = []
    for block in text.split("\n\n"):
        head, *frames = block.strip().splitlines() or [""]
        matched = re.match(r"\s*(.+?)\s+(\d+)/(\d+)", head)
        symbols = [frame.split(None, 1)[1] for frame in frames if len(frame.split(None, 1)) == 2]
        if matched:
            samples.append((int(matched[3]), matched[1], int(matched[2]), symbols))
    who.fio = busiest(Counter(
        tid for tid, comm, _, symbols in samples if comm == "fio" and where(symbols) in SUBMISSIONS
    ))
    places: Counter[str] = Counter()
    functions: Counter[str] = Counter()
    for tid, comm, pid, symbols in samples:
        owner = who.of(tid, comm, pid)
        if not owner:
            continue
        places[f"{owner}: {where(symbols)}"] += 1
        functions[f"{owner}: {symbols[0].rpartition(' (')[0] if symbols else 'itself'}"] += 1
    total = sum(places.values())
    return {
        "samples": total,
        "places": {name: hits / total for name, hits in places.most_common(24)},
        "functions": {name: hits / total for name, hits in functions.most_common(30)},
    }


def where(frames: list[str]) -> str:
    """What is being done: by the program itself, or by the kernel in a system call, an interrupt, a fault, a work."""
    if not frames:
        return "itself"
    names = [frame.rpartition(" (")[0] for frame in frames]
    for at, name in enumerate(names):
        if name.startswith(("asm_sysvec_", "asm_common_interrupt")):
            return "interrupts"
        if name.startswith("asm_exc_page_fault"):
            return "page faults"
        if name == "process_one_work" and at:
            return names[at - 1]
        if name == "do_syscall_64" and at:
            call = names[at - 1] if names[at - 1] != "x64_sys_call" or at == 1 else names[at - 2]
            return re.sub(r"^(__x64_sys_|__do_sys_|__se_sys_|ksys_)", "", call)
    return "entry and exit of system calls" if any(name in _ENTRIES for name in names) else "its thread"


# --------------------------------------------------------------------------------------------------------------------


def of_way(way: str, daemon: Daemon, image: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures of a way, by the depth of the queue."""
    qsd, served_by, device = None, None, image
    transport, _, aio = way.partition(":")
    if way != "direct":
        volume = daemon.call("Attach", {
            "name": f"costs-{transport}", "source": image, "format": "raw", "transport": transport,
            "options": {"cache": "none", **({"aio": aio} if aio else {})},
        })["volume"]
        qsd, device = int(volume["qsd_pid"]), str(volume["device"])
        served_by = parent_of(qsd)
    try:
        who, found = Who(qsd, served_by), {}
        fio(device, arguments, 16)
        for depth in arguments.depths:
            one = processor_time(device, who, arguments, depth)
            if (TRACING / "events" / CALLS[0] / "hist").exists():
                one |= counts(device, who, arguments, depth)
            if shutil.which("perf"):
                one["profile"] = profile(device, who, arguments, depth, os.path.dirname(image))
            found[str(depth)] = one
            print_figures(way, depth, one)
        return found
    finally:
        if way != "direct":
            daemon.call("Detach", {"name": f"costs-{transport}"})


def print_figures(way: str, depth: int, one: dict[str, Any]) -> None:
    """For people."""
    print(f"\n## {way}, queue depth {depth}: {one['iops']:.0f} IOPS")
    print("processor, µs a request: " + ", ".join(f"{name} {value:.1f}" for name, value in one["us"].items()))
    for title, kind in (("system calls", "calls"), ("sleeps", "sleeps")):
        if kind in one:
            print(f"{title} a request: " + ", ".join(f"{name} {value:.2f}" for name, value in one[kind].items()))
    if "profile" in one:
        total = sum(value for name, value in one["us"].items() if name != ALL)
        for title in ("places", "functions"):
            print(f"{title}, µs a request, of {one['profile']['samples']} samples:")
            for name, share in one["profile"][title].items():
                print(f"  {share * total:8.2f}  {100 * share:4.1f}%  {name}")
    sys.stdout.flush()


# What calls of QSD are for, as the profile names them: the image itself, and the way.
_OF_IMAGE = ("futex", "pread64", "io_uring_enter")
_OF_WAY = (
    "ioctl", "read", "write", "ppoll", "__sys_sendmsg", "__sys_recvmsg", "setsockopt", "do_writev", "writev", "brk",
)
#: Nanoseconds of an instruction in a steady machine.
_INSTRUCTION = 8


def table(found: dict[str, Any], depth: str) -> str:
    """Thousands of instructions, calls and sleeps for each request, a column for each way."""
    rows: dict[str, list[str]] = {}
    for figures in found.values():
        one = figures[depth]
        thousands = sum(value for name, value in one["us"].items() if name != ALL) / _INSTRUCTION
        places, functions = one["profile"]["places"], one["profile"]["functions"]

        def part(begin: str, names: Sequence[str] | None = None, of: dict[str, float] = places) -> float:
            return sum(value for name, value in of.items()
                       if name.startswith(begin) and (names is None or name.removeprefix(begin) in names))

        own, image, way = (part("QSD: ", names) for names in (("itself",), _OF_IMAGE, _OF_WAY))
        switching = sum(value for name, value in functions.items() if "finish_task_switch" in name)
        for title, share in {
            "**all**": 1.0, "fio, and the kernel for it": part("fio"), "QSD itself": own,
            "QSD's calls to read the image (and to hand that to a thread)": image,
            "QSD's calls that the way needs": way, "QSD's entries to and exits from calls": part("QSD: ") - own - image
            - way, "threads of the kernel": part("kernel"), "of all this: switching between threads": switching,
        }.items():
            rows.setdefault(title, []).append(f"{share * thousands:.1f}")
        calls = {name.removeprefix("QSD: "): hits for name, hits in one["calls"].items() if name.startswith("QSD: ")}
        rows.setdefault("QSD's system calls", []).append(f"{sum(calls.values()):.1f}")
        rows.setdefault("which", []).append(", ".join(f"{name} {hits:.2g}" for name, hits in calls.items()))
        rows.setdefault("sleeps (of fio, QSD, the kernel's)", []).append(f"{sum(one['sleeps'].values()):.1f}")
    lines = [f"| queue depth {depth} | {' | '.join(found)} |", f"|---|{'---|' * len(found)}"]
    return "\n".join([*lines, *(f"| {title} | {' | '.join(cells)} |" for title, cells in rows.items())])


def main() -> None:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--ways", type=lambda text: text.split(","), default=list(WAYS))
    parser.add_argument("--depths", type=lambda text: [int(part) for part in text.split(",")], default=[1, 32])
    parser.add_argument("--seconds", type=float, default=2.0)
    parser.add_argument("--rw", default="randread", choices=("randread", "randwrite"))
    parser.add_argument("--engine", default="io_uring")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--table", type=Path, nargs="+", metavar="FILE")
    arguments = parser.parse_args()
    if arguments.table:
        # Of a way that several have, the last.
        ways = {name: one for path in arguments.table for name, one in json.loads(path.read_text())["ways"].items()}
        for depth in next(iter(ways.values())):
            print(f"{table(ways, depth)}\n")
        return
    facts = machine()
    print(", ".join(f"{key} {value}" for key, value in facts.items()))
    found: dict[str, Any] = {"machine": facts, "ways": {}}
    daemon = Daemon()
    try:
        with traced(), tempfile.TemporaryDirectory(prefix="storaged-costs-", dir="/dev/shm") as place:
            image = f"{place}/disk.img"
            Path(image).write_bytes(os.urandom(SIZE))
            for way in arguments.ways:
                found["ways"][way] = of_way(way, daemon, image, arguments)
    finally:
        daemon.close()
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
