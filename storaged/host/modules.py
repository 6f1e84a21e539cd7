"""Kernel modules of the running kernel: look at them, and load one when it is asked for by name.

``state`` starts no process and loads nothing; ``load`` is the only place of storaged that loads a module.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path

from storaged.errors import ErrorCode, StoragedError
from storaged.model import modules
from storaged.model.kernelconfig import OPTION_OF_MODULE, KernelConfig, decode_config
from storaged.model.modules import Loading, ModuleInfo, ModuleState, Refusal

__all__ = ["Loading", "ModuleInfo", "ModuleState", "kernel_config", "load", "loading", "state"]

#: Where modprobe reads its configuration, the first wins (modprobe.d(5), libkmod's default_config_paths).
_MODPROBE_D = (
    "etc/modprobe.d", "run/modprobe.d", "usr/local/lib/modprobe.d", "usr/lib/modprobe.d", "lib/modprobe.d",
)
#: Seconds that a killed modprobe is waited for. One that hangs in the kernel does not die, and is left behind.
_KILLED = 1.0


def state(name: str, *, root: str = "/", release: str | None = None) -> ModuleInfo:
    """Say where a module of the running kernel is, and what keeps it out. Changes nothing, and loads nothing.

    Takes a few milliseconds at most. ``root`` is the directory below which all files are looked for, ``release`` the
    kernel's (``uname -r``).
    """
    name = modules.normalise(name)
    release = os.uname().release if release is None else release
    base = Path(root)
    if _loaded(name, base):
        return ModuleInfo(name, ModuleState.LOADED)
    directory = _directory(base, release)
    here = base / "sys/module" / name
    # /sys/module lists built-in modules too, those that have parameters; only loaded ones have an initstate.
    if here.is_dir() and not (here / "initstate").exists():
        return ModuleInfo(name, ModuleState.BUILTIN)
    if modules.builtin(name, _bytes(directory / "modules.builtin")):
        return ModuleInfo(name, ModuleState.BUILTIN)
    found = modules.dependencies(name, _bytes(directory / "modules.dep"))
    if found is None:
        return _not_installed(name, base, release, directory)
    path, needed = found
    if _text(base / "proc/sys/kernel/modules_disabled").strip() == "1":
        return modules.disabled(name)
    refusals = list(_refusals(base))
    for module in (name, *needed):
        refusal = modules.refusal_of(module, refusals)
        if refusal is not None and not _loaded(module, base):
            return modules.refused(name, module, refusal)
    return ModuleInfo(name, ModuleState.LOADABLE, path)


def load(
    name: str,
    *,
    parameters: Mapping[str, str] | None = None,
    timeout: float = 30.0,
    root: str = "/",
    release: str | None = None,
    modprobe: str = "modprobe",
) -> None:
    """Load a module and what it needs, unless it is there already (then ``parameters`` have no effect).

    Blocks for ``timeout`` seconds at most; modprobe(8) is killed then. Raises TRANSPORT_UNAVAILABLE with the cause
    (not there, kept out by the administrator, refused by the kernel, …), TIMEOUT.
    """
    name = modules.normalise(name)
    release = os.uname().release if release is None else release
    info = state(name, root=root, release=release)
    if info.present:
        return
    if not info.usable and info.state is not ModuleState.UNKNOWN:  # where nothing tells, modprobe may know
        raise _failure(name, info.detail or f"it is {info.state}", info.hint)
    arguments = [f"{key}={value}" for key, value in (parameters or {}).items()]
    try:
        status, said = _run([modprobe, "-b", "--", name, *arguments], timeout)
    except FileNotFoundError as error:
        raise _failure(name, f"{modprobe} is not installed", "apt install kmod") from error
    except OSError as error:
        raise _failure(name, f"{modprobe}: {error.strerror}", "apt install --reinstall kmod") from error
    if status:
        file = _directory(Path(root), release) / info.detail
        if "Unknown symbol" in said and info.state is ModuleState.LOADABLE and not file.exists():
            # ENOENT by init_module(2) would be a symbol; here there was nothing to give to it.
            raise _failure(name, f"its file {file} is gone", modules.how_to_get(name, release, configured="m"))
        raise _failure(name, *modules.explain_failure(name, said, release, loading(root=root)))
    # With -b modprobe says nothing, and succeeds, when something blacklists the module; and so does an install line
    # that does something else.
    if not state(name, root=root, release=release).present:
        raise _failure(
            name, "modprobe says that it worked, but the module is not in the kernel",
            "something in modprobe's configuration keeps it out; modprobe --showconfig shows it",
        )


def loading(*, root: str = "/") -> Loading:
    """Say how choosy the running kernel is about modules: kernel_lockdown(7), module.sig_enforce, modules_disabled."""
    base = Path(root)
    return Loading(
        lockdown=modules.parse_lockdown(_text(base / "sys/kernel/security/lockdown")),
        signatures=_text(base / "sys/module/module/parameters/sig_enforce").strip() == "Y",
        disabled=_text(base / "proc/sys/kernel/modules_disabled").strip() == "1",
    )


def kernel_config(release: str, *, root: str = "/", running: bool = True) -> tuple[str, KernelConfig] | None:
    """Return where a kernel's configuration is installed, and the configuration; None when it is not.

    ``running`` says that it is the kernel that runs, which may tell itself (CONFIG_IKCONFIG_PROC).
    """
    base = Path(root)
    places = [
        base / "boot" / f"config-{release}",
        base / "lib/modules" / release / "config",  # Fedora
        base / "usr/lib/modules" / release / "config",
        base / "lib/modules" / release / "build/.config",  # the headers are installed
    ]
    if running:
        places.append(base / "proc/config.gz")
    for path in places:
        data = _bytes(path)
        if data:
            with contextlib.suppress(StoragedError):  # a damaged one is as good as none: look further
                return str(path), decode_config(data)
    return None


def _not_installed(name: str, base: Path, release: str, directory: Path) -> ModuleInfo:
    """Neither listed as built in nor as loadable: the kernel's configuration may know more."""
    option = OPTION_OF_MODULE.get(name)
    found = kernel_config(release, root=str(base)) if option else None
    if option and found:
        value = found[1].value(option.symbol)
        if value == "y":
            return ModuleInfo(name, ModuleState.BUILTIN)
        if value == "m":
            detail = f"kernel {release} has it as a module, but its file is not installed in /lib/modules/{release}"
        else:
            value, detail = "n", f"kernel {release} was built without CONFIG_{option.symbol}"
        return ModuleInfo(name, ModuleState.ABSENT, detail, modules.how_to_get(name, release, configured=value))
    hint = modules.how_to_get(name, release)
    if directory.is_dir():
        return ModuleInfo(name, ModuleState.ABSENT, f"kernel {release} has no such module installed", hint)
    detail = f"neither the modules nor the configuration of kernel {release} are installed here"
    return ModuleInfo(name, ModuleState.UNKNOWN, detail, f"in a container, modprobe {name} on the host; else {hint}")


