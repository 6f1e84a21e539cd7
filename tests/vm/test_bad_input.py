"""VDUSE and NBD on a host that is not as they need it: a clear refusal, nothing of it left, nothing that hangs.

These tests take kernel modules away, alter them and load others: nothing else may use them meanwhile.
"""

from __future__ import annotations

import functools
import lzma
import os
import re
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import nbd, vdpa
from storaged.host.nbdhandshake import negotiate
from tests.harness import Daemon, error_of, eventually, image, leftovers, reads, refuses, run, with_config, writes

RELEASE = os.uname().release
PATTERN = bytes(range(256)) * 256
QSD = "/usr/bin/qemu-storage-daemon"
#: Each before those that it needs.
MODULES = {"vduse": ("virtio_vdpa", "vhost_vdpa", "vduse", "vdpa"), "nbd": ("nbd",)}

#: A qemu-storage-daemon with somebody between its QMP and the daemon, who kills or stops it.
MEDDLER = r"""#!/usr/bin/python3 -IS
import os, re, select, signal, socket, sys
REAL, WHEN, SIGNAL = {real!r}, {when!r}, {signal:d}
words = sys.argv[1:]
if words[0] != "--chardev":
    os.execv(REAL, [REAL, *words])
qsd, given = os.getpid(), int(re.search("fd=([0-9]+)", words[1])[1])
listener, inner = socket.socket(fileno=given), socket.socket(socket.AF_UNIX)
if os.path.exists("inner.sock"):
    os.unlink("inner.sock")
inner.bind("inner.sock")
inner.listen()
monitor = socket.socket(socket.AF_UNIX)
monitor.connect("inner.sock")
if os.fork():
    os.set_inheritable(inner.fileno(), True)
    words[1] = words[1].replace(f"fd={{given}}", f"fd={{inner.fileno()}}")
    os.execv(REAL, [REAL, *words])
inner.close()
for fd in map(int, os.listdir("/proc/self/fd")):
    # Locks, too: they are QSD's alone.
    if fd > 2 and fd not in (given, monitor.fileno()):
        try:
            os.close(fd)
        except OSError:
            pass
daemon, _ = listener.accept()
seen, trap, caught = b"", None, None


def spring():
    os.kill(qsd, SIGNAL)
    if SIGNAL == signal.SIGKILL:
        while os.path.exists(f"/proc/{{qsd}}/exe"):
            pass


while True:
    ready, _, _ = select.select([daemon, monitor, *([trap] if trap else [])], [], [])
    if trap in ready:
        caught = trap.accept()
        trap.close()
        trap = None
        spring()
    if daemon in ready:
        data = daemon.recv(65536)
        if not data:
            break
        if WHEN == "its first client comes" and b"nbd.sock" in data:
            data = data.replace(b"nbd.sock", b"not.sock")
            trap = socket.socket(socket.AF_UNIX)
            trap.bind("tmp/nbd.sock")
            trap.listen()
        seen += data
        monitor.sendall(data)
    if monitor in ready:
        data = monitor.recv(65536)
        if not data:
            break
        sprung = WHEN == "it has exported" and b"block-export-add" in seen
        if WHEN == "its device is made" and b"query-block-exports" in seen.partition(b"block-export-add")[2]:
            sprung = True
        if sprung:
            spring()
            seen = b""
        daemon.sendall(data)
"""

pytestmark = pytest.mark.timeout(300)  # the machine is emulated


@pytest.fixture
def source(place: Path) -> Path:
    return image(place / "a.raw", "raw")


@pytest.fixture(scope="module")
def scripted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("other") / "root")
    daemon.root.mkdir()
    # Who meddles has more to do than a QSD may.
    with_config(daemon, f'[qsd]\nsandbox = false\nbinary = "{qsd_of(daemon)}"\n')
    write_qsd(daemon, f'exec {QSD} "$@"')
    daemon.start()
    yield daemon
    daemon.end()


@pytest.fixture
def other(scripted: Daemon) -> Iterator[Daemon]:
    """A daemon whose qemu-storage-daemon is a script that the tests write."""
    yield scripted
    scripted.forget_all()
    eventually(lambda: leftovers(scripted.root) == [], "nothing is left")


@pytest.fixture(autouse=True)
def hangs_nowhere() -> Iterator[None]:
    """Nothing may hang in the kernel afterwards."""
    yield
    eventually(lambda: not stuck(), f"nothing is stuck; there is {stuck()}")


