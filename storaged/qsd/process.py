"""Starts qemu-storage-daemon so that it outlives this daemon."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host import protection, scope
from storaged.host.sandbox import Sandbox, confined, had
from storaged.qsd.stderr import WAITS

#: What of its own environment the daemon hands on; TMPDIR is the volume's own.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL")
_LOG_TAIL = 2000


def pidfile(directory: str) -> str:
    """The path of QSD's pid file; on its command line, it also tells whose QSD a process is."""
    return os.path.join(directory, "qsd.pid")


def log_file(directory: str) -> str:
    """The path of the file that QSD's standard error goes to."""
    return os.path.join(directory, "qsd.log")


def qmp_socket(directory: str) -> str:
    """The path of QSD's QMP socket in the private directory of a volume."""
    return os.path.join(directory, "qmp.sock")


def find_binary(binary: str) -> str:
    """Return the absolute path of a qemu-storage-daemon. Raises QSD_MISSING."""
    path = shutil.which(binary)
    if path is None:
        raise StoragedError(
            ErrorCode.QSD_MISSING, f"the program {binary!r} is not there",
            hint="apt install qemu-system-common (Debian 12) or qemu-utils (Debian 13), or set qsd.binary in "
            "storaged.toml",
        )
    return path


def spawn(
    binary: str, directory: str, listener: socket.socket, keep: Sequence[int],
    further: Mapping[str, str] | None = None, *, objects: Sequence[Mapping[str, Any]] = (), secret: bool = False,
    sandbox: Sandbox | None = None,
) -> tuple[int, int]:
    """Start QSD with nothing but ``objects`` and its QMP monitor on ``listener``, and return its pid and a pidfd.

    Each of the ``objects`` is what object-add takes. Everybody can read them: no secrets. With ``secret``, some will
    come by the monitor, and the process writes no core.

    The first client must be in the backlog of ``listener`` already: QSD waits for it, so that nobody has to wait
    for a file to appear. The descriptors ``keep`` (source locks, claims) are inherited and live as long as the
    process; ``further`` is added to its environment. It gets a session of its own, so that no signal to the daemon's
    terminal or group reaches it. It has no more of the host than ``sandbox`` says. The OOM killer leaves it alone, and
    it inherits from the daemon that it is an I/O flusher (host/protection.py).
    Blocks for an exec. Raises QSD_MISSING; INTERNAL where it cannot be confined.
    """
    environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    environment["TMPDIR"] = os.path.join(directory, "tmp")
    environment |= further or {}
    # Then the limit of a process that runs can be set, whoever it is. What else would is one at a time, and a start may
    # hang on a storage.
    later = bool(had({"SYS_RESOURCE"}))
    with open(log_file(directory), "ab") as log:
        def start() -> subprocess.Popen[bytes]:
            return subprocess.Popen(
                [
                    # By the "@" systemd's last act before the host goes down leaves it alone, whose disk may still be
                    # mounted (ROOT_STORAGE_DAEMONS in systemd's docs): its scope says so, too, where systemd knows
                    # SurviveFinalKillSignal=, and where there is a scope.
                    f"@{binary}" if scope.available() else binary,
                    # wait=on: QSD accepts the client that is in the backlog already before it makes its
                    # monitor. With wait=off, its main thread and its monitor thread now and then read the
                    # same connection at once, and a byte of a command is lost (docs/architecture.md).
                    "--chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=on",
                    "--monitor", "chardev=qmp",
                    "--pidfile", pidfile(directory),
                    *(word for one in objects for word in ("--object", json.dumps(one))),
                ],
                # Its working directory: sockets are named without the directory, whose path may be too long for them.
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=directory, env=environment,
                executable=binary, pass_fds=[listener.fileno(), *keep], start_new_session=True,
            )

        try:
            with protection.without_core() if secret and not later else contextlib.nullcontext():
                child = start() if sandbox is None else confined(sandbox, start)
        except OSError as error:
            raise StoragedError(
                ErrorCode.QSD_MISSING, f"cannot execute {binary}", cause=error.strerror or str(error),
                hint="install qemu-storage-daemon again, or set qsd.binary in storaged.toml",
            ) from error
    protection.spare(child.pid)
    if secret:
        protection.write_no_core(child.pid)
    # It is watched and collected through its pidfd; Popen must neither wait for it nor warn about it.
    child.returncode = 0
    # A child that was not collected keeps its number, even when it is dead already.
    return child.pid, os.pidfd_open(child.pid)


#: What a library wrote that ends QSD by itself, and what to do about it.
_LAST_WORDS = (
    (
        "Error reading configuration from etcd",
        "Vitastor's client ends where no etcd answers: start it, check -o etcd-host and etcd_address in the file of "
        "-o config-path",
    ),
    ("etcd_address is missing", "say where Vitastor's etcd is: -o etcd-host=HOST:PORT, or -o config-path=FILE"),
)


def died(directory: str, how: str) -> StoragedError:
    """The failure of a QSD that ended by itself, with the last it wrote."""
    words = log_tail(directory)
    hint = f"see {os.path.join(directory, 'qsd.log')} while the volume is there, and the journal"
    return StoragedError(
        ErrorCode.QSD_DIED, "qemu-storage-daemon ended", cause="; ".join(filter(None, [how, words])),
        hint=next((advice for said, advice in _LAST_WORDS if said in words), hint),
    )


def log_tail(directory: str) -> str:
    """Return the last lines that QSD wrote, on one line; empty if there are none."""
    try:
        with open(log_file(directory), "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _LOG_TAIL))
            text = file.read().decode(errors="replace")
    except OSError:
        return ""
    # It says at each start that it waits for us.
    lines = [line.strip() for line in text.splitlines() if line.strip() and WAITS not in line]
    return " | ".join(lines[-3:])
