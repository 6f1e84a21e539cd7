"""Whether a volume has an image, also while no process holds its lock."""

from __future__ import annotations

import os
from collections.abc import Mapping

from storaged.errors import StoragedError
from storaged.model.layout import Layout
from storaged.model.record import Record
from storaged.supervisor.claims import Claims
from storaged.supervisor.records import load_record


def refuse_attached(layout: Layout, sources: Mapping[str, bool]) -> None:
    """Raise SOURCE_IN_USE where a volume writes to what shall be read, or has what shall be written to.

    To be asked while the locks of ``sources`` are held. The locks tell it of every volume whose QSD lives. One whose
    QSD has died holds none for a moment, or for long, if the daemon is down; but it has a record, which is written
    before its QSD starts and goes only with the volume. Its I/O may wait for the source, and would be done later.
    """
    for name, record in _records(layout):
        claims = Claims()
        claims.hold(name, record.sources)
        try:
            claims.hold("", sources)
        except StoragedError as error:
            or_share = "" if any(sources.values()) else ", or attach it with --read-only or --snapshot"
            error.hint = f"detach the volume first{or_share}"
            raise


def _records(layout: Layout) -> list[tuple[str, Record]]:
    found = []
    try:
        names = sorted(os.listdir(layout.volumes_dir))
    except FileNotFoundError:
        return []
    for name in names:
        try:
            found.append((name, load_record(layout.volume_dir(name))))
        except (OSError, ValueError):
            continue  # of a volume without a good record nobody knows the sources; the daemon does not adopt it
    return found
