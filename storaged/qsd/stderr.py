"""What a QSD says on standard error: to a file in the volume's directory, and from there to the daemon's log."""

from __future__ import annotations

import os

#: Lines of one look that are told whole, and bytes that are looked at.
_LINES, _BYTES = 10, 64 << 10
#: Bytes: the file is on a tmpfs, and a QSD may complain for weeks.
_LARGEST = 1 << 20
#: It says so at each start: it waits for the daemon.
WAITS = "info: QEMU waiting for connection on: "


class Stderr:
    """The file of one volume. It is read where it has grown: nobody waits for anything."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._offset: int | None = None

    def skip(self) -> None:
        """What is there was told by an earlier daemon."""
        try:
            self._offset = os.stat(self._path).st_size
        except OSError:
            self._offset = 0

    def news(self) -> list[str]:
        """Return the lines that have come since the last look; of very many the first few, and how many more there are.

        The file is emptied when it has become too large. An empty list where it cannot be read.
        """
        try:
            size = os.stat(self._path).st_size
            offset = min(self._offset or 0, size)
            if size == offset:
                self._offset = offset
                return []
            with open(self._path, "r+b") as file:
                file.seek(offset)
                data = file.read(_BYTES)
                whole = data.rfind(b"\n") + 1 or len(data)
                self._offset = offset + whole
                skipped = 0
                if size - offset > _BYTES:
                    skipped, self._offset = size - offset - _BYTES, size
                if size > _LARGEST:
                    # QSD appends: it goes on at the beginning. What it writes right now is lost.
                    file.truncate(0)
                    self._offset = 0
        except OSError:
            return []
        lines = [line for line in data[:whole].decode(errors="replace").splitlines() if line.strip()]
        lines = [line for line in lines if WAITS not in line]
        if len(lines) > _LINES:
            skipped += sum(len(line) + 1 for line in lines[_LINES:])
            del lines[_LINES:]
        if skipped:
            lines.append(f"... and {skipped} bytes more, see {self._path}")
        return lines
