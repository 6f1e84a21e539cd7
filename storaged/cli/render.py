"""What people see. It may hold hostile text (names, paths, causes of failures): all goes through clean().

``list`` draws its own columns: rich takes 25 ms to import and as long again to lay out 50 rows, more than all
the rest of the command. It is for ``doctor``, and for the progress line of what takes long anyhow.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import format_size

if TYPE_CHECKING:
    from storaged.model.diagnosis import Finding

_GAP = "  "
_COLUMNS = ("NAME", "STATE", "DEVICE", "SIZE", "TRANSPORT", "FORMAT", "MODE", "SOURCE")
#: The last column is cut to what the terminal leaves, but never below this.
_MIN_LAST = 10
#: Left out on a terminal that is too narrow, in this order; ``show`` tells them.
_EXPENDABLE = ("TRANSPORT", "FORMAT", "SIZE", "MODE")
#: Columns of what is no terminal, and so has no width.
_ENDLESS = 100_000
#: The forms of --qemu-args, in the order in which they are shown.
_QEMU_FORMS = {
    "vhost_user": "through the volume's socket",
    "blockdev": "the source itself, with -blockdev",
    "drive": "the source itself, with -drive",
}
_STYLES = {"ok": "green", "info": "cyan", "warn": "yellow", "fail": "bold red"}


def write(text: str) -> None:
    """Print a line on stdout, at once. A closed pipe raises BrokenPipeError, a full disk StoragedError."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # some locale knows no such letter
    try:
        print(text, flush=True)
    except OSError as error:
        # Else Python tries once more at exit, and complains.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
        if isinstance(error, BrokenPipeError):
            raise
        raise StoragedError(
            ErrorCode.NO_SPACE if error.errno == errno.ENOSPC else ErrorCode.INTERNAL,
            "the output cannot be written",
            cause=error.strerror or str(error),
            hint="a change that was asked for is done all the same; look with: storaged list",
        ) from error


def write_json(value: object) -> None:
    """Print ``value`` as JSON on one line, or indented for a person who looks at it."""
    write(json.dumps(value, indent=2 if _is_terminal(sys.stdout) else None))


def clean(text: object) -> str:
    """Return ``text`` on one line and without anything that a terminal would obey."""
    line = str(text)
    if line.isprintable():
        return line
    line = " ".join(line.split())
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode("ascii") for char in line
    )


def failure(error: StoragedError, *, as_json: bool = False) -> None:
    """Say on stderr what failed, why, and what to do."""
    if as_json:
        fields = {
            "code": str(error.code),
            "message": error.message,
            "volume": error.volume,
            "step": error.step,
            "cause": error.cause,
            "hint": error.hint,
            "users": list(error.users),
        }
        note(json.dumps({"error": fields}))
        return
    note(f"storaged: {clean(error)} [{error.code}]")
    for user in error.users:
        note(f"in use by: {clean(user)}")
    if error.hint:
        note(f"hint: {clean(error.hint)}")


def note(line: str) -> None:
    """Print a line on stderr; nobody who reads it is no failure."""
    with contextlib.suppress(OSError):
        print(line, file=sys.stderr, flush=True)


def volume_table(volumes: Sequence[dict[str, Any]], width: int | None = None) -> str:
    """Return the table of ``storaged list``, cut to ``width`` columns (by default the terminal's)."""
    rows = [_COLUMNS, *(_row(volume) for volume in volumes)]
    widths = {
        column: len(_GAP) + max(_cells(row[index]) for row in rows)
        for index, column in enumerate(_COLUMNS[:-1])
    }
    left = (terminal_width() if width is None else width) - sum(widths.values())
    for column in _EXPENDABLE:
        if left < _MIN_LAST:
            left += widths.pop(column)
    lines = []
    for row in rows:
        cells = zip(_COLUMNS, row, strict=True)
        line = "".join(_pad(cell, widths[column]) for column, cell in cells if column in widths)
        lines.append(line + _cut(row[-1], max(left, _MIN_LAST)))
    return "\n".join(lines)


def volume_details(volume: dict[str, Any], now: float | None = None) -> str:
    """Return what ``storaged show`` prints: one aligned line per fact that there is."""
    size = volume.get("size")
    options = volume.get("options") or {}
    trouble = volume.get("failure") or {}
    transport = str(volume.get("transport") or "-")
    if volume.get("transport_reason"):
        transport += f" ({str(volume['transport_reason']).removeprefix(f'{transport}: ')})"
    qsd = "-"
    if volume.get("qsd_pid"):
        qsd = f"pid {volume['qsd_pid']}, version {volume.get('qsd_version') or 'unknown'}"
    facts = [
        ("name", volume.get("name")),
        ("state", volume.get("state")),
        ("since", moment(volume.get("since"), now)),
        ("device", volume.get("device")),
        ("socket", volume.get("socket")),
        ("link", volume.get("link")),
        ("size", f"{format_size(size)} ({size} bytes)" if isinstance(size, int) else None),
        ("block size", volume.get("logical_block_size")),
        ("source", volume.get("source")),
        ("format", volume.get("format")),
        ("mode", _mode(volume)),
        ("transport", transport),
        *((f"option {key}", value) for key, value in sorted(options.items())),
        ("overlay", volume.get("overlay")),
        ("qsd", qsd),
    ]
    if trouble:
        step = f" (at step {trouble['step']})" if trouble.get("step") else ""
        facts += [
            ("failure", f"{trouble.get('message')}{step} [{trouble.get('code')}]"),
            ("cause", trouble.get("cause") or None),
            ("hint", trouble.get("hint") or None),
        ]
    shown = [(clean(key), clean(value)) for key, value in facts if value is not None]
    margin = max(_cells(key) for key, _ in shown) + 1
    return "\n".join(f"{_pad(key + ':', margin)} {value}" for key, value in shown)


