"""The failures that a user can meet.

Every failure carries a stable code, the volume, the step at which it happened, the cause and a hint of what to
do. The command line, ``--json``, Varlink and the log show the same five.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum


class ErrorCode(StrEnum):
    """Stable names of failures; docs/faults.md explains each. Never rename one."""

    INVALID_NAME = "invalid-name"
    INVALID_ARGUMENT = "invalid-argument"
    INVALID_SOURCE = "invalid-source"
    INVALID_SIZE = "invalid-size"
    NO_SUCH_VOLUME = "no-such-volume"
    VOLUME_EXISTS = "volume-exists"
    VOLUME_BUSY = "volume-busy"
    NAME_TAKEN = "name-taken"
    SOURCE_MISSING = "source-missing"
    SOURCE_IN_USE = "source-in-use"
    SOURCE_CHANGED = "source-changed"
    WRONG_FORMAT = "wrong-format"
    BACKING_MISSING = "backing-missing"
    BACKING_NOT_ALLOWED = "backing-not-allowed"
    OPEN_FAILED = "open-failed"
    QSD_MISSING = "qsd-missing"
    QSD_DIED = "qsd-died"
    QSD_SILENT = "qsd-silent"
    QSD_REFUSED = "qsd-refused"
    TRANSPORT_UNAVAILABLE = "transport-unavailable"
    NO_FREE_DEVICE = "no-free-device"
    DEVICE_IN_USE = "device-in-use"
    DEVICE_FAILED = "device-failed"
    FLUSH_FAILED = "flush-failed"
    RECONNECT_LOG_LOST = "reconnect-log-lost"
    NO_SPACE = "no-space"
    IMAGE_FAILED = "image-failed"
    STATE_DAMAGED = "state-damaged"
    ADOPTION_REFUSED = "adoption-refused"
    UNSUPPORTED = "unsupported"
    TIMEOUT = "timeout"
    HOST_STUCK = "host-stuck"
    PERMISSION_DENIED = "permission-denied"
    DAEMON_UNREACHABLE = "daemon-unreachable"
    DAEMON_RUNNING = "daemon-running"
    INTERNAL = "internal"


class StoragedError(Exception):
    """A failure with all that a user needs to act on it.

    ``message`` says what failed, ``cause`` why (may be empty), ``hint`` what to do (may be empty), ``users``
    who holds the device or source, one human-readable line each.
    """

    def __init__(
        self,
        code: ErrorCode,
        message: str,
        *,
        volume: str = "",
        step: str = "",
        cause: str = "",
        hint: str = "",
        users: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.volume = volume
        self.step = step
        self.cause = cause
        self.hint = hint
        self.users = tuple(users)

    def at(self, *, volume: str = "", step: str = "") -> StoragedError:
        """Fill in the volume and the step where they were not known yet, and return self."""
        self.volume = self.volume or volume
        self.step = self.step or step
        return self

    def __str__(self) -> str:
        where = f"volume {self.volume}: " if self.volume else ""
        at = f" (at step {self.step})" if self.step else ""
        why = f": {self.cause}" if self.cause else ""
        return f"{where}{self.message}{at}{why}"


def bug(error: BaseException) -> StoragedError:
    """Return the failure that stands for an exception which nobody foresaw; whoever catches it logs it."""
    return StoragedError(
        ErrorCode.INTERNAL, "storaged has a bug here", cause=f"{type(error).__name__}: {error}",
        hint="the journal has the details; please report it",
    )
