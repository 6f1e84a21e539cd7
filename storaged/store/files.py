"""The volumes of /etc/storaged/volumes/NAME.toml: read, and never written.

A detach of such a volume lasts until its file goes, or until the next boot: it leaves a mark below /run, which says
which file it was. Another file of that name, or another content, is a new wish.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import remove_file, write_atomic
from storaged.model.names import check_name
from storaged.model.spec import VolumeSpec
from storaged.model.volumefile import SUFFIX, parse_volume_file

#: Bytes; a file of a volume has some hundreds.
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Found:
    """What the files wish for, and which of them are of no use."""

    volumes: dict[str, VolumeSpec] = field(default_factory=dict)
    bad: dict[str, StoragedError] = field(default_factory=dict)
    """By the name of the volume, or what stands in the place of it."""
    detached: frozenset[str] = frozenset()
    """Of the volumes: those that are not wanted until their file goes, or the next boot."""


class VolumeFiles:
    """A directory of NAME.toml, and one for the marks. Blocking calls."""

    def __init__(self, directory: str, marks: str) -> None:
        self._directory = directory
        self._marks = marks

    def path(self, name: str) -> str:
        """The file of a volume."""
        return os.path.join(self._directory, name + SUFFIX)

    def load(self) -> Found:
        """Read all. A file that is of no use is reported, and the others count. Marks without a file are removed.

        Raises INVALID_ARGUMENT where the directory cannot be read: nobody knows then which files there are.
        """
        volumes: dict[str, VolumeSpec] = {}
        bad: dict[str, StoragedError] = {}
        try:
            entries = sorted(os.listdir(self._directory))
        except FileNotFoundError:
            entries = []
        except OSError as error:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"cannot read {self._directory}", cause=error.strerror or str(error),
                hint="correct it, and then: systemctl reload storaged",
            ) from error
        for entry in entries:
            name, suffix = os.path.splitext(entry)
            if suffix != SUFFIX or entry.startswith("."):
                continue
            try:
                check_name(name)
                volumes[name] = parse_volume_file(self._read(name), self.path(name), name)
            except StoragedError as error:
                bad[name] = error.at(volume=name)
        return Found(volumes, bad, frozenset(self._marked(volumes.keys() | bad.keys())))

    def mark_detached(self, name: str) -> None:
        """The volume is not wanted until its file goes, or the next boot. Raises NO_SPACE, INTERNAL."""
        os.makedirs(self._marks, mode=0o700, exist_ok=True)
        write_atomic(os.path.join(self._marks, check_name(name)), self._identity(name).encode())

    def unmark(self, name: str) -> None:
        """It is wanted again."""
        if os.path.isdir(self._marks):
            remove_file(os.path.join(self._marks, check_name(name)))

    def _read(self, name: str) -> bytes:
        path = self.path(name)
        try:
            # A FIFO must not hold up all the others.
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            with open(fd, "rb") as file:
                text = file.read(_LONGEST + 1)
        except OSError as error:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{path} cannot be read", cause=error.strerror or str(error),
                hint="correct it, and then: systemctl reload storaged",
            ) from error
        if len(text or b"") > _LONGEST:
            raise StoragedError(ErrorCode.INVALID_ARGUMENT, f"{path} is too long for the wishes of a volume")
        return text or b""

    def _identity(self, name: str) -> str:
        """Which file there is now, empty if there is none."""
        try:
            found = os.stat(self.path(name))
        except OSError:
            return ""
        return f"{found.st_dev}:{found.st_ino}:{found.st_size}:{found.st_mtime_ns}"

    def _marked(self, present: set[str]) -> set[str]:
        """The names with a mark of the file that is there; other marks are removed."""
        try:
            marks = os.listdir(self._marks)
        except FileNotFoundError:
            return set()
        marked = set()
        for name in marks:
            path = os.path.join(self._marks, name)
            with open(path, encoding="ascii", errors="replace") as file:
                if name in present and file.read() == self._identity(name):
                    marked.add(name)
                else:
                    os.unlink(path)
        return marked
