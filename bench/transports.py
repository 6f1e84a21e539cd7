"""How fast a VDUSE and an NBD device are: storaged's against the best that can be set up by hand, in turns.

    make bench-vm          (in the test machine: python bench/transports.py [--explore] [--json FILE] [PART …])

``--explore`` tries settings by hand, on a disk that does nothing (null-co), so that what is seen is the transport.
A part ends after some minutes, whatever it has done by then.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import byhand
from byhand import Setup
from common import Daemon, fio, machine, middle, ratios, run

JOBS = {
    "4k random read, QD 1, IOPS": ["--rw=randread", "--bs=4k", "--iodepth=1", "--direct=1"],
    "4k random read, QD 32, IOPS": ["--rw=randread", "--bs=4k", "--iodepth=32", "--direct=1"],
    "4k random write, QD 1, IOPS": ["--rw=randwrite", "--bs=4k", "--iodepth=1", "--direct=1"],
    "4k random write, QD 32, IOPS": ["--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1"],
    "1M linear read, QD 4, MB/s": ["--rw=read", "--bs=1M", "--iodepth=4", "--direct=1"],
    "1M linear write, QD 4, MB/s": ["--rw=write", "--bs=1M", "--iodepth=4", "--direct=1"],
    # Once through, and never twice over the same: the page cache would be measured.
    "buffered linear read, MB/s": [
        "--rw=read", "--bs=1M", "--direct=0", "--ioengine=psync", "--time_based=0", "--ramp_time=0",
    ],
}
SMALL = [name for name in JOBS if name.startswith("4k")]
LINEAR = [name for name in JOBS if not name.startswith("4k")]

DEEP = [name for name in JOBS if "QD 1," not in name]

#: Changes to the setting that all are compared with, and the jobs that they can make a difference to.
Variant = tuple[str, Mapping[str, Any], list[str]]
ALWAYS: list[Variant] = [
    ("as it is", {}, [*JOBS]),
    ("as it is, again", {}, [*JOBS]),
    ("no iothread", {"iothread": False}, [*JOBS]),
    *((f"scheduler {name}", {"sysfs": {"scheduler": name}}, SMALL) for name in ("none", "kyber", "mq-deadline")),
    *((f"read-ahead {n} KiB", {"sysfs": {"read_ahead_kb": n}}, LINEAR[-1:]) for n in (128, 512, 1024, 4096)),
]
VARIANTS: dict[str, list[Variant]] = {
    "vduse": [
        *ALWAYS,
        ("2 queues", {"queues": 2}, [*JOBS]),
        *((f"queue size {n}", {"queue_size": n}, DEEP) for n in (64, 128, 512, 1024)),
        *((f"max_sectors {n} KiB", {"sysfs": {"max_sectors_kb": n}}, LINEAR) for n in (128, 512, 4096)),
    ],
    "nbd": [
        *ALWAYS,
        *((f"max_sectors {n} KiB", {"sysfs": {"max_sectors_kb": n}}, LINEAR) for n in (128, 512, 1024, 4096, 32768)),
    ],
}
AIO: list[Variant] = [
    ("aio threads", {}, [*JOBS]),
    ("aio io_uring", {"aio": "io_uring"}, [*JOBS]),
    ("aio threads, cache none", {"cache": "none"}, [*JOBS]),
    ("aio io_uring, cache none", {"aio": "io_uring", "cache": "none"}, [*JOBS]),
    ("aio native, cache none", {"aio": "native", "cache": "none"}, [*JOBS]),
]
#: The best by hand of what is as safe; what --explore finds.
BEST = {"vduse": Setup("vduse", sysfs={"scheduler": "none"}), "nbd": Setup("nbd")}
SIZE = "512M"
Figures = dict[str, dict[str, list[float]]]


def explore(transport: str, variants: list[Variant], image: str, until: float, seconds: float) -> Figures:
    """Every variant once in each round, in another order each time."""
    figures: Figures = {name: {} for name, _, _ in variants}
    while time.monotonic() < until:
        for name, changes, jobs in random.sample(variants, len(variants)):
            setup = dataclasses.replace(Setup(transport), **changes)
            device = byhand.attach(setup, image)
            try:
                for job in jobs:
                    value = fio(device, JOBS[job], seconds, SIZE)
                    figures[name].setdefault(job, []).append(value)
                    print(f"{transport} {name}: {job} {value:.0f}", file=sys.stderr, flush=True)
            finally:
                byhand.detach(setup, device)
            if time.monotonic() > until:
                break
    return figures


def print_exploration(title: str, figures: Figures, base: str) -> None:
    """Medians and the ratios to the base."""
    print(f"\n{title}\n")
    print(f"| | {' | '.join(JOBS)} |\n|---|{'---|' * len(JOBS)}")
    for name, values in figures.items():
        medians = {job: statistics.median(values[job]) for job in values}
        cells = [
            f"{medians[job]:.0f} ({medians[job] / statistics.median(figures[base][job]):.2f})" if job in values else ""
            for job in JOBS
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


def compare(daemon: Daemon, transport: str, images: list[str], until: float, seconds: float) -> Figures:
    """storaged's device and the best one by hand, job by job in turns; they change images after each round."""
    figures: Figures = {who: {job: [] for job in JOBS} for who in ("storaged", "by hand")}
    turn = 0
    while time.monotonic() < until or turn < 2:
        turn += 1
        images.reverse()
        answer = daemon.call("Attach", {"name": "b", "source": images[0], "format": "raw", "transport": transport})
        devices = {"storaged": str(answer["volume"]["device"]), "by hand": byhand.attach(BEST[transport], images[1])}
        for job, words in JOBS.items():
            for who in sorted(devices, reverse=turn % 2 == 0):
                figures[who][job].append(fio(devices[who], words, seconds, SIZE))
        byhand.detach(BEST[transport], devices["by hand"])
        daemon.call("Detach", {"name": "b"})
        print(f"{transport}: round {turn}", file=sys.stderr, flush=True)
    return figures


