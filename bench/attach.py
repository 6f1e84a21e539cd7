"""What attaching costs, side by side with the same steps done by hand, in one run.

    make bench-attach            (or: .venv/bin/python bench/attach.py [--quick] [--json FILE])

By hand means what an administrator types: qemu-storage-daemon --daemonize with the same blockdev and export
options, losetup, and back again. Every pair of measurements is interleaved; ratios are of medians, the spread is
given as the range of the middle half. Nothing here is a test: numbers are printed, not judged, but the limit that
each is meant to keep stands beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import QSD, STORAGED, Daemon, end, fio, machine, middle, run, timed

from storaged.qsd.version import loop_direct_io_is_safe, parse_version


@dataclass
class Row:
    """One line of the table."""

    what: str
    ours: str
    by_hand: str
    result: str
    limit: str


class Bench:
    """A daemon, images, and the ways to attach them."""

    def __init__(self, place: Path, count: int) -> None:
        self.place = place
        self.images = [place / f"{number}.qcow2" for number in range(count)]
        for image in self.images:
            run("qemu-img", "create", "-q", "-f", "qcow2", image, "1G")
        self.daemon = Daemon()
        self.root = self.daemon.root

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One call on a connection of its own."""
        return self.daemon.call(method, parameters)

    def attach(self, number: int) -> str:
        """Attach image ``number`` through the API."""
        volume = self.call("Attach", name=f"v{number}", source=str(self.images[number]), format="qcow2")["volume"]
        return str(volume["device"])

    def detach(self, number: int) -> None:
        """And detach it."""
        self.call("Detach", name=f"v{number}")

    def hand_command(self, number: int) -> list[str]:
        """The words that start QSD by hand, with the same options as the daemon's."""
        mount = self.place / f"hand{number}"
        mount.touch()
        return [
            QSD, "--daemonize", "--pidfile", str(self.place / f"hand{number}.pid"),
            "--blockdev", f"driver=file,node-name=f,filename={self.images[number]},discard=unmap",
            "--blockdev", "driver=qcow2,node-name=d,file=f,discard=unmap",
            "--export", f"type=fuse,id=e,node-name=d,mountpoint={mount},writable=on,allow-other=off",
        ]

    def hand_losetup(self, number: int) -> list[str]:
        """The words that set up the loop device by hand."""
        version = parse_version(run(QSD, "--version"))
        direct = ["--direct-io=on"] if version and loop_direct_io_is_safe(version) else []
        return ["losetup", "--find", "--show", "--partscan", *direct, str(self.place / f"hand{number}")]

    def attach_by_hand(self, number: int) -> str:
        """QSD and losetup."""
        run(*self.hand_command(number))
        return run(*self.hand_losetup(number)).strip()

    def detach_by_hand(self, number: int, device: str) -> None:
        """losetup, kill, and wait until it is gone."""
        run("losetup", "--detach", device)
        end(int((self.place / f"hand{number}.pid").read_text()))


def by_hand(bench: Bench, devices: list[str]) -> None:
    """Attach image 1 by hand, or take it away again."""
    if devices:
        bench.detach_by_hand(1, devices.pop())
    else:
        devices.append(bench.attach_by_hand(1))


def attach_and_detach(bench: Bench, rounds: int) -> list[Row]:
    """One volume at a time, through the API of a running daemon, against QSD and losetup."""
    figures: dict[str, list[float]] = {key: [] for key in ("attach", "detach", "hand attach", "hand detach")}
    for turn in range(rounds + 2):
        devices: list[str] = []
        values = {
            "attach": timed(lambda: bench.attach(0)),
            "detach": timed(lambda: bench.detach(0)),
            "hand attach": timed(functools.partial(by_hand, bench, devices)),
            "hand detach": timed(functools.partial(by_hand, bench, devices)),
        }
        if turn >= 2:  # the first two warm the caches
            for key, value in values.items():
                figures[key].append(value)
    return [
        Row(
            f"{what}, API, ms", middle(figures[what]), middle(figures[f"hand {what}"]),
            f"{statistics.median(figures[what]) - statistics.median(figures[f'hand {what}']):+.1f} ms",
            "at most +15 ms",
        )
        for what in ("attach", "detach")
    ]


