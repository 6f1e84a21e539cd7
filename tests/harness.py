"""A real daemon in a directory of its own, driven as a user drives it."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storaged.__main__ import main
from storaged.api.client import Client
from storaged.errors import ErrorCode, StoragedError
from storaged.model.layout import Layout

#: The test machine is slow, and slower yet beside other work.
_PATIENCE = 3 if os.environ.get("STORAGED_VM") else 1
STORAGED = [str(Path(sys.executable).with_name("storaged"))]
#: sd_listen_fds(3): becomes the daemon, to which descriptor 3 is the socket.
_HANDS_OVER = (
    "import os, sys\n"
    "os.dup2(int(sys.argv[1]), 9); os.dup2(9, 3)\n"
    "os.environ |= {'LISTEN_FDS': '1', 'LISTEN_PID': str(os.getpid())}\n"
    "os.execv(sys.argv[2], sys.argv[2:])\n"
)


class Daemon:
    """``storaged --root ROOT daemon`` as a process, and calls to it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.layout = Layout.below(str(root))
        self.process: subprocess.Popen[bytes] | None = None
        self.log = root.parent / f"{root.name}.log"
        #: Which one is armed in the present process.
        self.fault = ""

    def start(
        self, *, fault: str = "", command: list[str] | None = None, wait: bool = True, listener: int | None = None
    ) -> None:
        """Start it and wait until it answers; ``fault`` arms one (storaged.supervisor.faults).

        ``listener``: the descriptor of a socket that is handed over, as systemd does.
        """
        self.fault = fault
        environment = {**os.environ, "STORAGED_FAULT": fault} if fault else dict(os.environ)
        command = [*(command or []), *STORAGED, "--root", str(self.root), "daemon"]
        handed: tuple[int, ...] = ()
        if listener is not None:
            command, handed = [sys.executable, "-c", _HANDS_OVER, str(listener), *command], (listener,)
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment, start_new_session=True, pass_fds=handed
            )
        if wait:
            eventually(self.answers, "the daemon answers")

    def answers(self) -> bool:
        """Whether somebody serves the socket."""
        try:
            self.call("List")
        except StoragedError:
            assert self.process is None or self.process.poll() is None, self.log.read_text()
            return False
        return True

    def kill(self) -> None:
        """SIGKILL: what it was doing stays as it is."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def stop(self) -> int:
        """End it as systemd does; volumes stay."""
        assert self.process is not None
        self.process.terminate()
        return self.process.wait(60 * _PATIENCE)

    def wait_dead(self) -> None:
        """Wait until it ended by itself (an armed fault)."""
        assert self.process is not None
        assert self.process.wait(60 * _PATIENCE) == -signal.SIGKILL

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """One Varlink call."""
        with Client(self.layout.socket) as client:
            return client.call(method, parameters, 60 * _PATIENCE)

    def attach(self, name: str, source: object, **wishes: Any) -> dict[str, Any]:
        """Attach and return the volume."""
        volume = self.call("Attach", name=name, source=str(source), **wishes)["volume"]
        assert isinstance(volume, dict)
        return volume

    def device(self, name: str, source: object, **wishes: Any) -> str:
        """Attach and return the device."""
        return str(self.attach(name, source, **wishes)["device"])

    def detach(self, name: str, **how: Any) -> list[str]:
        """Detach and return the notes."""
        return list(self.call("Detach", name=name, **how)["notes"])

    def show(self, name: str) -> dict[str, Any]:
        """One volume."""
        return dict(self.call("Show", name=name)["volume"])

    def names(self) -> list[str]:
        """The names of all volumes."""
        return [volume["name"] for volume in self.call("List")["volumes"]]

    def states(self) -> dict[str, str]:
        """The state of each volume, all of the same moment: one may be gone at the next look."""
        return {volume["name"]: volume["state"] for volume in self.call("List")["volumes"]}

    def cli_command(self) -> list[str]:
        """The words with which every command line to this daemon begins."""
        return [*STORAGED, "--root", str(self.root)]

    def cli(self, *arguments: str, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
        """The command line."""
        done = subprocess.run(
            [*self.cli_command(), *arguments], capture_output=True, text=True, timeout=60, input=stdin,
            stdin=subprocess.DEVNULL if stdin is None else None,
        )
        assert not check or done.returncode == 0, done.stderr
        return done

    def mountpoint(self, name: str) -> Path:
        """Where the FUSE export of a volume is mounted."""
        (found,) = Path(self.layout.volume_dir(name)).glob("disk-*")
        return found

    def qsd(self, name: str) -> int:
        """The pid of a volume's qemu-storage-daemon."""
        return int(self.show(name)["qsd_pid"])

    def kill_qsd(self, name: str) -> int:
        """SIGKILL to a volume's qemu-storage-daemon; return its pid."""
        pid = self.qsd(name)
        os.kill(pid, signal.SIGKILL)
        return pid

    def replaced(self, name: str, former: int) -> bool:
        """Whether a volume is online with another QSD than the one with pid ``former``."""
        volume = self.show(name)
        return bool(volume["state"] == "online" and volume["qsd_pid"] not in (None, former))

    def replace_qsd(self, name: str, timeout: float = 40) -> str:
        """Kill a volume's qemu-storage-daemon and wait for its successor; return the device, which may be another."""
        former = self.kill_qsd(name)
        eventually(lambda: self.replaced(name, former), "a successor serves it", timeout)
        return str(self.show(name)["device"])

    def online(self, name: str) -> bool:
        """Whether a volume is online."""
        return bool(self.show(name)["state"] == "online")

    def forget_all(self) -> None:
        """Take all volumes away, whatever state they are in."""
        if self.process is None or self.process.poll() is not None:
            self.start()
        for name in self.names():
            try:
                self.detach(name, force=True)
            except StoragedError as error:
                print(f"while ending: {error}")

    def end(self) -> None:
        """Take everything away."""
        self.forget_all()
        self.stop()


