"""A man page in the macros of man(7), which groff and mandoc both read. Text may mark code with `backticks`."""

from __future__ import annotations

import re
import textwrap

import storaged

_SPECIAL = {"\\": "\\e", "-": "\\-", "^": "\\(ha", "~": "\\(ti", "`": "\\(ga", "'": "\\(aq", '"': "\\(dq"}
#: Columns of a line of source: mandoc's style asks for 80, and escapes make lines longer.
_WIDTH = 72


class Page:
    """One page, built from top to bottom."""

    def __init__(self, name: str, section: int, purpose: str, date: str) -> None:
        self.file = f"{name}.{section}"
        title = f".TH {escape(name.upper())} {section} {date} \"storaged {storaged.__version__}\" \"storaged manual\""
        self._lines = [title]
        self.heading("name")
        self._lines.append(f"{escape(name)} \\- {escape(purpose)}")

    def heading(self, text: str) -> None:
        """A section."""
        self._lines.append(f".SH {escape(text if text.startswith('[') else text.upper())}")

    def subheading(self, text: str) -> None:
        """A part of a section."""
        self._lines.append(f".SS {escape(text)}")

    def paragraph(self, text: str) -> None:
        """A paragraph; directly below a heading it needs no macro."""
        if not self._lines[-1].startswith((".SH", ".SS")):
            self._lines.append(".PP")
        self._lines += _filled(text)

    def term(self, tag: str, text: str, *, code: bool = True) -> None:
        """A word of an interface, and what it means."""
        self._lines.append(".TP")
        tagged = f"\\fB{escape(tag)}\\fR" if code else inline(tag)
        self._lines += [_at_line_start(tagged), *_filled(text)]

    def also(self, text: str) -> None:
        """A second paragraph of the term above."""
        self._lines += [".IP", *_filled(text)]

    def example(self, text: str) -> None:
        """Lines as they are."""
        lines = [_at_line_start(escape(line)) for line in textwrap.dedent(text).strip("\n").split("\n")]
        if not self._lines[-1].startswith((".SH", ".SS")):
            self._lines.append(".PP")
        self._lines += [".RS 4", ".nf", *lines, ".fi", ".RE"]

    def __str__(self) -> str:
        return "\n".join(self._lines) + "\n"


def escape(text: str) -> str:
    """Text as it is: nothing in it is a request, a hyphen can be copied, and what is no ASCII has its number."""
    return "".join(
        _SPECIAL.get(char) or (char if char.isascii() else f"\\[u{ord(char):04X}]")
        for char in text.replace("…", "...")  # which not every terminal has
    )


def inline(text: str) -> str:
    """Text in which `code` is bold and the target of a [link](target) is left out."""
    text = re.sub(r"\[([^\]]+)\]\([^)]+\)", r"\1", text)
    parts = text.split("`")
    return "".join(f"\\fB{escape(part)}\\fR" if index % 2 else escape(part) for index, part in enumerate(parts))


def _filled(text: str) -> list[str]:
    words = inline(" ".join(text.split())).split(" ")
    lines = [""]
    for word in words:
        if lines[-1] and len(lines[-1]) + len(word) >= _WIDTH:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + word
    return [_at_line_start(line) for line in lines]


def _at_line_start(line: str) -> str:
    return f"\\&{line}" if line.startswith((".", "'")) else line
