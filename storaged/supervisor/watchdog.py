"""Feeds the service manager's watchdog as long as the event loop turns and every volume has an actor that does.

It runs on the event loop, so a loop that stands still feeds nobody. A volume that hangs on its device does not count:
whatever an actor does has a deadline, which it must keep; what the device does about it is its own affair.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter

from storaged.host.servicemanager import ServiceManager
from storaged.model.states import State
from storaged.supervisor.manager import Manager

#: Seconds that an actor may be late. After a request it stores the outcome, for which it has half a minute twice.
PATIENCE = 120.0
#: Seconds between two looks where nobody waits for food: the status is told all the same.
_WITHOUT_WATCHDOG = 20.0

log = logging.getLogger("storaged.watchdog")


async def watch(manager: Manager, service: ServiceManager) -> None:
    """Feed and tell the status until cancelled. The first food comes at once."""
    every = _WITHOUT_WATCHDOG if service.watchdog is None else service.watchdog / 3
    said, told = "", ""
    while True:
        sick = illness(manager, time.monotonic())
        if sick and sick != said:
            log.critical("%s: the watchdog is not fed any more, so that the daemon is started anew", sick)
        said = sick
        if not sick:
            service.tell("WATCHDOG=1")
        status = sick or summary(manager)
        if status != told:
            service.tell(f"STATUS={status}")
            told = status
        await asyncio.sleep(every)


def illness(manager: Manager, now: float) -> str:
    """What of the daemon itself stands still, empty where nothing does. ``now`` is monotonic."""
    for volume in manager.volumes():
        if manager.is_abandoned(volume):
            return f"the actor of volume {volume.name} has ended"
        if (late := now - volume.due) > PATIENCE:
            return f"the actor of volume {volume.name} is late by {late:.0f} s"
    return ""


def summary(manager: Manager) -> str:
    """A line for systemctl status: how many volumes there are, and which are not online."""
    states = {volume.name: volume.state for volume in manager.volumes()}
    counts = Counter(states.values())
    others = [f"{name} {state}" for name, state in states.items() if state is not State.ONLINE]
    listed = ", ".join(others[:5]) + (", …" if len(others) > 5 else "")
    return f"{len(states)} volumes, {counts[State.ONLINE]} online" + (f"; {listed}" if listed else "")
