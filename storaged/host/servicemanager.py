"""What a daemon and its service manager tell each other: sd_notify(3), sd_watchdog_enabled(3), sd_listen_fds(3).

Of the standard library alone: each is a few lines of text, or a number in the environment.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import MutableMapping

#: The first descriptor that is handed over.
_FIRST_DESCRIPTOR = 3

log = logging.getLogger(__name__)


class ServiceManager:
    """What the environment says of the service manager. Without one, nothing is told and nobody is fed.

    The variables are taken out of ``environment``: what the daemon starts is not the daemon.
    """

    def __init__(self, environment: MutableMapping[str, str] | None = None) -> None:
        variables = os.environ if environment is None else environment
        self._address = variables.pop("NOTIFY_SOCKET", "")
        self._socket: socket.socket | None = None
        self.watchdog = _watchdog(variables.pop("WATCHDOG_USEC", ""), variables.pop("WATCHDOG_PID", ""))
        """Seconds within which each WATCHDOG=1 must follow the last one; None where nobody waits for it."""
        names = variables.pop("LISTEN_FDNAMES", "")
        self._descriptors = _descriptors(variables.pop("LISTEN_FDS", ""), variables.pop("LISTEN_PID", ""))
        if self._descriptors:
            log.debug("descriptors from the service manager: %s", names)

    def tell(self, *lines: str) -> None:
        """Send assignments as ``READY=1``. Never waits, and never raises: whoever does not listen hears nothing."""
        if not self._address:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
                self._socket.setblocking(False)
            # "@" stands for the NUL of an abstract address.
            address = f"\0{self._address[1:]}" if self._address.startswith("@") else self._address
            self._socket.sendto("\n".join(lines).encode(), address)
        except OSError as error:
            log.warning("the service manager cannot be told %s: %s", lines[0], error)

    def tell_reloading(self) -> None:
        """Say that the configuration is read again, and when that began, as Type=notify-reload wants it."""
        self.tell("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def take_listener(self, path: str) -> socket.socket | None:
        """Return the listening socket that was handed over, None where there is none.

        Raises ValueError where it is no stream socket that listens at ``path``, or where there is more than one.
        """
        descriptors, self._descriptors = self._descriptors, []
        if not descriptors:
            return None
        if len(descriptors) > 1:
            raise ValueError(f"{len(descriptors)} sockets were handed over, and one is served")
        try:
            listener = socket.socket(fileno=descriptors[0])
        except OSError as error:
            raise ValueError(f"what was handed over is no socket: {error.strerror}") from error
        listener.set_inheritable(False)
        listens = listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        if listener.family != socket.AF_UNIX or listener.type != socket.SOCK_STREAM or not listens:
            raise ValueError("the socket that was handed over is no unix stream socket that listens")
        if not os.path.exists(path) or not os.path.samefile(listener.getsockname(), path):
            raise ValueError(f"the socket that was handed over listens at {listener.getsockname()}, not at {path}")
        return listener


def _watchdog(microseconds: str, pid: str) -> float | None:
    if not microseconds.isdecimal() or int(microseconds) == 0 or pid not in ("", str(os.getpid())):
        return None
    return int(microseconds) / 1_000_000


def _descriptors(count: str, pid: str) -> list[int]:
    if not count.isdecimal() or pid != str(os.getpid()):
        return []
    return list(range(_FIRST_DESCRIPTOR, _FIRST_DESCRIPTOR + int(count)))
