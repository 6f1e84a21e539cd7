"""storaged-sources(7), from the backends and transports themselves, and the tables of spellings in docs/backends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from storaged.backends import BACKENDS
from storaged.backends.base import Backend
from storaged.manual.roff import Page
from storaged.model.spec import COMMON_OPTIONS
from storaged.transports import TRANSPORTS

#: Backends that share a page of docs/backends, by the one that it is named after.
_TOGETHER = {"https": "http", "ftps": "ftp"}


def page(date: str, docs: Path) -> Page:
    """Return the page; ``docs`` is the directory docs/backends."""
    page = Page("storaged-sources", 7, "how storaged is told where the data is", date)
    page.heading("synopsis")
    page.paragraph("`storaged attach` NAME SOURCE [`-o` KEY=VALUE]...")
    page.heading("description")
    page.paragraph(
        "A source says where the data of a volume is: on this host, or on the network. A path is a file or a block "
        "device of this host; a path that has a colon is written as ./we:ird.img. Anything else begins with the name "
        "of a scheme and a colon. What a scheme can do is decided by qemu-storage-daemon: its drivers for the network "
        "are in Debian's package qemu-block-extra."
    )
    page.paragraph(
        "Passwords and keys are never a part of a source or the value of an option: an option says where one is, a "
        "`/PATH`, `credential:NAME` (a systemd credential of the daemon), or `-` for standard input, which cannot be "
        "combined with `--persist`."
    )
    page.paragraph("The format of what is there is never guessed: `--format`, else raw.")
    page.heading("sources")
    for name, together in _groups().items():
        page.subheading(" and ".join(backend.name for backend in together))
        written = _spellings(docs / f"{name}.md")
        for spelling, meaning in written or [(backend.example, "") for backend in together]:
            if meaning:
                page.term(spelling, meaning, code=False)
            else:
                page.paragraph(f"`{spelling}`" if "`" not in spelling else spelling)
        options: dict[str, str] = {}
        for backend in together:
            for option, about in backend.options.items():
                options.setdefault(option, about)
        for option, about in options.items():
            having = [backend.name for backend in together if option in backend.options]
            _option(page, option, about, "" if len(having) == len(together) else f" (only with {', '.join(having)})")
    page.heading("options of all volumes")
    _options(page, COMMON_OPTIONS)
    page.heading("options of transports")
    page.paragraph("With `--transport auto` those of a transport that is not chosen are ignored.")
    for name, transport in TRANSPORTS.items():
        if transport.options:
            page.subheading(name)
            _options(page, transport.options)
    page.heading("files")
    page.term("/usr/share/doc/storaged/backends", "What each backend does when its server is away, as it was measured.")
    page.heading("see also")
    page.paragraph("storaged(1), storaged.toml(5), storaged(8)")
    return page


def _groups() -> dict[str, list[Backend]]:
    groups: dict[str, list[Backend]] = {}
    for name, backend in BACKENDS.items():
        groups.setdefault(_TOGETHER.get(name, name), []).append(backend)
    return groups


def _spellings(document: Path) -> list[tuple[str, str]]:
    """The rows of the table of spellings on a backend's page, where it has one."""
    rows: list[tuple[str, str]] = []
    lines = iter(document.read_text().splitlines() if document.exists() else [])
    for line in lines:
        if line.startswith("| spelling |"):
            next(lines, "")
            for row in lines:
                if not row.startswith("|"):
                    return rows
                spelling, meaning = (cell.strip() for cell in row.strip("|").split("|", 1))
                rows.append((spelling, meaning))
    return rows


def _options(page: Page, options: Mapping[str, str]) -> None:
    for option, about in options.items():
        _option(page, option, about)


def _option(page: Page, option: str, about: str, more: str = "") -> None:
    page.term(f"-o {option}=", f"{about}{more}")
