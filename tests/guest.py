"""A small virtual machine under QEMU's emulator, which uses the disks that it is given and does what it is told.

Its kernel and busybox are Debian's; scripts/debian-root gets them. They are kept in .cache/guest.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import json
import lzma
import select
import socket
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

TOP = Path(__file__).parents[1]
CACHE = TOP / ".cache" / "guest"
MODULES = ("virtio_pci", "virtio_blk", "virtio_console", "ext4")
MEMORY = "256M"
#: The words before the status of a command, in its output.
_END = "=== ended with"
#: The first program of the guest: does what comes in on its virtual console.
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install -s /bin
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
for module in /modules/*; do insmod $module; done
until [ -c /dev/hvc0 ]; do usleep 20000; done
exec </dev/hvc0 >/dev/hvc0 2>&1
stty raw -echo
echo "{_END} 0"
while read -r line; do
    eval "$line"
    echo "{_END} $?"
done
poweroff -f
"""


class GuestError(Exception):
    """The guest did not do what it was told."""


def guest_files() -> tuple[Path, Path]:
    """Return the kernel and the initramfs of the guest; both are made where they are missing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        root = CACHE / "root"
        made = subprocess.run(
            [TOP / "scripts" / "debian-root", "--variant=extract", "trixie", root, "linux-image-cloud-amd64",
             "busybox-static"],
            capture_output=True, text=True, timeout=115,
        )
        assert made.returncode == 0, made.stderr
        (modules,) = (root / "usr" / "lib" / "modules").iterdir()
        kernel = root / "boot" / f"vmlinuz-{modules.name}"
        key = hashlib.sha256("\0".join([modules.name, *MODULES, _INIT]).encode())
        key.update(str((root / ".debian-root").stat().st_mtime_ns).encode())
        initrd = CACHE / f"initrd-{key.hexdigest()[:16]}"
        if not initrd.exists():
            for old in CACHE.glob("initrd-*"):
                old.unlink()
            new = CACHE / "new"
            new.write_bytes(gzip.compress(_initramfs(root, modules.name), 1))
            new.rename(initrd)
        return kernel, initrd


def _initramfs(root: Path, release: str) -> bytes:
    """An archive as the kernel takes it: cpio's format newc (Documentation/driver-api/early-userspace in Linux)."""
    directory, program = stat.S_IFDIR | 0o755, stat.S_IFREG | 0o755
    entries = [(name, directory, b"") for name in ("bin", "dev", "proc", "sys", "mnt", "modules")]
    entries += [("init", program, _INIT.encode()), ("bin/busybox", program, _busybox(root).read_bytes())]
    for number, path in enumerate(_modules(root, release)):
        data = path.read_bytes()
        if path.suffix == ".xz":
            data = lzma.decompress(data)
        entries.append((f"modules/{number:02}-{path.name.partition('.')[0]}", program, data))
    archive = bytearray()
    for inode, (name, mode, data) in enumerate([*entries, ("TRAILER!!!", 0, b"")], 1):
        fields = (inode, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        archive += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        archive += bytes(-len(archive) % 4)
        archive += data
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def _busybox(root: Path) -> Path:
    return next(path for path in (root / "usr/bin/busybox", root / "bin/busybox") if path.exists())


def _modules(root: Path, release: str) -> list[Path]:
    """The files of MODULES and of what they need, in the order in which they are loaded."""
    subprocess.run(["depmod", "-b", root, release], check=True, capture_output=True, timeout=60)
    said = subprocess.run(
        ["modprobe", "-d", root, "-S", release, "--show-depends", "--ignore-install", "-a", *MODULES],
        check=True, capture_output=True, text=True, timeout=60,
    ).stdout
    # "builtin NAME" needs no file.
    paths = [line.split()[1] for line in said.splitlines() if line.startswith("insmod ")]
    return [Path(path) for path in dict.fromkeys(paths)]


class Qmp:
    """A connection to the monitor of a QEMU."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(30)
        _connect(self._socket, directory / "qmp.sock")
        self._file = self._socket.makefile("rb")
        self._file.readline()
        self.execute("qmp_capabilities")

    def execute(self, command: str, **arguments: Any) -> Any:
        """Execute a command and return its answer."""
        named = {key.replace("_", "-"): value for key, value in arguments.items()}
        self._socket.sendall(json.dumps({"execute": command, "arguments": named}).encode())
        while line := self._file.readline():
            answer = json.loads(line)
            if "error" in answer:
                raise GuestError(f"{command}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]
        raise GuestError(f"{command}: QEMU has ended")

    def close(self) -> None:
        """Close it."""
        self._file.close()
        self._socket.close()


def _connect(sock: socket.socket, path: Path) -> None:
    deadline = time.monotonic() + 20
    while True:
        try:
            sock.connect(str(path))
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise GuestError(f"{path}: {error}") from error
            time.sleep(0.02)


class Emulator:
    """A QEMU with some arguments, whose monitor answers. It runs nothing where no kernel is given."""

    def __init__(self, directory: Path, arguments: Sequence[str], *, before: Sequence[str] = ()) -> None:
        """``before``: words before its command line, such as those of setpriv or unshare."""
        directory.mkdir(exist_ok=True)
        self._log = directory / "qemu.log"
        command = [
            *before, "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-accel", "tcg",
            "-machine", "pc,usb=off", "-cpu", "qemu64,-cx16", "-no-reboot", "-qmp",
            f"unix:{directory / 'qmp.sock'},server=on,wait=off", *arguments,
        ]
        with open(self._log, "wb") as log:
            self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            self.qmp = Qmp(directory)
        except (OSError, GuestError) as error:
            self.process.kill()
            self.process.wait()
            raise GuestError(f"QEMU does not start: {self.says()}") from error

    def says(self) -> str:
        """What QEMU wrote."""
        return self._log.read_text(errors="replace")

    def end(self) -> None:
        """End it at once."""
        self.qmp.close()
        self.process.kill()
        self.process.wait()


@contextmanager
def emulator(directory: Path, arguments: Sequence[str]) -> Iterator[Emulator]:
    """A QEMU that is stopped before its first instruction."""
    running = Emulator(directory, ["-S", *arguments])
    try:
        yield running
    finally:
        running.end()


class Guest(Emulator):
    """A Linux that runs in an emulator."""

    def __init__(self, directory: Path, arguments: Sequence[str], *, before: Sequence[str] = ()) -> None:
        """Boot it; ``arguments`` give it its memory and its disks."""
        kernel, initrd = guest_files()
        self.console = directory / "console.log"
        super().__init__(
            directory,
            [
                "-kernel", str(kernel), "-initrd", str(initrd),
                "-append", "console=ttyS0 loglevel=5 mitigations=off panic=-1 nowatchdog "
                "rcupdate.rcu_cpu_stall_suppress=1 audit=0 8250.nr_uarts=1",
                "-serial", f"file:{self.console}",
                "-chardev", f"socket,id=commands,path={directory / 'commands.sock'},server=on,wait=off",
                "-device", "virtio-serial-pci,max_ports=1", "-device", "virtconsole,chardev=commands", *arguments,
            ],
            before=before,
        )
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._buffer = b""
        try:
            _connect(self._socket, directory / "commands.sock")
            self._answer(60)
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        self._socket.close()
        super().end()

    def run(self, command: str, *, timeout: float = 60) -> str:
        """Run a line of the shell in it and return what it writes."""
        self.send(command)
        return self.answer(timeout)

    def fails(self, command: str, *, timeout: float = 60) -> str:
        """Run a line of the shell that must fail and return what it writes."""
        self.send(command)
        status, output = self._answer(timeout)
        if not status:
            raise GuestError(f"{command!r} succeeded: {output}")
        return output

    def send(self, command: str) -> None:
        """Begin with a line of the shell; ``answer`` waits for its end."""
        assert "\n" not in command
        self._socket.sendall(command.encode() + b"\n")

    def answer(self, timeout: float = 60) -> str:
        """Wait for the end of what was sent, and return what it wrote. Raises TimeoutError."""
        status, output = self._answer(timeout)
        if status:
            raise GuestError(f"it ended with {status}: {output}")
        return output

    def _answer(self, timeout: float) -> tuple[int, str]:
        deadline = time.monotonic() + timeout
        while True:
            output, end, rest = self._buffer.partition(_END.encode())
            status, newline, more = rest.partition(b"\n")
            if end and newline:
                self._buffer = more
                return int(status), output.decode(errors="replace").replace("\r", "").strip()
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise TimeoutError(f"no answer after {timeout:g} s: {self._buffer!r}, {self.says()}, {self._tail()}")
            data = self._socket.recv(65536)
            if not data:
                raise GuestError(f"QEMU has ended: {self.says()}, {self._tail()}")
            self._buffer += data

    def _tail(self) -> str:
        with suppress(OSError):
            return self.console.read_text(errors="replace")[-2000:]
        return ""


@contextmanager
def guest(directory: Path, arguments: Sequence[str], *, before: Sequence[str] = ()) -> Iterator[Guest]:
    """A guest for a while."""
    running = Guest(directory, arguments, before=before)
    try:
        yield running
    finally:
        running.end()


def vhost_user(*sockets: str, reconnect: bool = True) -> list[str]:
    """The arguments that give a guest its memory, and these sockets as disks."""
    arguments = [
        "-m", MEMORY, "-object", f"memory-backend-memfd,id=mem,size={MEMORY},share=on",
        "-machine", "memory-backend=mem",
    ]
    for number, path in enumerate(sockets):
        again = ",reconnect=1" if reconnect else ""
        arguments += [
            "-chardev", f"socket,id=disk{number},path={path}{again}",
            "-device", f"vhost-user-blk-pci,id=device{number},chardev=disk{number},num-queues=1",
        ]
    return arguments
