"""The memory of a daemon with many real volumes: attached, at rest, after being asked a lot, and after detaching.

Each volume is an image of 16 MiB with a qemu-storage-daemon of its own, by fuse. What is asked: scrapes as Prometheus
makes them, lists, and the details of every volume, while clients that watch are connected. Told are the resident set
(RSS), as `ps` shows it, and the proportional one (PSS), in which pages that processes share are divided among them; of
the daemon, and of its worker (host/worker.py). Run by ``.venv/bin/python bench/memory.py`` (root, 8 GiB for 500).
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import json
import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common import Daemon, machine
from metrics import scrape

PORT = 19931
#: MiB that the daemon may have with 500 volumes.
LIMIT = 80
#: Attached at a time, as at a boot or by a tool for configuration.
TOGETHER = 16


def memory(pid: int) -> dict[str, float]:
    """MiB of a process: resident (of which anonymous), and proportional."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    rollup = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:])
    return {
        "rss": int(status["VmRSS"].split()[0]) / 1024, "anonymous": int(status["RssAnon"].split()[0]) / 1024,
        "pss": int(rollup["Pss"].split()[0]) / 1024, "threads": int(status["Threads"]),
    }


def children(pid: int) -> list[int]:
    """The processes that a process has started, without qemu-storage-daemons: those are not a part of it."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == pid and b"qemu-storage-daemon" not in (entry / "cmdline").read_bytes().split(b"\0")[0]:
                found.append(int(entry.name))
    return found


class Measured:
    """A daemon, and what was found of its memory at each point."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.points: dict[str, dict[str, float]] = {}

    def note(self, point: str) -> None:
        """Look, and print a row."""
        pid = self.daemon.process.pid
        found = memory(pid)
        workers = [memory(child) for child in children(pid)]
        found["workers"], found["workers rss"] = len(workers), sum(one["rss"] for one in workers)
        found["workers pss"] = sum(one["pss"] for one in workers)
        self.points[point] = found
        print(
            f"| {point} | {found['rss']:.1f} | {found['anonymous']:.1f} | {found['pss']:.1f} | "
            f"{found['workers rss']:.1f} ({len(workers)}) | {found['workers pss']:.1f} | {found['threads']:.0f} |",
            flush=True,
        )


@contextlib.contextmanager
def watching(path: str, number: int) -> Iterator[None]:
    """Have clients that read each event."""

    def read(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while connection.recv(65536):
                pass

    connections = []
    for _ in range(number):
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.connect(path)
        connection.sendall(json.dumps({"method": "io.storaged.Watch", "more": True}).encode() + b"\0")
        threading.Thread(target=read, args=(connection,), daemon=True).start()
        connections.append(connection)
    try:
        yield
    finally:
        for connection in connections:
            connection.shutdown(socket.SHUT_RDWR)
            connection.close()


def first_scrape() -> None:
    """Scrape as soon as the daemon listens."""
    deadline = time.monotonic() + 30
    while True:
        try:
            scrape(PORT)
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def attach(daemon: Daemon, place: str, number: int) -> None:
    """Attach all volumes, some at a time."""

    def one(index: int) -> None:
        image = Path(place, f"{index}.raw")
        image.touch()
        os.truncate(image, 1 << 24)
        daemon.call("Attach", {"name": f"volume-{index:04}", "source": str(image), "transport": "fuse"}, 300)

    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(one, range(number)))


def detach(daemon: Daemon, number: int) -> None:
    """Detach all volumes, some at a time."""

    def one(index: int) -> None:
        daemon.call("Detach", {"name": f"volume-{index:04}"}, 300)

    with concurrent.futures.ThreadPoolExecutor(TOGETHER) as pool:
        list(pool.map(one, range(number)))


def ask(daemon: Daemon, number: int, scrapes: int) -> None:
    """What a host with monitoring asks in some time, as fast as it is answered."""
    for _ in range(scrapes):
        scrape(PORT)
        daemon.call("List", {})
    for index in range(number):
        daemon.call("Show", {"name": f"volume-{index:04}"})


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=500)
    parser.add_argument("--idle", type=float, default=120, help="seconds")
    parser.add_argument("--scrapes", type=int, default=40, help="and as many lists")
    parser.add_argument("--watching", type=int, default=10, help="clients")
    parser.add_argument("--json", metavar="FILE")
    wishes = parser.parse_args()
    number = wishes.volumes
    about = machine()
    print("; ".join(f"{key} {value}" for key, value in about.items()))
    print("\n| MiB | RSS | of it anonymous | PSS | workers, RSS | workers, PSS | threads |")
    print("|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        daemon = Daemon(f'[metrics]\nlisten = "127.0.0.1:{PORT}"\n')
        try:
            measured = Measured(daemon)
            first_scrape()
            measured.note("no volume, after a scrape")
            with watching(daemon.layout.socket, wishes.watching):
                begin = time.monotonic()
                attach(daemon, place, number)
                took = time.monotonic() - begin
                measured.note(f"{number} attached")
                time.sleep(wishes.idle)
                measured.note(f"{wishes.idle:.0f} s later")
                ask(daemon, number, wishes.scrapes)
                measured.note(f"after {wishes.scrapes} scrapes and lists, and a show of each")
                qsds = [memory(volume["qsd_pid"]) for volume in daemon.call("List", {})["volumes"]]
                detach(daemon, number)
                measured.note("all detached")
                attach(daemon, place, number)
                ask(daemon, number, wishes.scrapes)
                measured.note("all attached again, and asked as much")
                detach(daemon, number)
                measured.note("all detached again")
        finally:
            daemon.close()
    most = max(point["rss"] + point["workers rss"] for point in measured.points.values())
    print(
        f"\nthe most at a time: {most:.1f} MiB with the workers, meant to keep {LIMIT}; all attached in {took:.0f} s; "
        f"a qemu-storage-daemon: RSS {sum(one['rss'] for one in qsds) / number:.1f} MiB, "
        f"PSS {sum(one['pss'] for one in qsds) / number:.1f}"
    )
    if wishes.json:
        found: dict[str, Any] = {"machine": about, "points": measured.points}
        Path(wishes.json).write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
