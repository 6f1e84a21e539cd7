"""A program in the place of qemu-storage-daemon that tries what somebody would who has taken it over; then it is it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.harness import Daemon, with_config

QSD = "/usr/bin/qemu-storage-daemon"
_TRIES = r"""#!/usr/bin/python3 -IS
import ctypes, json, os, socket, stat, sys
words = sys.argv[1:]
if words[0] != "--chardev":
    os.execv({real!r}, [{real!r}, *words])
libc = ctypes.CDLL(None, use_errno=True)
aims = json.load(open({aims!r}))
status = dict(line.rstrip("\n").split(":\t", 1) for line in open("/proc/self/status") if ":\t" in line)
done = []

def attempt(what, call):
    try:
        if call() == -1:
            return
    except OSError:
        return
    done.append(what)

def connects(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(path)

for path in aims["read"]:
    attempt(f"read {{path}}", lambda: open(path, "rb").close())
for path in aims["write"]:
    attempt(f"write {{path}}", lambda: os.close(os.open(path, os.O_WRONLY)))
for path in aims["make"]:
    attempt(f"make {{path}}", lambda: os.close(os.open(path + "/new", os.O_WRONLY | os.O_CREAT)))
for path in aims["connect"]:
    attempt(f"connect {{path}}", lambda: connects(path))
for pid in aims["processes"]:
    attempt(f"signal {{pid}}", lambda: os.kill(pid, 0))
    attempt(f"trace {{pid}}", lambda: libc.ptrace(16, pid, 0, 0))
    attempt(f"environment of {{pid}}", lambda: open(f"/proc/{{pid}}/environ", "rb").read())
attempt("mount", lambda: libc.mount(b"none", b"/mnt", b"tmpfs", 0, None))
attempt("unshare", lambda: libc.unshare(0x20000))
attempt("chroot", lambda: os.chroot("/"))
attempt("become root", lambda: os.setuid(0) if os.getuid() else -1)
attempt("packets", lambda: socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close())
attempt("device", lambda: os.mknod("tmp/node", stat.S_IFBLK | 0o600, os.makedev(7, 0)))
attempt("io_uring", lambda: libc.syscall(425, 1, ctypes.create_string_buffer(120)))
attempt("own directory", lambda: os.close(os.open("tmp/mine", os.O_WRONLY | os.O_CREAT)))
with open("tmp/report", "w") as file:
    json.dump({{"done": done, "status": status}}, file)
os.execv({real!r}, [{real!r}, *words])
"""


class Prisoner:
    """Serves the volumes of a daemon that is started afterwards."""

    def __init__(self, daemon: Daemon, place: Path) -> None:
        self._daemon = daemon
        self._aims = place / "aims.json"
        program = place / "bin" / "prisoner"
        program.parent.mkdir()
        program.write_text(_TRIES.format(real=QSD, aims=str(program.parent / "aims.json")))
        program.chmod(0o755)
        self._aims = program.parent / "aims.json"
        self.aim()
        with_config(daemon, f"[qsd]\nbinary = '{program}'\n")

    def aim(self, **aims: list[Any]) -> None:
        """Say what the next one shall try: paths to read, write, make and connect, processes."""
        every: dict[str, list[Any]] = {"read": [], "write": [], "make": [], "connect": [], "processes": []}
        self._aims.write_text(json.dumps({**every, **aims}))
        self._aims.chmod(0o644)

    def report(self, name: str) -> tuple[set[str], dict[str, str]]:
        """What it could do, and /proc/self/status."""
        found = json.loads(Path(self._daemon.layout.volume_dir(name), "tmp", "report").read_text())
        return set(found["done"]), found["status"]
