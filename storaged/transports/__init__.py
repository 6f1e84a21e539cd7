"""The transports, and which one ``auto`` takes. A new transport is one file and one line here."""

from __future__ import annotations

import time
from collections.abc import Mapping

from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build, QsdVersion
from storaged.transports import fuse, nbd, queue, vduse, vhost_user
from storaged.transports.base import Transport

#: In the order in which ``auto`` tries them.
TRANSPORTS: dict[str, Transport] = {
    transport.name: transport
    for transport in (vduse.TRANSPORT, nbd.TRANSPORT, fuse.TRANSPORT, vhost_user.TRANSPORT)
}
#: Those that give a device of the host, and that ``auto`` may take.
HOST_TRANSPORTS = ("vduse", "nbd", "fuse")
#: For options whose values are wrong with every build of QSD.
_ANY_BUILD = Build(QsdVersion(0, 0, 0), frozenset())


def options_of(wanted: str) -> Mapping[str, str]:
    """Return the options of a transport; for ``auto``, those of all that it may take."""
    names = HOST_TRANSPORTS if wanted == "auto" else (wanted,)
    return {key: about for name in names if name in TRANSPORTS for key, about in TRANSPORTS[name].options.items()}


def check_transport(spec: VolumeSpec) -> None:
    """Refuse what can be refused by a look: INVALID_ARGUMENT, and TRANSPORT_UNAVAILABLE if one is insisted on."""
    wanted = spec.transport
    for name in _candidates(wanted):
        TRANSPORTS[name].settings(spec, _ANY_BUILD)
    queue.attributes(spec)
    if wanted != "auto":
        seen = TRANSPORTS[wanted].probe(None)
        if not seen.available:
            raise _unavailable(wanted, [f"{wanted}: {seen.reason}"], seen.hint)


def choose_transport(wanted: str, build: Build, timeout: float) -> tuple[Transport, str]:
    """Return a transport whose modules are loaded, and why it was taken. Blocks, for at most ``timeout`` seconds.

    Only what is chosen is loaded. Raises INVALID_ARGUMENT, TRANSPORT_UNAVAILABLE.
    """
    deadline = time.monotonic() + timeout
    reasons: list[str] = []
    hint = ""
    for name in _candidates(wanted):
        transport = TRANSPORTS[name]
        seen = transport.probe(build)
        if seen.available:
            try:
                transport.make_ready(max(0.1, deadline - time.monotonic()))
            except StoragedError as error:
                if wanted != "auto":
                    raise
                reasons.append(f"{name}: {error.message}: {error.cause}" if error.cause else f"{name}: {error.message}")
                continue
            return transport, "as asked for" if wanted != "auto" else "; ".join([*reasons, f"{name}: {seen.reason}"])
        reasons.append(f"{name}: {seen.reason}")
        hint = seen.hint
    raise _unavailable(wanted, reasons, hint if wanted != "auto" else "")


def _candidates(wanted: str) -> tuple[str, ...]:
    if wanted == "auto":
        return HOST_TRANSPORTS
    if wanted not in TRANSPORTS:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"there is no transport {wanted!r}",
            hint=f"use auto or one of {', '.join(TRANSPORTS)}",
        )
    return (wanted,)


def _unavailable(wanted: str, reasons: list[str], hint: str) -> StoragedError:
    return StoragedError(
        ErrorCode.TRANSPORT_UNAVAILABLE,
        f"this host cannot do the transport {wanted}" if wanted != "auto" else "this host can do no transport",
        cause="; ".join(reasons), hint=hint or "storaged doctor says what is missing and how to get it",
    )
