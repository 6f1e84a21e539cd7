"""What the benchmarks share: a daemon of their own, programs, the clock, fio, and figures with their spread."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import select
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from storaged.api.client import Client
from storaged.errors import StoragedError
from storaged.model.layout import Layout

STORAGED = str(Path(sys.executable).with_name("storaged"))
QSD = "qemu-storage-daemon"


class Daemon:
    """A daemon with directories of its own, below /run: a tmpfs, where the real one has them too.

    From its start on a signal ends the benchmark in good order: who made a Daemon has to close it, whatever happens.
    """

    def __init__(self, configuration: str = "") -> None:
        """``configuration``: the content of its storaged.toml."""
        end_in_order()
        self.root = Path(tempfile.mkdtemp(prefix="storaged-bench-", dir="/run"))
        self.layout = Layout.below(str(self.root))
        os.makedirs(self.layout.config_dir)
        Path(self.layout.config_file).write_text(configuration)
        try:
            self.start()
        except BaseException:
            shutil.rmtree(self.root)
            raise

    def start(self) -> None:
        """Start it, and wait until it answers."""
        # In a session of its own: Ctrl-C goes to all of the terminal's, and it is needed to take its volumes away.
        with open(self.root / "log", "ab") as log:
            self.process = subprocess.Popen(
                [STORAGED, "--root", str(self.root), "daemon"], stdout=subprocess.DEVNULL, stderr=log,
                start_new_session=True,
            )
        try:
            self._await_answer(time.monotonic() + 60)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _await_answer(self, deadline: float) -> None:
        while True:
            with contextlib.suppress(StoragedError, OSError):
                self.call("List", {}, 5)
                return
            if time.monotonic() > deadline or self.process.poll() is not None:
                raise SystemExit(f"the daemon does not start: {(self.root / 'log').read_text()}")
            time.sleep(0.05)

    def stop(self) -> None:
        """End it; volumes stay."""
        self.process.terminate()
        self.process.wait()

    def call(self, method: str, parameters: dict[str, Any], timeout: float = 120) -> dict[str, Any]:
        """One call on a connection of its own."""
        with Client(self.layout.socket) as client:
            return client.call(method, parameters, timeout)

    def close(self) -> None:
        """Take all away; if the daemon has died or does not answer, by another one."""
        try:
            volumes = self.call("List", {}, 20)["volumes"]
        except (StoragedError, OSError):
            self.process.kill()
            self.process.wait()
            self.start()
            volumes = self.call("List", {})["volumes"]
        for volume in volumes:
            try:
                self.call("Detach", {"name": volume["name"], "force": True})
            except StoragedError as error:
                print(f"{volume['name']} is left behind: {error}", file=sys.stderr)
        self.stop()
        shutil.rmtree(self.root)


def end_in_order() -> None:
    """SIGINT, SIGTERM and SIGHUP end the benchmark once, and it takes away what it has made; a second is not heard."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        for each in caught:
            signal.signal(each, lambda *_: None)  # not SIG_IGN: what is started now would inherit that
        raise SystemExit(128 + number)

    caught = [
        number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN  # nohup(1)
    ]
    for number in caught:
        signal.signal(number, interrupt)


def run(*command: object) -> str:
    """Run a program and return what it prints."""
    return subprocess.run([str(word) for word in command], check=True, stdout=subprocess.PIPE, text=True).stdout


def timed(work: Callable[[], object]) -> float:
    """Milliseconds."""
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1000


def end(pid: int) -> None:
    """SIGTERM, and wait for the end of a process."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, 15)
        select.select([pidfd], [], [], 30)
    finally:
        os.close(pidfd)


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """The lower quartile, the median, the upper quartile; of a few values the least and the greatest instead."""
    if len(values) < 4:
        return min(values), statistics.median(values), max(values)
    low, median, high = statistics.quantiles(values, n=4)
    return low, median, high


def middle(values: Sequence[float], digits: int = 1) -> str:
    """Median and the range of the middle half."""
    low, median, high = quartiles(values)
    return f"{median:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(ones: Sequence[float], others: Sequence[float]) -> str:
    """The ratio of the medians, and of the pairs with its spread."""
    pairs = [one / other for one, other in zip(ones, others, strict=True)]
    return f"{statistics.median(ones) / statistics.median(others):.2f}; pair by pair {middle(pairs, 2)}"


def fio(device: str, words: list[str], seconds: float, size: str) -> float:
    """Run one job on a device for some seconds and return its IOPS, or MB/s where its blocks are of 1M."""
    os.sync()
    command = [
        "fio", "--name=x", f"--filename={device}", "--ioengine=libaio", f"--size={size}", "--time_based",
        f"--runtime={round(seconds * 1000)}ms", "--ramp_time=300ms", "--output-format=json", "--invalidate=1", *words,
    ]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=60 + 10 * seconds)
    job = json.loads(done.stdout)["jobs"][0]
    if "--bs=1M" in words:
        return float(job["read"]["bw"] + job["write"]["bw"]) * 1024 / 1e6
    return float(job["read"]["iops"] + job["write"]["iops"])


def machine() -> dict[str, str]:
    """What this ran on."""
    processors = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in processors if line.startswith("model name")), "?")
    memory = Path("/proc/meminfo").read_text().split()[1]
    return {
        "processor": f"{os.cpu_count()} x {model}", "memory": f"{int(memory) >> 20} GiB",
        "kernel": platform.release(), "python": platform.python_version(),
        "qemu-storage-daemon": run(QSD, "--version").splitlines()[0].removeprefix("qemu-storage-daemon version "),
        "fio": run("fio", "--version").strip(), "date": time.strftime("%Y-%m-%d"),
    }
