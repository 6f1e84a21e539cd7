"""One running machine: its directory, its QEMU, and commands in it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tests.vm.machine import checkout, session
from tests.vm.machine.agent import PORT
from tests.vm.machine.checkout import ROOT
from tests.vm.machine.session import MachineError, MachineGone

CACHE = ROOT / ".cache" / "vm"
MACHINES = sorted(path.name.removesuffix(".d") for path in (ROOT / "tests/vm/guest").glob("*.d"))
BOOT_TIMEOUT = 240.0
SPARE_SIZE = 4 << 30
BOOT_ID = "/proc/sys/kernel/random/boot_id"

# -cx16: QEMU 7.2 emulates it in a way that makes the kernel fault. The others are slow when emulated, and who finds
# them uses them: together they take half of the machine's speed.
PROCESSOR = "max,-cx16,-la57,-avx,-avx2,-xsave,-erms,-fsrm"
KERNEL_ARGUMENTS = (
    "root=/dev/vda rw console=ttyS0 loglevel=5 mitigations=off net.ifnames=0 "
    # What is wrong with the kernel has to end the machine, and to say so on the console.
    "panic=-1 oops=panic "
    # The host may let the machine stand still for a while: that is no lockup, and no timer that does not work (which
    # the kernel panics of as it boots).
    "nowatchdog rcupdate.rcu_cpu_stall_suppress=1 no_timer_check "
    "systemd.show_status=false TERM=dumb audit=0 lsm=landlock,capability 8250.nr_uarts=1"
)


def build(name: str, *options: str) -> Path:
    """Make the disk of a machine, or find it; return its directory."""
    done = subprocess.run([ROOT / "scripts/vm-root", *options, name], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise MachineError(f"the root of the machine {name} could not be made")
    return Path(done.stdout.strip())


class Machine:
    """A machine that was started, by us or somebody else. What it has is in a directory of its own."""

    def __init__(self, name: str, directory: Path, *, steady: bool = False) -> None:
        """``steady``: its clock counts instructions, so that the load of this machine does not show in it."""
        self.name = name
        self.steady = steady
        self.directory = directory
        self.process: subprocess.Popen[bytes] | None = None
        self.console = directory / "console.log"

    # --- start and end ----------------------------------------------------------------------------

    def start(self, *, stays: bool, memory: str = "3G", processors: int = 2) -> bool:
        """Start it, in a directory that is ours; return whether it was us. ``stays``: it outlives us."""
        self.directory.mkdir(parents=True, exist_ok=True)
        lock = os.open(self.directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            # QEMU inherits the lock: it is held as long as the machine lives, whoever started it.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            return False
        root, root_lock = self._root()
        try:
            for path in self.directory.iterdir():
                if path.name != "lock":
                    path.unlink()
            (self.directory / "root").write_text(str(root))
            self._launch(root, (lock, root_lock), stays, memory, processors)
        finally:
            os.close(lock)
            os.close(root_lock)
        with self._qmp() as qmp:
            answer = qmp.execute("human-monitor-command", {"command-line": "info usernet"})
        found = re.search(rf"HOST_FORWARD\]\s+\d+\s+127\.0\.0\.1\s+(\d+)\s+\S+\s+{PORT}\b", str(answer))
        if found is None:
            raise MachineError(f"QEMU does not tell the port that leads into the machine: {answer!r}")
        temporary = self.directory / "port.new"
        temporary.write_text(found[1])
        temporary.rename(self.directory / "port")
        return True

    def _root(self) -> tuple[Path, int]:
        """The directory of the disk, locked: vm-root removes none that is in use."""
        while True:
            root = build(self.name)
            with contextlib.suppress(FileNotFoundError):
                lock = os.open(root, os.O_RDONLY)
                fcntl.flock(lock, fcntl.LOCK_SH)
                if root.exists():
                    return root, lock
                os.close(lock)

    def _launch(self, root: Path, locks: tuple[int, ...], stays: bool, memory: str, processors: int) -> None:
        command = [
            "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-machine", "q35,usb=off",
            # Both processors of a steady machine run in one thread, by turns: 8 ns for each instruction.
            *(("-icount", "shift=3", "-rtc", "clock=vm") if self.steady else ()),
            "-accel", f"tcg,thread={'single' if self.steady else 'multi'},tb-size=512",
            "-cpu", PROCESSOR, "-smp", str(processors), "-m", memory,
            "-kernel", str(root / "kernel"), "-initrd", str(root / "initrd"), "-append", KERNEL_ARGUMENTS,
            "-no-reboot",
            # What is written goes into a nameless file in TMPDIR.
            "-drive", f"if=none,id=root,format=raw,snapshot=on,cache=unsafe,discard=unmap,file={root / 'root.img'}",
            "-device", "virtio-blk-pci,drive=root",
            # /dev/vdb, empty: a disk on which nothing of the machine itself waits.
            "-drive", "if=none,id=spare,format=raw,cache=unsafe,discard=unmap,file=spare.img",
            "-device", "virtio-blk-pci,drive=spare",
            # A network of the machine and us, from us to it only.
            "-netdev", f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:0-:{PORT}",
            "-device", "virtio-net-pci,netdev=net,romfile=",
            "-device", "virtio-rng-pci",
            "-serial", "file:console.log", "-qmp", "unix:qmp.sock,server=on,wait=off",
        ]
        if shutil.which(command[0]) is None:
            raise MachineError("qemu-system-x86_64 is missing: run 'make setup'")
        if not stays:
            command = ["setpriv", "--pdeathsig", "KILL", *command]
        with open(self.directory / "spare.img", "wb") as spare:
            spare.truncate(SPARE_SIZE)
        with open(self.directory / "qemu.log", "wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=locks,
                start_new_session=True, env={**os.environ, "TMPDIR": str(self.directory)},
            )

    def alive(self) -> bool:
        """Whether its QEMU runs."""
        if self.process is not None:
            return self.process.poll() is None
        try:
            lock = os.open(self.directory / "lock", os.O_RDWR)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def end(self) -> None:
        """End it at once; what it has written is thrown away."""
        with contextlib.suppress(OSError, MachineError), self._qmp(5) as qmp:
            qmp.execute("quit")
        deadline = time.monotonic() + 10
        while self.alive() and time.monotonic() < deadline:
            time.sleep(0.02)
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        if self.alive():
            raise MachineError(f"QEMU does not end (its directory is {self.directory})")

    def outdated(self) -> bool:
        """Whether it runs from a disk that would be another one by now."""
        return build(self.name, "--where") != Path((self.directory / "root").read_text())

    def restart(self, *, orderly: bool) -> None:
        """Restart it, by systemd or as its button does, and wait until it is up. What is on its disk stays."""
        before = self.quietly(["cat", BOOT_ID])
        with self._qmp() as qmp:
            # With -no-reboot this would be its end otherwise.
            qmp.execute("set-action", {"reboot": "reset"})
            # What was not flushed may be gone, of the checkout too.
            (self.directory / "synced.json").unlink(missing_ok=True)
            if orderly:
                with contextlib.suppress(MachineGone):
                    self.quietly(["systemctl", "--no-block", "reboot"])
            else:
                qmp.execute("system_reset")
            deadline = time.monotonic() + BOOT_TIMEOUT
            while True:
                with contextlib.suppress(MachineGone):
                    if self.quietly(["cat", BOOT_ID]) != before:
                        break
                if time.monotonic() > deadline or not self.alive():
                    raise MachineError(f"it did not come back; its console is in {self.console}")
                time.sleep(0.2)
            qmp.execute("set-action", {"reboot": "shutdown"})

    def _qmp(self, timeout: float = 20) -> _Qmp:
        return _Qmp(self.directory, self.alive, timeout)

    # --- commands -----------------------------------------------------------------------------------

    def connect(self, timeout: float = BOOT_TIMEOUT) -> socket.socket:
        """Connect to its agent, waiting until it is up."""
        deadline = time.monotonic() + timeout
        path = self.directory / "port"
        while not path.exists() and self.alive() and time.monotonic() < deadline:
            time.sleep(0.05)
        if not path.exists():
            raise MachineGone("QEMU has ended, or does not start")
        return session.connect(int(path.read_text()), self.alive, deadline - time.monotonic())

    def sync(self) -> None:
        """Bring the checkout in, as it is now."""
        with open(self.directory / "synced.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            path = self.directory / "synced.json"
            had, has = checkout.load(path), checkout.now()
            changed = [name for name, state in has.items() if had.get(name) != state]
            gone = [name for name in had if name not in has]
            if gone:
                self.quietly(["rm", "-rf", "--", *gone])
            if changed:
                self.quietly(["tar", "-x", "--no-same-owner", "-f", "-"], checkout.archive(changed))
            path.write_text(json.dumps(has))

    def quietly(self, command: list[str], data: bytes = b"", timeout: float = BOOT_TIMEOUT) -> bytes:
        """Run a command that has to succeed, and return what it writes."""
        output, error = bytearray(), bytearray()
        with open_pipe(data) as stdin:
            status = session.run(
                self.connect(timeout), command, stdin=stdin, output=output.extend, error=error.extend,
                deadline=time.monotonic() + 120,
            )
        if status:
            raise MachineError(f"{command[0]} in the machine ended with {status}: {error.decode(errors='replace')}")
        return bytes(output)

    def run(self, command: list[str], *, output: Callable[[bytes], object], **how: Any) -> int:
        """Run a command and return its exit status."""
        return session.run(self.connect(), command, output=output, **how)


def open_pipe(data: bytes) -> BinaryIO:
    """Bytes as something that has a descriptor."""
    file = os.fdopen(os.memfd_create("data"), "w+b")
    file.write(data)
    file.seek(0)
    return file


class _Qmp:
    """A connection to QEMU's monitor."""

    def __init__(self, directory: Path, alive: Callable[[], bool], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        # By the directory's descriptor: a socket's path may not be long.
        place = os.open(directory, os.O_PATH | os.O_DIRECTORY)
        try:
            while True:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
                self._socket.settimeout(timeout)
                try:
                    self._socket.connect(f"/proc/self/fd/{place}/qmp.sock")
                    break
                except OSError as error:
                    self._socket.close()
                    if not alive() or time.monotonic() > deadline:
                        log = directory / "qemu.log"
                        said = log.read_text(errors="replace") if log.exists() else ""
                        raise MachineGone(f"QEMU does not answer: {error}\n{said}".rstrip()) from error
                    time.sleep(0.02)
        finally:
            os.close(place)
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def __enter__(self) -> _Qmp:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._socket.close()

    def execute(self, command: str, arguments: dict[str, object] | None = None) -> object:
        """Execute a command."""
        self._socket.sendall(json.dumps({"execute": command, "arguments": arguments or {}}).encode())
        while line := self._file.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise MachineError(f"QEMU: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]
        raise MachineGone("QEMU has ended")
