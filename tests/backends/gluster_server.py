"""A cluster of one glusterd with one brick, in a network of its own: bricks refuse addresses of loopback."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path

from tests.harness import eventually, run

VOLUME = "v1"
#: What the programs have compiled in; each is an empty place of its own in the namespace.
_DIRECTORIES = "/var/lib/glusterd /var/log/glusterfs /run/gluster"
_START = (
    f'for place in {_DIRECTORIES}; do mkdir -p $place && mount -t tmpfs tmpfs $place || exit; done; '
    'exec glusterd -N -p /run/gluster/glusterd.pid -f "$0"'
)
#: As Debian's /etc/glusterfs/glusterd.vol, but for the socket, which is in /run by default.
_CONFIG = """volume management
    type mgmt/glusterd
    option working-directory /var/lib/glusterd
    option transport-type socket
    option transport.address-family inet
    option glusterd-sockfile {socket}
end-volume
"""


class GlusterServer:
    """glusterd and the brick of one volume; the namespace ``netns`` and ``address`` in it are there already."""

    def __init__(self, place: Path, netns: str, address: str) -> None:
        self.socket = place / "glusterd.sock"
        self.brick = place / "brick"
        self.disk = self.brick / "data" / "disk 1.raw"
        self.address = address
        self._netns = netns
        self._glusterd: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start glusterd, create the volume and start it."""
        # The brick reaches glusterd there.
        run("ip", "-n", self._netns, "link", "set", "lo", "up")
        (self.brick / "data").mkdir(parents=True)
        self.disk.touch()
        config = self.brick.with_name("glusterd.vol")
        config.write_text(_CONFIG.format(socket=self.socket))
        self._glusterd = subprocess.Popen(
            [
                "ip", "netns", "exec", self._netns, "unshare", "--mount", "--propagation", "private",
                "sh", "-c", _START, str(config),
            ],
            stdin=subprocess.DEVNULL,
        )
        # Before that it may not be in its namespaces yet, and the client would write a log outside of them.
        eventually(self.socket.exists, "glusterd makes its socket")
        eventually(lambda: self._gluster("pool", "list", check=False).returncode == 0, "glusterd answers")
        self._gluster("volume", "create", VOLUME, f"{self.address}:{self.brick}/data", "force")
        self._gluster("volume", "start", VOLUME)

    def _gluster(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        assert self._glusterd is not None
        assert self._glusterd.poll() is None, "glusterd ended"
        return run(
            "nsenter", "-t", self._glusterd.pid, "-m", "-n",
            "gluster", "--mode=script", f"--glusterd-sock={self.socket}", *words, check=check,
        )

    def stop_volume(self) -> None:
        """The volume is there, and nobody serves it."""
        self._gluster("volume", "stop", VOLUME)

    def start_brick(self) -> None:
        """Start the brick again, or the volume."""
        # glusterd may not have noticed yet that the brick has ended.
        eventually(
            lambda: self._gluster("volume", "start", VOLUME, "force", check=False).returncode == 0 and self._bricks(),
            "the brick runs",
        )

    def kill_brick(self) -> None:
        """SIGKILL."""
        self.signal_brick(signal.SIGKILL)
        eventually(lambda: not self._bricks(), "the brick is gone")

    def signal_brick(self, number: signal.Signals) -> None:
        """Send the brick a signal."""
        for pid in self._bricks():
            os.kill(pid, number)

    def _bricks(self) -> list[int]:
        return [pid for pid in self._pids() if Path(f"/proc/{pid}/comm").read_text() == "glusterfsd\n"]

    def _pids(self) -> list[int]:
        return [int(word) for word in run("ip", "netns", "pids", self._netns).stdout.split()]

    def end(self) -> None:
        """End all that runs in the namespace; what it kept goes with it."""
        for pid in self._pids():
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not self._pids(), "Gluster has ended")
        if self._glusterd is not None:
            self._glusterd.wait(20)
        shutil.rmtree(self.brick, ignore_errors=True)
