"""What one volume that hangs does to the rest: calls of the API, and the I/O of others. A part of bench/recovery.py."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from aio import BLOCK, Reads, open_direct
from common import Daemon, middle, ratios, timed
from hand import kill, stop

from storaged.api.client import Client

_PATIENCE = 120.0
#: Seconds of one phase, and how often List and Show are called in it.
_PHASE = 10.0
_CALLS = 20
_BUSY = 4


def await_all_online(daemon: Daemon) -> float:
    """Return the moment (monotonic) at which no volume is anything else."""
    deadline = time.monotonic() + 10 * _PATIENCE
    while any(volume["state"] != "online" for volume in daemon.call("List", {})["volumes"]):
        if time.monotonic() > deadline:
            raise SystemExit("not all volumes come back")
        time.sleep(0.02)
    return time.monotonic()


def online_again(daemon: Daemon, volume: dict[str, Any]) -> float:
    """Kill the QSD of a volume whose device goes with it; seconds until the daemon says that it has another one."""
    with Client(daemon.layout.socket) as client:
        events = client.stream("Watch", {"name": volume["name"]})
        next(events)
        begin = time.monotonic()
        kill([volume["qsd_pid"]], wait=False)
        for answer in events:
            if answer["event"]["kind"] == "state" and answer["event"]["message"] == "online":
                return time.monotonic() - begin
    raise SystemExit("the daemon has ended")


def all_online_again(daemon: Daemon, volumes: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Kill all QSDs at once; seconds until each volume has another device and is online; it is read afterwards."""
    pids = {volume["name"]: volume["qsd_pid"] for volume in volumes}
    begin = time.monotonic()
    kill([*pids.values()], wait=False)
    back: dict[str, float] = {}
    while len(back) < len(pids):
        for volume in daemon.call("List", {})["volumes"]:
            if volume["state"] == "online" and volume["qsd_pid"] not in (None, pids[volume["name"]]):
                back.setdefault(volume["name"], time.monotonic() - begin)
        if time.monotonic() > begin + 10 * _PATIENCE:
            raise SystemExit("not all volumes come back")
        time.sleep(0.02)
    for volume in daemon.call("List", {})["volumes"]:
        Path(volume["device"]).open("rb").close()
    return [*back.values()], max(back.values())


class Load:
    """fio on some devices at once."""

    def __init__(self, devices: list[str], seconds: float) -> None:
        jobs = [word for number, device in enumerate(devices) for word in (f"--name=j{number}", f"--filename={device}")]
        self._process = subprocess.Popen(
            [
                "fio", "--output-format=json", "--ioengine=libaio", "--direct=1", "--rw=randread", "--bs=4k",
                "--iodepth=4", "--size=64M", "--time_based", f"--runtime={seconds:g}", "--ramp_time=500ms", *jobs,
            ],
            stdout=subprocess.PIPE, text=True,
        )

    def end(self) -> float:
        """Wait for its end, and return the IOPS of all."""
        told = json.loads(self._process.communicate()[0])
        return float(sum(job["read"]["iops"] for job in told["jobs"]))


def phase(daemon: Daemon, busy: list[str], shown: str) -> tuple[float, list[float], list[float]]:
    """IOPS of the busy ones, and the milliseconds of calls meanwhile: List and Show."""
    load = Load(busy, _PHASE)
    listed: list[float] = []
    showed: list[float] = []
    for number in range(_CALLS):
        listed.append(timed(functools.partial(daemon.call, "List", {})))
        showed.append(timed(functools.partial(daemon.call, "Show", {"name": shown})))
        time.sleep(_PHASE / _CALLS * (0.5 + number % 2))
    return load.end(), listed, showed


def calls(transport: str, paths: list[str], rounds: int) -> dict[str, Any]:
    """The same with and without one that hangs, in turns."""
    figures: dict[str, list[float]] = {}
    with contextlib.closing(Daemon()) as daemon:
        for number, path in enumerate(paths):
            wishes = {"name": f"v{number}", "source": path, "format": "raw", "transport": transport}
            daemon.call("Attach", wishes)
        volumes = {volume["name"]: volume for volume in daemon.call("List", {})["volumes"]}
        busy, sick = [volumes[f"v{number}"]["device"] for number in range(_BUSY)], volumes[f"v{len(paths) - 1}"]
        phase(daemon, busy, sick["name"])  # the first warms the caches
        for turn in range(rounds):
            for hangs in sorted((False, True), reverse=turn % 2 == 1):
                key = "one hangs" if hangs else "all well"
                if hangs:
                    fd = open_direct(sick["device"])
                    reads = Reads([(fd, turn * BLOCK)])
                    stop([sick["qsd_pid"]])
                    reader = threading.Thread(target=reads.submit)
                    reader.start()
                    # Somebody asks something of it, so that the daemon finds out meanwhile.
                    asking = threading.Thread(target=_ask, args=(daemon, sick))
                    asking.start()
                iops, listed, showed = phase(daemon, busy, sick["name"])
                if hangs:
                    state = daemon.call("Show", {"name": sick["name"]})["volume"]["state"]
                    os.kill(sick["qsd_pid"], signal.SIGCONT)
                    reader.join()
                    reads.wait(_PATIENCE)
                    os.close(fd)
                    asking.join()
                    if state != "hung":
                        print(f"calls {transport}: it was {state}, not hung", file=sys.stderr, flush=True)
                    await_all_online(daemon)
                figures.setdefault(f"IOPS of {_BUSY} others, {key}", []).append(iops)
                figures.setdefault(f"List, {key}", []).extend(listed)
                figures.setdefault(f"Show, {key}", []).extend(showed)
                print(
                    f"calls {transport}, {key}: {iops:.0f} IOPS, List {statistics.median(listed):.1f} ms, at most "
                    f"{max(listed):.1f}, Show {statistics.median(showed):.1f}, at most {max(showed):.1f}",
                    file=sys.stderr, flush=True,
                )
    print(f"\ncalls {transport}: {len(paths)} volumes; each call within 100 ms\n")
    print("| what | ms, IOPS | worst | calls |\n|---|---|---|---|")
    for key, values in sorted(figures.items()):
        worst = min(values) if key.startswith("IOPS") else max(values)
        print(f"| {key} | {middle(values)} | {worst:.1f} | {len(values)} |")
    shares = [figures[f"IOPS of {_BUSY} others, {key}"] for key in ("one hangs", "all well")]
    print(f"\nIOPS while one hangs, of those before: {ratios(*shares)}")
    return {"figures": figures}


def _ask(daemon: Daemon, sick: dict[str, Any]) -> None:
    wishes = {key: sick[key] for key in ("name", "source", "format", "transport")}
    with contextlib.suppress(Exception):  # that it does not answer is what is wanted
        daemon.call("Attach", {**wishes, "timeout": 10}, 30)
