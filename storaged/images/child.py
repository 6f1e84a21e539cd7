"""Starts the programs of QEMU that a command on images needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

from storaged.errors import ErrorCode, StoragedError
from storaged.host import protection
from storaged.images.provide import Provided


def start(line: Sequence[str], given: Provided, *, stdout: int, stderr: int, keep: Sequence[int] = ()) -> (
    subprocess.Popen[bytes]
):
    """Start a program with all that was provided for it; ``keep`` are further descriptors that it inherits.

    It dies with this process, even if that is killed (PR_SET_PDEATHSIG, by setpriv(1)). It writes no core: secrets are
    in its memory, and the limit is there before it reads them. Raises QSD_MISSING.
    """
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    try:
        with protection.without_core():
            child = subprocess.Popen(
                [*guard, *line], stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, cwd=given.directory,
                env=given.environment, pass_fds=[*keep, *given.inherited],
                # No signal of the terminal reaches it: it is ended here, and what it leaves is cleaned up.
                start_new_session=True,
            )
    except OSError as error:
        raise StoragedError(
            ErrorCode.QSD_MISSING, f"cannot execute {os.path.basename(line[0])}", cause=error.strerror or str(error),
            hint="apt install qemu-utils",
        ) from error
    protection.write_no_core(child.pid)
    return child
