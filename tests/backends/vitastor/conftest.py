"""What the tests need is in no Debian package: they run where the environment names it, and else say so (README)."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.backends.vitastor.cluster import QSD, Cluster, environment, missing
from tests.harness import Daemon, with_config

# Not a skip: CI takes a skipped test for a missing one, and nobody can install Vitastor in it.
collect_ignore = ["test_vitastor.py"] if missing() else []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say what did not run."""
    if missing():
        terminalreporter.write_line(
            f"tests/backends/vitastor did not run: {missing()} not set; its README says what they are"
        )


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """The cluster of all tests; who kills something in it brings it back."""
    with tempfile.TemporaryDirectory(prefix="sd-", dir="/var/tmp") as name:
        found = Cluster(Path(name))
        try:
            found.start()
            yield found
        finally:
            found.end()


@pytest.fixture
def daemon(stopped: Daemon) -> Daemon:
    """A daemon that takes Vitastor's build of QSD for Vitastor."""
    with_config(stopped, f'[qsd.binaries]\nvitastor = "{environment(QSD)}"\n')
    stopped.start()
    return stopped
