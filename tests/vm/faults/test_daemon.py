"""The daemon dies under load, alone, with QSD, and at each step of what it does; and its /run is full."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.model.plan import Step
from tests.harness import Daemon, error_of, eventually, image, leftovers, run
from tests.vm.faults.cases import Case, fault
from tests.vm.faults.load import under_load


def around(*steps: Step) -> list[str]:
    """The places before and after each step (storaged.supervisor.faults)."""
    return [f"{when} {step}" for step in steps for when in ("before", "after")]


ATTACH = [
    *around(Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH),
    "start: recorded", "start: spawned", "connect: made",
]
DETACH = [*around(Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.REMOVE), "before forget"]
_SUCCESSOR = [*around(Step.START, Step.OPEN, Step.EXPORT), "start: recorded", "start: spawned"]
RECOVERY = {"vduse": _SUCCESSOR, "nbd": [*_SUCCESSOR, *around(Step.RECONNECT)]}


@fault("the daemon is killed, again and again", expected="no error, no pause", in_ci=("vduse-ext4-32",))
def test_the_daemon_is_killed_again_and_again(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        qsd = daemon.qsd("a")
        for _ in range(case.times(10, 2)):
            daemon.kill()
            site.goes_on()
            daemon.start()
            eventually(lambda: daemon.online("a"), "adopted")
            site.goes_on()
        assert daemon.qsd("a") == qsd
        site.saw_no_error()


@fault(
    "the daemon is killed while it attaches, at each step", expected="the next daemon finishes it, no error",
    uses=("raw-32",), steps=ATTACH, in_ci=("nbd-raw-32-after open",),
)
def test_the_daemon_is_killed_while_it_attaches(stopped: Daemon, place: Path, case: Case) -> None:
    source = image(place / "a.img", "raw", "64M")
    stopped.start(fault=case.step)
    error = error_of(lambda: stopped.attach("a", source, transport=case.transport))
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    stopped.wait_dead()
    stopped.start()
    with under_load(stopped, place, case, source) as site:
        site.saw_no_error()


@fault(
    "the daemon is killed while it detaches, at each step", expected="the next daemon finishes it, nothing lost",
    uses=("ext4-1",), steps=DETACH, in_ci=("vduse-ext4-1-after disconnect",),
)
def test_the_daemon_is_killed_while_it_detaches(stopped: Daemon, place: Path, case: Case) -> None:
    stopped.start(fault=case.step)
    with under_load(stopped, place, case) as site:
        assert site.load.stop()["errors"] == {}
        site.unmount()
        assert error_of(lambda: stopped.detach("a")).code is ErrorCode.DAEMON_UNREACHABLE
        stopped.wait_dead()
        stopped.start()
        eventually(lambda: stopped.names() == [], "detached", timeout=60)
        assert leftovers(stopped.root) == []
        site.keeps_what_was_flushed(str(site.source))
        case.outcome = "detached, nothing lost"


@fault(
    "QSD is killed, and the daemon while it recovers, at each step", expected="no error",
    uses=("raw-32", "ext4-1"), steps=RECOVERY, in_ci=(
        "vduse-raw-32-after export", "vduse-ext4-1-start: recorded", "nbd-raw-32-before reconnect",
        "nbd-ext4-1-after open",
    ),
)
def test_the_daemon_is_killed_while_it_recovers(stopped: Daemon, place: Path, case: Case) -> None:
    stopped.start()
    with under_load(stopped, place, case) as site:
        former = stopped.qsd("a")
        stopped.kill()
        os.kill(former, signal.SIGKILL)
        stopped.start(fault=case.step, wait=False)
        stopped.wait_dead()
        stopped.start()
        eventually(lambda: stopped.replaced("a", former), "replaced", timeout=60)
        site.goes_on()
        site.saw_no_error()


@fault("QSD and the daemon are killed together", expected="no error", in_ci=("nbd-raw-1",))
def test_qsd_and_the_daemon_are_killed_together(stopped: Daemon, place: Path, case: Case) -> None:
    stopped.start()
    with under_load(stopped, place, case) as site:
        former = stopped.kill_qsd("a")
        stopped.kill()
        stopped.start()
        eventually(lambda: stopped.replaced("a", former), "replaced", timeout=60)
        site.goes_on()
        site.saw_no_error()


@fault("QSD is killed while the daemon is being restarted", expected="no error", in_ci=("vduse-raw-1",))
def test_qsd_is_killed_while_the_daemon_starts(daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case) as site:
        for _ in range(case.times(10, 2)):
            former = daemon.qsd("a")
            daemon.kill()
            daemon.start(wait=False)
            time.sleep(random.uniform(0, 2))
            os.kill(former, signal.SIGKILL)
            eventually(daemon.answers, "the daemon answers")
            eventually(lambda former=former: daemon.replaced("a", former), "replaced", 60)  # type: ignore[misc]
            site.goes_on()
        site.saw_no_error()


@contextmanager
def full(*directories: str) -> Iterator[None]:
    """Shrink each tmpfs to what is in it."""
    sizes = {}
    try:
        for directory in directories:
            now = os.statvfs(directory)

            def shrunk(directory: str = directory) -> bool:
                now = os.statvfs(directory)
                used = (now.f_blocks - now.f_bfree) * now.f_frsize
                return run("mount", "-o", f"remount,size={used}", directory, check=False).returncode == 0

            sizes[directory] = now.f_blocks * now.f_frsize
            eventually(shrunk, f"{directory} is full")
            with pytest.raises(OSError, match="No space"):
                Path(directory, "more").write_bytes(bytes(1 << 20))
            Path(directory, "more").unlink()
        yield
    finally:
        for directory, size in sizes.items():
            run("mount", "-o", f"remount,size={size}", directory)


@pytest.fixture
def small_run(place: Path) -> Iterator[Daemon]:
    """A daemon whose /run is a tmpfs of its own. Nothing of it may be left afterwards."""
    daemon = Daemon(place / "root")
    (daemon.root / "run").mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", daemon.root / "run")
    try:
        daemon.start()
        yield daemon
        daemon.end()
        assert [line for line in leftovers(daemon.root) if not line.startswith("tmpfs ")] == []
    finally:
        run("umount", "-l", daemon.root / "run")


@fault("/run is full; QSD is killed", expected="no error", in_ci=("nbd-ext4-1",))
def test_run_is_full_and_qsd_is_killed(small_run: Daemon, place: Path, case: Case) -> None:
    with under_load(small_run, place, case) as site:
        with full("/run", str(small_run.root / "run")):
            former = small_run.kill_qsd("a")
            eventually(lambda: small_run.replaced("a", former), "replaced", timeout=60)
            site.goes_on()
        site.saw_no_error()
