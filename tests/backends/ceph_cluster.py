"""A real Ceph cluster on loopback: one monitor and one OSD, which keeps its data in a file and outlives a SIGKILL.

There is no manager: rbd does not need one. It is up in some seconds because the monitor agrees with itself at once
(paxos_propose_interval), and because the pool is made when the OSD is up: before that, nobody tells the OSD of its
placement groups until the monitor's next tick.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import uuid
from pathlib import Path
from typing import Any

from tests.harness import eventually, run

POOL = "rbd"
NAMESPACE = "team 1"
#: A user that may do what QEMU needs, and one that may only read.
USER, READER = "bob", "reader"
_USERS = {
    "mon.": ("--cap", "mon", "allow *"),
    "client.admin": ("--cap", "mon", "allow *", "--cap", "osd", "allow *"),
    f"client.{USER}": ("--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd"),
    f"client.{READER}": ("--cap", "mon", "profile rbd", "--cap", "osd", "profile rbd-read-only"),
    "osd.0": ("--cap", "mon", "profile osd", "--cap", "osd", "allow *"),
}


class CephCluster:
    """A cluster in a directory of its own, with the pool ``rbd`` and a namespace in it."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.conf = place / "ceph.conf"
        self._keyring = place / "keyring"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.monitor = f"127.0.0.1:{free.getsockname()[1]}"
        self._monitor: subprocess.Popen[bytes] | None = None
        self._osd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Make it and wait until it can be used."""
        self._write_configuration()
        run("ceph-authtool", "--create-keyring", self._keyring)
        for user, capabilities in _USERS.items():
            run("ceph-authtool", self._keyring, "--name", user, "--gen-key", *capabilities)
        for directory in ("mon", "osd"):
            (self.place / directory).mkdir()
        monmap = self.place / "monmap"
        run("monmaptool", "--create", "--addv", "a", f"[v2:{self.monitor}]", monmap)
        self._run("ceph-mon", "--mkfs", "-i", "a", "--monmap", monmap, "--keyring", self._keyring)
        self._monitor = self._spawn("ceph-mon", "-i", "a")
        identifier = str(uuid.uuid4())
        self._ceph(f"osd new {identifier}")
        self._run("ceph-osd", "--mkfs", "-i", "0", "--osd-uuid", identifier)
        self.start_osd()
        log = self.place / "osd.0.log"
        eventually(lambda: "booting -> active" in log.read_text(), "the OSD is up", 60)
        self._ceph(f"osd pool create {POOL} 8", f"osd pool application enable {POOL} rbd")
        self.rbd("namespace", "create", "--pool", POOL, "--namespace", NAMESPACE)

    def _write_configuration(self) -> None:
        settings = {
            "mon_host": f"[v2:{self.monitor}]", "public_addr": "127.0.0.1", "keyring": self._keyring,
            "mon_data": self.place / "mon", "osd_data": self.place / "osd", "run_dir": self.place,
            "log_file": self.place / "$name.log", "mon_cluster_log_file": self.place / "cluster.log",
            "pid_file": "", "admin_socket": "",
            **{f"auth_{of}_required": "cephx" for of in ("cluster", "service", "client")},
            "osd_pool_default_size": 1, "osd_pool_default_min_size": 1, "osd_crush_chooseleaf_type": 0,
            "osd_pool_default_pg_autoscale_mode": "off", "mon_allow_pool_size_one": "true",
            "paxos_propose_interval": 0.05, "paxos_min_wait": 0.01, "mon_tick_interval": 1,
            "osd_objectstore": "bluestore", "bluestore_block_size": 2 << 30,
            # 30 seconds is the default: after them a client that died no longer has its exclusive lock.
            "osd_client_watch_timeout": 5,
            # A killed OSD that comes back must not have been declared dead: nobody else has its data.
            "mon_osd_report_timeout": 900,
        }
        lines = [f"{key} = {value}" for key, value in settings.items()]
        # What the clients have tells setting().
        client = ["[client]", f"admin_socket = {self.place}/$pid.asok", f"log_file = {self.place}/client.log"]
        self.conf.write_text("\n".join(["[global]", *lines, *client, ""]))

    @property
    def _environment(self) -> dict[str, str]:
        return {key: value for key, value in os.environ.items() if not key.startswith("CEPH_")}

    def _run(self, *command: object) -> str:
        words = [str(word) for word in (command[0], "--conf", self.conf, *command[1:])]
        done = subprocess.run(words, capture_output=True, text=True, timeout=100, env=self._environment)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with open(self.place / f"{program}.out", "ab") as out:
            return subprocess.Popen(
                [program, "--conf", str(self.conf), "-f", *arguments], stdin=subprocess.DEVNULL, stdout=out,
                # Debian 13's looks for the classes of objects, such as rbd's, in a directory below this one.
                stderr=out, env=self._environment, cwd="/",
            )

    def _ceph(self, *commands: str) -> None:
        # One process for several: it takes half a second to start.
        for command in commands:
            self._run("ceph", "--connect-timeout", "30", *command.split())

    def rbd(self, *arguments: object) -> str:
        """The program rbd; return what it prints."""
        return self._run("rbd", *arguments)

    def image(self, name: str, *options: object, size: str = "64M") -> str:
        """Create an image, and return its name in the pool."""
        self.rbd("create", "--pool", POOL, "--image", name, "--size", size, *options)
        return name

    def exported(self, image: str, to: Path) -> Path:
        """What the cluster has in an image (POOL/…), as a file."""
        to.unlink(missing_ok=True)
        self.rbd("export", "--no-progress", image, to)
        return to

    def key(self, user: str) -> str:
        """The cephx key of a user, in base64."""
        return run("ceph-authtool", self._keyring, "--name", f"client.{user}", "--print-key").stdout.strip()

    def setting(self, pid: int, name: str) -> str:
        """What an option of Ceph is in a client."""
        answer: dict[str, Any] = json.loads(
            run("ceph", "--admin-daemon", self.place / f"{pid}.asok", "config", "get", name).stdout
        )
        return str(answer[name])

    def start_osd(self) -> None:
        """Start the OSD, for the first time or again."""
        self._osd = self._spawn("ceph-osd", "-i", "0")

    def kill_osd(self) -> None:
        """SIGKILL: what it was doing stays as it is."""
        assert self._osd is not None
        self._osd.kill()
        self._osd.wait(20)

    def signal_osd(self, number: signal.Signals) -> None:
        """Send the OSD a signal."""
        assert self._osd is not None
        _signal(self._osd, number)

    def signal_monitor(self, number: signal.Signals) -> None:
        """Send the monitor a signal."""
        assert self._monitor is not None
        _signal(self._monitor, number)

    def stop(self) -> None:
        """End it; its directory stays."""
        for process in (self._osd, self._monitor):
            if process is not None:
                process.kill()
                process.wait(20)


def _signal(server: subprocess.Popen[bytes], number: signal.Signals) -> None:
    server.send_signal(number)
    if number == signal.SIGSTOP:
        # Its threads go on until one of them was given a processor and has taken the signal.
        os.waitid(os.P_PID, server.pid, os.WSTOPPED | os.WNOWAIT)
