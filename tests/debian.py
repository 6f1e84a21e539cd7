"""Programs of another Debian than this host's, run out of a directory."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path

TOP = Path(__file__).parents[1]


def program(suite: str, name: str, path: str, *packages: str, libraries: str = "") -> list[str]:
    """Return the words that run the program at ``path`` of these packages; they are kept in .cache/roots/``name``.

    ``libraries``: a directory below that of the libraries where some of them are.
    """
    root = TOP / ".cache" / "roots" / name
    root.parent.mkdir(parents=True, exist_ok=True)
    made = subprocess.run(
        [TOP / "scripts" / "debian-root", "--variant=extract", suite, root, *packages],
        capture_output=True, text=True, timeout=110,
    )
    assert made.returncode == 0, made.stderr
    found = root / "usr" / "lib" / f"{platform.machine()}-linux-gnu"
    (loader,) = [*root.glob("lib64/ld-linux-*.so.*"), *root.glob("usr/lib/ld-linux-*.so.*")][:1]
    where = f"{found}:{found / libraries}" if libraries else str(found)
    return [str(loader), "--library-path", where, str(root / path)]
