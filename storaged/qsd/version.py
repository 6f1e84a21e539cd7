"""Which qemu-storage-daemon this is, and which of its known bugs it has. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

_VERSION = re.compile(r"version (\d+)\.(\d+)\.(\d+)")


class QsdVersion(NamedTuple):
    """A QEMU release, ordered."""

    major: int
    minor: int
    micro: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.micro}"


def parse_version(text: str) -> QsdVersion | None:
    """Return the version from the output of ``qemu-storage-daemon --version``, None if there is none."""
    match = _VERSION.search(text)
    return QsdVersion(*map(int, match.groups())) if match else None


def loop_direct_io_is_safe(version: QsdVersion) -> bool:
    """Whether this QSD's FUSE export keeps data intact under a loop device with direct I/O.

    Older ones overwrite the buffer of a request while it is in flight: measured with 7.2 and 10.0.2 (wrong
    blocks), and not seen with 10.0.13 and 11.1. Debian's changelog names the fix ("fuse: Copy write buffer
    content before polling") from 10.0.10 in the 10.0 series.
    """
    if version[:2] == (10, 0):
        return version.micro >= 10
    return version.major >= 11


def fuse_has_threads(version: QsdVersion) -> bool:
    """Whether this QSD's FUSE export can be served by several I/O threads.

    BlockExportIothreads is in QAPI since 10.1; that FUSE takes it was seen with 11.1.3 (block/export/fuse.c), and not
    with 10.0.13.
    """
    return version.major >= 11


def curl_loses_requests(version: QsdVersion) -> bool:
    """Whether of several requests of http, https, ftp or ftps that end at once all but one wait for ever.

    Measured with 7.2.22: reads of a device hang within a second (curl_multi_check_completion in block/curl.c leaves
    its loop after the first). "block/curl: fix concurrent completion handling" is in 10.0.9 of the 10.0 series; which
    release of 10.1 and 10.2 has it is not known.
    """
    if version[:2] == (10, 0):
        return version.micro < 9
    return version.major < 11


def aborts_with_iothread(version: QsdVersion) -> bool:
    """Whether this QSD aborts when an I/O thread ends, which it does at ``quit``.

    Seen with 7.2.22: "qemu_mutex_destroy: Device or resource busy", after everything was closed; not with 10.0.13.
    """
    return version.major < 10


@dataclass(frozen=True)
class Build:
    """A qemu-storage-daemon program: its release, and what it was built with."""

    version: QsdVersion
    exports: frozenset[str]
    """The types of --export that it knows."""
    vduse_serial: bool = False
    """vduse-blk has an option for the disk's serial number."""


_EXPORT_TYPE = re.compile(r"--export \[type=\]([a-z-]+)(.*?)(?=--export|\n\n|\Z)", re.DOTALL)


def parse_build(version: str, help: str) -> Build | None:
    """Return the build from the output of ``--version`` and ``--help`` (storage-daemon/qemu-storage-daemon.c in QEMU).

    What was not compiled in is not in the help. None where there is no version.
    """
    release = parse_version(version)
    if release is None:
        return None
    types = dict(_EXPORT_TYPE.findall(help))
    return Build(release, frozenset(types), vduse_serial="serial=" in types.get("vduse-blk", ""))
