"""``storaged doctor``: what this host and this installation can do. Works without the daemon."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence

import storaged
from storaged.api.client import Client
from storaged.backends import BACKENDS
from storaged.errors import ErrorCode, StoragedError
from storaged.host import landlock, modules, probe, sandbox
from storaged.model.diagnosis import MODULES, Facts, Finding, Opener, Status, diagnose, diagnose_kernel
from storaged.model.kernelconfig import MAX_CONFIG, KernelConfig, Verdict, check, decode_config
from storaged.model.layout import Layout
from storaged.model.powers import LAST_USER
from storaged.qsd.build import build_of
from storaged.qsd.drivers import drivers_of, reads_only_whole
from storaged.qsd.process import find_binary

_DAEMON_DEADLINE = 5.0


def examine(layout: Layout, command: str = "storaged") -> list[Finding]:
    """Look at everything and return the findings. ``command`` is how the hints call storaged."""
    return diagnose(gather(layout, command))


def exit_status(findings: Sequence[Finding]) -> int:
    """Return 1 when something keeps storaged from working, else 0."""
    return int(any(finding.status is Status.FAIL for finding in findings))


def examine_kernel(what: str, transport: str | None = None) -> tuple[list[Finding], list[Verdict]]:
    """Judge a kernel's configuration: all transports, or the one that is named.

    ``what`` is a file (packed by gzip or not), ``-`` for stdin, the release of an installed kernel (``uname -r``), or
    empty for the kernel that runs. Raises INVALID_ARGUMENT.
    """
    where, config = _kernel_config(what)
    verdicts = check(config, transport)
    return diagnose_kernel(where, config, verdicts, transport), verdicts


def gather(layout: Layout, command: str = "storaged") -> Facts:
    """Return the facts of this host."""
    binary, binaries, sandboxed, config_problem = _configured_qsd(layout)
    qsd_path, qsd_output, qsd = probe.qsd(binary)
    nbd, nbd_is_libnbd = probe.libnbd()
    free_loops, loops = probe.loop_devices()
    daemon_version, daemon_problem, daemon_hint = _daemon(layout, command)
    return Facts(
        root=os.geteuid() == 0,
        python=(sys.version_info.major, sys.version_info.minor, sys.version_info.micro),
        libraries=probe.libraries(),
        nbd=nbd,
        nbd_is_libnbd=nbd_is_libnbd,
        config_file=layout.config_file,
        config_problem=config_problem,
        qsd_binary=binary,
        qsd_path=qsd_path,
        qsd_output=qsd_output,
        qsd=qsd,
        kernel=os.uname().release,
        fuse=probe.device_node("/dev/fuse", "fuse", "fuse"),
        loop=probe.device_node("/dev/loop-control", "loop", "loop-control"),
        free_loops=free_loops,
        loops=loops,
        modules={module: modules.state(module) for module in MODULES},
        loading=modules.loading(),
        run_dir=probe.directory(layout.run_dir),
        state_dir=probe.directory(layout.state_dir),
        daemon_version=daemon_version,
        daemon_problem=daemon_problem,
        daemon_hint=daemon_hint,
        own_version=storaged.__version__,
        openers=_openers(binary, binaries) if qsd is not None or binaries else (),
        curl=shutil.which("curl") is not None,
        rbd=shutil.which("rbd") is not None,
        sandbox=sandboxed,
        landlock=landlock.abi(),
        no_users=sandbox.lacking(LAST_USER),
    )


def _openers(binary: str, binaries: Mapping[str, str]) -> tuple[Opener, ...]:
    """Ask each program that opens sources which ones it can open."""
    backends: dict[str, list[str]] = {}
    for name in BACKENDS:
        if name != "tftp":  # curl's
            backends.setdefault(binaries.get(name, binary), []).append(name)
    return tuple(_opener(program, tuple(names)) for program, names in backends.items())


def _opener(program: str, backends: tuple[str, ...]) -> Opener:
    try:
        path = find_binary(program)
        version, found = build_of(path).version, drivers_of(path)
    except StoragedError as error:
        return Opener(program, backends, problem=error.cause or error.message, hint=error.hint)
    lacks = {name: (lack.message, lack.hint) for name in backends if (lack := found[name]) is not None}
    return Opener(
        program, backends, version, lacks=lacks,
        only_whole=frozenset(name for name in backends if reads_only_whole(name, version)),
    )


def _kernel_config(what: str) -> tuple[str, KernelConfig]:
    if what == "-":
        return "stdin", decode_config(sys.stdin.buffer.read(MAX_CONFIG))
    if "/" in what or os.path.isfile(what):
        try:
            with open(what, "rb") as file:
                return what, decode_config(file.read(MAX_CONFIG))
        except OSError as error:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{what} cannot be read", cause=error.strerror or str(error)
            ) from error
        except StoragedError as error:
            error.message = f"{what}: {error.message}"
            raise
    running = os.uname().release
    found = modules.kernel_config(what or running, running=what in ("", running))
    if found is None:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"no configuration of kernel {what or running} is installed",
            cause=f"there is no /boot/config-{what or running}, and none in /lib/modules/{what or running}",
            hint="name the file",
        )
    return found


def _configured_qsd(layout: Layout) -> tuple[str, Mapping[str, str], bool, str]:
    """Return the QSD that the configuration names, those of some backends, whether they are kept in a sandbox, and what
    is wrong with the configuration.
    """
    default = "qemu-storage-daemon"
    try:
        from storaged.host.configfiles import load_config
    except ImportError:  # msgspec is missing, which is a finding of its own
        return default, {}, True, ""
    try:
        qsd = load_config(layout, None).qsd
        return qsd.binary, qsd.binaries, qsd.sandbox, ""
    except StoragedError as error:
        return default, {}, True, error.cause or error.message


def _daemon(layout: Layout, command: str) -> tuple[str, str, str]:
    """Return the daemon's version, or why it does not answer, and what to do."""
    try:
        with Client(layout.socket, command=command) as client:
            info = client.call("org.varlink.service.GetInfo", timeout=_DAEMON_DEADLINE)
    except StoragedError as error:
        return "", f"{error.message}: {error.cause}" if error.cause else error.message, error.hint
    return str(info.get("version") or "unknown"), "", ""
