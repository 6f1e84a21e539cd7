"""What the doctor makes of the facts of a host. Pure: storaged/host/probe.py gathers them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

from storaged.model.kernelconfig import BY_TRANSPORT, KernelConfig, Needs, Verdict, works
from storaged.model.modules import SIGN_HINT, Loading, ModuleInfo, ModuleState
from storaged.model.sizes import format_size
from storaged.qsd.version import QsdVersion, loop_direct_io_is_safe

#: Below this, snapshots are short of room.
LOW_SPACE = 1 << 30
#: Below this, not even records can be trusted to be written.
NO_SPACE = 16 << 20
_MIN_PYTHON = (3, 11)
_SETUP = "make setup (or, in the virtual environment: pip install {})"
#: What each transport needs of QSD, where that is more than the first version storaged works with.
_MIN_QSD = {"vduse": QsdVersion(7, 1, 0)}
#: The transports whose modules are listed in one line; fuse has lines of its own.
_OTHER_TRANSPORTS = (BY_TRANSPORT["vduse"], BY_TRANSPORT["nbd"])
#: It competes with virtio_vdpa for the devices of the vDPA bus.
RIVAL = "vhost_vdpa"
#: The modules that the doctor asks for.
MODULES = (*(module for needs in _OTHER_TRANSPORTS for module in needs.modules), RIVAL)


class Status(StrEnum):
    """How good or bad a finding is. Only ``fail`` keeps storaged from working."""

    OK = "ok"
    INFO = "info"
    WARN = "warn"
    FAIL = "fail"


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
    module: ModuleInfo
    problem: str = ""


@dataclass(frozen=True)
class Directory:
    """A directory of ours. ``problem`` is empty when it can be written, or made where it is missing."""

    path: str
    problem: str = ""
    free: int | None = None


@dataclass(frozen=True)
class Opener:
    """The program that opens the sources of some backends. ``problem``: it does not say what it can open."""

    program: str
    backends: tuple[str, ...]
    version: QsdVersion | None = None
    problem: str = ""
    hint: str = ""
    lacks: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Backend → why its sources cannot be opened, and what to do."""
    only_whole: frozenset[str] = frozenset()
    """Backends whose sources have to be fetched first."""


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
    modules: dict[str, ModuleInfo] = field(default_factory=dict)
    loading: Loading = field(default_factory=Loading)
    run_dir: Directory = Directory("")
    state_dir: Directory = Directory("")
    daemon_version: str = ""
    daemon_problem: str = ""
    daemon_hint: str = ""
    own_version: str = ""
    openers: tuple[Opener, ...] = ()
    curl: bool = True
    """The program curl is installed."""
    rbd: bool = True
    """Ceph's program of that name is there."""
    sandbox: bool = True
    """The configuration lets every QSD be kept to what it needs."""
    landlock: int = 0
    """The version of the kernel's Landlock, 0 where there is none."""
    no_users: str = ""
    """Why QSDs cannot be given users of their own; empty where they can."""


def diagnose(facts: Facts) -> list[Finding]:
    """Return the findings, in the order in which things have to work."""
    return [
        *_installation(facts),
        *_qsd(facts),
        *_backends(facts),
        *_kernel(facts),
        *_directories(facts),
        _sandbox(facts),
        _daemon(facts),
    ]