def command_line(bench: Bench, rounds: int) -> list[Row]:
    """The command ``storaged``, which starts a Python each time."""
    base = [STORAGED, "--root", str(bench.root)]
    attach, detach, start = [], [], []
    for _ in range(rounds):
        attach.append(timed(lambda: run(*base, "attach", "v0", bench.images[0], "--format", "qcow2")))
        detach.append(timed(lambda: run(*base, "detach", "v0")))
        start.append(timed(lambda: run("/usr/bin/python3", "-c", "pass")))
    return [
        Row("storaged attach (command), ms", middle(attach), f"python3 -c pass: {middle(start)}", "", "told apart"),
        Row("storaged detach (command), ms", middle(detach), "", "", "told apart"),
    ]


def listing(bench: Bench, rounds: int) -> list[Row]:
    """``storaged list`` with 50 volumes."""
    for number in range(50):
        bench.attach(number)
    ours, start = [], []
    for _ in range(rounds):
        ours.append(timed(lambda: run(STORAGED, "--root", str(bench.root), "list")))
        start.append(timed(lambda: run("/usr/bin/python3", "-c", "pass")))
    for number in range(50):
        bench.detach(number)
    ratio = statistics.median(ours) / statistics.median(start)
    return [Row("storaged list, 50 volumes, ms", middle(ours), middle(start), f"{ratio:.1f} times", "at most 10 times")]


def in_parallel(bench: Bench, repeats: int) -> list[Row]:
    """A hundred at once, against a shell loop that starts the same commands in the background."""
    count = len(bench.images)
    ours, hand = [], []
    script = "".join(
        f"( {' '.join(bench.hand_command(n))} && {' '.join(bench.hand_losetup(n))} >{bench.place}/hand{n}.dev ) &\n"
        for n in range(count)
    ) + "wait\n"
    for _ in range(repeats):
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            ours.append(count / timed(lambda: list(pool.map(bench.attach, range(count)))) * 1000)
            list(pool.map(bench.detach, range(count)))
        hand.append(count / timed(lambda: run("sh", "-c", script)) * 1000)
        for n in range(count):
            bench.detach_by_hand(n, (bench.place / f"hand{n}.dev").read_text().strip())
    ratio = statistics.median(ours) / statistics.median(hand)
    return [
        Row(
            f"{count} attached in parallel, volumes/s", " ".join(f"{value:.0f}" for value in ours),
            " ".join(f"{value:.0f}" for value in hand), f"{ratio:.2f} of the rate", "at least 0.5",
        )
    ]


def idle(bench: Bench, seconds: float) -> list[Row]:
    """Memory and processor time of the daemon with all volumes attached and idle."""
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(bench.attach, range(len(bench.images))))
    time.sleep(5)
    begin, begin_at = processor(bench.daemon.process.pid), time.monotonic()
    time.sleep(seconds)
    used = (processor(bench.daemon.process.pid) - begin) / (time.monotonic() - begin_at) * 100
    status = Path(f"/proc/{bench.daemon.process.pid}/status").read_text()
    memory = int(next(line.split()[1] for line in status.splitlines() if line.startswith("VmRSS"))) / 1024
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        list(pool.map(bench.detach, range(len(bench.images))))
    what = f"{len(bench.images)} attached and idle for {seconds:.0f} s"
    return [
        Row(f"{what}: daemon's memory", f"{memory:.1f} MiB", "", "", "at most 60 MiB"),
        Row(f"{what}: daemon's processor time", f"{used:.2f} % of a core", "", "", "at most 0.5 %"),
    ]


