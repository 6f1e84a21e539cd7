"""Real servers, which the tests start, kill, stop and cut off."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.harness import eventually, run

EXPORT = "disk 1/ä"


class NbdServer:
    """A qemu-nbd (or another program) that serves an export on a unix socket or a TCP port."""

    def __init__(self, image: Path, *, socket_path: Path | None = None, at: tuple[str, int] | None = None,
                 netns: str = "", export: str = EXPORT, options: tuple[str, ...] = ()) -> None:
        self.image = image
        self.export = export
        self.options = options
        self._socket, self.at, self._netns = socket_path, at, netns
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *options: str) -> None:
        """Start it, and wait until it accepts connections."""
        where = ["-k", str(self._socket)] if self.at is None else ["-b", self.at[0], "-p", str(self.at[1])]
        self.run(
            "qemu-nbd", "-t", "-e", "0", "-f", "raw", "-x", self.export, *where, *self.options, *options,
            str(self.image),
        )

    def run(self, *command: str) -> None:
        """Start any server there, and wait until it accepts connections."""
        inside = ["ip", "netns", "exec", self._netns] if self._netns else []
        if self._socket is not None:
            self._socket.unlink(missing_ok=True)
        self._process = subprocess.Popen([*inside, *command], stdin=subprocess.DEVNULL)
        eventually(self._accepts, "the NBD server accepts connections")

    def _accepts(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, "the NBD server ended"
        family = socket.AF_UNIX if self.at is None else socket.AF_INET
        with socket.socket(family, socket.SOCK_STREAM) as client:
            try:
                client.connect(str(self._socket) if self.at is None else self.at)
            except OSError:
                return False
        return True

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


@contextmanager
def network(name: str, addresses: str = "198.51.100") -> Iterator[tuple[str, str]]:
    """A network namespace behind a cable; yields the server's address in it, and this host's end of the cable.

    ``addresses``: the first three bytes of both ends' addresses.
    """
    near, far = f"{name}-0", f"{name}-1"
    run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", near, "type", "veth", "peer", "name", far, "netns", name)
        run("ip", "address", "add", f"{addresses}.1/30", "dev", near)
        run("ip", "link", "set", near, "up")
        run("ip", "-n", name, "address", "add", f"{addresses}.2/30", "dev", far)
        run("ip", "-n", name, "link", "set", far, "up")
        yield f"{addresses}.2", near
    finally:
        run("ip", "netns", "del", name)
        # With its peer's namespace it goes, a moment later.
        run("ip", "link", "del", near, check=False)
        eventually(lambda: not os.path.exists(f"/sys/class/net/{near}"), "the cable is gone")


class Load:
    """fio in the background: writes all of a part of a device in a random order, and then verifies it."""

    def __init__(self, device: str, place: Path, *, seconds: int, mib: int = 8) -> None:
        self._words = (
            "--name=x", "--bs=4k", f"--size={mib}M", "--verify=crc32c", "--randseed=7", "--verify_state_save=0",
        )
        self._place = place
        self._process = subprocess.Popen(
            [
                "fio", *self._words, f"--filename={device}", "--rw=randwrite", "--direct=1", "--ioengine=libaio",
                "--iodepth=8", "--fsync=64", f"--rate_iops={mib * 256 // seconds}", "--verify_fatal=1",
                "--output", str(place / "fio.log"),
            ],
            cwd=place, stdin=subprocess.DEVNULL,
        )

    @property
    def runs(self) -> bool:
        """Whether it is still at it."""
        return self._process.poll() is None

    def succeeded(self, timeout: float = 80) -> None:
        """Wait for its end: no request failed, all data is right."""
        assert self._process.wait(timeout) == 0, (self._place / "fio.log").read_text()

    def kill(self) -> None:
        """Do not wait for it; a thread of it that hangs in the kernel stays until the device goes."""
        self._process.kill()

    def is_in(self, image: Path) -> None:
        """All that was written is in the image itself."""
        run("fio", *self._words, f"--filename={image}", "--rw=randwrite", "--verify_only", "--verify_fatal=1")
