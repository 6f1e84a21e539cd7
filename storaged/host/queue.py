"""The request queue of a device: what was asked for is set, and looked at whether the kernel has it."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Mapping

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, worker

#: Hints at what an attribute can be, where the kernel tells it.
_LIMITS = {"queue/max_sectors_kb": "queue/max_hw_sectors_kb"}
#: In which they are written, either way.
_ORDER = ("queue/scheduler", "queue/max_sectors_kb", "queue/nr_requests", "queue/read_ahead_kb")
#: What the kernel changes along with an attribute: a scheduler has a number of requests of its own
#: (blk_mq_init_sched), and the size of the largest request makes it compute the read-ahead (blk_apply_bdi_limits).
_ALONG = {"queue/scheduler": "queue/nr_requests", "queue/max_sectors_kb": "queue/read_ahead_kb"}
#: Errors of a write that say nothing of the value. EOWNERDEAD: the worker was killed.
_PASSING = frozenset({errno.EAGAIN, errno.EBUSY, errno.EINTR, errno.ENOMEM, errno.EOWNERDEAD})


def former(path: str, wanted: Mapping[str, str]) -> dict[str, str]:
    """Return what the attributes are that ``set_up`` will write, and those that the kernel changes along with them.

    In the order in which they are given back. Never blocks.
    """
    names = [name for name in _ORDER if name in wanted or any(_ALONG.get(leader) == name for leader in wanted)]
    return {name: value for name in names if (value := _present(path, name)) is not None}


def set_up(path: str, wanted: Mapping[str, str]) -> list[StoragedError]:
    """Give attributes of the device ``path`` (below /sys/block/X) values, in their order; return what it refuses.

    A refusal is INVALID_ARGUMENT, with the kernel's error; that attribute is as it was, the others are set. Nothing is
    written that is so already: a write waits until no request is in flight, and costs more than all else. May block.
    Raises DEVICE_FAILED, HOST_STUCK where it may well be that it can be set later.
    """
    refused = []
    for name, value in wanted.items():
        present = _present(path, name)
        if present == value:
            continue
        try:
            _write(path, name, value)
        except OSError as error:
            why = error.strerror or str(error)
            if error.errno in _PASSING:
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, f"{name} of {path} cannot be set", cause=why, hint="look into the journal"
                ) from error
            refused.append(_refused(path, name, value, why))
            continue
        if (made := _present(path, name)) != value:
            refused.append(_refused(path, name, value, f"it made {made or 'nothing'} of it"))
            if present is not None:
                _try_to_write(path, name, present)
    return refused


def give_back(
    path: str, former: Mapping[str, str], made: Mapping[str, str], *, is_ours: Callable[[], bool] = lambda: True
) -> None:
    """Set what ``set_up`` has made of a device to what it was, but for what is something else by now. May block.

    In the order of ``set_up``: another scheduler sets nr_requests anew, and so on. It ends when the device is not
    ``is_ours`` any more: whoever has it by now may have set it up already.
    """
    ours = {name for name, value in made.items() if _present(path, name) == value}
    # Whatever these are by now: the kernel makes something else of them once more.
    ours |= {_ALONG[name] for name in ours if name in _ALONG and former.get(name) != made[name]}
    for name in _ORDER:
        if not is_ours():
            return
        if name in ours and name in former and _present(path, name) != former[name]:
            _try_to_write(path, name, former[name])


def is_given_back(path: str, former: Mapping[str, str], made: Mapping[str, str]) -> bool:
    """Whether anything of a device is as it was before ``set_up``, and not as that made it. Never blocks."""
    return any(value != made.get(name, value) and _present(path, name) == value for name, value in former.items())


def schedulers(path: str) -> list[str]:
    """The I/O schedulers that a device can have now; empty where it has none to choose."""
    return (disk.attribute(path, "queue/scheduler") or "").replace("[", "").replace("]", "").split()


def _write(path: str, name: str, value: str) -> None:
    # It waits for the requests in flight, for ever if the server dies meanwhile.
    worker.write(f"/sys/block/{os.path.basename(path)}/{name}", value)


def _try_to_write(path: str, name: str, value: str) -> None:
    with contextlib.suppress(OSError, StoragedError):  # nothing depends on it
        _write(path, name, value)


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
