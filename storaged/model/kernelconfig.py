"""What each transport needs of the kernel's configuration, as a table. Pure.

The table is the only source: the fragments in kernel-config/ are what :func:`fragment` makes of it (a test compares
them), and ``storaged doctor`` and kernel-config/check judge by it.

Names, dependencies and versions are those of the kernel's Kconfig files (drivers/vdpa, drivers/virtio,
drivers/block, fs/fuse).
"""

from __future__ import annotations

import re
import textwrap
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from storaged.errors import ErrorCode, StoragedError

#: No kernel's configuration comes near this (bytes); what a small file unpacks to may be endless.
MAX_CONFIG = 16 << 20
_GZIP = b"\x1f\x8b"


@dataclass(frozen=True)
class Option:
    """One option of the kernel. ``module`` is what it builds as ``m``; empty for what can only be built in."""

    symbol: str
    why: str
    module: str = ""
    debian: str = ""
    """Which Debian kernels have it, where not all do."""
    lets: str = ""
    """The option that cannot be chosen without this one in some kernels. Where that one is set, all is well."""


@dataclass(frozen=True)
class Needs:
    """What a transport needs. ``kernel`` is the first with all of it, and ``because`` says why that one."""

    transport: str
    about: str
    kernel: tuple[int, int]
    because: str
    options: tuple[Option, ...]
    notes: tuple[str, ...] = ()
    device: bool = True
    """It makes a block device of the host."""

    @property
    def modules(self) -> tuple[str, ...]:
        """The kernel modules of the transport, each after those that it needs."""
        return tuple(option.module for option in self.options if option.module)


_DEBIAN_13 = "Debian 13's has it; for Debian 12's 6.1 there is the package storaged-vduse-dkms"
_NET = Option("NET", "netlink and sockets; what follows depends on it")
_UNIX = Option("UNIX", "the sockets between QSD and whoever uses its export")
_BLOCK = Option("BLOCK", "disks")
_BLK_DEV = Option("BLK_DEV", "the menu of drivers for disks")
_EVENTFD = Option("EVENTFD", "how QSD and the other side wake each other")

#: In the order in which ``auto`` tries them.
NEEDS = (
    Needs(
        "vduse", "a virtio disk of the host, served by QSD; QSD can be replaced under running I/O",
        kernel=(5, 15), because="VDUSE came with it",
        options=(
            _NET, _BLOCK, _BLK_DEV, _EVENTFD,
            # drivers/vdpa/Kconfig, arch/x86/Kconfig and arch/arm64/Kconfig of 6.12: ARCH_HAS_DMA_OPS.
            Option("HYPERVISOR_GUEST", "x86: the menu that PARAVIRT is in", lets="VDPA_USER"),
            Option("PARAVIRT", "x86: XEN depends on it", lets="VDPA_USER"),
            Option("XEN", "x86 and arm64: without it Linux 6.12 offers no VDPA_USER", lets="VDPA_USER"),
            Option("VIRTIO_MENU", "the menu that VIRTIO_VDPA is in"),
            Option("VDPA", "the bus that vDPA devices are on", "vdpa", _DEBIAN_13),
            Option("VDPA_USER", "vDPA devices that a process serves (VDUSE)", "vduse", _DEBIAN_13),
            Option("VIRTIO_VDPA", "makes a virtio device of a vDPA device", "virtio_vdpa", _DEBIAN_13),
            Option("VIRTIO_BLK", "makes a disk of a virtio device", "virtio_blk"),
        ),
        notes=(
            "VDPA_USER also depends on MMU and HAS_DMA, which nobody can choose, and in Linux 6.12 and some later on"
            " ARCH_HAS_DMA_OPS: x86 and arm64 have that with XEN only (nothing of Xen need be there at run time).",
            "VHOST_VDPA is not needed. Where its module vhost_vdpa is loaded too, it may take a new vDPA device before"
            " virtio_vdpa does, and then there is no disk: better leave it out.",
        ),
    ),
    Needs(
        "nbd", "a disk of the kernel's NBD client, connected to QSD by a unix socket",
        kernel=(5, 14), because="an NBD device can bear an identifier of its server since then",
        options=(_NET, _UNIX, _BLOCK, _BLK_DEV, Option("BLK_DEV_NBD", "the kernel's NBD client", "nbd")),
    ),
    Needs(
        "fuse", "a file that QSD shows through FUSE, and a loop device on it",
        kernel=(5, 8), because="LOOP_CONFIGURE came with it",
        options=(
            _BLOCK, _BLK_DEV,
            Option("FUSE_FS", "the file through which QSD shows the disk", "fuse"),
            Option("BLK_DEV_LOOP", "makes a disk of that file", "loop"),
        ),
    ),
    Needs(
        "vhost-user", "a socket for a virtual machine, and no device of the host",
        kernel=(5, 3), because="storaged watches processes by pidfd",
        options=(
            _NET, _UNIX, _EVENTFD, Option("SHMEM", "TMPFS depends on it"),
            Option("TMPFS", "memory of the virtual machine that QSD can map too (with it comes memfd_create)"),
        ),
        notes=("Nearly every kernel has all of it. The driver of the disk is in the virtual machine: VIRTIO_BLK.",),
        device=False,
    ),
)
BY_TRANSPORT = {needs.transport: needs for needs in NEEDS}
#: The option that builds each module.
OPTION_OF_MODULE = {option.module: option for needs in NEEDS for option in needs.options if option.module}


