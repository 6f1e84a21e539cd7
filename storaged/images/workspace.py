"""A directory below /run for one command on images: what qemu-img reads, and the ssh-agent that it asks.

It is removed at the end. What a command that was killed has left is removed by the next: a lock on the directory
(flock(2)), which qemu-img inherits, tells whether anybody still uses it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace

from storaged.errors import ErrorCode, StoragedError
from storaged.host import sshagent
from storaged.model.layout import Layout


@dataclass(frozen=True)
class Workspace:
    """The directory, and the descriptor whose lock says that it is in use."""

    path: str
    lock: int
    layout: Layout
    """As of a daemon whose ``run`` and ``state`` are this command's own."""


@contextlib.contextmanager
def workspace(layout: Layout) -> Iterator[Workspace]:
    """Make a workspace, and remove it at the end. Raises PERMISSION_DENIED where nobody but root may."""
    base, copies = os.path.join(layout.run_dir, "images"), os.path.join(layout.state_dir, "images")
    try:
        os.makedirs(base, mode=0o700, exist_ok=True)
        guard = os.open(base, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise StoragedError(
            ErrorCode.PERMISSION_DENIED, f"cannot use {base}", cause=error.strerror or "",
            hint="run it as root: it takes the host's locks of the images, and reads the volumes that are attached",
        ) from error
    try:
        # Nobody sweeps between the making of the directory and its lock.
        fcntl.flock(guard, fcntl.LOCK_EX)
        _sweep(base, copies)
        path = os.path.realpath(tempfile.mkdtemp(prefix="", dir=base))
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        os.close(guard)
    state = os.path.join(copies, os.path.basename(path))
    try:
        os.mkdir(os.path.join(path, "tmp"), 0o700)
        yield Workspace(path, lock, replace(layout, run_dir=path, state_dir=state))
    finally:
        _remove(path, state)
        os.close(lock)


def _sweep(base: str, copies: str) -> None:
    for name in os.listdir(base):
        path = os.path.join(base, name)
        try:
            fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            continue
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(path, os.path.join(copies, name))
        except BlockingIOError:
            continue
        finally:
            os.close(fd)


    with contextlib.suppress(FileNotFoundError):
        for name in os.listdir(copies):
            # Copies are on a disk: a reboot has left them.
            if not os.path.lexists(os.path.join(base, name)):
                shutil.rmtree(os.path.join(copies, name), ignore_errors=True)


def _remove(path: str, state: str) -> None:
    sshagent.end(path)
    shutil.rmtree(path, ignore_errors=True)
    shutil.rmtree(state, ignore_errors=True)
