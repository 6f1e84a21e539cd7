"""Brings the checkout into a machine: all of it the first time, later what was changed."""

from __future__ import annotations

import io
import json
import os
import subprocess
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]


def now() -> dict[str, list[int]]:
    """All files of the checkout but the ignored ones."""
    listed = subprocess.run(
        ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "-co", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout
    state = {}
    for name in sorted({os.fsdecode(path) for path in listed.split(b"\0") if path}):
        try:
            found = os.lstat(ROOT / name)
        except OSError:
            continue  # deleted, and git was not told
        state[name] = [found.st_ino, found.st_mtime_ns, found.st_size, found.st_mode]
    return state


def load(path: Path) -> dict[str, list[int]]:
    """What a machine has by now."""
    try:
        return dict(json.loads(path.read_text()))
    except FileNotFoundError:
        return {}


def archive(names: list[str]) -> bytes:
    """Files of the checkout as a tar archive."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name in names:
            try:
                member = tar.gettarinfo(ROOT / name, arcname=name)
                member.uid = member.gid = 0
                member.uname = member.gname = "root"
                with open(ROOT / name, "rb") if member.isreg() else io.BytesIO() as content:
                    tar.addfile(member, content)
            except FileNotFoundError:
                continue  # deleted meanwhile; the next look sees it
    return data.getvalue()
