"""Which block drivers a qemu-storage-daemon program can open sources with, and which package brings one that it lacks.

Its schema tells what it was built with, and not which of its modules are installed. So it is asked to open a node of
each driver, in a way that QEMU refuses as soon as it has the driver and before it calls it (bdrv_open_common in
block.c): nothing is connected to.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.version import QsdVersion, curl_loses_requests

_DEADLINE = 10.0
_INET = {"type": "inet", "host": "localhost", "port": "1"}
#: Driver → the members without which QAPI refuses it.
_NEEDED: dict[str, dict[str, Any]] = {
    "file": {"filename": "/"},
    "host_device": {"filename": "/"},
    "nbd": {"server": _INET},
    "iscsi": {"transport": "tcp", "portal": "localhost", "target": "iqn.2008-11.org.linux-kvm", "lun": 1},
    "nfs": {"server": {"type": "inet", "host": "localhost"}, "path": "/x"},
    "ssh": {"server": {"host": "localhost", "port": "1"}, "path": "/x"},
    "rbd": {"pool": "x", "image": "x"},
    "gluster": {"volume": "x", "path": "x", "server": [_INET]},
    "vitastor": {"image": "x"},
    **{scheme: {"url": f"{scheme}://localhost/"} for scheme in ("http", "https", "ftp", "ftps")},
}
#: What QEMU refuses of every driver that it has: zeroes cannot become discards where discards are ignored.
_REFUSED = {"discard": "ignore", "detect-zeroes": "unmap"}
_NO_MODULE = re.compile(r"Unknown driver '([^']*)'")
_NOT_BUILT = re.compile(r"Parameter 'driver' does not accept value '([^']*)'")

_PACKAGE = "apt install qemu-block-extra, of the very version of qemu-storage-daemon"
_OF_VITASTOR = (
    "it must be Vitastor's build, which may stand beside the other: [qsd.binaries] vitastor = \"/path\" in "
    "storaged.toml names it"
)
_WITHOUT_MODULE = {
    "gluster": f"{_PACKAGE} (Ubuntu: qemu-block-supplemental)",
    "vitastor": "install the qemu-block-extra of Vitastor's build",
    "file": "", "host_device": "", "nbd": "",
}
_NOT_IN_BUILD = {
    "gluster": "QEMU gives it up since 10.0: name an older one in storaged.toml, or mount the volume with "
    "mount.glusterfs and attach the file",
    "vitastor": _OF_VITASTOR,
}

_known: dict[tuple[str, int, int, int], Mapping[str, StoragedError | None]] = {}


def lack_of(text: str) -> StoragedError | None:
    """Return the failure that a refusal of blockdev-add amounts to, if it is that QSD lacks a driver of a backend."""
    if (found := _NO_MODULE.search(text)) is not None:
        return StoragedError(
            ErrorCode.UNSUPPORTED, f"this qemu-storage-daemon lacks the module of the block driver {found[1]}",
            cause=text, hint=_WITHOUT_MODULE.get(found[1], _PACKAGE) or "install it again",
        )
    if (found := _NOT_BUILT.search(text)) is not None and found[1] in _NEEDED:
        return StoragedError(
            ErrorCode.UNSUPPORTED, f"this qemu-storage-daemon was built without the block driver {found[1]}",
            cause=text, hint=_NOT_IN_BUILD.get(found[1], "name another build in storaged.toml: qsd.binary, or "
                                               "[qsd.binaries] for this backend alone"),
        )
    return None


def drivers_of(binary: str) -> Mapping[str, StoragedError | None]:
    """Return what keeps the program at this path from opening sources by each driver: None for nothing.

    Blocks for a tenth of a second, at most 10 seconds; a program is asked once, as long as this process lives.
    Raises QSD_MISSING where it cannot be run, or gives no answer.
    """
    try:
        seen = os.stat(binary)
        identity = (binary, seen.st_dev, seen.st_ino, seen.st_mtime_ns)
        if identity not in _known:
            _known[identity] = read_answers(_ask(binary))
        return _known[identity]
    except (OSError, subprocess.TimeoutExpired, ValueError) as error:
        raise StoragedError(
            ErrorCode.QSD_MISSING, f"{binary} does not say which sources it can open", cause=str(error),
            hint="install qemu-storage-daemon again, or set qsd.binary in storaged.toml",
        ) from error


def _ask(binary: str) -> str:
    commands: list[dict[str, Any]] = [{"execute": "qmp_capabilities"}]
    for driver, members in _NEEDED.items():
        node = {"driver": driver, "node-name": "x", "read-only": True, **_REFUSED, **members}
        commands.append({"execute": "blockdev-add", "arguments": node, "id": driver})
    commands.append({"execute": "quit"})
    done = subprocess.run(
        [binary, "--chardev", "stdio,id=monitor", "--monitor", "chardev=monitor"],
        input="".join(f"{json.dumps(command)}\n" for command in commands).encode(),
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=_DEADLINE, check=False, cwd="/",
    )
    return done.stdout.decode(errors="replace")


def read_answers(output: str) -> dict[str, StoragedError | None]:
    """Return driver → what it lacks from the answers on the monitor. Raises ValueError where one is missing."""
    found: dict[str, StoragedError | None] = {}
    for line in output.splitlines():
        answer = json.loads(line)
        if isinstance(answer, dict) and answer.get("id") in _NEEDED:
            found[answer["id"]] = lack_of(str((answer.get("error") or {}).get("desc", "")))
    if found.keys() != _NEEDED.keys():
        raise ValueError("it ended before it had answered")
    return found


def reads_only_whole(driver: str, version: QsdVersion | None) -> bool:
    """Whether a source of this driver has to be fetched first, because QSD would lose requests to it."""
    return driver in ("http", "https", "ftp", "ftps") and version is not None and curl_loses_requests(version)
