"""Log records as structured entries of systemd's journal: https://systemd.io/JOURNAL_NATIVE_PROTOCOL/.

Each entry about a volume has its name in STORAGED_VOLUME; each that an administrator may act upon has a MESSAGE_ID,
which systemd/storaged.catalog explains (``journalctl -x``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import sys
from collections.abc import Mapping
from typing import Any

#: What is told → MESSAGE_ID. Those of volumes are the kinds of model/history.Happening, and two more.
MESSAGE_IDS: Mapping[str, str] = {
    "ready": "64745eb397684437a5c54fbe17167e1e",
    "ending": "9bfc3afa644642c9b3174cbcc21e55ca",
    "state": "cde4c8ec41634863bc54ca77600d8900",
    "death": "c4b672c53a5948739382e32577ac4d7e",
    "hang": "8acc772b4d4b463e8a32740c15f302f1",
    "stall": "b3e952c6ece746b2add3a57f92b830ef",
    "recovered": "a82daed6e267498d8341ae6f4fe1cc52",
    "rescue": "ba29075b36624ca1a4d171efe2d542f4",
    "resume": "5844e6d226704c1281e26dd06c1d1de2",
    "upgrade": "b984d8dcef5647c0ba299e44c7522674",
    "lost": "578d03d467b241638f451a8a32400ae7",
    "failure": "f2edc714dc764d848f42c9877a8a1b34",
    "grown": "0636fb1cdf8a461e98740d979f007555",
    "adopted": "7a71cb1fc2ac419cb4d51e7e91b499bf",
    "qsd": "b09ad8987e894421a88c3cb4d7ec56b8",
}
_SOCKET = "/run/systemd/journal/socket"
_FORMAT = "%(levelname)s %(name)s: %(message)s"
#: Bytes: an entry has to fit into a datagram (net.core.wmem_default is 212,992), with its other fields.
_LONGEST = 64 << 10
#: syslog(3)
_PRIORITIES = ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6))
_DEBUG = 7


def about(volume: str = "", event: str = "", **further: str) -> dict[str, Any]:
    """Return the ``extra`` of a log call: the volume that it is about, what of MESSAGE_IDS it tells, and other fields.

    A field ``code`` becomes STORAGED_CODE.
    """
    return {"storaged": {"volume": volume, "event": event, **further}}


def set_up(level: str) -> None:
    """Send all log records from ``level`` on to the journal where standard error is the journal's, else there."""
    handler: logging.Handler | None = None
    if is_the_journals(sys.stderr.fileno(), os.environ.get("JOURNAL_STREAM", "")):
        with contextlib.suppress(OSError):
            handler = JournalHandler(_SOCKET)
    if handler is None:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter(_FORMAT))
    logging.basicConfig(level=level, handlers=[handler])


def is_the_journals(descriptor: int, told: str) -> bool:
    """Whether a descriptor is what systemd has told in $JOURNAL_STREAM (systemd.exec(5)): not, after a redirection."""
    status = os.fstat(descriptor)
    return told == f"{status.st_dev}:{status.st_ino}"


class JournalHandler(logging.Handler):
    """Sends records to journald. It never waits: a journal that takes nothing gets the text on standard error."""

    def __init__(self, path: str) -> None:
        """Raises OSError where there is no ``path``."""
        super().__init__()
        os.stat(path)
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)

    def emit(self, record: logging.LogRecord) -> None:
        """Send one."""
        try:
            # By its path: journald may have been restarted.
            self._socket.sendto(encoded(fields_of(record)), self._path)
        except OSError:
            with contextlib.suppress(OSError):
                print(logging.Formatter(_FORMAT).format(record), file=sys.stderr, flush=True)
        except Exception:  # as every handler of logging does: a bug here must not break what is logged
            self.handleError(record)

    def close(self) -> None:
        """The end of logging."""
        self._socket.close()
        super().close()


def fields_of(record: logging.LogRecord) -> dict[str, str]:
    """Return the journal's fields of a record (systemd.journal-fields(7))."""
    message = record.getMessage()
    if record.exc_info:
        message += "\n" + logging.Formatter().formatException(record.exc_info)
    fields = {
        "MESSAGE": message,
        "PRIORITY": str(next((number for level, number in _PRIORITIES if record.levelno >= level), _DEBUG)),
        "SYSLOG_IDENTIFIER": "storaged",
        "LOGGER": record.name,
        "CODE_FILE": record.pathname, "CODE_LINE": str(record.lineno), "CODE_FUNC": record.funcName or "",
    }
    told: Mapping[str, str] = getattr(record, "storaged", {})
    for name, value in told.items():
        if name == "event" and value:
            fields["MESSAGE_ID"] = MESSAGE_IDS[value]
        if value:
            fields[f"STORAGED_{re.sub('[^A-Z0-9]', '_', name.upper())}"] = value
    return fields


def encoded(fields: Mapping[str, str]) -> bytes:
    """Return an entry as journald takes it. A value that is too long ends with three dots."""
    entry = b""
    for name, value in fields.items():
        data = value.encode(errors="surrogateescape")
        if len(data) > _LONGEST:
            data = data[:_LONGEST] + b"..."
        if b"\n" in data:
            entry += name.encode() + b"\n" + len(data).to_bytes(8, "little") + data + b"\n"
        else:
            entry += name.encode() + b"=" + data + b"\n"
    return entry
