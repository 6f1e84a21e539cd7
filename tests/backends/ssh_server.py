"""An sshd of the tests' own: its keys, its configuration, its port; it is killed and stopped with all its sessions."""

from __future__ import annotations

import base64
import hashlib
import os
import signal
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from tests.harness import eventually, run

_CONFIG = """\
Port {port}
ListenAddress 127.0.0.1
HostKey {place}/host-key
AuthorizedKeysFile {place}/authorized-keys
PidFile none
PermitRootLogin yes
StrictModes no
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
Subsystem sftp internal-sftp
"""


class SshServer:
    """Serves files of this host to root, who has the key ``key``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        place.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = int(free.getsockname()[1])
        self.key = self.new_key("user-key")
        (place / "authorized-keys").write_bytes(Path(f"{self.key}.pub").read_bytes())
        self.new_key("host-key")
        (place / "config").write_text(_CONFIG.format(port=self.port, place=place))
        # Its privilege separation wants this empty directory, which Debian's unit makes.
        os.makedirs("/run/sshd", mode=0o755, exist_ok=True)
        self._process: subprocess.Popen[bytes] | None = None

    def new_key(self, name: str, passphrase: str = "", kind: str = "ed25519") -> Path:
        """Make a key, in the place of one of that name."""
        path = self.place / name
        for old in (path, Path(f"{path}.pub")):
            old.unlink(missing_ok=True)
        run("ssh-keygen", "-q", "-t", kind, "-N", passphrase, "-C", name, "-f", path)
        return path

    def public(self, name: str) -> str:
        """Type and key, as they stand in known_hosts."""
        return " ".join((self.place / f"{name}.pub").read_text().split()[:2])

    @property
    def fingerprint(self) -> str:
        """What -o host-key takes."""
        digest = hashlib.sha256(base64.b64decode(self.public("host-key").split()[1])).digest()
        return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")

    @property
    def options(self) -> dict[str, str]:
        """Of an attachment."""
        return {"host-key": self.fingerprint, "ssh-key": str(self.key)}

    def url(self, path: object) -> str:
        """The source of a file."""
        return f"ssh://127.0.0.1:{self.port}{path}"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        with open(self.place / "log", "ab") as log:
            self._process = subprocess.Popen(
                # Its sessions die with it: it is the first process of a PID namespace of their own.
                ["unshare", "--pid", "--fork", "--kill-child", "/usr/sbin/sshd", "-D", "-e", "-f",
                 str(self.place / "config")],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        eventually(self._accepts, "sshd accepts connections")

    def _accepts(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.place / "log").read_text()
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to it and all its sessions."""
        assert self._process is not None
        for pid in _descendants(self._process.pid):
            os.kill(pid, number)

    def end_sessions(self) -> None:
        """SIGKILL to all its sessions; the server itself stays."""
        assert self._process is not None
        for pid in _descendants(self._process.pid)[1:]:
            with suppress(ProcessLookupError):  # the end of one may be the end of another
                os.kill(pid, signal.SIGKILL)

    def kill(self) -> None:
        """SIGKILL: what it was doing stays as it is."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            eventually(lambda: not self._listens(), "sshd is gone")
            self._process = None

    def _listens(self) -> bool:
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def sftp(self, *commands: str) -> str:
        """Do commands of OpenSSH's own client."""
        known = self.place / "known-hosts"
        known.write_text(f"[127.0.0.1]:{self.port} {self.public('host-key')}\n")
        return run(
            "sftp", "-q", "-b", "-", "-P", self.port, "-i", self.key, "-o", f"UserKnownHostsFile={known}",
            "-o", "IdentitiesOnly=yes", "root@127.0.0.1", stdin="\n".join(commands) + "\n",
        ).stdout


def _descendants(pid: int) -> list[int]:
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found += [int(child), *_descendants(int(child))]
    return found
