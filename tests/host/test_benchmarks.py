"""The benchmarks of bench/ that change the host: they run, and leave nothing, however they are ended."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import STORAGED, eventually, leftovers, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="they attach volumes")

BENCH = Path(__file__).parents[2] / "bench"


def daemon_of(pid: int) -> tuple[int, Path]:
    """The daemon that a benchmark has started, and its root."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path(f"/proc/{child}/cmdline").read_bytes().decode().split("\0")
        if STORAGED[0] in words and "--root" in words:
            return int(child), Path(words[words.index("--root") + 1])
    raise AssertionError("it has no daemon")


@pytest.mark.parametrize("accident", ["Ctrl-C", "SIGTERM, and the daemon is dead"])
def test_a_benchmark_that_is_ended_takes_its_volumes_away(accident: str) -> None:
    command = [sys.executable, str(BENCH / "memory.py"), "--volumes", "3", "--idle", "500"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as benchmark:
        try:
            assert benchmark.stdout is not None
            assert any("| 3 attached" in line for line in benchmark.stdout)
            daemon, root = daemon_of(benchmark.pid)
            there = leftovers(root)
            assert sum("loop device" in one for one in there) == sum("/dev/fuse" in one for one in there) == 3
            if accident == "Ctrl-C":
                os.killpg(benchmark.pid, signal.SIGINT)  # as a terminal does: to all that belongs to it
                expected = 128 + signal.SIGINT
            else:
                os.kill(daemon, signal.SIGKILL)
                expected = 128 + signal.SIGTERM
        finally:
            benchmark.terminate()  # after Ctrl-C it is not heard any more
        assert benchmark.wait(60) == expected
    eventually(lambda: leftovers(root) == [], "nothing is left")
    assert not root.exists()


def test_a_restart_is_measured_with_all_devices_and_servers_as_they_were(place: Path) -> None:
    # That no device and no qemu-storage-daemon changes, and that the daemon does, it looks at by itself.
    done = run(
        sys.executable, BENCH / "restart.py", "--alone", "--transport", "fuse", "--volumes", "2", "--rate", "10",
        "--rounds", "1", "--settle", "0.5", "--json", place / "json",
    )
    assert "| one I/O, longest of all |" in done.stdout
    told = json.loads((place / "json").read_text())
    assert told["transport"] == "fuse"
    (restarted,), (other,), (alone,) = told["restarted"], told["another one started"], told["left alone"]
    assert restarted["until all are adopted"] >= restarted["until it is restarted"] > 0
    assert alone["seconds"] == pytest.approx(restarted["seconds"], rel=0.2)
    # A volume that had no I/O would have ended it.
    assert min(each["one I/O, median"] for each in (restarted, other, alone)) > 0
