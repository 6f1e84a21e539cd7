"""Fuzz one target until it fails or is told to stop: ``python -m tests.fuzz TARGET [option of libFuzzer]…``.

It ends with status 77 where the target raised something; the input is then in a file that libFuzzer names. That file,
as an argument, repeats it. Without options it goes on for ever.
"""

from __future__ import annotations

import contextlib
import sys
import tempfile
from pathlib import Path

import atheris

# Before anything imports them: what is to be covered is rewritten as it is imported.
with atheris.instrument_imports(include=["storaged", "asyncvarlink"]):
    from tests.fuzz.targets import TARGETS


def main(arguments: list[str]) -> int:
    """Never returns once it fuzzes: libFuzzer ends the process."""
    if not arguments or arguments[0] not in TARGETS:
        print(f"usage: python -m tests.fuzz {{{','.join(TARGETS)}}} [option of libFuzzer]…", file=sys.stderr)
        return 2
    target = TARGETS[arguments[0]]
    with contextlib.ExitStack() as ends:
        seeds = Path(ends.enter_context(tempfile.TemporaryDirectory()))
        for number, seed in enumerate(target.seeds):
            (seeds / str(number)).write_bytes(seed)
        given = [word for word in arguments[1:] if word.startswith("-")]
        inputs = [word for word in arguments[1:] if not word.startswith("-")]
        # With files as arguments libFuzzer runs these alone; with directories it looks for more.
        words = ["-timeout=20", "-rss_limit_mb=2048", *given, *(inputs or [str(seeds)])]
        check = ends.enter_context(target.ready())
        atheris.Setup([sys.argv[0], *words], check)
        atheris.Fuzz()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
