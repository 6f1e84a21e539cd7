"""Kernel modules: what the installed files, the administrator and modprobe say of them. Pure.

storaged/host/modules.py reads the files and runs modprobe; storaged/model/kernelconfig.py knows which options of
the kernel's configuration build which module.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from storaged.model.kernelconfig import NEEDS, OPTION_OF_MODULE

#: What to do about a module that the kernel does not take, as under Secure Boot.
SIGN_HINT = (
    "install the module from the distribution's kernel package, which is signed; or sign it with a key that the machine"
    " knows (mokutil --import, then reboot); or switch Secure Boot off"
)


class ModuleState(StrEnum):
    """Where the code of a kernel module is."""

    BUILTIN = "built in"
    LOADED = "loaded"
    LOADABLE = "loadable"
    BLACKLISTED = "blacklisted"
    """It could be loaded, and the administrator does not want that."""
    ABSENT = "absent"
    UNKNOWN = "unknown"
    """Nothing tells: neither modules nor a configuration of this kernel are installed, as in a container."""


@dataclass(frozen=True)
class ModuleInfo:
    """A module of the running kernel: ``detail`` says more about the state, ``hint`` what to do (may be empty)."""

    name: str
    state: ModuleState
    detail: str = ""
    hint: str = ""

    @property
    def present(self) -> bool:
        """It is in the kernel now."""
        return self.state in (ModuleState.BUILTIN, ModuleState.LOADED)

    @property
    def usable(self) -> bool:
        """It is in the kernel, or may be loaded (which can still fail: the kernel may refuse it)."""
        return self.present or self.state is ModuleState.LOADABLE

    def __str__(self) -> str:
        return f"module {self.name} is {self.state}" + (f": {self.detail}" if self.detail else "")


@dataclass(frozen=True)
class Refusal:
    """What the administrator wrote to keep a module out, and where."""

    pattern: str
    text: str
    where: str

    def matches(self, name: str) -> bool:
        """The names of ``install`` lines may be patterns (libkmod's kmod_module_get_install_commands)."""
        return fnmatch.fnmatchcase(name, self.pattern)


@dataclass(frozen=True)
class Loading:
    """What decides whether the kernel takes modules at all.

    ``lockdown`` is kernel_lockdown(7)'s mode, empty when there is none; ``signatures`` is the parameter
    module.sig_enforce; ``disabled`` is the sysctl kernel.modules_disabled.
    """

    lockdown: str = ""
    signatures: bool = False
    disabled: bool = False


def normalise(name: str) -> str:
    """Return the name as the kernel has it: ``-`` and ``_`` are the same, the kernel uses ``_``."""
    return name.replace("-", "_")


def builtin(name: str, listing: bytes) -> bool:
    """Say whether ``name`` is in the text of modules.builtin (one path per line)."""
    return any(True for _ in _find(name, listing))


def dependencies(name: str, listing: bytes) -> tuple[str, list[str]] | None:
    """Return a module's file and the names of all modules that it needs, as modules.dep has them (depmod(8)).

    None when it is not listed. The listing has all of them, not only the nearest.
    """
    for start, end in _find(name, listing):
        path, colon, needed = listing[start:end].decode(errors="replace").partition(":")
        if colon and normalise(path.rpartition("/")[2]).startswith(f"{normalise(name)}.ko"):
            return path, [_name_of(one) for one in needed.split()]
    return None


def parse_modprobe_d(text: str, path: str) -> Iterator[Refusal]:
    """Return the lines of a file in modprobe.d(5) that keep a module out.

    ``blacklist X`` alone would only keep modprobe from loading X by an alias. Who wrote it does not want the module;
    storaged takes it so, and asks modprobe to do the same (``-b``).
    """
    for number, line in _logical_lines(text):
        words = line.split(None, 2)
        if len(words) > 1 and words[0] == "blacklist":
            # Not a pattern: libkmod compares these names as they are.
            yield Refusal(_literal(normalise(words[1])), f"blacklist {words[1]}", f"{path} line {number}")
        elif len(words) > 2 and words[0] == "install" and _does_nothing(words[2]):
            yield Refusal(normalise(words[1]), f"install {words[1]} {words[2]}", f"{path} line {number}")


def parse_command_line(text: str) -> Iterator[Refusal]:
    """Return what the kernel's command line keeps out: modprobe.blacklist= (kmod) and module_blacklist= (the kernel).

    Documentation/admin-guide/kernel-parameters.txt; modprobe(8).
    """
    for word in re.findall(r'(?:[^\s"]|"[^"]*")+', text):
        key, equals, value = word.replace('"', "").partition("=")
        if equals and normalise(key) in ("modprobe.blacklist", "module_blacklist"):
            for name in filter(None, value.split(",")):
                yield Refusal(_literal(normalise(name)), f"{key}={name}", "the kernel's command line")


def refusal_of(name: str, refusals: Iterable[Refusal]) -> Refusal | None:
    """Return the first refusal that is about ``name``."""
    return next((refusal for refusal in refusals if refusal.matches(normalise(name))), None)


def parse_lockdown(text: str) -> str:
    """Return the mode of /sys/kernel/security/lockdown, ``none [integrity] confidentiality``; empty for none."""
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found and found[1] != "none" else ""


def how_to_get(name: str, release: str, *, configured: str = "") -> str:
    """Return what to do about a module that is not there. ``configured``: y, m or n in the configuration, or empty.

    The same for all modules of a transport, as far as that can be, so that it need be said only once.
    """
    install = f"apt install linux-image-{release} (Ubuntu: linux-modules-extra-{release})"
    if configured == "m":
        return f"{install}; if the kernel was upgraded since the last boot, reboot"
    option = OPTION_OF_MODULE.get(name)
    boot = f"boot a kernel with the module {name}"
    if option:
        transport = next(needs.transport for needs in NEEDS if name in needs.modules)
        boot = f"boot a kernel that has what kernel-config/{transport}.config asks for"
        if option.debian:
            boot += f" ({option.debian})"
    return boot if configured == "n" else f"{boot}, or install its modules: {install}"


def explain_failure(name: str, stderr: str, release: str, loading: Loading) -> tuple[str, str]:
    """Return the cause and the hint for what modprobe said when it failed (tools/modprobe.c of kmod, strerror(3))."""
    said = " ".join(stderr.split())
    installed = re.search(r"Error running install command (?:'(.*?)' )?", said)
    if "not found in" in said:
        return f"there is no module {name} for kernel {release}", how_to_get(name, release)
    if "Key was rejected by service" in said or "Required key not available" in said:
        # module_sig_check() in kernel/module/signing.c: unsigned, or by a key that the kernel does not know.
        return (
            f"the kernel takes only modules that are signed by a key it knows ({_guard(loading)}): {said}", SIGN_HINT
        )
    if "Operation not permitted" in said:
        if loading.disabled:
            return _DISABLED
        if loading.lockdown or loading.signatures:
            return f"the kernel does not take this module ({_guard(loading)}): {said}", SIGN_HINT
        return (
            f"the kernel does not let this process load modules: {said}",
            "run the daemon as root and with CAP_SYS_MODULE; in a container, load the module on the host:"
            f" modprobe {name}",
        )
    if installed:
        return (
            f"the install line for it in modprobe's configuration failed: {said}",
            "correct that line; modprobe --showconfig shows it",
        )
    if "Function not implemented" in said:
        return "this kernel cannot load modules (CONFIG_MODULES is not set)", how_to_get(name, release, configured="n")
    if any(text in said for text in ("Exec format error", "Invalid module format", "Unknown symbol", "Bad message")):
        return (
            f"the module's file does not fit the running kernel {release}: {said}",
            "dmesg says more; if the kernel was upgraded since the last boot, reboot; build DKMS modules anew:"
            " dpkg-reconfigure storaged-vduse-dkms",
        )
    return said or "modprobe failed and said nothing", "dmesg may say more"


def refused(name: str, needed: str, refusal: Refusal) -> ModuleInfo:
    """Return the info of a module that is kept out, itself or by what it needs."""
    why = f"{refusal.where} says: {refusal.text}"
    if needed != name:
        why = f"it needs {needed}, and {why}"
    return ModuleInfo(name, ModuleState.BLACKLISTED, why, "remove that if storaged may use the module")


def disabled(name: str) -> ModuleInfo:
    """Return the info of a module that cannot be loaded because nothing can until the next boot."""
    return ModuleInfo(name, ModuleState.BLACKLISTED, *_DISABLED)


#: /proc/sys/kernel/modules_disabled, Documentation/admin-guide/sysctl/kernel.rst: it cannot be set back.
_DISABLED = (
    "loading modules is switched off until the next boot (sysctl kernel.modules_disabled is 1)",
    "load it before that is set, with a file in /etc/modules-load.d, and reboot",
)


def _guard(loading: Loading) -> str:
    """Name what makes the kernel choosy."""
    found = []
    if loading.lockdown:
        found.append(f"lockdown: {loading.lockdown}, as with Secure Boot")
    if loading.signatures:
        found.append("module.sig_enforce is on")
    return ", ".join(found) or "its signature is checked"


def _logical_lines(text: str) -> Iterator[tuple[int, str]]:
    """Join lines that end in a backslash; the number is that of the first (getline_wrapped in kmod)."""
    start, joined = 0, ""
    for number, line in enumerate(text.split("\n"), 1):
        start = start if joined else number
        if line.endswith("\\"):
            joined += line[:-1] or " "
            continue
        yield start, joined + line
        joined = ""
    if joined:
        yield start, joined


def _does_nothing(command: str) -> bool:
    """``install X /bin/false`` and its kin: hardening guides use them to keep a module out for good."""
    word = command.split(None, 1)[0]
    return word.rpartition("/")[2] in ("false", "true", ":", "exit")


def _literal(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _find(name: str, listing: bytes) -> Iterator[tuple[int, int]]:
    """Return where each line begins and ends that has a path to the module ``name`` in it.

    The listing has a megabyte and is asked for often. A regular expression takes ten times as long.
    """
    flat = listing.replace(b"-", b"_")  # as long as before, so that places stay the same
    needle = normalise(name).encode() + b".ko"
    place = flat.find(needle)
    while place >= 0:
        if flat[place - 1 : place] in (b"", b"/", b"\n"):
            end = flat.find(b"\n", place)
            yield flat.rfind(b"\n", 0, place) + 1, len(flat) if end < 0 else end
        place = flat.find(needle, place + 1)


def _name_of(path: str) -> str:
    return normalise(path.rpartition("/")[2].partition(".ko")[0])
