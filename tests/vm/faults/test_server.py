"""The server behind a volume dies, hangs, or cannot be reached; and comes back."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.harness import Daemon, eventually, image, run
from tests.vm.faults.cases import Case, fault
from tests.vm.faults.load import nothing_is_stuck, under_load
from tests.vm.faults.test_rescue import works_again

_NAMESPACE = "storage"
_OURS, _THEIRS = "10.99.0.1", "10.99.0.2"
_PORT = 10809
#: How long the server is away (seconds).
_AWAY = 4


class Server:
    """A qemu-nbd in a network namespace: it has an address of its own, and a cable that can be pulled."""

    def __init__(self, disk: Path) -> None:
        self.disk = disk
        self.source = f"nbd://{_THEIRS}:{_PORT}/disk"
        self.process: subprocess.Popen[bytes] | None = None
        run("ip", "netns", "add", _NAMESPACE)
        run("ip", "link", "add", "storaged0", "type", "veth", "peer", "name", "eth0", "netns", _NAMESPACE)
        run("ip", "address", "add", f"{_OURS}/24", "dev", "storaged0")
        run("ip", "link", "set", "storaged0", "up")
        run("ip", "-n", _NAMESPACE, "address", "add", f"{_THEIRS}/24", "dev", "eth0")
        self.plug()

    def start(self) -> None:
        """Serve the disk, and wait until it can be reached."""
        self.process = subprocess.Popen([
            "ip", "netns", "exec", _NAMESPACE, "qemu-nbd", "--persistent", "--shared=0", "--format=raw",
            "--export-name=disk", f"--bind={_THEIRS}", f"--port={_PORT}", self.disk,
        ])

        def answers() -> bool:
            with suppress(OSError), socket.create_connection((_THEIRS, _PORT), timeout=1):
                return True
            return False

        eventually(answers, "the server answers")

    def signal(self, number: int) -> None:
        """Send a signal to it (``ip netns exec`` has become it)."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait(20)

    def unplug(self) -> None:
        """Pull the cable: what is sent is lost, and nobody is told."""
        run("ip", "-n", _NAMESPACE, "link", "set", "eth0", "down")

    def plug(self) -> None:
        """Put it back."""
        run("ip", "-n", _NAMESPACE, "link", "set", "eth0", "up")

    def reset(self) -> None:
        """Have both ends of all connections to it end with RST, as a firewall does."""
        run("ip", "netns", "exec", _NAMESPACE, "ss", "--kill", "--tcp", f"sport = :{_PORT}")

    def end(self) -> None:
        """Take everything away."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(20)
        run("ip", "link", "del", "storaged0", check=False)
        run("ip", "netns", "del", _NAMESPACE)
        eventually(lambda: not Path("/sys/class/net/storaged0").exists(), "the cable is gone")


@pytest.fixture
def server(place: Path) -> Iterator[Server]:
    """A server with a disk of 64 MiB."""
    server = Server(image(place / "disk.img", "raw", "64M"))
    try:
        server.start()
        yield server
    finally:
        server.end()


def _goes_on_after(server: Server, daemon: Daemon, place: Path, case: Case, away: str) -> None:
    with under_load(daemon, place, case, server.source) as site:
        if away == "killed":
            server.signal(signal.SIGKILL)
        elif away == "stopped":
            server.signal(signal.SIGSTOP)
        elif away == "unplugged":
            server.unplug()
        else:
            server.reset()
        if away != "reset":
            eventually(lambda: site.load.status()["in_flight"] >= case.depth, "all requests wait", timeout=30)
            time.sleep(_AWAY)
            assert site.load.status()["errors"] == {}
        if away == "killed":
            server.start()
        elif away == "stopped":
            server.signal(signal.SIGCONT)
        elif away == "unplugged":
            server.plug()
        site.goes_on(timeout=90)
        site.saw_no_error()
        if case.use == "raw":
            wrong = site.load.wrong(server.disk, "acked")
            assert wrong == [], wrong[:20]


@fault("the server of an NBD source is killed, and back", expected="no error", in_ci=("vduse-raw-32",))
def test_the_server_is_killed(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    _goes_on_after(server, daemon, place, case, "killed")


@fault("the server is stopped, and goes on", expected="no error", in_ci=("nbd-raw-32",))
def test_the_server_is_stopped(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    _goes_on_after(server, daemon, place, case, "stopped")


@fault("the network drops everything, and is back", expected="no error", in_ci=("vduse-ext4-32",))
def test_the_cable_is_pulled(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    _goes_on_after(server, daemon, place, case, "unplugged")


@fault("the connection to the server is reset", expected="no error", in_ci=("nbd-ext4-32",))
def test_the_connection_is_reset(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    _goes_on_after(server, daemon, place, case, "reset")


@fault(
    "the server is stopped; `on-stall=fail-after:12`, `resume`", expected="I/O errors, then the same device works",
    in_ci=("vduse-raw-32", "nbd-ext4-1"),
)
def test_the_policy_ends_what_waits_for_the_server(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case, server.source, options={"on-stall": "fail-after:12"}) as site:
        begin = time.monotonic()
        server.signal(signal.SIGSTOP)
        eventually(lambda: daemon.show("a")["condition"] is not None, "it says why it stalls", timeout=60)
        condition = daemon.show("a")["condition"]
        assert condition["trouble"] in ("backend-silent", "network-away"), condition
        assert condition["acts_at"] is not None
        eventually(lambda: daemon.show("a")["state"] == "rescued", "rescued", timeout=60)
        case.notes["rescued_after"] = round(time.monotonic() - begin, 1)
        eventually(lambda: site.load.status()["errors"] != {}, "they have ended with errors")
        nothing_is_stuck()
        server.signal(signal.SIGCONT)
        works_again(site)


@fault(
    "the server is stopped, QSD is killed, and it goes on", expected="no error", uses=("raw-32", "ext4-1"),
    in_ci=("nbd-raw-32",),
)
def test_qsd_is_killed_while_the_server_is_stopped(server: Server, daemon: Daemon, place: Path, case: Case) -> None:
    with under_load(daemon, place, case, server.source) as site:
        server.signal(signal.SIGSTOP)
        eventually(lambda: site.load.status()["in_flight"] >= case.depth, "all requests wait", timeout=30)
        former = daemon.qsd("a")
        os.kill(former, signal.SIGKILL)
        time.sleep(_AWAY)
        server.signal(signal.SIGCONT)
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=90)
        site.goes_on(timeout=90)
        site.saw_no_error()