@dataclass(frozen=True)
class KernelConfig:
    """A kernel's configuration, as in /proc/config.gz or /boot/config-*."""

    text: str

    @cached_property
    def version(self) -> tuple[int, int] | None:
        """The version in the comment at the top, None if there is none."""
        found = re.search(r"^# Linux\S* (\d+)\.(\d+)\S* Kernel Configuration", self.text[:4096], re.MULTILINE)
        return (int(found[1]), int(found[2])) if found else None

    def value(self, symbol: str) -> str:
        """Return an option's value, ``n`` where it is not set or not there. ``symbol`` is without CONFIG_."""
        # The last one counts, as for the kernel's own conf: fragments are appended.
        found = re.findall(rf"^(?:CONFIG_{symbol}=(.*)|# CONFIG_{symbol} is not set)\r?$", self.text, re.MULTILINE)
        return (found[-1].strip() or "n") if found else "n"


@dataclass(frozen=True)
class Missing:
    """An option that a kernel lacks."""

    symbol: str
    why: str
    hint: str


@dataclass(frozen=True)
class Verdict:
    """What a kernel's configuration makes of a transport. ``modules`` are those that have to be loaded for it."""

    transport: str
    possible: bool
    detail: str
    hint: str
    missing: tuple[Missing, ...] = ()
    modules: tuple[str, ...] = ()


def parse_config(text: str) -> KernelConfig:
    """Return the configuration in ``text``. Raises INVALID_ARGUMENT when it is none."""
    if not re.search(r"^(# )?CONFIG_\w+(=| is not set)", text, re.MULTILINE):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "this is no configuration of a kernel",
            cause="no line in it begins with CONFIG_",
            hint="take /boot/config-VERSION, /proc/config.gz or the .config of a kernel's build",
        )
    return KernelConfig(text)


def decode_config(data: bytes) -> KernelConfig:
    """Return the configuration in a file's content, packed by gzip or not. Raises INVALID_ARGUMENT."""
    if data.startswith(_GZIP):
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            data = unpacker.decompress(data, MAX_CONFIG)
        except zlib.error as error:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "this is no configuration of a kernel",
                cause=f"it cannot be unpacked: {error}",
            ) from error
    return parse_config(data[:MAX_CONFIG].decode(errors="replace"))


def check(config: KernelConfig, transport: str | None = None) -> list[Verdict]:
    """Return what this kernel can do of each transport, in the order of NEEDS, or of the one that is named."""
    return [_check(needs, config) for needs in NEEDS if transport in (None, needs.transport)]


def works(verdicts: Sequence[Verdict], transport: str | None = None) -> bool:
    """Say whether ``transport`` is possible; if none is named, whether any that makes a device of the host is."""
    return any(
        verdict.possible
        for verdict in verdicts
        if verdict.transport == transport or (transport is None and BY_TRANSPORT[verdict.transport].device)
    )


def fragment(needs: Needs) -> str:
    """Return what a transport needs as a fragment for the kernel's scripts/kconfig/merge_config.sh.

    No comment in it begins with the name of an option: merge_config.sh of older kernels takes such a line for one.
    """
    major, minor = needs.kernel
    lines = [
        *_comment(
            f"What storaged's transport {needs.transport} needs of the kernel: Linux {major}.{minor} or newer"
            f" ({needs.because})."
        ),
        *_comment(f"The transport: {needs.about}."),
        "#",
        "# storaged/model/kernelconfig.py is where this is written; kernel-config/check --fragment prints it.",
        "# In the kernel's source, where .config is the configuration to add this to:",
        f"#   scripts/kconfig/merge_config.sh -m -y .config PATH/kernel-config/{needs.transport}.config",
        "#   make olddefconfig",
    ]
    for note in needs.notes:
        lines += ["#", *_comment(note)]
    for option in needs.options:
        why = option.why[0].upper() + option.why[1:]
        lines += ["", *_comment(f"{why}." + (f" The module: {option.module}." if option.module else ""))]
        lines.append(f"CONFIG_{option.symbol}={'m' if option.module else 'y'}")
    return "\n".join(lines) + "\n"


def _check(needs: Needs, config: KernelConfig) -> Verdict:
    values = {option: config.value(option.symbol) for option in needs.options}
    unset = {option.symbol for option, value in values.items() if value not in ("y", "m")}
    missing = tuple(
        Missing(f"CONFIG_{option.symbol}", option.why, option.debian)
        for option in needs.options
        if option.symbol in unset and (not option.lets or option.lets in unset)
    )
    modules = tuple(option.module for option, value in values.items() if value == "m" and option.module)
    major, minor = needs.kernel
    problems, hints = [], []
    if config.version is not None and config.version < needs.kernel:
        version = ".".join(map(str, config.version))
        problems.append(f"Linux {version} is too old, {major}.{minor} is needed ({needs.because})")
        hints.append(f"use Linux {major}.{minor} or newer")
    if missing:
        problems.append("not set: " + ", ".join(lack.symbol for lack in missing))
        hints.append(f"build a kernel with kernel-config/{needs.transport}.config")
        hints += dict.fromkeys(lack.hint for lack in missing if lack.hint)
    if problems:
        return Verdict(needs.transport, False, "; ".join(problems), "; ".join(hints), missing, modules)
    detail = "modules: " + ", ".join(modules) if modules else "all is built in"
    return Verdict(needs.transport, True, detail, "", (), modules)


def _comment(text: str) -> Iterator[str]:
    return (f"# {line}" for line in textwrap.wrap(text, 98, break_on_hyphens=False))
