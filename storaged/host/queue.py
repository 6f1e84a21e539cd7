"""The request queue of a device: what was asked for is set, and looked at whether the kernel has it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, worker

#: Hints at what an attribute can be, where the kernel tells it.
_LIMITS = {"queue/max_sectors_kb": "queue/max_hw_sectors_kb"}


def set_up(path: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Give attributes of the device ``path`` (below /sys/block/X) values, in their order; return what they were.

    Nothing is written that is so already: a write waits until no request is in flight, and costs more than all else.
    May block. Raises INVALID_ARGUMENT, with the kernel's error, where it does not take one; all is as before then.
    """
    former: dict[str, str] = {}
    for name, value in wanted.items():
        present = _present(path, name)
        if present == value:
            continue
        try:
            _write(path, name, value)
            if present is not None:
                former[name] = present
            if (made := _present(path, name)) != value:
                raise _refused(path, name, value, f"it made {made or 'nothing'} of it")
        except OSError as error:
            give_back(path, former, wanted)
            raise _refused(path, name, value, error.strerror or str(error)) from error
        except StoragedError:
            give_back(path, former, {**wanted, name: _present(path, name) or ""})
            raise
    return former


def give_back(path: str, former: Mapping[str, str], made: Mapping[str, str]) -> None:
    """Set what ``set_up`` has made of a device to what it was, but for what is something else by now. May block."""
    for name, value in reversed(list(former.items())):  # another scheduler sets nr_requests anew
        if _present(path, name) == made.get(name):
            with contextlib.suppress(OSError, StoragedError):  # nothing depends on it
                _write(path, name, value)


def schedulers(path: str) -> list[str]:
    """The I/O schedulers that a device can have now; empty where it has none to choose."""
    return (disk.attribute(path, "queue/scheduler") or "").replace("[", "").replace("]", "").split()


def _write(path: str, name: str, value: str) -> None:
    # It waits for the requests in flight, for ever if the server dies meanwhile.
    worker.write(f"/sys/block/{os.path.basename(path)}/{name}", value)


def _present(path: str, name: str) -> str | None:
    text = disk.attribute(path, name)
    if text is not None and name == "queue/scheduler":
        # All that there are, with brackets around the one that counts; alone, where there is nothing to choose.
        return next((word[1:-1] for word in text.split() if word.startswith("[")), text.strip())
    return text


def _refused(path: str, name: str, value: str, why: str) -> StoragedError:
    option = name.removeprefix("queue/").replace("_", "-")
    hint = "say another value, or leave the option out"
    if option == "scheduler":
        hint = f"this device has: {', '.join(schedulers(path)) or 'none'}; others are modules, as bfq"
    elif name in _LIMITS and (limit := disk.attribute(path, _LIMITS[name])) is not None:
        hint = f"this device takes at most {limit}"
    return StoragedError(
        ErrorCode.INVALID_ARGUMENT, f"the kernel does not take option {option}={value} for {path}", cause=why,
        hint=hint,
    )
