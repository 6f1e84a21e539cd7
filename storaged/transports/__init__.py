"""The transports, and which one ``auto`` takes. A new transport is one file and one line here."""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.version import QsdVersion
from storaged.transports import fuse
from storaged.transports.base import Transport

#: In the order in which ``auto`` tries them.
TRANSPORTS: dict[str, Transport] = {transport.name: transport for transport in (fuse.TRANSPORT,)}


def choose_transport(wanted: str, version: QsdVersion | None) -> tuple[Transport, str]:
    """Return the transport and why it was taken. Raises INVALID_ARGUMENT, TRANSPORT_UNAVAILABLE."""
    if wanted != "auto" and wanted not in TRANSPORTS:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"there is no transport {wanted!r}",
            hint=f"use auto or one of {', '.join(TRANSPORTS)}",
        )
    reasons: list[str] = []
    for transport in TRANSPORTS.values() if wanted == "auto" else [TRANSPORTS[wanted]]:
        seen = transport.probe(version)
        if seen.available:
            why = "as asked for" if wanted != "auto" else "; ".join([*reasons, seen.reason])
            return transport, why
        reasons.append(f"{transport.name}: {seen.reason}")
    raise StoragedError(
        ErrorCode.TRANSPORT_UNAVAILABLE,
        f"this host cannot do the transport {wanted}" if wanted != "auto" else "this host can do no transport",
        cause="; ".join(reasons), hint="storaged doctor says what is missing and how to get it",
    )
