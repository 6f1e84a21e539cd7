"""What people see. It may hold hostile text (names, paths, causes of failures): all goes through clean().

``list`` draws its own columns: rich takes 25 ms to import and as long again to lay out 50 rows, more than all
the rest of the command. It is for ``doctor``, and for the progress line of what takes long anyhow.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
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
#: Entries of a volume's history that ``show`` prints, and the lines that a message may take on a terminal.
_NEWEST = 20
_MOST_LINES = 3
#: Columns of a message, however narrow the terminal is.
_MIN_MESSAGE = 20
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


def volume_table(
    volumes: Sequence[dict[str, Any]], width: int | None = None, now: float | None = None
) -> str:
    """Return the table of ``storaged list``, cut to ``width`` columns (by default the terminal's)."""
    now = time.time() if now is None else now
    rows = [_COLUMNS, *(_row(volume, now) for volume in volumes)]
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


def volume_details(volume: dict[str, Any], now: float | None = None, width: int | None = None) -> str:
    """Return what ``storaged show`` prints: one aligned line per fact that there is, and the history.

    Nothing but the history is cut to ``width`` columns (by default the terminal's).
    """
    now = time.time() if now is None else now
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
        ("grown to", _growth(volume)),
        ("block size", volume.get("logical_block_size")),
        ("source", volume.get("source")),
        ("format", volume.get("format")),
        ("mode", _mode(volume)),
        ("kept", _kept(volume)),
        ("transport", transport),
        ("profile", volume.get("profile")),
        *((f"option {key}", value) for key, value in sorted(options.items())),
        ("overlay", volume.get("overlay")),
        ("qsd", qsd),
        ("confined", volume.get("qsd_confinement")),
        ("deaths", volume.get("deaths") or None),
        ("last pause", None if volume.get("paused") is None else _lasting(volume["paused"])),
        *_condition_facts(volume.get("condition") or {}, now),
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
    lines = [f"{_pad(key + ':', margin)} {value}" for key, value in shown]
    lines += _chain_table(volume.get("layers") or [])
    lines += _history_table(volume.get("history") or [], terminal_width() if width is None else width)
    return "\n".join(lines)


def _growth(volume: dict[str, Any]) -> str | None:
    size = volume.get("source_size")
    if not isinstance(size, int):
        return None
    takes = "" if volume.get("transport") == "nbd" or volume.get("read_only") else "; storaged resize takes them"
    return f"{format_size(size)} ({size} bytes): the source{takes}"


def _kept(volume: dict[str, Any]) -> str | None:
    """How long a volume is wanted, and what changes that."""
    name, file, persist = volume.get("name"), volume.get("file"), volume.get("persist")
    if file:
        return f"attached at each boot by {file}; a detach lasts until that goes, or until the next boot"
    if not isinstance(persist, bool):
        return None
    if persist:
        return f"until it is detached, over reboots, too (storaged persist {name} off changes that)"
    return f"until it is detached, or the host reboots (storaged persist {name} on changes that)"


def _condition_facts(condition: dict[str, Any], now: float) -> list[tuple[str, object]]:
    if not condition:
        return []
    policy, acts_at = condition.get("policy") or "-", condition.get("acts_at")
    if isinstance(acts_at, int | float):
        when = f"in {_span(acts_at - now)}" if acts_at > now else "now"
        policy = f"{policy}, {when} ({timestamp(acts_at)})"
    else:
        policy = f"{policy}; nothing is done by itself"
    return [
        ("trouble", f"{condition.get('trouble')} since {moment(condition.get('since'), now)}"),
        ("detail", condition.get("detail") or None),
        ("policy", policy),
    ]


def _history_table(entries: Sequence[dict[str, Any]], width: int) -> list[str]:
    """The newest entries of a volume's history as lines, the newest last."""
    if not entries:
        return []
    rows = [
        (timestamp(entry.get("time")), clean(entry.get("kind") or "-"), _lasting(entry.get("seconds")), _told(entry))
        for entry in entries[-_NEWEST:]
    ]
    more = len(entries) - len(rows)
    rows.insert(0, ("TIME", "WHAT", "TOOK", "MESSAGE"))
    margins = [len(_GAP) + max(_cells(row[index]) for row in rows) for index in range(3)]
    left = max(_MIN_MESSAGE, width - sum(margins))
    lines = ["", f"history (the oldest {more} are left out here; --json has them):" if more else "history:"]
    for *cells, message in rows:
        first, *rest = _folded(message, left, _MOST_LINES)
        lines.append("".join(map(_pad, cells, margins)) + first)
        lines += [" " * sum(margins) + line for line in rest]
    return [line.rstrip() for line in lines]


def _chain_table(layers: Sequence[dict[str, Any]]) -> list[str]:
    """The images of a chain, the disk first and its base last, where there is more than the source itself."""
    if len(layers) < 2 and not any(layer.get("data_file") for layer in layers):
        return []
    rows = [("IMAGE", "FORMAT", "SIZE", "SOURCE")]
    for number, layer in enumerate(layers):
        size = layer.get("virtual_size")
        rows.append((
            "disk" if not number else f"backing {number}", clean(layer.get("format") or "-"),
            format_size(size) if isinstance(size, int) else "-", clean(layer.get("source") or "-"),
        ))
        if layer.get("data_file"):
            rows.append(("its data", "raw", "", clean(layer["data_file"])))
    margins = [len(_GAP) + max(_cells(row[index]) for row in rows) for index in range(3)]
    return ["", "images:", *("".join(map(_pad, row[:3], margins)) + row[3] for row in rows)]


def _told(entry: dict[str, Any]) -> str:
    message, times = clean(entry.get("message") or ""), entry.get("times")
    if not isinstance(times, int) or times < 2:
        return message
    return f"{times} times, last {timestamp(entry.get('last'))}: {message}"


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
    try:
        local = time.localtime(seconds)
    except (OverflowError, ValueError, OSError):
        return "-"  # no year of ours
    text = time.strftime("%Y-%m-%dT%H:%M:%S%z", local)
    return f"{text[:-2]}:{text[-2:]}"


def moment(seconds: object, now: float | None = None) -> str:
    """Return a time since the epoch in local time, and how long ago that was."""
    if not isinstance(seconds, int | float):
        return "-"
    return f"{timestamp(seconds)} ({_span((time.time() if now is None else now) - seconds)} ago)"


def _span(seconds: float) -> str:
    """Return a length of time in its largest unit."""
    if not math.isfinite(seconds):
        return "-"
    for unit, length in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= length:
            return f"{int(seconds // length)}{unit}"
    return f"{max(0, int(seconds))}s"


def _lasting(seconds: object) -> str:
    """Return how long something took, as exactly as people want it."""
    if not isinstance(seconds, int | float):
        return "-"
    if not 0 <= seconds < 100:
        return _span(seconds)
    return f"{seconds:.2f}s" if seconds < 10 else f"{seconds:.0f}s"


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


def _row(volume: dict[str, Any], now: float) -> tuple[str, ...]:
    state, size = str(volume.get("state") or "-"), volume.get("size")
    trouble = volume.get("failure")
    if state == "failed" and trouble and trouble.get("code"):
        state = f"failed({trouble['code']})"
    if condition := volume.get("condition"):
        since = condition.get("since")
        for_how_long = f", {_span(now - since)}" if isinstance(since, int | float) else ""
        state += f" ({condition.get('trouble')}{for_how_long})"
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


def _folded(text: str, width: int, most: int) -> list[str]:
    """Return ``text`` in lines of at most ``width`` columns, broken at blanks where there are any, ``most`` of them."""
    lines: list[str] = []
    while _cells(text) > width:
        end, cells = 0, 0
        while (cells := cells + _cells(text[end])) <= width - (len(lines) == most - 1):
            end += 1
        if len(lines) == most - 1:
            return [*lines, text[:end] + "…"]
        blank = text.rfind(" ", 1, end + 1)
        lines.append(text[: blank if blank > 0 else end].rstrip())
        text = text[blank if blank > 0 else end:].lstrip()
    return [*lines, text]
