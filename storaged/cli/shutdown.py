"""``storaged shutdown``: what systemd runs while the host goes down (systemd/storaged-shutdown, storaged-stuck)."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from storaged.api.client import Client
from storaged.cli import render
from storaged.errors import ErrorCode, StoragedError

#: Seconds for an answer that the daemon has in its head, and between two looks.
_QUICK = 30.0
_LOOK = 1.0
#: Seconds for a rescue; it goes on in the daemon.
_RESCUE = 60.0


def park(connect: Callable[[], Client], timeout: float) -> None:
    """Flush and end what nobody uses, within ``timeout`` seconds; say what goes on. Nothing where nobody answers."""
    try:
        with connect() as client:
            notes = client.call("Park", {"timeout": timeout}, timeout + _QUICK).get("notes") or []
    except StoragedError as error:
        if error.code is not ErrorCode.DAEMON_UNREACHABLE:
            raise
        notes = [str(error)]
    for note in notes:
        render.note(f"storaged: {render.clean(note)}")


def end_stuck(connect: Callable[[], Client], patience: float) -> None:
    """Rescue each volume that has hung for ``patience`` seconds from now on, until the daemon is gone.

    What waits for such a volume would keep the host from going down, and with the reboot it is lost in any case.
    """
    since: dict[str, float] = {}
    while True:
        try:
            with connect() as client:
                volumes = client.call("List", timeout=_QUICK).get("volumes") or []
        except StoragedError as error:
            if error.code is ErrorCode.DAEMON_UNREACHABLE:
                return
            raise
        now = time.monotonic()
        waiting = {str(volume.get("name")) for volume in volumes if _waits(volume)}
        since = {name: since.get(name, now) for name in waiting}
        for name in sorted(name for name, begin in since.items() if now - begin >= patience):
            render.note(f"storaged: volume {render.clean(name)}: its I/O is ended, because the host shuts down")
            _rescue(connect, name)
            del since[name]
        time.sleep(_LOOK)


def _waits(volume: dict[str, Any]) -> bool:
    """Whether its device is there, and what uses it waits. A state alone does not tell: a failed one may work."""
    return bool(volume.get("device")) and bool(volume.get("condition"))


def _rescue(connect: Callable[[], Client], name: str) -> None:
    try:
        with connect() as client:
            client.call("Rescue", {"name": name, "timeout": _RESCUE}, _RESCUE + _QUICK)
    except StoragedError as error:
        render.failure(error)
