"""How long I/O waits while storaged is restarted, with 100 volumes under I/O, against the same without, in turns.

And against the start of another daemon, which has no volumes: what that costs I/O is the processor that a program takes
as it starts, and not that volumes wait for their daemon.

    .venv/bin/python bench/restart.py [--transport T] [--volumes N] [--rate R] [--rounds N] [--json FILE]
    scripts/vm run 'python bench/restart.py'

Where systemd runs it installs storaged's units, has systemd restart the service, and uses the real directories: only
where nothing else does, in the test machine above all. Elsewhere a daemon with directories of its own gets SIGTERM, and
the next one is started. In both the qemu-storage-daemons stay, and that is looked at. (root)

What counts is from the moment in which the restart is asked for until a second after the last volume is adopted; and in
the same load without a restart, or beside another daemon that is started and ended, a time as long. I/O is at a rate
that leaves the processors most of their time, as told by how much of it was done: where that is less than all, the
machine was too slow for the rate, and the figures say nothing. Two I/Os of a volume end as far from each other as the
rate has it, whatever happens (1000 ms divided by it).
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from common import Daemon, end_in_order, machine, middle, quartiles, ratios, run, timed

from storaged.api.client import Client
from storaged.errors import StoragedError
from storaged.host import disk
from storaged.model.layout import Layout

_PATIENCE = 300.0
#: Seconds after the last volume is adopted that count, too.
_AFTER = 1.0
#: What is compared.
RESTARTED, OTHER, ALONE = "restarted", "another one started", "left alone"
Figures = dict[str, list[dict[str, float]]]
#: Of the I/O that was asked for: less was done by a machine that is too slow.
_ENOUGH = 0.95


class Service(Protocol):
    """Whose restart is measured."""

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One call to the daemon."""

    def pid(self) -> int:
        """The daemon's."""

    def restart(self) -> None:
        """It is another process that answers when this returns."""


class Unit:
    """The service of systemd, which has installed units of this checkout."""

    def __init__(self) -> None:
        run(Path(__file__).parents[1] / "scripts/install-units")
        run("systemctl", "start", "storaged")
        self._socket = Layout.below("/").socket

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One call."""
        with Client(self._socket) as client:
            return client.call(method, parameters, _PATIENCE)

    def pid(self) -> int:
        """MainPID."""
        return int(run("systemctl", "show", "-P", "MainPID", "storaged"))

    def restart(self) -> None:
        """It returns when the new one is ready."""
        run("systemctl", "restart", "storaged")


class Alone:
    """A daemon without systemd."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def call(self, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
        """One call."""
        return self._daemon.call(method, parameters, _PATIENCE)

    def pid(self) -> int:
        """The process that was started."""
        return self._daemon.process.pid

    def restart(self) -> None:
        """What systemd does: SIGTERM, wait for its end, start it, wait until it answers."""
        self._daemon.stop()
        self._daemon.start()


@contextlib.contextmanager
def service(*, alone: bool) -> Iterator[Service]:
    """Have one to restart."""
    if alone:
        with contextlib.closing(Daemon()) as daemon:
            yield Alone(daemon)
    else:
        end_in_order()
        yield Unit()


def await_online(storaged: Service) -> None:
    """Wait until every volume is."""
    deadline = time.monotonic() + _PATIENCE
    while not_yet := [one["name"] for one in storaged.call("List", {})["volumes"] if one["state"] != "online"]:
        if time.monotonic() > deadline:
            raise SystemExit(f"not online: {', '.join(not_yet)}")
        time.sleep(0.1)


def servers(storaged: Service) -> dict[str, tuple[str, int, str]]:
    """Of each volume the device, the pid of its qemu-storage-daemon and when that was started."""
    found = {}
    for volume in storaged.call("List", {})["volumes"]:
        stat = Path(f"/proc/{volume['qsd_pid']}/stat").read_text()
        found[volume["name"]] = (volume["device"], volume["qsd_pid"], stat.rpartition(")")[2].split()[19])
    return found


@contextlib.contextmanager
def attached(storaged: Service, count: int, transport: str) -> Iterator[str]:
    """So many volumes, raw images on a tmpfs; all that is left of them is taken away again. Give the transport."""
    place = tempfile.mkdtemp(prefix="restart-", dir="/dev/shm")
    try:
        for number in range(count):
            path = f"{place}/{number}.raw"
            run("truncate", "-s", "64M", path)
            storaged.call("Attach", {"name": f"r{number}", "source": path, "format": "raw", "transport": transport})
        await_online(storaged)
        yield str(storaged.call("Show", {"name": "r0"})["volume"]["transport"])
    finally:
        # With a daemon of its own this is done once more, where the daemon has died (Daemon.close).
        for number in range(count):
            with contextlib.suppress(StoragedError):
                storaged.call("Detach", {"name": f"r{number}", "force": True})
        shutil.rmtree(place)