def processor(pid: int) -> float:
    """Seconds of processor time."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


JOBS = {
    "4k random read, QD 32, IOPS": ["--rw=randread", "--bs=4k", "--iodepth=32"],
    "4k random write, QD 32, IOPS": ["--rw=randwrite", "--bs=4k", "--iodepth=32"],
    "1M linear read, QD 4, MB/s": ["--rw=read", "--bs=1M", "--iodepth=4"],
    "1M linear write, QD 4, MB/s": ["--rw=write", "--bs=1M", "--iodepth=4"],
}


def throughput(bench: Bench, repeats: int, runtime: float) -> list[Row]:
    """fio on the attached device and on the same export set up by hand, in turns.

    Both are set up anew for each turn: on few processors the figures depend most on which threads share one, and
    that is settled when they start.
    """
    for image in bench.images[:2]:  # both fully allocated
        run("qemu-img", "bench", "-q", "-w", "-f", "qcow2", "-s", "1M", "-c", "512", "-d", "1", image)
    figures: dict[str, dict[str, list[float]]] = {what: {"ours": [], "hand": []} for what in JOBS}
    for turn in range(repeats):
        devices = {"ours": bench.attach(0), "hand": bench.attach_by_hand(1)}
        order = sorted(devices, reverse=turn % 2 == 0)
        for who in order:
            # Both get several times as fast in their first seconds; that is not what is compared.
            fio(devices[who], ["--direct=1", "--rw=read", "--bs=1M", "--iodepth=4"], 2 * runtime, "512M")
        for what, words in JOBS.items():
            for who in order:
                figures[what][who].append(fio(devices[who], ["--direct=1", *words], runtime, "512M"))
        bench.detach(0)
        bench.detach_by_hand(1, devices["hand"])
    rows = []
    for what, values in figures.items():
        ratios = [ours / hand for ours, hand in zip(values["ours"], values["hand"], strict=True)]
        low, median, high = statistics.quantiles(ratios, n=4)
        of_medians = statistics.median(values["ours"]) / statistics.median(values["hand"])
        rows.append(
            Row(
                what, middle(values["ours"]), middle(values["hand"]),
                f"{of_medians:.2f} of it; pair by pair {median:.2f} ({low:.2f} to {high:.2f})", "at least 0.95",
            )
        )
    return rows


@contextlib.contextmanager
def workshop(count: int) -> Iterator[Bench]:
    """A bench with ``count`` images that goes away whatever happens."""
    with tempfile.TemporaryDirectory(prefix="storaged-bench-", dir="/var/tmp") as name:
        bench = Bench(Path(name), count)
        try:
            yield bench
        finally:
            bench.daemon.close()


def main() -> int:
    """Measure everything and print one table (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and volumes: to try the harness itself")
    parser.add_argument("--json", metavar="FILE", help="write the rows and the machine as JSON, too")
    options = parser.parse_args()
    if os.geteuid() != 0:
        raise SystemExit("bench/attach.py: this sets up loop devices: run it as root")
    quick = options.quick
    rows: list[Row] = []
    with workshop(52 if quick else 100) as bench:
        parts: tuple[Callable[[], list[Row]], ...] = (
            lambda: attach_and_detach(bench, 5 if quick else 20),
            lambda: command_line(bench, 5 if quick else 20),
            lambda: listing(bench, 5 if quick else 20),
            lambda: in_parallel(bench, 1 if quick else 3),
            lambda: idle(bench, 5 if quick else 60),
            lambda: throughput(bench, 3 if quick else 14, 0.5 if quick else 1.5),
        )
        for part in parts:
            rows += part()
            print(f"... {rows[-1].what}: {rows[-1].ours} {rows[-1].result}", file=sys.stderr)
    facts = machine()
    print("; ".join(f"{key} {value}" for key, value in facts.items()) + "\n")
    print("| what | storaged | by hand | result | meant to keep |\n|---|---|---|---|---|")
    for row in rows:
        print(f"| {row.what} | {row.ours} | {row.by_hand} | {row.result} | {row.limit} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": facts, "rows": [asdict(row) for row in rows]}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
