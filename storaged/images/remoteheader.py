"""Looks at the header of an image that is behind a server, before qemu-img opens it as an image.

An attach has QSD for that (supervisor/remoteheader.py); here it is a qemu-nbd, for a moment and for reading only.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time

from storaged.errors import ErrorCode, StoragedError
from storaged.host.nbdhandshake import reading
from storaged.host.unixsock import connect_unix
from storaged.images import arguments
from storaged.images.child import start
from storaged.images.operand import Operand
from storaged.images.process import failure
from storaged.images.provide import Provided, beside
from storaged.model.headers import read_header

_EXPORT = "header"
#: Seconds for the server to let us in, and for its header.
_PATIENCE = 60.0
_STEP = 0.01


def check(operand: Operand, given: Provided) -> None:
    """Refuse an image whose header is of another format, or names other files: qemu-img would open them. Blocks.

    Raises WRONG_FORMAT, UNSUPPORTED, BACKING_NOT_ALLOWED, OPEN_FAILED, …
    """
    if operand.opened.source is None:
        return
    # Not at the top: with it comes all of the daemon's way to QSD, which most commands do without.
    from storaged.supervisor.remoteheader import refuse_references

    program = beside(given.program, "qemu-nbd") or shutil.which("qemu-nbd")
    if program is None:
        raise StoragedError(ErrorCode.QSD_MISSING, "the program qemu-nbd is not there", hint="apt install qemu-utils")
    protocol = given.nodes[operand.spec.name]["file"]
    path = os.path.join(given.directory, "header.sock")
    child = start(
        # The whole path may be too long for a socket.
        [program, "--read-only", "--socket", f"/proc/self/fd/{given.directory_fd}/header.sock",
         "--export-name", _EXPORT, *given.objects,
         arguments.filename({"driver": "raw", "read-only": True, "file": protocol})],
        given, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )
    try:
        with _connected(child, path) as sock, reading(sock, _EXPORT, _PATIENCE) as (size, read):
            refuse_references(read_header(operand.spec.format, read, size))
    finally:
        child.kill()
        child.communicate(timeout=_PATIENCE)
        if os.path.lexists(path):
            os.unlink(path)


def _connected(child: subprocess.Popen[bytes], path: str) -> socket.socket:
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            return connect_unix(path)
        except OSError:
            if child.poll() is not None:
                assert child.stderr is not None
                said = child.stderr.read().decode(errors="replace").replace("qemu-nbd: Failed to blk_new_open ", "")
                raise failure("info", said.replace("qemu-nbd: ", ""), child.returncode) from None
            if time.monotonic() > deadline:
                raise StoragedError(
                    ErrorCode.TIMEOUT, "the source does not let us in", cause=f"not within {_PATIENCE:.0f} s",
                    hint="the server hangs, or a firewall swallows the packets",
                ) from None
            time.sleep(_STEP)  # nothing tells that its socket is there