class Done(NamedTuple):
    """One I/O: when it ended, in milliseconds of the epoch, and how long it took."""

    ended: float
    took: float


def ended(device: str) -> int:
    """How many requests of a device have ended so far."""
    progress = disk.progress(device)
    if progress is None:
        raise SystemExit(f"nothing is counted of {device}")
    return progress.ended


class Load:
    """fio on all devices: a thread for each, direct reads and writes of 4 KiB, so many of each in a second.

    They begin one after the other, so that the volumes' requests do not come all at once.
    """

    def __init__(self, devices: Sequence[str], directory: Path, rate: float) -> None:
        self._directory = directory
        self._ended = {device: ended(device) for device in devices}
        jobs: list[str] = []
        for number, device in enumerate(devices):
            delay = f"{round(number * 1000 / rate / len(devices))}ms"
            jobs += [f"--name=j{number}", f"--filename={device}", f"--startdelay={delay}"]
        self._process = subprocess.Popen(
            [
                "fio", "--output-format=json", "--ioengine=psync", "--thread", "--direct=1", "--rw=randrw", "--bs=4k",
                "--size=4M", "--time_based", f"--runtime={3 * _PATIENCE:g}", f"--rate_iops={rate:g},{rate:g}",
                f"--write_lat_log={directory}/log", "--log_avg_msec=0", "--per_job_logs=1", "--log_unix_epoch=1",
                "--disable_slat=1", "--disable_clat=1", *jobs,
            ],
            stdout=subprocess.PIPE, text=True, start_new_session=True,
        )

    def await_begun(self) -> None:
        """Wait until each device has done something: fio takes a while to start so many threads."""
        deadline = time.monotonic() + _PATIENCE
        while idle := [device for device, before in self._ended.items() if ended(device) < before + 2]:
            if time.monotonic() > deadline or self._process.poll() is not None:
                raise SystemExit(f"fio does nothing on {', '.join(idle)}")
            time.sleep(0.1)

    def end(self) -> list[list[Done]]:
        """End it. Return each volume's I/O, in the order in which it ended."""
        self._process.send_signal(signal.SIGINT)
        told, _ = self._process.communicate(timeout=_PATIENCE)
        jobs = json.loads(told[told.index("{"):])["jobs"]
        if wrong := [job["jobname"] for job in jobs if job["error"]]:
            raise SystemExit(f"I/O errors: {wrong}")
        found = []
        for number in range(1, len(jobs) + 1):
            log = self._directory / f"log_lat.{number}.log"  # none where fio's thread did not get to any I/O
            lines = log.read_text().splitlines() if log.exists() else []
            found.append([Done(float(words[0]), int(words[1]) / 1e6) for words in (line.split(", ") for line in lines)])
        return found

    def kill(self) -> None:
        """End it, whatever has happened."""
        self._process.kill()
        self._process.communicate()


def figures_of(volumes: Sequence[Sequence[Done]], begin: float, end: float, rate: float) -> dict[str, float]:
    """What counts of all volumes' I/O between two moments, in milliseconds of the epoch.

    An I/O counts that was under way in that time, and a pause between two that reaches into it.
    """
    longest, gaps, every = [], [], []
    for volume in volumes:
        took = [one.took for one in volume if one.ended >= begin and one.ended - one.took <= end]
        between = [
            later.ended - earlier.ended for earlier, later in itertools.pairwise(volume)
            if later.ended >= begin and earlier.ended <= end
        ]
        if not took or not between:
            raise SystemExit("a volume had no I/O at all: this machine is too busy, or too slow for that rate (--rate)")
        longest.append(max(took))
        gaps.append(max(between))
        every += took
    # Of the whole time, and at its begin one of both: what counts is too short for a rate that is not even.
    wanted = sum(2 * rate * (volume[-1].ended - volume[0].ended) / 1000 + 2 for volume in volumes)
    return {
        "one I/O, longest of all": max(longest), "one I/O, longest of the median volume": statistics.median(longest),
        "one I/O, 99 % of all": statistics.quantiles(every, n=100, method="inclusive")[98],
        "one I/O, median": statistics.median(every),
        "between two of a volume, longest of all": max(gaps),
        "between two of a volume, longest of the median volume": statistics.median(gaps),
        "of the I/O asked for, done": sum(map(len, volumes)) / wanted,
    }