def qemu_arguments(found: dict[str, Any]) -> str:
    """Return what ``storaged show --qemu-args`` prints: the forms, each ready to be pasted into a script."""
    lines = [f"# {clean(note)}" for note in found.get("notes") or []]
    for key, title in _QEMU_FORMS.items():
        words = [str(word) for word in found.get(key) or []]
        if not words:
            continue
        pairs = [" ".join(map(_shell_word, words[index:index + 2])) for index in range(0, len(words), 2)]
        lines += ["", f"# {title}", *(f"{pair} \\" for pair in pairs[:-1]), pairs[-1]]
    return "\n".join(lines).lstrip("\n")


def _shell_word(word: str) -> str:
    """Quote a word for a shell; what a terminal would obey is written as bash's $'…' has it."""
    import shlex

    if word.isprintable():
        return shlex.quote(word)
    letters = (
        char if char.isprintable() and char not in "'\\" else "".join(f"\\{byte:03o}" for byte in char.encode())
        for char in word
    )
    return f"$'{''.join(letters)}'"


def event_line(event: dict[str, Any]) -> str:
    """Return one line of ``storaged watch``."""
    words = [timestamp(event.get("time")), event.get("volume"), event.get("kind")]
    state, message = event.get("state"), event.get("message")
    if state and event.get("kind") != "step":
        words.append(state)
    line = _GAP.join(clean(word or "-") for word in words)
    return f"{line}{_GAP}{clean(message)}" if message and message != state else line


def timestamp(seconds: object) -> str:
    """Return a time since the epoch as ISO 8601 in local time."""
    if not isinstance(seconds, int | float):
        return "-"
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(seconds))
    return f"{text[:-2]}:{text[-2:]}"


def moment(seconds: object, now: float | None = None) -> str:
    """Return a time since the epoch in local time, and how long ago that was."""
    if not isinstance(seconds, int | float):
        return "-"
    ago = (time.time() if now is None else now) - seconds
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if ago >= length:
            return f"{timestamp(seconds)} ({int(ago // length)}{unit} ago)"
    return f"{timestamp(seconds)} ({max(0, int(ago))}s ago)"


def findings(found: Sequence[Finding]) -> None:
    """Print what the doctor found."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:  # which is one of the findings
        for finding in found:
            write(clean(f"{finding.status:4}  {finding.check}: {finding.detail}"))
            if finding.hint:
                write(clean(f"      hint: {finding.hint}"))
        return
    terminal = _is_terminal(sys.stdout)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column("STATUS")
    table.add_column("CHECK", no_wrap=True)
    table.add_column("DETAIL", overflow="fold")
    for finding in found:
        detail = Text(clean(finding.detail))
        if finding.hint:
            style = "dim" if finding.status == "info" else "bold"
            detail.append(f"\nhint: {clean(finding.hint)}", style)
        table.add_row(Text(finding.status, _STYLES[finding.status]), finding.check, detail)
    console = Console(width=terminal_width(), highlight=False, force_terminal=terminal)
    with console.capture() as capture:
        console.print(table)
    # rich fills each line up to the widest.
    write("\n".join(line.rstrip() for line in capture.get().splitlines()))


def terminal_width() -> int:
    """Return the columns of stdout's terminal; endless when it is none: nothing is cut for programs."""
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return _ENDLESS


def _is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty()


def _row(volume: dict[str, Any]) -> tuple[str, ...]:
    state, size = str(volume.get("state") or "-"), volume.get("size")
    trouble = volume.get("failure")
    if state == "failed" and trouble and trouble.get("code"):
        state = f"failed({trouble['code']})"
    cells: Iterable[object] = (
        volume.get("name"),
        state,
        volume.get("device") or volume.get("socket"),
        format_size(size) if isinstance(size, int) else None,
        volume.get("transport"),
        volume.get("format"),
        _mode(volume),
        volume.get("source"),
    )
    return tuple(clean(cell or "-") for cell in cells)


def _mode(volume: dict[str, Any]) -> str:
    marks = ["ro" if volume.get("read_only") else "rw"]
    marks += [mark for mark in ("snapshot", "persist") if volume.get(mark)]
    return ",".join(marks)


def _cells(text: str) -> int:
    """Columns that a terminal takes for ``text``."""
    if text.isascii():
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(2 if east_asian_width(char) in "WF" else 0 if combining(char) else 1 for char in text)


def _pad(text: str, width: int) -> str:
    return text + " " * (width - _cells(text))


def _cut(text: str, width: int) -> str:
    """Return the end of ``text``, which tells images apart, in at most ``width`` columns."""
    if _cells(text) <= width:
        return text
    while _cells(text) > width - 1:
        text = text[1:]
    return "…" + text
