"""Sources that are fetched whole before QSD opens them (storaged/backends/tftp.py). Blocks, use a thread.

The copy of a volume is NAME.raw in a directory of the daemon's state, which is no memory and outlives daemon and QSD.
It is there until the volume is detached: an overlay of --snapshot belongs to just what was fetched, and a successor
of QSD serves the same disk, whatever the server has by then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from storaged.backends import find_backend, tftp
from storaged.host import download
from storaged.host.identity import file_identity
from storaged.model.layout import Layout
from storaged.model.spec import VolumeSpec
from storaged.supervisor.opening import Opening

_COPY = ".raw"
_MARK = ".raw.json"
_PART = ".raw.part"


def is_fetched(spec: VolumeSpec) -> bool:
    """Whether the source of a volume is fetched before it is opened."""
    return find_backend(spec.source) is tftp.BACKEND


def directory(layout: Layout) -> str:
    """Where the copies are."""
    return os.path.join(layout.state_dir, "copies")


def path_of(layout: Layout, name: str) -> str:
    """The copy of a volume's source."""
    return os.path.join(directory(layout), name + _COPY)


def located(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Return a tree of nodes with the path of the copy in it."""
    return {
        key: located(value, path) if isinstance(value, dict)
        else path if (key, value) == ("filename", tftp.COPY) and node.get("driver") == "file"
        else value
        for key, value in node.items()
    }


def fetch(
    spec: VolumeSpec, wanted: Opening, layout: Layout, *, deadline: float, stop: threading.Event,
    progress: Callable[[int, int | None], None],
) -> Opening:
    """Fetch the source, if it is one that has to be and there is no copy yet; return what QSD opens then.

    ``deadline`` is of time.monotonic(). Raises what ``download.fetch`` raises.
    """
    if not is_fetched(spec):
        return wanted
    url = tftp.BACKEND.parse(spec.source, spec.options)
    path = path_of(layout, spec.name)
    download.fetch(
        url, path, deadline=deadline, stop=stop, progress=progress, stall=tftp.stall_of(spec.options),
        size=tftp.size_of(spec.options),
    )
    seen = os.stat(path)
    return replace(
        wanted, node=located(wanted.node, path),
        source=None if wanted.source is None else located(wanted.source, path),
        files=frozenset({file_identity(seen.st_dev, seen.st_ino)}),
    )


def remove(layout: Layout, name: str) -> None:
    """Remove the copy of a volume's source, and all that was begun; no error where there is none."""
    if exists(layout, name):
        download.remove(path_of(layout, name))


def exists(layout: Layout, name: str) -> bool:
    """Whether there is anything to remove."""
    return any(os.path.lexists(os.path.join(directory(layout), name + end)) for end in (_COPY, _MARK, _PART))


def all_names(layout: Layout) -> list[str]:
    """Return the volumes of which there is something to remove."""
    try:
        entries = os.listdir(directory(layout))
    except FileNotFoundError:
        return []
    ends = (_MARK, _PART, _COPY)
    return sorted({entry.removesuffix(end) for entry in entries for end in ends if entry.endswith(end)})
