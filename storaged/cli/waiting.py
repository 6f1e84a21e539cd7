"""``storaged wait``: until a volume is online, whatever becomes of the daemon meanwhile."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import Any

from storaged.api.client import Client
from storaged.errors import ErrorCode, StoragedError

#: Seconds between two tries to reach a daemon that is being restarted.
_PAUSE = 0.2
#: Seconds for an answer that the daemon has in its head.
_QUICK = 30.0


def unescaped(instance: str) -> str:
    """The name in an instance of storaged@.service, of which systemd-escape may have escaped the dashes.

    A volume's name has no backslash, so both ways of writing it can be told apart.
    """
    return re.sub(r"\\x([0-9a-f]{2})", lambda found: chr(int(found[1], 16)), instance)


def until_online(connect: Callable[[], Client], name: str, timeout: float) -> dict[str, Any]:
    """Return the volume as soon as it is online; at most ``timeout`` seconds.

    A daemon that goes away meanwhile is waited for. Raises NO_SUCH_VOLUME at once, and TIMEOUT with what the volume
    failed of last as the cause.
    """
    deadline = time.monotonic() + timeout
    last: dict[str, Any] = {}
    reason = ""
    while True:
        try:
            # The stream first: nothing that happens after the look is missed.
            with connect() as events:
                events.send("Watch", {"name": name}, more=True)
                while events.wait(max(0.0, deadline - time.monotonic())):
                    events.receive(_QUICK)
                    with connect() as client:
                        last = client.call("Show", {"name": name}, timeout=_QUICK).get("volume") or {}
                    if last.get("state") == "online":
                        return last
            reason = _reason(last)
        except StoragedError as error:
            if error.code is not ErrorCode.DAEMON_UNREACHABLE:
                raise
            reason = str(error)
        if time.monotonic() >= deadline:
            raise StoragedError(
                ErrorCode.TIMEOUT, f"it is not online after {timeout:g} s", volume=name, cause=reason,
                hint=f"it goes on being tried; storaged show {name} tells more",
            )
        time.sleep(_PAUSE)


def _reason(volume: dict[str, Any]) -> str:
    failure = volume.get("failure") or {}
    text = ": ".join(filter(None, [failure.get("message"), failure.get("cause")]))
    return f"it is {volume.get('state') or 'unknown'}" + (f", {text}" if text else "")