def stuck() -> list[str]:
    """Processes and threads in state D that are no kernel threads."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with suppress(OSError):
            text = entry.read_text()
            if text.rpartition(")")[2].split()[0] == "D" and (entry.parent / "exe").resolve().exists():
                found.append(text.split(" (")[1])
    return found


def qsd_of(daemon: Daemon) -> Path:
    return daemon.root.parent / "qsd"


def write_qsd(daemon: Daemon, text: str) -> None:
    """Make another program of the daemon's qemu-storage-daemon."""
    new = qsd_of(daemon).with_suffix(".new")
    new.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
    new.chmod(0o755)
    new.rename(qsd_of(daemon))


def works(daemon: Daemon, source: Path, transport: str) -> None:
    """A good attach gives a disk."""
    device = daemon.device("a", source, transport=transport)
    writes(device, 0, PATTERN)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def automatic(daemon: Daemon, source: Path) -> tuple[str, str]:
    """What ``auto`` takes, and why."""
    volume = daemon.attach("a", source)
    daemon.detach("a")
    return volume["transport"], volume["transport_reason"]


def says(error: StoragedError, *words: object) -> None:
    """The error, as an administrator reads it, has these words."""
    text = f"{error} [{error.code}]\nhint: {error.hint}"
    print(text)
    for word in words:
        assert str(word) in text


def loaded(module: str) -> bool:
    return Path(f"/sys/module/{module}").exists()


def file_of(module: str) -> Path:
    return Path(run("modinfo", "-n", module).stdout.strip())


@contextmanager
def unloaded(*transports: str) -> Iterator[None]:
    """Their modules are not in the kernel, neither at the beginning nor at the end."""
    unload(*transports)
    yield
    unload(*transports)


def unload(*transports: str) -> None:
    for name in [module for transport in transports for module in MODULES[transport]]:
        eventually(functools.partial(_without, name), f"the kernel is without {name}", 60)


def _without(module: str) -> bool:
    # Whoever opens a device node that has lost its driver makes the kernel load it again, and udev opens them.
    run("udevadm", "settle", "--timeout=60")
    if loaded(module):
        print(run("modprobe", "-r", module, check=False).stderr)
    return not loaded(module)


@contextmanager
def not_installed(module: str, *, indexed: bool) -> Iterator[None]:
    """The module's file is gone; ``indexed``: modules.dep has it still."""
    path, index = file_of(module), Path(f"/lib/modules/{RELEASE}/modules.dep")
    aside, before = path.with_name(f"{path.name}.aside"), index.read_text()
    path.rename(aside)
    if not indexed:
        # As depmod does, which takes long in the machine.
        index.write_text("".join(line for line in before.splitlines(True) if path.name not in line.partition(":")[0]))
    try:
        yield
    finally:
        aside.rename(path)
        index.write_text(before)


@contextmanager
def modprobe_d(text: str) -> Iterator[Path]:
    """A file in modprobe.d."""
    path = Path("/run/modprobe.d/hardening.conf")
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    try:
        yield path
    finally:
        path.unlink()


@contextmanager
def altered(module: str) -> Iterator[None]:
    """A letter of the module is another, under its good signature."""
    path = file_of(module)
    before = path.read_bytes()
    data = lzma.decompress(before) if path.suffix == ".xz" else before
    changed = data.replace(b"description=", b"Description=", 1)
    assert changed != data
    path.write_bytes(lzma.compress(changed, check=lzma.CHECK_CRC32) if path.suffix == ".xz" else changed)
    try:
        yield
    finally:
        path.write_bytes(before)


# The kernel's modules --------------------------------------------------------------------------------------------


def test_a_module_that_is_not_installed_is_named_and_auto_takes_the_next_transport(
    daemon: Daemon, source: Path
) -> None:
    with unloaded("vduse"), not_installed("vduse", indexed=False):
        error = refuses(daemon, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="vduse")
        says(error, "module vduse is absent", RELEASE)
        daemon.attach("a", source)
        shown = daemon.cli("show", "a").stdout
        print(shown)
        assert re.search(r"transport: +nbd \(vduse: module vduse is absent", shown)
        daemon.detach("a")
        with unloaded("nbd"), not_installed("nbd", indexed=True):
            error = refuses(daemon, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="nbd")
            says(error, "module nbd", RELEASE, "is gone", "apt install")
            taken, why = automatic(daemon, source)
            print(why)
            assert taken == "fuse"
            assert "vduse: module vduse is absent" in why
            assert "nbd: the kernel module nbd cannot be loaded" in why
    works(daemon, source, "vduse")


