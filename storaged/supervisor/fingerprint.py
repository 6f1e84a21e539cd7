"""What tells the disk behind a server from another one that has its name by now, where a program of the server tells.

Blocks, use a thread. The program is a child with a deadline; it gets its secrets by files.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time

from storaged.backends import find_backend
from storaged.backends.base import Inquiry, NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import protection, secrets
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec

#: Seconds for all the programs that are asked of one source.
PATIENCE = 10.0
#: Letters of a program's complaint that are told.
_LONGEST = 300


def ask(spec: VolumeSpec, directory: str, timeout: float = PATIENCE) -> str:
    """Return what tells this disk from others of its name; empty where its backend knows of nothing.

    ``directory`` is the volume's. Raises UNSUPPORTED where the program is not installed, OPEN_FAILED where it does not
    answer within ``timeout`` seconds, or answers something else.
    """
    backend = find_backend(spec.source)
    if not isinstance(backend, NetworkBackend):
        return ""
    location, deadline = backend.parse(spec.source, spec.options), time.monotonic() + timeout
    return "@".join(
        _answer(inquiry, spec, directory, deadline) for inquiry in backend.inquiries(location, spec.options)
    )


def compare(record: Record, found: str) -> None:
    """Raise SOURCE_CHANGED where another disk has the name of the one that was attached."""
    if record.fingerprint and record.fingerprint != found:
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, "another disk has the name of the one that was attached",
            cause=f"it is {found} by now, it was {record.fingerprint}",
            hint="bring the old one back; or detach the volume (--force) and attach it again",
        )


def _answer(inquiry: Inquiry, spec: VolumeSpec, directory: str, deadline: float) -> str:
    program = shutil.which(inquiry.program)
    if program is None:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "another disk of the same name and size would not be noticed",
            cause=f"the program {inquiry.program} is not installed", hint=f"apt install {inquiry.package}",
        )
    files = [
        word for option, argument in inquiry.secret_files.items()
        for word in (argument, secrets.place_of(option, spec.options[option], directory))
    ]
    environment = {name: value for name, value in os.environ.items() if name in ("PATH", "HOME")}
    try:
        child = subprocess.Popen(
            [program, *inquiry.arguments, *files], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**environment, "LC_ALL": "C", **inquiry.environment},
        )
    except OSError as error:
        raise _unanswered(inquiry, error.strerror or str(error)) from error
    protection.write_no_core(child.pid)
    with child:
        try:
            told, complaint = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            child.kill()
            raise _unanswered(inquiry, "it did not answer in time") from None
    if child.returncode:
        lines = complaint.decode(errors="replace").strip().splitlines()
        raise _unanswered(inquiry, lines[-1][:_LONGEST] if lines else f"status {child.returncode}")
    try:
        return inquiry.understand(told)
    except (ValueError, LookupError, TypeError):
        raise _unanswered(inquiry, "what it printed is not understood") from None


def _unanswered(inquiry: Inquiry, cause: str) -> StoragedError:
    return StoragedError(
        ErrorCode.OPEN_FAILED, f"{inquiry.program} does not tell which disk this is", cause=cause,
        hint=f"try by hand: {inquiry.program} {inquiry.arguments[0]}",
    )
