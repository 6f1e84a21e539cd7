"""What all tests share: in CI, a skipped test is a missing test; and a real daemon, for tests that run as root."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, eventually, leftovers, processes_of

# They need a machine of their own, and run in it: make test-vm.
collect_ignore = [] if os.environ.get("STORAGED_VM") else ["vm"]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Fail a CI run that skipped anything: CI has all that the tests need."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("CI") and reporter is not None and reporter.stats.get("skipped") and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def place() -> Iterator[Path]:
    """A short directory on a filesystem of the disk."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)  # so that what keeps others out is the daemon, not the directory
        yield Path(os.path.realpath(name))


@pytest.fixture
def root(place: Path) -> Iterator[Daemon]:
    """Where a daemon would have its files, for what needs none. Nothing is left below it afterwards."""
    found = Daemon(place / "root")
    found.root.mkdir()
    yield found
    for directory in (found.layout.run_dir, found.layout.state_dir):
        assert [path for path in Path(directory).rglob("*") if path.parent.name == "images"] == []
    eventually(lambda: processes_of(found) == [], "no process is left")


@pytest.fixture
def stopped(place: Path) -> Iterator[Daemon]:
    """A daemon that the test starts by itself. Nothing of it may be left afterwards."""
    daemon = Daemon(place / "root")
    daemon.root.mkdir()
    yield daemon
    daemon.end()
    assert leftovers(daemon.root) == []


@pytest.fixture(scope="session")
def long_lived() -> Iterator[Daemon]:
    """One daemon for many tests: in the emulated machine a start takes seconds."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name:
        os.chmod(name, 0o755)  # QSDs are no root, and have to get to their directories
        daemon = Daemon(Path(os.path.realpath(name)) / "root")
        daemon.root.mkdir()
        yield daemon
        daemon.end()


@pytest.fixture
def daemon(request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A running daemon with no volumes. Nothing of the test may be left afterwards."""
    if not os.environ.get("STORAGED_VM"):
        stopped: Daemon = request.getfixturevalue("stopped")
        stopped.start()
        yield stopped
        return
    shared: Daemon = request.getfixturevalue("long_lived")
    if shared.process is None or shared.process.poll() is not None:
        shared.start()
    try:
        yield shared
    finally:
        if shared.fault and shared.process is not None:
            shared.kill()  # a test that failed before it did its work: it would end the next ones
        shared.forget_all()
    eventually(lambda: leftovers(shared.root) == [], f"nothing is left; there is {leftovers(shared.root)}")
