"""Unix sockets at paths of any length: sun_path holds 108 bytes only (unix(7)).

The directory is opened, and the socket is named through /proc/self/fd/N, which is short whatever the path is.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def _socket_for(path: str) -> Iterator[tuple[socket.socket, int, str, str]]:
    """A new socket, closed on an error; the descriptor of its directory, its name there, and its short path."""
    directory, base = os.path.split(path)
    fd = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    try:
        yield sock, fd, base, f"/proc/self/fd/{fd}/{base}"
    except BaseException:
        sock.close()
        raise
    finally:
        os.close(fd)


def bind_unix(path: str, *, mode: int) -> socket.socket:
    """Return a listening stream socket at ``path``; a stale socket there is replaced. Raises OSError."""
    with _socket_for(path) as (sock, fd, base, short):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(base, dir_fd=fd)
        # Nobody can connect before listen(), so that the mode is right before the first client comes.
        sock.bind(short)
        os.chmod(base, mode, dir_fd=fd)
        sock.listen(64)
    return sock


def connect_unix(path: str) -> socket.socket:
    """Return a connected, blocking stream socket. Never waits.

    Raises OSError; BlockingIOError where the server's backlog is full, because it accepts nobody any more.
    """
    with _socket_for(path) as (sock, _fd, _base, short):
        sock.setblocking(False)
        sock.connect(short)
        sock.setblocking(True)
    return sock
