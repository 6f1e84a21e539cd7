"""A socket in a directory that others look through: each of systemd's hook directories has one for each service.

What looks there takes sockets only (varlink_execute_directory in systemd's src/shared/varlink-util.c), so a symbolic
link does not do. The socket is made in a directory of our own, and a hard link to it in the other: an entry whose inode
is our socket's is ours, also after a kill, and every other one is somebody else's.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket

from storaged.host.unixsock import bind_unix

log = logging.getLogger("storaged.api")


class HookSocket:
    """``own`` is the path of the socket, ``hook`` that of the link to it; both on the same filesystem."""

    def __init__(self, own: str, hook: str) -> None:
        self._own, self._hook = own, hook

    def register(self) -> socket.socket | None:
        """Return a listening socket, for root alone, that is found by its hook. None, and said, where it cannot be.

        Does nothing where whose directory it is (the parent of the hook's) does not exist.
        """
        directory = os.path.dirname(self._hook)
        if not os.path.isdir(os.path.dirname(directory)):
            return None
        try:
            os.makedirs(directory, mode=0o755, exist_ok=True)
            # The link first: one to a socket that is not ours any more would be somebody else's for ever.
            self._unlink_hook()
            listener = bind_unix(self._own, mode=0o600)
            try:
                os.link(self._own, self._hook, follow_symlinks=False)
            except BaseException:
                listener.close()
                os.unlink(self._own)
                raise
        except OSError as error:
            cause = error.strerror
            if error.errno == errno.EEXIST:
                cause = "it is there, and not storaged's"
            log.warning("systemd's programs will not find storaged's volumes by %s: %s", self._hook, cause)
            return None
        return listener

    def withdraw(self) -> None:
        """Take both away, unless somebody else has put something in their place."""
        with contextlib.suppress(OSError):
            self._unlink_hook()
            os.unlink(self._own)

    def _unlink_hook(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.lstat(self._own), os.lstat(self._hook)):
                os.unlink(self._hook)
