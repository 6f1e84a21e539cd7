"""nfs-ganesha, an NFS server in user space, and the port mapper (rpcbind) that its clients ask, in a network namespace.

rpcbind has no other port than 111, and a socket below /run. So both see a /run of their own.
"""

from __future__ import annotations

import re
import signal
import subprocess
from pathlib import Path

from tests.harness import eventually, run

_CONFIGURATION = """
NFS_CORE_PARAM {{
    Protocols = 3; Enable_NLM = false; Enable_RQUOTA = false; mount_path_pseudo = false; {more}
}}
EXPORT {{
    Export_Id = 1; Path = "{path}"; Pseudo = "/exp"; Protocols = 3; SecType = sys;
    Access_Type = {access}; Squash = {squash};
    Attr_Expiration_Time = 0;
    FSAL {{ Name = VFS; }}
}}
"""


class NfsServer:
    """A server that exports a directory by NFSv3, under its own path."""

    def __init__(self, place: Path, exported: Path, *, netns: str) -> None:
        self.exported = exported
        self._place, self._netns = place, netns
        self._mapper: subprocess.Popen[bytes] | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, *, access: str = "RW", squash: str = "No_Root_Squash") -> None:
        """Start it, and wait until it is known to the port mapper, which is started before it."""
        if self._mapper is None:
            self._mapper = subprocess.Popen(
                [
                    "ip", "netns", "exec", self._netns, "sh", "-c",
                    "ip link set lo up && mount -t tmpfs tmpfs /run && mkdir /run/rpcbind && exec rpcbind -f",
                ],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            )
            eventually(lambda: self._knows("100000"), "the port mapper answers")
        configuration = self._place / "ganesha.conf"
        # From 6 on it ends where it lacks CAP_SYS_RESOURCE, as in containers, unless it is told.
        release = re.search(r"V(\d+)", run("ganesha.nfsd", "-v").stdout)
        more = "allow_set_io_flusher_fail = true;" if release and int(release[1]) >= 6 else ""
        configuration.write_text(_CONFIGURATION.format(path=self.exported, access=access, squash=squash, more=more))
        self._process = subprocess.Popen(
            [
                *self._inside(), "ganesha.nfsd", "-F", "-f", str(configuration),
                "-L", str(self._place / "ganesha.log"), "-p", str(self._place / "ganesha.pid"),
            ],
            stdin=subprocess.DEVNULL,
        )
        eventually(lambda: self._knows("100003") and self._knows("100005"), "the NFS server is there")

    def signal(self, number: signal.Signals) -> None:
        """Send the NFS server a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL to the NFS server; the port mapper forgets it, as after a restart of the whole host."""
        if self._process is not None:
            self._process.kill()
            self._process.wait(20)
            self._process = None
            for program, version in (("100003", "3"), ("100005", "3"), ("100005", "1")):
                run(*self._inside(), "rpcinfo", "-d", program, version)

    def end(self) -> None:
        """End both."""
        self.kill()
        if self._mapper is not None:
            self._mapper.kill()
            self._mapper.wait(20)
            self._mapper = None

    def _inside(self) -> list[str]:
        assert self._mapper is not None
        return ["nsenter", f"--target={self._mapper.pid}", "--net", "--mount"]

    def _knows(self, program: str) -> bool:
        """Whether that program answers at its TCP port."""
        for process in (self._mapper, self._process):
            assert process is None or process.poll() is None, "the server ended"
        return run(*self._inside(), "rpcinfo", "-T", "tcp", "127.0.0.1", program, "3", check=False).returncode == 0
