"""Asks a qemu-storage-daemon program what it can do. Each program is asked once."""

from __future__ import annotations

import os
import subprocess

from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.version import Build, parse_build

_DEADLINE = 30
_Identity = tuple[str, int, int, int]
_known: dict[_Identity, Build] = {}


def build_of(binary: str) -> Build:
    """Return what the program at this path is. Blocks for two runs of it the first time.

    Raises QSD_MISSING where it cannot be run or is no qemu-storage-daemon.
    """
    try:
        seen = os.stat(binary)
        identity = (binary, seen.st_dev, seen.st_ino, seen.st_mtime_ns)
        if identity not in _known:
            build = parse_build(_output(binary, "--version"), _output(binary, "--help"))
            if build is None:
                raise StoragedError(
                    ErrorCode.QSD_MISSING, f"{binary} is no qemu-storage-daemon", cause="it tells no version",
                    hint="set qsd.binary in storaged.toml",
                )
            _known[identity] = build
        return _known[identity]
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoragedError(
            ErrorCode.QSD_MISSING, f"cannot execute {binary}", cause=str(error),
            hint="install qemu-storage-daemon again, or set qsd.binary in storaged.toml",
        ) from error


def _output(binary: str, option: str) -> str:
    done = subprocess.run(
        [binary, option], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=_DEADLINE, check=False, cwd="/",
    )
    return done.stdout.decode(errors="replace")