def phase(storaged: Service, rate: float, settle: float, kind: str, lasts: float) -> dict[str, float]:
    """One load, and what is done meanwhile; ``lasts`` is how many seconds count where there is no restart.

    ``settle``: seconds of I/O before, and again so many for what was under way at the end, so that it is told, too.
    """
    before, pid = servers(storaged), storaged.pid()
    told: dict[str, float] = {}
    with tempfile.TemporaryDirectory(dir="/run") as directory:
        load = Load([device for device, _, _ in before.values()], Path(directory), rate)
        try:
            load.await_begun()
            # At no fixed moment between two I/Os, of which many come at a time.
            time.sleep(settle + random.random() / rate)
            begin = time.time()
            if kind == RESTARTED:
                told["until it is restarted"] = timed(storaged.restart)
                told["until all are adopted"] = told["until it is restarted"] + timed(lambda: await_online(storaged))
                time.sleep(_AFTER)
            else:
                if kind == OTHER:
                    Daemon().close()
                time.sleep(max(0.0, begin + lasts - time.time()))
            end = time.time()
            time.sleep(settle + 1 / rate)
            told |= figures_of(load.end(), begin * 1000, end * 1000, rate)
        except BaseException:
            load.kill()
            raise
    if (storaged.pid() != pid) is not (kind == RESTARTED):
        raise SystemExit("the daemon was not the one that it should be")
    if servers(storaged) != before:
        raise SystemExit("a restart has changed a device or a qemu-storage-daemon")
    return told | {"seconds": end - begin}


def measured(storaged: Service, rate: float, settle: float, rounds: int) -> Figures:
    """So many rounds of all three; the order changes from round to round."""
    found: Figures = {RESTARTED: [], OTHER: [], ALONE: []}
    for turn in range(rounds):
        # The first of all has to tell how long the others last.
        for kind in list(found)[:: 1 if turn % 2 == 0 else -1]:
            lasts = found[RESTARTED][-1]["seconds"] if found[RESTARTED] else 0.0
            told = phase(storaged, rate, settle, kind, lasts)
            found[kind].append(told)
            print(
                f"round {turn + 1}, {kind}: " + "; ".join(f"{key} {value:.3g}" for key, value in told.items()),
                file=sys.stderr, flush=True,
            )
    return found


def table(found: Figures) -> str:
    """Median of the rounds, and spread, of all three and of the ratio."""
    lines = [
        f"| ms | {' | '.join(found)} | {RESTARTED}: of {ALONE}; pair by pair | {RESTARTED}: of {OTHER}; pair by pair |",
        "|---|---|---|---|---|---|",
    ]
    for key in found[ALONE][0]:
        if key == "seconds":
            continue
        of = {kind: [told[key] for told in each] for kind, each in found.items()}
        digits = 2 if max(max(values) for values in of.values()) < 10 else 0
        cells = [middle(values, digits) for values in of.values()]
        cells += [ratios(of[RESTARTED], of[kind]) for kind in (ALONE, OTHER)]
        lines.append(f"| {key} | {' | '.join(cells)} |")
    for key in ("until it is restarted", "until all are adopted"):
        lines.append(f"| {key} | {middle([told[key] for told in found[RESTARTED]], 0)} | | | | |")
    return "\n".join(lines)


def main() -> int:
    """Measure and print a table (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--volumes", type=int, default=100)
    parser.add_argument("--rate", type=float, default=1.0, help="reads, and as many writes, of each volume in a second")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--settle", type=float, default=4.0, help="seconds of I/O before what counts, and after it")
    parser.add_argument("--alone", action="store_true", help="a daemon of its own, where systemd runs, too")
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    options = parser.parse_args()
    alone = options.alone or not os.path.isdir("/run/systemd/system")
    with service(alone=alone) as storaged, attached(storaged, options.volumes, options.transport) as transport:
        load_before = os.getloadavg()[0]
        found = measured(storaged, options.rate, options.settle, options.rounds)
    about = machine() | {"load before": f"{load_before:.1f}"}
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    print(
        f"\n{options.volumes} volumes, {transport}, {2 * options.rate:g} I/Os a second of each, "
        f"{'by itself' if alone else 'under systemd'}, {options.rounds} rounds\n\n{table(found)}"
    )
    least = min(quartiles([told["of the I/O asked for, done"] for told in each])[0] for each in found.values())
    if least < _ENOUGH:
        print(f"\nOnly {least:.0%} of the I/O was done: this machine is too slow for that rate, see --rate.")
    if options.json:
        Path(options.json).write_text(json.dumps({
            "machine": about, "volumes": options.volumes, "transport": transport, "rate": options.rate,
            "alone": alone, **found,
        }))
    return 0


if __name__ == "__main__":
    sys.exit(main())