def diagnose_kernel(
    where: str, config: KernelConfig, verdicts: Sequence[Verdict], transport: str | None = None
) -> list[Finding]:
    """Return what a kernel's configuration, found at ``where``, means for the transports, or for the one named."""
    grave = Status.WARN if works(verdicts, transport) else Status.FAIL
    version = "Linux " + ".".join(map(str, config.version)) if config.version else "of unknown version"
    return [Finding("kernel", Status.INFO, f"{version}, from {where}")] + [
        Finding(
            f"transport {verdict.transport}",
            Status.OK if verdict.possible else grave,
            f"possible; {verdict.detail}" if verdict.possible else verdict.detail,
            verdict.hint,
        )
        for verdict in verdicts
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
    if not facts.rbd:
        yield Finding(
            "rbd", Status.INFO,
            "Ceph's program rbd is not installed: another rbd image of the same name and size would not be noticed",
            "apt install ceph-common, where rbd images are attached",
        )
    if loop_direct_io_is_safe(facts.qsd):
        yield Finding("qsd direct I/O", Status.OK, "loop devices use direct I/O")
    else:
        yield Finding(
            "qsd direct I/O",
            Status.WARN,
            f"{facts.qsd} corrupts what is written to loop devices with direct I/O: they are buffered,"
            " which is much slower and takes page cache twice; but not those that are only read",
            "use QEMU 10.0.10 or a later 10.0, or 11.0 and newer (Debian 13, or backports)",
        )


def _backends(facts: Facts) -> Iterator[Finding]:
    """Which sources can be opened: a line for all that can, and one for each that cannot, or not in each way."""
    for opener in facts.openers:
        if opener.problem:
            yield Finding(
                f"backend {', '.join(opener.backends)}", Status.WARN, f"{opener.program}: {opener.problem}", opener.hint
            )
            continue
        good = [name for name in opener.backends if name not in opener.lacks]
        if good:
            version = f" {opener.version}" if opener.version is not None else ""
            yield Finding(
                f"backends of {opener.program}" if len(facts.openers) > 1 else "backends", Status.OK,
                f"qemu-storage-daemon{version} opens {', '.join(good)}",
            )
        for name in opener.backends:
            if name in opener.lacks:
                yield Finding(f"backend {name}", Status.INFO, *opener.lacks[name])
        if whole := [name for name in good if name in opener.only_whole]:
            yield Finding(
                f"backend {', '.join(whole)}", Status.INFO,
                f"{opener.version} loses requests to it: only with -o fetch=whole",
                "use QEMU 10.0.9 or newer (Debian 13), for these alone by [qsd.binaries] in storaged.toml",
            )
    if facts.openers and not facts.curl:
        yield Finding(
            "backend tftp", Status.INFO, "the program curl, which fetches its sources, is not installed",
            "apt install curl",
        )
    elif facts.openers:
        yield Finding("backend tftp", Status.OK, "curl fetches its sources, and those with -o fetch=whole")


def _kernel(facts: Facts) -> Iterator[Finding]:
    transports = [_transport(facts, needs) for needs in _OTHER_TRANSPORTS]
    # Only what leaves the host without any transport keeps storaged from working.
    grave = Status.WARN if any(finding.status is Status.OK for finding in transports) else Status.FAIL
    if _release(facts.kernel) >= BY_TRANSPORT["fuse"].kernel:
        yield Finding("kernel", Status.OK, facts.kernel)
    else:
        yield Finding(
            "kernel",
            Status.FAIL,
            f"{facts.kernel} has no LOOP_CONFIGURE, which came with 5.8",
            "boot a newer kernel: apt install linux-image-amd64",
        )
    yield _node("fuse", facts.fuse, grave)
    yield _node("loop", facts.loop, grave)
    if facts.loop.module.present and not facts.loop.problem:
        more = "" if facts.free_loops else "; the kernel makes another on request"
        yield Finding(
            "loop devices", Status.OK, f"{facts.free_loops} of {facts.loops} are free{more}"
        )
    yield from transports
    if RIVAL in facts.modules and facts.modules[RIVAL].present:
        yield Finding(
            f"module {RIVAL}", Status.INFO,
            f"it is {facts.modules[RIVAL].state}, and may take new vDPA devices before virtio_vdpa makes disks of them",
            f"if no virtual machine needs it: modprobe -r {RIVAL}",
        )


def _transport(facts: Facts, needs: Needs) -> Finding:
    """What keeps a transport from being possible: the kernel's age, its modules, QSD's age, a library."""
    problems, hints = [], []
    if _release(facts.kernel) < needs.kernel:
        version = ".".join(map(str, needs.kernel))
        problems.append(f"kernel {facts.kernel} is too old, {version} is needed ({needs.because})")
        hints.append("boot a newer kernel: apt install linux-image-amd64")
    modules = [facts.modules[module] for module in needs.modules if module in facts.modules]
    absent = [module for module in modules if module.state in (ModuleState.ABSENT, ModuleState.UNKNOWN)]
    if len({module.hint for module in absent}) == 1 < len(absent):
        # They lack for one reason: say it once.
        problems.append(f"modules {', '.join(module.name for module in absent)} are {absent[0].state}")
        hints.append(absent[0].hint)
        modules = [module for module in modules if module not in absent]
    for module in modules:
        if not module.usable:
            problems.append(str(module))
            hints.append(module.hint)
    least = _MIN_QSD.get(needs.transport)
    if least is not None and facts.qsd is not None and facts.qsd < least:
        problems.append(f"qemu-storage-daemon {facts.qsd} is too old, {least} is needed")
        hints.append("use a newer QEMU (Debian 12 and 13 have it)")
    if needs.transport == "nbd" and not (facts.nbd.version and facts.nbd_is_libnbd):
        problems.append("libnbd's Python module is missing")
        hints.append("apt install python3-libnbd")
    check = f"transport {needs.transport}"
    if problems:
        # Several modules may have the same remedy.
        return Finding(check, Status.INFO, "; ".join(problems), "; ".join(dict.fromkeys(filter(None, hints))))
    waiting = [module for module in modules if not module.present]
    foreign = [module.name for module in waiting if not module.detail.startswith("kernel/")]
    if foreign and (facts.loading.lockdown or facts.loading.signatures):
        return Finding(
            check, Status.WARN,
            f"the kernel takes only signed modules, and {', '.join(foreign)} did not come with it: it may be refused",
            SIGN_HINT,
        )
    if waiting:
        names = ", ".join(module.name for module in waiting)
        return Finding(check, Status.OK, f"possible; an attach loads {names}")
    return Finding(check, Status.OK, "possible; its modules are in the kernel")


def _node(check: str, node: DeviceNode, grave: Status) -> Finding:
    state = node.module.state
    if not node.problem:
        return Finding(check, Status.OK, f"{node.path} can be opened ({state})")
    if state is ModuleState.LOADABLE:
        return Finding(
            check, Status.OK, f"the module is not loaded yet; the daemon does it (modprobe {check})"
        )
    if node.module.present:
        detail, hint = str(state), f"run as root; in a container, pass {node.path} through and allow it"
    else:
        detail = node.module.detail or str(state)
        hint = node.module.hint or f"boot a kernel that has the module {check}, or install its modules package"
    return Finding(check, grave, f"{node.path}: {node.problem} (module: {detail})", hint)


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


def _sandbox(facts: Facts) -> Finding:
    check = "sandbox"
    if not facts.sandbox:
        return Finding(
            check, Status.WARN, "it is switched off: who takes over a qemu-storage-daemon is root",
            "leave sandbox out of [qsd] in storaged.toml",
        )
    if not facts.landlock:
        return Finding(
            check, Status.WARN, "there is no Landlock: a qemu-storage-daemon is not kept to its own files",
            "boot a kernel that has it (Linux 5.13), with landlock among lsm=",
        )
    if facts.no_users and facts.root:
        return Finding(
            check, Status.WARN, f"every qemu-storage-daemon is root: {facts.no_users}",
            "leave them to the daemon's unit or container",
        )
    return Finding(check, Status.OK, f"users of their own, Landlock {facts.landlock}, a filter of system calls")


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


def _release(release: str) -> tuple[int, ...]:
    """Return the leading numbers of a kernel release: 6 and 12 of ``6.12.48+deb13-amd64``."""
    numbers = []
    for part in release.split(".")[:2]:
        digits = part[: len(part) - len(part.lstrip("0123456789"))]
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)
