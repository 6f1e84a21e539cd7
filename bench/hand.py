"""Disks by hand whose qemu-storage-daemon is killed and followed by another: the other side of bench/recovery.py.

As with storaged, a VDUSE or NBD device stays where it is meanwhile; with FUSE there is another loop device. The kernel
is told of NBD connections by storaged's own functions, because no program for the shell can give a device that waits
another one.
"""

from __future__ import annotations

import json
import os
import select
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from byhand import vduse_device
from common import QSD, end, run

from storaged.host import nbd
from storaged.host.nbdhandshake import negotiate
from storaged.host.process import reap, thread_states
from storaged.model.blockdev import failing_node
from storaged.qsd.version import loop_direct_io_is_safe, parse_version

PLACE = Path("/run/hand")
SIZE = 64 << 20
_TIMEOUTS = nbd.Timeouts(0, 3600)


class Hand:
    """One disk: its device, and the process that serves it."""

    def __init__(self, transport: str, image: str, number: int = 0) -> None:
        self.transport = transport
        self.image = image
        self.name = f"hand{number}"
        self.place = PLACE / self.name
        self.place.mkdir(parents=True, exist_ok=True)
        self.device = ""
        self.pid = 0

    # The commands ------------------------------------------------------------------------------------------------

    def command(self, *, failing: bool = False) -> list[str]:
        """The words that start QSD; ``failing``: it opens nothing, and fails all I/O."""
        node: dict[str, Any] = {
            "driver": "raw", "node-name": "disk", "discard": "unmap",
            "file": {"driver": "file", "filename": self.image, "aio": "threads", "discard": "unmap"},
        }
        if failing:
            node = failing_node(SIZE)
        export = {
            "vduse": f"type=vduse-blk,id=e,node-name=disk,name={self.name},writable=on,num-queues=1,queue-size=256,"
            "iothread=io",
            "nbd": f"type=nbd,id=e,node-name=disk,name={self.name},writable=on,iothread=io",
            "fuse": f"type=fuse,id=e,node-name=disk,mountpoint={self.place}/export,writable=on,allow-other=off",
        }[self.transport]
        server = ["--nbd-server", f"addr.type=unix,addr.path={self.place}/nbd.sock"] if self.transport == "nbd" else []
        thread = [] if self.transport == "fuse" else ["--object", "iothread,id=io"]
        return [
            QSD, "--pidfile", str(self.place / "pid"), *thread, "--blockdev", json.dumps(node), *server,
            "--export", export,
        ]

    def line(self) -> str:
        """What somebody types to have a successor, or for FUSE the whole of it; another line begins after it."""
        start = f"TMPDIR={self.place} {shlex.join([*self.command(), '--daemonize'])}"
        if self.transport != "fuse":
            return start
        return f"umount -l {self.place}/export; losetup -d {self.device}; {start} && {self.losetup()}"

    def losetup(self) -> str:
        """What sets up the loop device."""
        version = parse_version(run(QSD, "--version"))
        direct = "--direct-io=on" if version and loop_direct_io_is_safe(version) else ""
        return f"losetup --find --show --partscan {direct} {self.place}/export >{self.place}/device"

    # What is done with it ----------------------------------------------------------------------------------------

    def attach(self) -> str:
        """Start QSD and make the device."""
        if self.transport == "fuse":
            (self.place / "export").touch()
            run("/bin/sh", "-c", f"{shlex.join([*self.command(), '--daemonize'])} && {self.losetup()}")
            self.adopt()
            return self.device
        self.start()
        if self.transport == "vduse":
            run("vdpa", "dev", "add", "name", self.name, "mgmtdev", "vduse")
            self.device = vduse_device(self.name)
        else:
            with self._connected() as sock:
                told = negotiate(sock, self.name)
                self.device = nbd.connect(self.name, [sock], told, block_size=512, timeouts=_TIMEOUTS).path
            self._look_often()
        return self.device

    def start(self, *, failing: bool = False) -> float:
        """Start QSD alone, and return the milliseconds from its start until query-block-exports names the export.

        Nobody polls: its first client is there before it, and it answers as soon as its command line is done.
        """
        path = self.place / "qmp"
        path.unlink(missing_ok=True)
        with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as monitor:
            listener.bind(str(path))
            listener.listen()
            monitor.connect(str(path))
            listener.set_inheritable(True)
            words = [
                *self.command(failing=failing), "--chardev", f"socket,id=q,fd={listener.fileno()},server=on,wait=on",
                "--monitor", "chardev=q",
            ]
            log = (os.POSIX_SPAWN_OPEN, 1, str(self.place / "log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
            environment = {**os.environ, "TMPDIR": str(self.place)}
            begin = time.monotonic()
            self.pid = os.posix_spawnp(
                words[0], words, environment, file_actions=[log, (os.POSIX_SPAWN_DUP2, 1, 2)]
            )
            monitor.settimeout(60)
            with monitor.makefile("rwb") as qmp:
                qmp.readline()
                for question in ("qmp_capabilities", "query-block-exports"):
                    qmp.write(json.dumps({"execute": question}).encode() + b"\n")
                    qmp.flush()
                    while "return" not in (answer := json.loads(qmp.readline())):
                        if "error" in answer:
                            raise SystemExit(f"QSD by hand: {answer}")
            passed = (time.monotonic() - begin) * 1000
            if not answer["return"]:
                raise SystemExit("QSD by hand has no export")
        return passed

    def reconnect(self) -> None:
        """Give an NBD device that waits a connection to the present QSD. The others need nothing."""
        if self.transport == "nbd":
            with self._connected() as sock:
                negotiate(sock, self.name)
                nbd.reconnect(self.device, self.name, [sock], _TIMEOUTS)
            self._look_often()

    def adopt(self) -> None:
        """Take over what a line for the shell has started."""
        self.pid = int((self.place / "pid").read_text())
        if self.transport == "fuse":
            self.device = (self.place / "device").read_text().strip()

    def kill(self) -> None:
        """SIGKILL, and see it gone."""
        kill([self.pid])

    def detach(self) -> None:
        """The device away, QSD away."""
        if self.transport == "vduse":
            run("vdpa", "dev", "del", self.name)
        elif self.transport == "nbd":
            run("nbd-client", "-d", self.device)
        else:
            run("losetup", "--detach", self.device)
        end(self.pid)
        collect(self.pid)

    def _look_often(self) -> None:
        # A reconnection has set it back to 30 seconds (nbd_set_cmd_timeout in drivers/block/nbd.c).
        Path(f"/sys/block/{os.path.basename(self.device)}/queue/io_timeout").write_text("500")

    def _connected(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.place / "nbd.sock"))
        return sock


def kill(pids: Sequence[int], *, wait: bool = True) -> None:
    """SIGKILL to all of them, and see them gone."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    for pid in pids:
        os.kill(pid, 9)
    for pidfd in pidfds:
        if wait:
            select.select([pidfd], [], [])
            reap(pidfd)
        os.close(pidfd)


def stop(pids: Sequence[int]) -> None:
    """SIGSTOP, and see that none of their threads does anything any more: the signal takes a while to reach all."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    for pid in pids:
        while set(thread_states(pid)) != {"T"}:
            time.sleep(0.001)


def collect(pid: int) -> None:
    """Of a child that has ended; others are init's."""
    try:
        os.waitpid(pid, os.WNOHANG)
    except ChildProcessError:
        return


def successors_by_shell(hands: Sequence[Hand], *, parallel: bool) -> float:
    """Start a successor for each by lines for the shell, with the kernel's NBD connections, and return the seconds."""
    script = "".join(f"( {hand.line()} ) {'&' if parallel else ''}\n" for hand in hands) + "wait\n"
    path = PLACE / "script"
    path.write_text(script)
    begin = time.monotonic()
    subprocess.run(["/bin/sh", str(path)], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for hand in hands:
        hand.reconnect()
    passed = time.monotonic() - begin
    for hand in hands:
        hand.adopt()
    return passed
