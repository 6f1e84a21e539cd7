"""What all tests share: in CI, a skipped test is a missing test; and a real daemon, for tests that run as root."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, leftovers


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
def stopped(place: Path) -> Iterator[Daemon]:
    """A daemon that the test starts by itself. Nothing of it may be left afterwards."""
    daemon = Daemon(place / "root")
    daemon.root.mkdir()
    yield daemon
    daemon.end()
    assert leftovers(daemon.root) == []


@pytest.fixture
def daemon(stopped: Daemon) -> Daemon:
    """A running daemon."""
    stopped.start()
    return stopped
