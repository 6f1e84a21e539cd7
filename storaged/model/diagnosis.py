"""What the doctor makes of the facts of a host. Pure: storaged/host/probe.py gathers them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum

from storaged.model.sizes import format_size
from storaged.qsd.version import QsdVersion, loop_direct_io_is_safe

#: Below this, snapshots are short of room.
LOW_SPACE = 1 << 30
#: Below this, not even records can be trusted to be written.
NO_SPACE = 16 << 20
_MIN_PYTHON = (3, 11)
_SETUP = "make setup (or, in the virtual environment: pip install {})"
#: Kernel modules, and the options that build them.
MODULE_OPTIONS = {
    "fuse": "FUSE_FS",
    "loop": "BLK_DEV_LOOP",
    "vduse": "VDPA_USER",
    "virtio_vdpa": "VIRTIO_VDPA",
    "nbd": "BLK_DEV_NBD",
}
#: Those that only later transports need.
LATER_MODULES = ("vduse", "virtio_vdpa", "nbd")


class Status(StrEnum):
    """How good or bad a finding is. Only ``fail`` keeps storaged from working."""

    OK = "ok"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"


class ModuleState(StrEnum):
    """Where the code of a kernel module is."""

    BUILTIN = "built in"
    LOADED = "loaded"
    LOADABLE = "loadable"
    ABSENT = "absent"
    UNKNOWN = "unknown"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    check: str
    status: Status
    detail: str
    hint: str = ""


@dataclass(frozen=True)
class Library:
    """A Python package: ``version`` is empty when it cannot be imported, ``problem`` says why."""

    name: str
    version: str = ""
    problem: str = ""


@dataclass(frozen=True)
class DeviceNode:
    """A device node of a driver. ``problem`` is empty when it can be opened for reading and writing."""

    path: str
    module: ModuleState
    problem: str = ""


@dataclass(frozen=True)
class Directory:
    """A directory of ours. ``problem`` is empty when it can be written, or made where it is missing."""

    path: str
    problem: str = ""
    free: int | None = None


@dataclass(frozen=True)
class Facts:
    """All that the doctor looks at. ``None`` means that it could not be found out."""

    root: bool
    python: tuple[int, int, int]
    libraries: tuple[Library, ...]
    nbd: Library
    nbd_is_libnbd: bool
    config_file: str
    config_problem: str
    qsd_binary: str
    qsd_path: str | None
    qsd_output: str
    qsd: QsdVersion | None
    kernel: str
    fuse: DeviceNode
    loop: DeviceNode
    free_loops: int
    loops: int
    modules: dict[str, ModuleState] = field(default_factory=dict)
    run_dir: Directory = Directory("")
    state_dir: Directory = Directory("")
    daemon_version: str = ""
    daemon_problem: str = ""
    daemon_hint: str = ""
    own_version: str = ""


def diagnose(facts: Facts) -> list[Finding]:
    """Return the findings, in the order in which things have to work."""
    return [
        *_installation(facts),
        *_qsd(facts),
        *_kernel(facts),
        *_directories(facts),
        _daemon(facts),
    ]


def _installation(facts: Facts) -> Iterator[Finding]:
    if facts.root:
        yield Finding("root", Status.OK, "running as root")
    else:
        yield Finding(
            "root",
            Status.WARN,
            "not running as root: the daemon has to, and some findings below tell of this user only",
            "sudo storaged doctor",
        )
    python = ".".join(map(str, facts.python))
    if facts.python >= _MIN_PYTHON:
        yield Finding("python", Status.OK, python)
    else:
        yield Finding("python", Status.FAIL, f"{python} is too old", "use Python 3.11 or newer (Debian 12)")
    for library in facts.libraries:
        check = f"python {library.name}"
        if library.version:
            yield Finding(check, Status.OK, library.version)
        else:
            yield Finding(check, Status.FAIL, library.problem, _SETUP.format(library.name))
    yield _libnbd(facts)
    if facts.config_problem:
        yield Finding(
            "configuration", Status.FAIL, f"{facts.config_file}: {facts.config_problem}", "correct the file"
        )


def _libnbd(facts: Facts) -> Finding:
    check = "python nbd"
    if not facts.nbd.version:
        hint = "apt install python3-libnbd, and a virtual environment made with --system-site-packages"
        return Finding(check, Status.WARN, f"{facts.nbd.problem}; the nbd transport needs it", hint)
    if not facts.nbd_is_libnbd:
        return Finding(
            check,
            Status.WARN,
            f"{facts.nbd.version} is not libnbd's module but PyPI's package of that name",
            "pip uninstall nbd; apt install python3-libnbd",
        )
    return Finding(check, Status.OK, f"libnbd {facts.nbd.version}")


def _qsd(facts: Facts) -> Iterator[Finding]:
    if facts.qsd_path is None:
        hint = "apt install qemu-system-common (Debian 12) or qemu-utils (Debian 13)"
        if "/" in facts.qsd_binary:
            hint = f"correct [qsd] binary in {facts.config_file}, or {hint}"
        yield Finding("qsd", Status.FAIL, f"{facts.qsd_binary} is not installed", hint)
        return
    if facts.qsd is None:
        yield Finding(
            "qsd",
            Status.FAIL,
            f"{facts.qsd_path} does not tell its version: {facts.qsd_output or 'it printed nothing'}",
            "apt install --reinstall qemu-system-common (Debian 12) or qemu-utils (Debian 13)",
        )
        return
    yield Finding("qsd", Status.OK, f"{facts.qsd} at {facts.qsd_path}")
    if loop_direct_io_is_safe(facts.qsd):
        yield Finding("qsd direct I/O", Status.OK, "loop devices use direct I/O")
    else:
        yield Finding(
            "qsd direct I/O",
            Status.WARN,
            f"{facts.qsd} corrupts data under loop devices with direct I/O: they are buffered,"
            " which is slower and takes page cache twice",
            "use QEMU 10.0.10 or a later 10.0, or 11.0 and newer (Debian 13, or backports)",
        )


def _kernel(facts: Facts) -> Iterator[Finding]:
    release = tuple(int(number) for number in _numbers(facts.kernel))
    if release >= (5, 8):
        yield Finding("kernel", Status.OK, facts.kernel)
    else:
        yield Finding(
            "kernel",
            Status.FAIL,
            f"{facts.kernel} has no LOOP_CONFIGURE, which came with 5.8",
            "boot a newer kernel: apt install linux-image-amd64",
        )
    yield _node("fuse", facts.fuse)
    yield _node("loop", facts.loop)
    if facts.loop.module in (ModuleState.BUILTIN, ModuleState.LOADED) and not facts.loop.problem:
        more = "" if facts.free_loops else "; the kernel makes another on request"
        yield Finding(
            "loop devices", Status.OK, f"{facts.free_loops} of {facts.loops} are free{more}"
        )
    for module, state in facts.modules.items():
        status = Status.OK if state in (ModuleState.BUILTIN, ModuleState.LOADED) else Status.INFO
        hint = ""
        if state is ModuleState.LOADABLE:
            hint = f"modprobe {module}"
        elif state is ModuleState.ABSENT:
            hint = f"a kernel with CONFIG_{MODULE_OPTIONS[module]} (Debian 13's has it)"
        yield Finding(f"module {module}", status, f"{state} (for a later transport)", hint)


def _node(check: str, node: DeviceNode) -> Finding:
    if not node.problem:
        return Finding(check, Status.OK, f"{node.path} can be opened ({node.module})")
    if node.module is ModuleState.LOADABLE:
        return Finding(
            check, Status.OK, f"the module is not loaded yet; the daemon does it (modprobe {check})"
        )
    if node.module in (ModuleState.ABSENT, ModuleState.UNKNOWN):
        hint = f"boot a kernel that has the module {check}, or install its modules package"
    else:
        hint = f"run as root; in a container, pass {node.path} through and allow it"
    return Finding(check, Status.FAIL, f"{node.path}: {node.problem} (module: {node.module})", hint)


def _directories(facts: Facts) -> Iterator[Finding]:
    for check, directory in (("run directory", facts.run_dir), ("state directory", facts.state_dir)):
        if directory.problem:
            yield Finding(
                check,
                Status.FAIL if facts.root else Status.WARN,
                f"{directory.path}: {directory.problem}",
                "mount it writable, or choose another place with --root",
            )
        else:
            yield Finding(check, Status.OK, f"{directory.path} can be written")
    free = facts.state_dir.free
    if free is None:
        return
    detail = f"{format_size(free)} free for {facts.state_dir.path}"
    if free >= LOW_SPACE:
        yield Finding("free space", Status.OK, detail)
    else:
        yield Finding(
            "free space",
            Status.FAIL if free < NO_SPACE else Status.WARN,
            detail,
            "make room, or put snapshots elsewhere: snapshot_dir in storaged.toml",
        )


def _daemon(facts: Facts) -> Finding:
    if facts.daemon_problem:
        return Finding("daemon", Status.WARN, facts.daemon_problem, facts.daemon_hint)
    if facts.daemon_version != facts.own_version:
        return Finding(
            "daemon",
            Status.WARN,
            f"it is version {facts.daemon_version}, this command is {facts.own_version}",
            "systemctl restart storaged (volumes stay attached)",
        )
    return Finding("daemon", Status.OK, f"version {facts.daemon_version} answers")


def _numbers(release: str) -> list[str]:
    """Return the leading numbers of a kernel release: 6 and 12 of ``6.12.48+deb13-amd64``."""
    numbers = []
    for part in release.split(".")[:2]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(digits)
    return numbers