def print_comparison(title: str, figures: Figures) -> None:
    """Medians, and the ratio with its spread."""
    print(f"\n{title}\n\n| | storaged | best by hand | ratio |\n|---|---|---|---|")
    for job in JOBS:
        ours, other = figures["storaged"][job], figures["by hand"][job]
        print(f"| {job} | {middle(ours, 0)} | {middle(other, 0)} | {ratios(ours, other)} |", flush=True)


def make_image(path: str) -> str:
    """A raw image with all of its blocks allocated."""
    run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", f"count={SIZE.removesuffix('M')}", "status=none")
    return path


def main() -> int:
    """Measure and print tables (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--explore", action="store_true", help="try settings by hand instead")
    parser.add_argument("--minutes", type=float, default=5, help="for each part (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each job of fio (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    parser.add_argument("parts", nargs="*", default=["vduse:/dev/shm", "nbd:/dev/shm"], help=(
        "TRANSPORT:DIRECTORY with the images; with --explore TRANSPORT:null, or a directory to try aio and cache "
        "(default: %(default)s)"
    ))
    options = parser.parse_args()
    # mq-deadline is what the kernel gives a disk with one queue, if it is there.
    run("modprobe", "-a", "vduse", "virtio_vdpa", "nbd", "mq-deadline", "kyber-iosched")
    found = {}
    with contextlib.closing(Daemon()) as daemon:
        for part in options.parts:
            transport, _, place = part.partition(":")
            images = ["null"] if place == "null" else [make_image(f"{place}/bench-{n}.raw") for n in (1, 2)]
            until = time.monotonic() + 60 * options.minutes
            if options.explore:
                variants = VARIANTS[transport] if place == "null" else AIO
                found[part] = explore(transport, variants, images[0], until, options.seconds)
                print_exploration(part, found[part], variants[0][0])
            else:
                found[part] = compare(daemon, transport, images, until, options.seconds)
                print_comparison(part, found[part])
            for image in images:
                Path(image).unlink(missing_ok=True)
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "figures": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
