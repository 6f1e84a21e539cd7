"""What the transports need of the kernel: what is lacking, and loading what is there."""

from __future__ import annotations

import time

from storaged.errors import ErrorCode, StoragedError
from storaged.host import modules, netlink
from storaged.model.kernelconfig import BY_TRANSPORT
from storaged.transports.base import Availability


def lacking(transport: str) -> Availability | None:
    """Say what keeps this kernel from a transport, without loading anything; None if nothing does."""
    for name in BY_TRANSPORT[transport].modules:
        seen = modules.state(name)
        if not seen.usable:
            return Availability(False, str(seen), seen.hint)
    return None


def check_family(family: str) -> None:
    """Look whether the kernel can be spoken to by a generic netlink family. Blocks. Raises TRANSPORT_UNAVAILABLE."""
    try:
        if netlink.has_family(family):
            return
        cause = "the daemon runs in another network namespace than the host's, as in a container"
    except OSError as error:
        cause = f"netlink cannot be used: {error.strerror or error}"
    raise StoragedError(
        ErrorCode.TRANSPORT_UNAVAILABLE, f"the kernel's netlink family {family!r} cannot be seen from here",
        cause=cause, hint="run the daemon in the host's network namespace; or use --transport fuse",
    )


def load_modules(transport: str, timeout: float) -> None:
    """Load what is not there yet, within ``timeout`` seconds. Raises TRANSPORT_UNAVAILABLE, TIMEOUT."""
    deadline = time.monotonic() + timeout
    for name in BY_TRANSPORT[transport].modules:
        modules.load(name, timeout=max(0.1, deadline - time.monotonic()))
