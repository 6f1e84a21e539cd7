"""How long a scrape takes, and how much it holds up the event loop: 500 made up volumes, and some real ones.

The made up ones are real objects of the daemon's without a process; what is read of sysfs and /proc for each is real: a
block device of this host, and this process. Run by ``.venv/bin/python bench/metrics.py [--real N]`` (root for --real).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

import uvloop
from common import Daemon

from storaged.host import disk, process
from storaged.model.config import Config, MetricsConfig
from storaged.model.layout import Layout
from storaged.model.record import Record
from storaged.model.spec import Desired, VolumeSpec
from storaged.model.states import State
from storaged.observe.exporter import Exporter
from storaged.store.local import LocalStore
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume

ACCEPT = "application/openmetrics-text; version=1.0.0"
#: The lag is measured this often: a moment when the loop is held up must not fall between two measurements.
TICK = 0.001


def resident() -> float:
    """MiB of memory of this process."""
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def some_device() -> str:
    """A block device of this host with counters."""
    for name in sorted(os.listdir("/sys/block")):
        if disk.counters(f"/dev/{name}"):
            return f"/dev/{name}"
    raise SystemExit("this host has no block device")


def scrape(port: int) -> tuple[float, bytes]:
    """Milliseconds of one scrape, as a client sees it, and what it got."""
    request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": ACCEPT})
    begin = time.perf_counter()
    with urllib.request.urlopen(request, timeout=30) as answer:
        content = answer.read()
    return (time.perf_counter() - begin) * 1000, content


async def lags(until: Callable[[], bool], busy: Callable[[], bool]) -> tuple[list[float], list[float]]:
    """Milliseconds by which the loop was late, each time, until something is over: while busy, and while not."""
    during: list[float] = []
    between: list[float] = []
    loop = asyncio.get_running_loop()
    while not until():
        was_busy, due = busy(), loop.time() + TICK
        await asyncio.sleep(TICK)
        (during if was_busy or busy() else between).append((loop.time() - due) * 1000)
    return during, between


def told(what: str, values: list[float]) -> None:
    """Print figures."""
    ordered = sorted(values)
    print(
        f"{what}: median {statistics.median(ordered):.1f} ms, 99 % {ordered[int(0.99 * (len(ordered) - 1))]:.1f} ms, "
        f"worst {ordered[-1]:.1f} ms ({len(ordered)})"
    )


async def made_up(number: int, scrapes: int) -> None:
    """Scrape a manager with volumes that nobody serves."""
    with tempfile.TemporaryDirectory() as place:
        layout = Layout.below(place)
        environment = Environment(
            layout=layout, config=Config(metrics=MetricsConfig(listen="127.0.0.1:1")),
            persistent=LocalStore(layout.desired_persistent), volatile=LocalStore(layout.desired_volatile),
            events=EventHub(), lock_directory=place,
        )
        device, me = some_device(), process.identify(os.getpid())
        before = resident()
        async with asyncio.TaskGroup() as tasks:
            manager = Manager(environment, tasks)
            volumes = []
            for index in range(number):
                spec = VolumeSpec(name=f"volume-{index:04}", source=f"/srv/images/{index}.raw")
                volume = Volume(Desired(spec=spec), environment)
                volume.state = State.ONLINE
                volume.attachment.record = Record(
                    spec=spec, transport="nbd", transport_reason="auto", binary="", process=me, size=1 << 30,
                    device=device, counted=disk.counters(device) or [], open_seconds=0.01,
                )
                # Alive, as far as anybody can tell; a pipe stands for the pidfd.
                volume.attachment.qsd._pidfd = os.pidfd_open(os.getpid())
                volumes.append(volume)
            manager.volumes = lambda: volumes  # type: ignore[method-assign]  # made up
            with_volumes = resident()
            exporter = Exporter(environment.config.metrics, manager, asyncio.get_running_loop())
            exporter.server._address = ("127.0.0.1", 0)
            exporter.server.start()
            while not exporter.server.port:  # noqa: ASYNC110  # it is a thread that listens
                await asyncio.sleep(0.01)
            began = time.process_time()
            # Prometheus is another process: it does not share the interpreter with the loop.
            client = await asyncio.create_subprocess_exec(
                sys.executable, __file__, "--client", str(exporter.server.port), "--scrapes", str(scrapes),
                stdout=asyncio.subprocess.PIPE,
            )
            answer = asyncio.create_task(client.communicate())
            during, between = await lags(answer.done, exporter._scraping.locked)
            found = json.loads((await answer)[0])
            told(
                f"scrape of {number} made up volumes, {found['samples']} samples, {found['bytes'] / 1e6:.1f} MB",
                found["took"],
            )
            used = (time.process_time() - began) * 1000 / scrapes
            told("lag of the loop during a scrape", during)
            told("lag of the loop between scrapes", between)
            print(f"processor time of a scrape, with the measurement of the lag: {used:.1f} ms")
            print(
                f"memory: {before:.1f} MiB, with the volumes {with_volumes:.1f}, after the scrapes {resident():.1f}"
            )
            exporter.server.stop()


def spaced(port: int, scrapes: int) -> list[tuple[float, bytes]]:
    """Scrape several times, as far apart that none has to wait for the rest that the daemon takes after a scrape."""
    found = []
    for _ in range(scrapes):
        time.sleep(0.25)
        found.append(scrape(port))
    return found


def client(port: int, scrapes: int) -> None:
    """Scrape, and print what was seen, for the process that measures."""
    found = spaced(port, scrapes)
    content = found[-1][1]
    samples = sum(not line.startswith(b"#") for line in content.splitlines())
    print(json.dumps({"took": [took for took, _ in found], "bytes": len(content), "samples": samples}))


def real(number: int, scrapes: int) -> None:
    """Scrape a daemon with real volumes."""
    port = 19930
    with tempfile.TemporaryDirectory(dir="/var/tmp") as place:
        daemon = Daemon(f'[metrics]\nlisten = "127.0.0.1:{port}"\n')
        try:
            for index in range(number):
                image = Path(place, f"{index}.raw")
                image.touch()
                os.truncate(image, 1 << 24)
                daemon.call("Attach", {"name": f"v{index}", "source": str(image), "transport": "fuse"})
            who = process.identify(daemon.process.pid)
            assert who is not None
            before = process.usage(who)
            told(f"scrape of {number} real volumes", [took for took, _ in spaced(port, scrapes)])
            after = process.usage(who)
            assert before is not None
            assert after is not None
            print(
                f"processor time of a scrape: {(after.cpu - before.cpu) * 1000 / scrapes:.1f} ms; "
                f"memory of the daemon: {after.resident / (1 << 20):.1f} MiB"
            )
        finally:
            daemon.close()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--volumes", type=int, default=500, help="made up ones")
    parser.add_argument("--real", type=int, default=0, help="real ones, by fuse (root)")
    parser.add_argument("--scrapes", type=int, default=40)
    parser.add_argument("--client", type=int, help=argparse.SUPPRESS)
    wishes = parser.parse_args()
    if wishes.client:
        client(wishes.client, wishes.scrapes)
        raise SystemExit
    print(f"Python {sys.version.split()[0]}, {os.cpu_count()} CPUs")
    uvloop.run(made_up(wishes.volumes, wishes.scrapes))
    if wishes.real:
        real(wishes.real, wishes.scrapes)
