"""A Vitastor cluster: one that the tests start (etcd, the monitor, three OSDs on sparse files), or one that is there.

README says which variables name the programs. Nothing here is of Vitastor; its programs are only started.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from tests.harness import eventually, run

#: For a cluster that the tests start.
BIN, MONITOR, QSD, QEMU_IMG = (f"STORAGED_VITASTOR_{name}" for name in ("BIN", "MONITOR", "QSD", "QEMU_IMG"))
#: ADDRESS:PORT of the etcd of a cluster that is there; then MONITOR is not needed.
ETCD = "STORAGED_VITASTOR_ETCD"
OSDS = (1, 2, 3)
_OSD_SIZE = 1 << 30


def environment(name: str) -> str:
    """Return a variable; empty if it is not set."""
    return os.environ.get(name, "")


def missing() -> str:
    """Say which variables are missing; empty if none is."""
    needed = [BIN, QSD, QEMU_IMG] + ([] if environment(ETCD) else [MONITOR])
    return ", ".join(name for name in needed if not environment(name))


def free_port() -> int:
    """Return a TCP port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Cluster:
    """``own``: the tests started it, and may stop and kill its servers."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.own = not environment(ETCD)
        self.etcd = environment(ETCD) or f"127.0.0.1:{free_port()}"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._images = 0

    def start(self) -> None:
        """Start etcd, the monitor and the OSDs, and wait until the pool can be written to."""
        if not self.own:
            return
        self.start_etcd()
        self._put("config/global", {"immediate_commit": "all"})
        self._put("config/pools", {"1": {
            "name": "tests", "scheme": "replicated", "pg_size": 2, "pg_minsize": 1, "pg_count": 4,
            "failure_domain": "osd",
        }})
        self._spawn(
            "monitor", "node", environment(MONITOR), "--etcd_address", f"http://{self.etcd}",
            "--mon_http_ip", "127.0.0.1", "--mon_http_port", str(free_port()),
        )
        self.repair()

    def start_etcd(self) -> None:
        """Start etcd, or start it again with what it had."""
        peers = f"http://127.0.0.1:{free_port()}"
        self._spawn(
            "etcd", "etcd", "--name", "a", "--data-dir", str(self.place / "etcd"),
            "--listen-client-urls", f"http://{self.etcd}", "--advertise-client-urls", f"http://{self.etcd}",
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", peers, "--initial-cluster", f"a={peers}",
        )
        eventually(lambda: self._etcdctl("endpoint", "health", check=False).returncode == 0, "etcd is up", 30)

    def start_osd(self, number: int) -> None:
        """Start an OSD, or start it again with what it had."""
        disk = self.place / f"osd{number}.bin"
        if not disk.exists():
            disk.touch()
            os.truncate(disk, _OSD_SIZE)
        layout = run(
            self._program("vitastor-disk"), "simple-offsets", "--format", "options", str(disk)
        ).stdout.split()
        command = (
            self._program("vitastor-osd"), "--osd_num", str(number), "--bind_address", "127.0.0.1",
            "--etcd_address", self.etcd, "--immediate_commit", "all", "--disable_data_fsync", "1",
            "--journal_no_same_sector_overwrites", "true", "--journal_sector_buffer_count", "1024", *layout,
        )
        log = self.place / f"osd{number}.log"
        begin = log.stat().st_size if log.exists() else 0

        def up() -> bool:
            """One that was killed is still up to etcd until its lease ends; till then it ends by itself."""
            server = self._running.get(f"osd{number}")
            if server is None or server.poll() is not None:
                self._spawn(f"osd{number}", *command)
                time.sleep(0.5)
            return "Successfully subscribed" in log.read_text()[begin:]

        eventually(up, f"OSD {number} is up", 90)

    def signal(self, number: signal.Signals, *names: str) -> None:
        """Send a signal to servers: ``etcd``, ``osd1``, …"""
        for name in names:
            self._running[name].send_signal(number)

    def kill(self, *names: str) -> None:
        """SIGKILL, and wait until they are gone."""
        for name in names:
            server = self._running.pop(name)
            server.kill()
            server.wait(20)

    def repair(self) -> None:
        """Start what does not run. OSDs that cannot reach etcd for some seconds end themselves."""
        if "etcd" not in self._running:
            self.start_etcd()
        for number in OSDS:
            server = self._running.get(f"osd{number}")
            if server is None or server.poll() is not None:
                self.start_osd(number)
        eventually(self._active, "the pool is active", 60)

    def end(self) -> None:
        """End all that was started."""
        self.kill(*list(self._running))

    def image(self, size: str = "64M") -> str:
        """Make an image; return its name."""
        self._images += 1
        name = f"storaged-test-{os.getpid()}-{self._images}"
        self.cli("create", "-s", size, name)
        return name

    def cli(self, *arguments: str) -> str:
        """Run vitastor-cli."""
        return run(self._program("vitastor-cli"), "--etcd_address", self.etcd, *arguments).stdout

    def number_of(self, image: str) -> tuple[int, int]:
        """Return the pool and the inode of an image."""
        (found,) = json.loads(self.cli("--json", "ls", "--exact", image))
        return int(found["pool_id"]), int(found["inode_num"])

    def source(self, image: str, more: str = "") -> str:
        """Return the image as storaged and qemu-img take it."""
        return f"vitastor:image={image}:etcd_host={self.etcd}{more}".replace(self.etcd, self.etcd.replace(":", r"\:"))

    def content(self, image: str, place: Path) -> bytes:
        """Return what is in the image, as Vitastor's own qemu-img reads it."""
        copy = place / "copy.raw"
        run(environment(QEMU_IMG), "convert", "-O", "raw", self.source(image), copy)
        return copy.read_bytes()

    def _active(self) -> bool:
        found = self._etcdctl("get", "--prefix", "--print-value-only", "/vitastor/pg/state/1/").stdout.splitlines()
        states = [json.loads(line)["state"] for line in found if line]
        return len(states) == 4 and all(state == ["active"] for state in states)

    def _put(self, key: str, value: object) -> None:
        self._etcdctl("put", f"/vitastor/{key}", json.dumps(value))

    def _etcdctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        return run("env", "ETCDCTL_API=3", "etcdctl", f"--endpoints=http://{self.etcd}", *words, check=check)

    @staticmethod
    def _program(name: str) -> str:
        return os.path.join(environment(BIN), name)

    def _spawn(self, name: str, *command: str) -> None:
        with open(self.place / f"{name}.log", "ab") as log:
            self._running[name] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=self.place
            )
