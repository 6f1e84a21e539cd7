"""What happens to servers whose loss costs no request, one suite for all of them: requests wait, and are done again.

A file of tests derives a class from ``ServerAccidents``, and has the fixtures ``backed`` and ``disk``.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import pytest

from tests.backends.servers import Load
from tests.harness import Daemon, eventually, reads, writes

PATTERN = bytes(range(256)) * 16


class Server(Protocol):
    """A server that serves a disk, and can be taken away."""

    def start(self) -> None:
        """Start it, again if need be; return when it serves."""

    def kill(self) -> None:
        """End it at once."""

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to all its processes."""


@dataclass(frozen=True)
class Backed:
    """A server and the source of its disk."""

    server: Server
    source: str


class ServerAccidents:
    """The suite."""

    soon: ClassVar[Mapping[str, str]] = {}
    """Options with which a QSD soon gives up to open a source whose server is away."""

    def test_the_server_is_killed_under_load_and_started_again(
        self, backed: Backed, daemon: Daemon, place: Path, disk: Path
    ) -> None:
        load = Load(daemon.device("a", backed.source), place, seconds=4)
        time.sleep(1)
        backed.server.kill()
        time.sleep(2)
        assert load.runs
        backed.server.start()
        load.succeeded()
        daemon.detach("a")
        load.is_in(disk)

    def test_the_server_is_stopped_under_load_and_goes_on(
        self, backed: Backed, daemon: Daemon, place: Path, disk: Path
    ) -> None:
        load = Load(daemon.device("a", backed.source), place, seconds=3)
        time.sleep(1)
        backed.server.signal(signal.SIGSTOP)
        time.sleep(4)
        assert load.runs
        backed.server.signal(signal.SIGCONT)
        load.succeeded()
        daemon.detach("a")
        load.is_in(disk)

    @pytest.mark.parametrize("away", ["killed", "stopped"])
    def test_a_detach_by_force_ends_while_the_server_is_away(
        self, backed: Backed, daemon: Daemon, place: Path, away: str
    ) -> None:
        load = Load(daemon.device("a", backed.source), place, seconds=4)
        time.sleep(1)
        if away == "killed":
            backed.server.kill()
        else:
            backed.server.signal(signal.SIGSTOP)
        time.sleep(1)
        daemon.detach("a", force=True, timeout=30)
        assert daemon.names() == []
        load.kill()

    def test_another_daemon_adopts_it(self, backed: Backed, daemon: Daemon, place: Path, disk: Path) -> None:
        before = daemon.attach("a", backed.source)
        load = Load(before["device"], place, seconds=2)
        daemon.kill()
        daemon.start()
        assert daemon.attach("a", backed.source)["device"] == before["device"]
        assert daemon.show("a")["qsd_pid"] == before["qsd_pid"]
        load.succeeded()
        daemon.detach("a")
        load.is_in(disk)

    def test_qsd_dies_while_the_server_is_away_and_the_volume_comes_back_with_it(
        self, backed: Backed, daemon: Daemon
    ) -> None:
        writes(daemon.device("a", backed.source, options=dict(self.soon)), 0, PATTERN)
        backed.server.kill()
        pid = daemon.kill_qsd("a")
        eventually(lambda: daemon.show("a")["failure"] is not None, "the volume says that it failed")
        backed.server.start()
        eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
        assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
