"""How long I/O waits while systemd restarts storaged, with 100 volumes under I/O, against the same without, in turns.

    scripts/vm run 'python bench/restart.py [--transport T] [--volumes N] [--rounds N] [--json FILE]'

It installs storaged's units, and uses the real directories: only where nothing else does, in the test machine above
all. A part of the figures is fio's rate: each volume is read and written four times a second, so that even when
nothing happens an I/O ends up to 250 ms after the last one.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import machine, middle, run, timed

from storaged.api.client import Client
from storaged.model.layout import Layout

_SOCKET = Layout.below("/").socket
_PATIENCE = 300.0
#: Reads, and as many writes, of each volume in a second.
_RATE = 4
#: Seconds of I/O before a restart, and after the last volume is adopted.
_AROUND = 8.0


def call(method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    """One call to the daemon that systemd runs."""
    with Client(_SOCKET) as client:
        return client.call(method, parameters, _PATIENCE)


def volumes() -> list[dict[str, Any]]:
    """All volumes."""
    return list(call("List")["volumes"])


def await_online() -> None:
    """Wait until every volume is."""
    deadline = time.monotonic() + _PATIENCE
    while not_yet := [volume["name"] for volume in volumes() if volume["state"] != "online"]:
        if time.monotonic() > deadline:
            raise SystemExit(f"not online: {', '.join(not_yet)}")
        time.sleep(0.5)


def main_pid() -> int:
    """The daemon's."""
    return int(run("systemctl", "show", "-P", "MainPID", "storaged"))


def servers() -> dict[str, tuple[str, int, str]]:
    """Of each volume the device, the pid of its qemu-storage-daemon and when that was started."""
    found = {}
    for volume in volumes():
        stat = Path(f"/proc/{volume['qsd_pid']}/stat").read_text()
        found[volume["name"]] = (volume["device"], volume["qsd_pid"], stat.rpartition(")")[2].split()[19])
    return found


@contextlib.contextmanager
def attached(count: int, transport: str) -> Iterator[None]:
    """So many volumes, raw images on a tmpfs; all that is left of them is taken away again."""
    paths = [Path(f"/dev/shm/restart-{number}.raw") for number in range(count)]
    try:
        for number, path in enumerate(paths):
            run("truncate", "-s", "64M", path)
            call("Attach", {"name": f"r{number}", "source": str(path), "format": "raw", "transport": transport})
        await_online()
        yield
    finally:
        for volume in volumes():
            call("Detach", {"name": volume["name"], "force": True})
        for path in paths:
            path.unlink(missing_ok=True)


class Load:
    """fio on all devices: a thread for each, at a rate, direct I/O."""

    def __init__(self, devices: list[str], directory: Path) -> None:
        self._directory = directory
        jobs = [word for number, device in enumerate(devices) for word in (f"--name=j{number}", f"--filename={device}")]
        self._process = subprocess.Popen(
            [
                "fio", "--output-format=json", "--ioengine=psync", "--thread", "--direct=1", "--rw=randrw", "--bs=4k",
                "--size=4M", "--time_based", f"--runtime={_PATIENCE:g}", f"--rate_iops={_RATE},{_RATE}",
                f"--write_lat_log={directory}/log", "--log_avg_msec=0", "--per_job_logs=1", "--disable_slat=1",
                "--disable_clat=1", *jobs,
            ],
            stdout=subprocess.PIPE, text=True,
        )

    def end(self) -> tuple[list[float], list[float]]:
        """End it. Return for each volume the longest time between two I/Os that ended, and the longest I/O, in ms."""
        self._process.send_signal(signal.SIGINT)
        told, _ = self._process.communicate(timeout=_PATIENCE)
        jobs = json.loads(told[told.index("{"):])["jobs"]
        if wrong := [job["jobname"] for job in jobs if job["error"]]:
            raise SystemExit(f"I/O errors: {wrong}")
        gaps, longest = [], []
        for number in range(1, len(jobs) + 1):
            lines = (self._directory / f"log_lat.{number}.log").read_text().splitlines()
            # In order of their end: a thread has one in flight.
            ended, took = zip(*((int(word) for word in line.split(", ")[:2]) for line in lines), strict=True)
            gaps.append(float(max(later - earlier for earlier, later in itertools.pairwise(ended))))
            longest.append(max(took) / 1e6)
        return gaps, longest


def phase(restarts: bool, seconds: float) -> dict[str, Any]:
    """One load, with a restart in it or without; ``seconds`` is how long the one without lasts."""
    before, pid = servers(), main_pid()
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        load, begin = Load([device for device, _, _ in before.values()], Path(directory)), time.monotonic()
        time.sleep(_AROUND)
        if restarts:
            figures["until systemd has restarted it, ms"] = timed(lambda: run("systemctl", "restart", "storaged"))
            figures["until all are adopted, ms"] = figures["until systemd has restarted it, ms"] + timed(await_online)
            time.sleep(_AROUND)
        else:
            time.sleep(seconds - _AROUND)
        figures["seconds"] = time.monotonic() - begin
        figures["gaps"], figures["longest"] = load.end()
    if (main_pid() != pid) is not restarts:
        raise SystemExit("the daemon was not the one that it should be")
    if servers() != before:
        raise SystemExit("a restart has changed a device or a qemu-storage-daemon")
    return figures


def main() -> int:
    """Measure and print a table (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="vduse")
    parser.add_argument("--volumes", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    options = parser.parse_args()
    run(Path(__file__).parents[1] / "scripts/install-units")
    run("systemctl", "start", "storaged")
    found: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    with attached(options.volumes, options.transport):
        for turn in range(options.rounds):
            for restarts in (True, False):
                last = found[True][-1]["seconds"] if found[True] else 0.0
                figures = phase(restarts, last)
                found[restarts].append(figures)
                said = {key: round(value) for key, value in figures.items() if isinstance(value, float)}
                print(
                    f"{options.transport}, round {turn}, {'restarted' if restarts else 'left alone'}: longest gap "
                    f"{max(figures['gaps']):.0f} ms, median {statistics.median(figures['gaps']):.0f}, longest I/O "
                    f"{max(figures['longest']):.0f} ms; {said}", file=sys.stderr, flush=True,
                )
    print(f"\n{options.volumes} volumes, {options.transport}, ms\n\n| what | restarted | left alone |\n|---|---|---|")
    for key, text in (("gaps", "between two I/Os of a volume that ended"), ("longest", "one I/O")):
        for name, reduce in (("of all volumes", max), ("of the median volume", statistics.median)):
            cells = [middle([reduce(figures[key]) for figures in found[restarts]], 0) for restarts in (True, False)]
            print(f"| longest time {text}, {name} | {' | '.join(cells)} |")
    for key in ("until systemd has restarted it, ms", "until all are adopted, ms"):
        print(f"| {key.removesuffix(', ms')} | {middle([figures[key] for figures in found[True]], 0)} | |")
    if options.json:
        Path(options.json).write_text(json.dumps({
            "machine": machine(), "volumes": options.volumes, "transport": options.transport,
            "restarted": found[True], "left alone": found[False],
        }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
