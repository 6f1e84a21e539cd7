"""tgtd, the iSCSI target of Linux in user space, on a free port of the loopback interface."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Mapping
from pathlib import Path

from tests.harness import eventually

TARGET = "iqn.2026-01.test:t1"
USER = "iqn.1993-08.test:01:bob"
SECRET = "twelve & more: 12"


class IscsiServer:
    """A target with LUNs; LUN 0 is tgtd's controller, which has no data."""

    def __init__(self, place: Path, luns: Mapping[int, Path], *, user: str = "", target: str = TARGET) -> None:
        self.target = target
        self.port = _free_port()
        self._luns, self._user = luns, user
        self._environment = {**os.environ, "TGT_IPC_SOCKET": str(place / "tgtd")}
        self._log = place / "tgtd.log"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def portal(self) -> str:
        """Where it listens."""
        return f"127.0.0.1:{self.port}"

    def source(self, lun: int = 1) -> str:
        """A source without a user."""
        return f"iscsi://{self.portal}/{self.target}/{lun}"

    def start(self) -> None:
        """Start it with all its LUNs. It lets clients in once it has them."""
        with open(self._log, "ab") as log:
            self._process = subprocess.Popen(
                ["tgtd", "-f", "--iscsi", f"portal={self.portal}"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                env=self._environment,
            )
        eventually(lambda: self._tgtadm("show", "sys", check=False), "tgtd answers")
        self._tgtadm("new", "target", "-T", self.target)
        for lun, image in self._luns.items():
            self._tgtadm("new", "logicalunit", "--lun", str(lun), "-b", str(image))
        if self._user:
            self._tgtadm("new", "account", "--user", self._user, "--password", SECRET)
            self._tgtadm("bind", "account", "--user", self._user)
        self._tgtadm("bind", "target", "-I", "ALL")

    def protect(self, lun: int) -> None:
        """Make a LUN read-only."""
        self._tgtadm("update", "logicalunit", "--lun", str(lun), "--params", "readonly=1")

    def let_in_only(self, initiator: str) -> None:
        """Refuse all clients but those of one name."""
        self._tgtadm("unbind", "target", "-I", "ALL")
        self._tgtadm("bind", "target", "-Q", initiator)

    def sessions(self) -> str:
        """What it says of its clients."""
        return self._tgtadm("show", "conn")

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL: what it was doing stays as it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None

    def _tgtadm(self, operation: str, mode: str, *more: str, check: bool = True) -> str:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        whose = [] if mode in ("sys", "account") and operation != "bind" else ["--tid", "1"]
        done = subprocess.run(
            ["tgtadm", "--lld", "iscsi", "--op", operation, "--mode", mode, *whose, *more],
            env=self._environment, capture_output=True, text=True, timeout=30,
        )
        assert not check or done.returncode == 0, f"{operation} {mode}: {done.stderr}"
        return done.stdout if done.returncode == 0 else ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    assert isinstance(port, int)
    return port
