"""QSD dies, or stops, under load."""

from __future__ import annotations

import os
import random
import signal
import time
from contextlib import suppress
from pathlib import Path

from storaged.host.process import identify
from tests.harness import Daemon, eventually, leftovers
from tests.vm.faults.cases import Case, fault
from tests.vm.faults.load import Site, under_load


def stop(pid: int) -> None:
    """SIGSTOP, and wait until it stands still."""
    os.kill(pid, signal.SIGSTOP)
    eventually(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "Tt", "stopped")


def is_replaced(site: Site, former: int) -> None:
    """Wait until a volume is online with another QSD, and let it do without the pause between two tries."""

    def is_so() -> bool:
        if not site.daemon.replaced("a", former):
            site.ask_again()
        return site.daemon.replaced("a", former)

    eventually(is_so, "replaced", timeout=60)


@fault("QSD is killed, again and again", expected="no error", in_ci=("vduse-raw-32", "nbd-ext4-32"))
def test_qsd_is_killed_again_and_again(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        pauses = []
        for number in range(case.times(50, 10)):
            time.sleep(random.uniform(0, 0.2))
            former = daemon.kill_qsd("a")
            if number:
                is_replaced(site, former)
            # The first is repaired at once, without anybody asking for it.
            eventually(lambda former=former: daemon.replaced("a", former), "replaced")  # type: ignore[misc]
            pauses.append(round(site.goes_on(), 2))
        case.notes["pauses"] = pauses
        site.saw_no_error()


@fault(
    "QSD of a `qcow2` image is killed", expected="I/O errors, another device", uses=("raw-32", "ext4-1"),
    in_ci=("vduse-ext4-1",),
)
def test_qsd_of_a_qcow2_image_is_killed(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case, format="qcow2") as site:
        former = daemon.kill_qsd("a")
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
        eventually(lambda: site.load.status()["flush_errors"] > 0, "a flush failed")
        site.saw_errors("another device")
        device = str(daemon.show("a")["device"])
        site.keeps_what_was_flushed(device)
        daemon.detach("a", timeout=60)


@fault(
    "QSD is killed, and its successor at once", expected="no error", uses=("raw-32", "ext4-1"),
    in_ci=("nbd-raw-32",),
)
def test_qsd_is_killed_and_its_successor_at_once(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        first = daemon.kill_qsd("a")

        def second() -> int:
            pid = daemon.show("a")["qsd_pid"]
            return 0 if pid in (None, first) else int(pid)

        eventually(lambda: second(), "there is a successor")
        successor = second()
        with suppress(ProcessLookupError):
            os.kill(successor, signal.SIGKILL)
        eventually(lambda: daemon.replaced("a", successor), "replaced once more", timeout=60)
        site.goes_on()
        site.saw_no_error()


@fault("QSD is stopped for 3 s and goes on", expected="no error", in_ci=("vduse-raw-1",))
def test_qsd_is_stopped_and_goes_on(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        pid = daemon.qsd("a")
        stop(pid)
        time.sleep(3)
        os.kill(pid, signal.SIGCONT)
        site.goes_on()
        assert daemon.qsd("a") == pid
        site.saw_no_error()


@fault(
    "QSD is stopped; `detach --force`", expected="I/O errors, nothing left",
    in_ci=("vduse-ext4-32",),
)
def test_qsd_is_stopped_and_the_volume_detached_by_force(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        pid = daemon.qsd("a")
        stop(pid)
        eventually(lambda: site.load.status()["in_flight"] >= case.depth, "all requests wait")
        begin = time.monotonic()
        daemon.detach("a", force=True, timeout=60)
        case.notes["detached_after"] = round(time.monotonic() - begin, 2)
        assert identify(pid) is None
        site.saw_errors("nothing left")
        eventually(lambda: leftovers(daemon.root) == [], f"nothing is left; there is {leftovers(daemon.root)}")
        site.keeps_what_was_flushed(str(site.source))