def _refusals(base: Path) -> Iterator[Refusal]:
    """What the administrator keeps out, in the order in which modprobe reads it."""
    files: dict[str, Path] = {}
    for place in _MODPROBE_D:
        with contextlib.suppress(OSError):
            for entry in os.scandir(base / place):
                # A file masks those of its name in later directories, also when it is empty or /dev/null.
                if entry.name.endswith(".conf") and not entry.name.startswith(".") and not entry.is_dir():
                    files.setdefault(entry.name, Path(entry.path))
    for _, path in sorted(files.items()):
        yield from modules.parse_modprobe_d(_text(path), str(path))
    yield from modules.parse_command_line(_text(base / "proc/cmdline"))


def _run(command: list[str], timeout: float) -> tuple[int, str]:
    """Run a program, return its exit status and what it wrote to stderr. Raises TIMEOUT, OSError."""
    environment = {key: value for key, value in os.environ.items() if key != "MODPROBE_OPTIONS"} | {"LC_ALL": "C"}
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=environment,
        start_new_session=True,  # install lines run shells, which must go with it
    )
    try:
        _, said = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(_KILLED)
        raise StoragedError(
            ErrorCode.TIMEOUT, f"{' '.join(command)} did not end within {timeout:g} s",
            hint="dmesg says whether the kernel hangs in the module",
        ) from None
    finally:
        if child.stderr is not None:
            child.stderr.close()
    return child.returncode, said.decode(errors="replace")


def _failure(name: str, cause: str, hint: str) -> StoragedError:
    return StoragedError(
        ErrorCode.TRANSPORT_UNAVAILABLE, f"the kernel module {name} cannot be loaded", cause=cause, hint=hint
    )


def _loaded(name: str, base: Path) -> bool:
    # "coming" and "going" are not there yet, or no longer; modprobe waits for them.
    return _text(base / "sys/module" / name / "initstate").strip() == "live"


def _directory(base: Path, release: str) -> Path:
    """Where modules are installed: some distributions have no /lib any more."""
    directory = base / "lib/modules" / release
    other = base / "usr/lib/modules" / release
    return other if other.is_dir() and not directory.is_dir() else directory


def _text(path: Path) -> str:
    return _bytes(path).decode(errors="replace")


def _bytes(path: Path) -> bytes:
    """Return a file's content, nothing if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError:
        return b""
