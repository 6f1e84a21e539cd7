"""``python -m storaged.manual DIRECTORY``: write the man pages there. Run in the checkout, where docs/backends is."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

from storaged.manual import command, configuration, daemon, sources


def pages(docs: Path, date: str) -> dict[str, str]:
    """Return all pages by the names of their files; ``docs`` is the directory docs, ``date`` as 2026-01-31."""
    made = (command.page(date), configuration.page(date), sources.page(date, docs / "backends"), daemon.page(date))
    return {page.file: str(page) for page in made}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the pages."""
    parser = argparse.ArgumentParser(prog="python -m storaged.manual", description="Write the man pages.")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    args = parser.parse_args(argv)
    # https://reproducible-builds.org/specs/source-date-epoch
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH") or time.time())))
    args.directory.mkdir(parents=True, exist_ok=True)
    for name, text in pages(args.docs, date).items():
        (args.directory / name).write_text(text)


if __name__ == "__main__":
    main()
