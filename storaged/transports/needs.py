"""The kernel modules of the transports: what is lacking, and loading what is there."""

from __future__ import annotations

import time

from storaged.host import modules
from storaged.model.kernelconfig import BY_TRANSPORT


def lacking(transport: str) -> str:
    """Say what keeps this kernel from a transport, without loading anything; empty if nothing does."""
    for name in BY_TRANSPORT[transport].modules:
        seen = modules.state(name)
        if not seen.usable:
            return f"{seen}; {seen.hint}" if seen.hint else str(seen)
    return ""


def load_modules(transport: str, timeout: float) -> None:
    """Load what is not there yet, within ``timeout`` seconds. Raises TRANSPORT_UNAVAILABLE, TIMEOUT."""
    deadline = time.monotonic() + timeout
    for name in BY_TRANSPORT[transport].modules:
        modules.load(name, timeout=max(0.1, deadline - time.monotonic()))