@dataclass(frozen=True)
class Printed:
    """How a command ended, and what it printed."""

    status: int
    stdout: str
    stderr: str


def image_command(daemon: Daemon, *words: object, check: bool = True) -> Printed:
    """``storaged --root ROOT image WORDS`` in this process: a process of its own takes most of the time to start."""
    out, errors = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(errors):
        status = main(["--root", str(daemon.root), "image", *map(str, words)])
    assert not check or status == 0, f"{words}: {out.getvalue()}{errors.getvalue()}"
    return Printed(status, out.getvalue(), errors.getvalue())


def eventually(condition: Callable[[], object], what: str, timeout: float = 20) -> None:
    """Wait for a condition; a test's own deadline (seconds, of a machine that is not emulated).

    To look costs a processor at most a third of its time: it is short of what is waited for, in the machine above all.
    """
    begin = time.monotonic()
    deadline = begin + timeout * _PATIENCE
    while not condition():
        end = time.monotonic()
        assert end < deadline, f"still not: {what}"
        time.sleep(max(0.02, 2 * (end - begin)))
        begin = time.monotonic()


def run(*command: object, check: bool = True, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    """Run a program to its end."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=100, input=stdin
    )
    assert not check or done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
    return done


def image(path: Path, format: str = "qcow2", size: str = "64M", *options: str) -> Path:
    """Create an image with qemu-img."""
    run("qemu-img", "create", "-q", "-f", format, *options, path, size)
    return path


def luks_image(path: Path, key: Path) -> Path:
    """Create an encrypted image of 64 MiB."""
    command = (
        "qemu-img", "create", "-q", "-f", "luks", "--object", f"secret,id=k,file={key}",
        "-o", "key-secret=k,iter-time=50", path, "64M",
    )
    # Its benchmark of the key derivation fails now and then on a busy machine.
    for _ in range(10):
        if run(*command, check=False).returncode == 0:
            return path
    run(*command)
    return path


def size_of(device: str) -> int:
    """The bytes of a block device, as the kernel has them."""
    return int(run("blockdev", "--getsize64", device).stdout)


@contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    """Mount a device for a while."""
    directory.mkdir(exist_ok=True)
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


def reads(device: str, offset: int, length: int) -> bytes:
    """Read from a device, past the page cache."""
    run("blockdev", "--flushbufs", device)
    with open(device, "rb") as file:
        file.seek(offset)
        return file.read(length)


def writes(device: str, offset: int, data: bytes) -> None:
    """Write to a device and flush."""
    with open(device, "r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def leftovers(root: Path) -> list[str]:
    """What of a daemon below ``root`` is still there: processes, loop devices, mounts, files, links."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            # TMPDIR tells whose QSD it is, whatever the program is.
            if f"TMPDIR={root}/".encode() in (entry.parent / "environ").read_bytes():
                found.append(f"process {entry.parent.name}")
        except OSError:
            continue
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            if entry.read_text().startswith(f"{root}/run"):
                found.append(f"loop device {entry.parent.parent.name}")
        except OSError:
            continue
    # What all of the host share names no root: these tests have the host to themselves.
    found += [f"vDPA device {entry.name}" for entry in Path("/sys/bus/vdpa/devices").glob("storaged.*")]
    found += [f"VDUSE device {entry.name}" for entry in Path("/dev/vduse").glob("storaged.*")]
    for entry in Path("/sys/block").glob("nbd*/backend"):
        with suppress(OSError):
            if entry.read_text().startswith("storaged."):
                found.append(f"NBD device {entry.parent.name}")
    found += [line for line in Path("/proc/mounts").read_text().splitlines() if f"{root}/run" in line]
    layout = Layout.below(str(root))
    for directory in (
        layout.volumes_dir, layout.desired_volatile, layout.desired_persistent, layout.snapshots_dir, layout.dev_dir,
        layout.vm_sockets_dir, f"{layout.state_dir}/copies",
    ):
        if os.path.isdir(directory):
            found += [f"{directory}/{entry}" for entry in os.listdir(directory)]
    return found


def processes_of(daemon: Daemon) -> list[str]:
    """The processes whose working directory, or directory for temporary files, is below a root."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            here = os.readlink(entry / "cwd").startswith(f"{daemon.root}/run")
            if here or f"TMPDIR={daemon.root}/".encode() in (entry / "environ").read_bytes():
                found.append(entry.name)
    return found


def error_of(call: Callable[[], object]) -> StoragedError:
    """Return the failure that a call ends with."""
    try:
        call()
    except StoragedError as error:
        return error
    raise AssertionError("it succeeded")


def as_json(text: str) -> Any:
    """Parse JSON."""
    return json.loads(text)


def refuses(daemon: Daemon, code: ErrorCode, source: object, name: str = "a", **wishes: object) -> StoragedError:
    """Attach, expect a clear refusal, and that nothing is left of it."""
    before = leftovers(daemon.root)
    error = error_of(lambda: daemon.attach(name, source, **wishes))
    assert error.code is code, error
    assert error.message
    assert error.hint, f"no hint: {error}"
    assert name not in daemon.names()
    assert sorted(leftovers(daemon.root)) == sorted(before)
    return error


def with_config(daemon: Daemon, text: str) -> None:
    """Write storaged.toml."""
    Path(daemon.layout.config_dir).mkdir(parents=True, exist_ok=True)
    Path(daemon.layout.config_file).write_text(text)