def test_a_module_that_the_administrator_keeps_out_stays_out_and_the_error_names_the_line(
    daemon: Daemon, source: Path
) -> None:
    with unloaded("vduse", "nbd"), modprobe_d("# hardening\nblacklist vduse\ninstall nbd /bin/false\n") as path:
        error = refuses(daemon, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="vduse")
        says(error, f"{path} line 2 says: blacklist vduse")
        error = refuses(daemon, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="nbd")
        says(error, f"{path} line 3 says: install nbd /bin/false")
        taken, why = automatic(daemon, source)
        print(why)
        assert taken == "fuse"
        assert f"{path} line 2" in why
        assert f"{path} line 3" in why
        assert not loaded("vduse")
        assert not loaded("nbd")
    works(daemon, source, "nbd")


def test_a_module_that_was_tampered_with_is_refused_by_the_kernel_and_auto_takes_the_next(
    daemon: Daemon, source: Path
) -> None:
    with unloaded("nbd"), altered("nbd"):
        error = refuses(daemon, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="nbd")
        says(error, "Key was rejected", "signed")
        assert not loaded("nbd")
    works(daemon, source, "nbd")


def test_in_a_network_namespace_of_its_own_there_is_no_vdpa_and_auto_takes_the_next_transport(
    stopped: Daemon, source: Path
) -> None:
    """As in a container. The family vdpa is the first namespace's alone; nbd too, in Linux 6.1 and not in 6.12."""
    stopped.start(command=["unshare", "--net"])
    error = refuses(stopped, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="vduse")
    says(error, "'vdpa'", "network namespace", "fuse")
    taken, why = automatic(stopped, source)
    print(why)
    assert "'vdpa' cannot be seen from here: the daemon runs in another network namespace" in why
    if taken == "fuse":
        error = refuses(stopped, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="nbd")
        says(error, "'nbd'", "network namespace", "fuse")
    else:
        assert taken == "nbd"


def test_a_lost_connection_is_noticed_although_the_module_was_loaded_anew(daemon: Daemon, source: Path) -> None:
    works(daemon, source, "nbd")
    unload("nbd")
    device = daemon.device("a", source, transport="nbd", options={"timeout": "1"})
    notice = f"the kernel lost the connection of {device}"
    before = daemon.log.read_text().count(notice)
    os.kill(daemon.qsd("a"), signal.SIGSTOP)
    with subprocess.Popen(["dd", f"if={device}", "of=/dev/null", "count=1", "iflag=direct"]) as reader:
        eventually(lambda: daemon.log.read_text().count(notice) > before, "it is noticed")
        os.kill(daemon.qsd("a"), signal.SIGCONT)
        reader.wait(20)
    daemon.detach("a")


def test_vhost_vdpa_that_was_there_first_does_not_keep_the_disk(daemon: Daemon, source: Path) -> None:
    if run("modprobe", "--dry-run", "vhost_vdpa", check=False).returncode != 0:
        return  # Debian 12's kernel is built without it
    with unloaded("vduse"):
        run("modprobe", "vhost_vdpa")
        works(daemon, source, "vduse")


# Devices and names ---------------------------------------------------------------------------------------------


def test_nbd_devices_do_not_run_out_when_those_made_beforehand_are_taken(daemon: Daemon, place: Path) -> None:
    """The kernel makes more, until it has no minor numbers left, after 4096 devices at least."""
    with unloaded("nbd"):
        run("modprobe", "nbd", "nbds_max=1")
        assert Path("/dev/nbd0").exists()
        devices = [daemon.device(name, image(place / name, "raw"), transport="nbd") for name in ("b", "c")]
        assert len(set(devices)) == 2
        daemon.forget_all()


