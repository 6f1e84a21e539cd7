"""Faults at named places, for tests: the daemon ends itself as SIGKILL would, exactly there.

STORAGED_FAULT=PLACE in the daemon's environment arms one. Places are ``before STEP`` and ``after STEP`` for each
Step of storaged.model.plan, and the few in the middle of a step that are called by name in the code.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

Fault = Callable[[str], None]


def no_fault(_place: str) -> None:
    """What a daemon in service has."""


def fault_from_environment() -> Fault:
    """Return a function that ends the process when it is called with the place that STORAGED_FAULT names."""
    armed = os.environ.get("STORAGED_FAULT")
    if not armed:
        return no_fault

    def die_there(place: str) -> None:
        if place == armed:
            os.kill(os.getpid(), signal.SIGKILL)

    return die_there
