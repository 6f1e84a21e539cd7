"""QSD hangs, in whole or in part, and the policy has it replaced; and it is replaced on purpose."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storaged.host.process import identify
from tests.harness import Daemon, eventually
from tests.vm.faults.cases import Case, fault
from tests.vm.faults.load import CHECKOUT, under_load
from tests.vm.faults.test_qsd import stop

_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207


def hold_thread(thread: int) -> None:
    """Stop one thread (linux/ptrace.h), say so, and hold it until our standard input ends."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
    for request in (_PTRACE_SEIZE, _PTRACE_INTERRUPT):
        if libc.ptrace(request, thread, None, None) != 0:
            raise OSError(ctypes.get_errno(), "ptrace")
    os.waitpid(thread, 0x40000000)  # __WALL: until it has stopped
    print("held", flush=True)
    sys.stdin.read()


@contextmanager
def main_thread_held(pid: int) -> Iterator[None]:
    """The main loop of a QSD stands still, with its monitor; its I/O thread goes on."""
    with subprocess.Popen(
        [sys.executable, "-c", f"from tests.vm.faults.test_hang import hold_thread; hold_thread({pid})"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=CHECKOUT,
    ) as tracer:
        assert tracer.stdout is not None
        assert tracer.stdout.readline() == b"held\n"
        yield
        # The end of its standard input lets it go, at the end of this block.


def _why(daemon: Daemon) -> str:
    volume = daemon.show("a")
    return f"{volume['state']}: {volume['condition']['trouble']}" if volume["condition"] else ""


@fault(
    "QSD is stopped; `on-hang=restart-after:5`", expected="no error", in_ci=("vduse-ext4-32", "nbd-raw-32")
)
def test_qsd_that_is_stopped_is_replaced(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case, options={"on-hang": "restart-after:5"}) as site:
        former = daemon.qsd("a")
        stop(former)
        eventually(lambda: _why(daemon) == "hung: qsd-stopped", "it says why it hangs", timeout=60)
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
        # It can never write again: it is gone, not only stopped.
        assert identify(former) is None
        site.goes_on()
        site.saw_no_error()


@fault(
    "QSD's monitor hangs, its I/O does not; `on-hang=restart-after:5`", expected="no error",
    in_ci=("vduse-raw-1",),
)
def test_qsd_whose_monitor_hangs_is_replaced(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case, options={"on-hang": "restart-after:5"}) as site:
        former = daemon.qsd("a")
        with main_thread_held(former):
            case.notes["while_it_hangs"] = round(site.goes_on(), 2)
            eventually(lambda: _why(daemon) in ("hung: qsd-silent", "hung: qsd-stopped"), "it hangs", timeout=120)
            eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
        assert identify(former) is None
        site.goes_on()
        site.saw_no_error()


@fault("QSD is replaced: `upgrade`", expected="no error", in_ci=("vduse-raw-32", "nbd-ext4-32"))
def test_qsd_is_upgraded(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        pauses = []
        for _ in range(case.times(10, 2)):
            former = daemon.qsd("a")
            daemon.call("Upgrade", name="a")
            assert daemon.replaced("a", former)
            assert identify(former) is None
            pauses.append(round(site.goes_on(), 2))
        case.notes["pauses"] = pauses
        site.saw_no_error()


@fault("QSD is killed while it is replaced: `upgrade`", expected="no error", uses=("raw-32", "ext4-1"),
       in_ci=("nbd-raw-32",))
def test_qsd_is_killed_while_it_is_upgraded(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        former = daemon.qsd("a")
        with subprocess.Popen([*daemon.cli_command(), "upgrade", "a"]) as upgrade:
            eventually(lambda: daemon.show("a")["qsd_pid"] not in (None, former), "there is a successor", timeout=60)
            successor = daemon.show("a")["qsd_pid"]
            if successor is not None:
                os.kill(successor, signal.SIGKILL)
            upgrade.wait(60)
        eventually(lambda: daemon.replaced("a", former) and daemon.replaced("a", successor), "replaced", timeout=60)
        time.sleep(1)
        site.goes_on()
        site.saw_no_error()