@contextmanager
def foreign_qsd(place: Path, *exports: str, settled: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's qemu-storage-daemon, up when ``settled`` is there."""
    disk = image(place / "foreign.raw", "raw")
    words = [
        QSD, "--blockdev", f"driver=file,filename={disk},node-name=d",
        *[word for export in exports for word in shlex.split(export)],
    ]
    with subprocess.Popen(words, cwd=place) as process:
        try:
            eventually(settled.exists, "it serves")
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize("on_the_bus", [True, False], ids=["on the bus", "served only"])
def test_a_vduse_device_of_somebody_else_is_left_alone(
    daemon: Daemon, place: Path, source: Path, on_the_bus: bool
) -> None:
    run("modprobe", "-a", "vduse", "virtio_vdpa")
    export = "--export vduse-blk,id=e,node-name=d,name=storaged.a,writable=on"
    node = Path("/dev/vduse/storaged.a")
    with foreign_qsd(place, export, settled=node):
        if on_the_bus:
            vdpa.add("storaged.a")
            vdpa.bind("storaged.a")
            eventually(lambda: vdpa.find_disk("storaged.a"), "their disk")
        error = refuses(daemon, ErrorCode.NAME_TAKEN, source, transport="vduse")
        says(error, "storaged.a", "vDPA bus" if on_the_bus else "VDUSE device")
        if not on_the_bus:
            vdpa.add("storaged.a")
            vdpa.bind("storaged.a")
        eventually(lambda: vdpa.find_disk("storaged.a"), "their disk")
        theirs = vdpa.find_disk("storaged.a")
        assert theirs is not None
        writes(theirs.path, 4096, PATTERN)
        assert reads(theirs.path, 4096, len(PATTERN)) == PATTERN
        vdpa.unbind("storaged.a", 20)
        vdpa.delete("storaged.a")
    # It was killed, and its node is left, which nobody serves: that is in nobody's way.
    assert node.exists()
    works(daemon, source, "vduse")


def test_an_nbd_device_of_somebody_else_is_left_alone(daemon: Daemon, place: Path, source: Path) -> None:
    run("modprobe", "nbd")
    exports = (
        "--nbd-server addr.type=unix,addr.path=their.sock",
        "--export nbd,id=e,node-name=d,name=theirs,writable=on",
    )
    with foreign_qsd(place, *exports, settled=place / "their.sock"):
        with socket.socket(socket.AF_UNIX) as sock:
            eventually(lambda: sock.connect_ex(str(place / "their.sock")) == 0, "it listens")
            theirs = nbd.connect(
                "storaged.a", [sock], negotiate(sock, "theirs"), block_size=512, timeouts=nbd.Timeouts(0, 60)
            )
        error = refuses(daemon, ErrorCode.NAME_TAKEN, source, transport="nbd")
        says(error, theirs.path, "storaged.a")
        writes(theirs.path, 4096, PATTERN)
        assert reads(theirs.path, 4096, len(PATTERN)) == PATTERN
        nbd.disconnect(theirs.path, "storaged.a")
        nbd.wait_gone(theirs.path, "storaged.a")


# qemu-storage-daemon ---------------------------------------------------------------------------------------------


def test_a_qemu_storage_daemon_without_vduse_blk_leaves_auto_with_nbd(other: Daemon, source: Path) -> None:
    write_qsd(other, f'case $1 in --help) {QSD} --help | sed /vduse-blk/d;; *) exec {QSD} "$@";; esac')
    error = refuses(other, ErrorCode.TRANSPORT_UNAVAILABLE, source, transport="vduse")
    says(error, "has no vduse-blk export")
    taken, why = automatic(other, source)
    print(why)
    assert taken == "nbd"
    assert "has no vduse-blk export" in why


@pytest.mark.parametrize(
    ("number", "transport", "when", "code"),
    [
        (signal.SIGKILL, "vduse", "it has exported", ErrorCode.QSD_DIED),
        (signal.SIGKILL, "vduse", "its device is made", ErrorCode.QSD_DIED),
        (signal.SIGKILL, "nbd", "its device is made", ErrorCode.QSD_DIED),
        (signal.SIGKILL, "nbd", "its first client comes", ErrorCode.QSD_DIED),
        (signal.SIGSTOP, "vduse", "its device is made", ErrorCode.DEVICE_FAILED),
        (signal.SIGSTOP, "nbd", "its first client comes", ErrorCode.QSD_SILENT),
    ],
)
def test_a_qemu_storage_daemon_that_is_killed_or_stopped_between_its_start_and_the_disk(
    other: Daemon, source: Path, number: signal.Signals, transport: str, when: str, code: ErrorCode
) -> None:
    """The attach ends in its time, and says it; nothing is left, and the next one is as good as any."""
    write_qsd(other, MEDDLER.format(real=QSD, when=when, signal=number))
    options = {"msg-timeout": "3"} if transport == "vduse" else {}
    begin = time.monotonic()
    error = error_of(lambda: other.attach("a", source, transport=transport, options=options, timeout=12))
    print(f"{time.monotonic() - begin:.1f} s")
    says(error, "qemu-storage-daemon")
    assert error.code is code
    if number is signal.SIGKILL:
        assert "SIGKILL" in error.cause
    write_qsd(other, f'exec {QSD} "$@"')
    eventually(lambda: leftovers(other.root) == [], "nothing is left")
    works(other, source, transport)


# Options -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("transport", "option", "value"),
    [
        ("vduse", "queues", "0"),
        ("vduse", "queue-size", "100"),
        ("nbd", "connections", "0"),
        ("nbd", "queues", "2"),
        ("auto", "queue-size", "100"),
    ],
)
def test_an_option_that_makes_no_sense_is_refused_before_anything_starts(
    daemon: Daemon, source: Path, transport: str, option: str, value: str
) -> None:
    error = refuses(
        daemon, ErrorCode.INVALID_ARGUMENT, source, transport=transport, options={option: value}
    )
    says(error, option)
    assert "start" not in error.step
