"""Unix sockets at paths of any length: sun_path holds 108 bytes only (unix(7)).

The directory is opened, and the socket is named through /proc/self/fd/N, which is short whatever the path is.
"""

from __future__ import annotations

import contextlib
import os
import socket


def bind_unix(path: str, *, mode: int) -> socket.socket:
    """Return a listening stream socket at ``path``; a stale socket there is replaced. Raises OSError."""
    directory, base = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(base, dir_fd=fd)
        # Nobody can connect before listen(), so that the mode is right before the first client comes.
        sock.bind(f"/proc/self/fd/{fd}/{base}")
        os.chmod(base, mode, dir_fd=fd)
        sock.listen(64)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock


def connect_unix(path: str) -> socket.socket:
    """Return a connected, blocking stream socket. Never waits.

    Raises OSError; BlockingIOError where the server's backlog is full, because it accepts nobody any more.
    """
    directory, base = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        sock.setblocking(False)
        sock.connect(f"/proc/self/fd/{fd}/{base}")
        sock.setblocking(True)
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)
    return sock
