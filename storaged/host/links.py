"""The stable names /dev/storaged/NAME and NAME-partN.

udev makes the same ones where the rules of udev/60-storaged.rules are installed, in its own time: a link that leads
to the right device is right, whoever made it, and any of them may come or go meanwhile.
"""

from __future__ import annotations

import contextlib
import os
import re

from storaged.errors import ErrorCode, StoragedError

#: udev removes a directory with its last link, maybe just before the next one is made in it.
_ATTEMPTS = 10


def links_are_right(directory: str, name: str, device: str, partitions: dict[int, str]) -> bool:
    """Whether exactly the links that shall be there are there."""
    return _present(directory, name) == _wanted(name, device, partitions)


def links_are_there(directory: str, name: str, device: str, partitions: dict[int, str]) -> bool:
    """Whether the links that shall be there are there, whatever else is: cheaper than to look at all."""
    return all(_target(directory, link) == target for link, target in _wanted(name, device, partitions).items())


def publish(directory: str, name: str, device: str, partitions: dict[int, str]) -> None:
    """Make the links that are not right yet, each replaced atomically, and remove those of partitions that are gone.

    Raises DEVICE_FAILED where something that is no link stands in the way.
    """
    wanted = _wanted(name, device, partitions)
    for link, target in wanted.items():
        if _target(directory, link) != target:
            _replace(directory, link, target)
    for link in _present(directory, name).keys() - wanted.keys():
        _remove(directory, link)


def unpublish(directory: str, name: str) -> None:
    """Remove the links; no error when there are none."""
    for link in _present(directory, name):
        _remove(directory, link)


def any_link(directory: str, name: str) -> bool:
    """Whether any link of this volume is there."""
    return bool(_present(directory, name))


def _wanted(name: str, device: str, partitions: dict[int, str]) -> dict[str, str]:
    return {name: device, **{f"{name}-part{number}": path for number, path in partitions.items()}}


def _present(directory: str, name: str) -> dict[str, str]:
    pattern = re.compile(re.escape(name) + r"(-part[0-9]+)?")
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return {}
    found = {
        entry: _target(directory, entry)
        for entry in entries if entry.startswith(name) and pattern.fullmatch(entry)
    }
    return {entry: target for entry, target in found.items() if target is not None}


def _target(directory: str, link: str) -> str | None:
    """Return the path that a link leads to (udev's are relative), None if it is no link. Follows nothing further."""
    try:
        return os.path.normpath(os.path.join(directory, os.readlink(os.path.join(directory, link))))
    except OSError:
        return None


def _replace(directory: str, link: str, target: str) -> None:
    path, temporary = os.path.join(directory, link), os.path.join(directory, f".{link}.tmp")
    for attempt in range(_ATTEMPTS):
        if os.path.lexists(path) and not os.path.islink(path):
            raise StoragedError(
                ErrorCode.DEVICE_FAILED, f"{path} is in the way", cause="it is not a link",
                hint="move it away: that name belongs to the volume",
            )
        os.makedirs(directory, mode=0o755, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        try:
            # Absolute: udev (257) leaves it alone then, when it forgets another device of that name.
            os.symlink(target, temporary)
            os.rename(temporary, path)
        except FileNotFoundError:
            if attempt == _ATTEMPTS - 1:
                raise
        else:
            return


def _remove(directory: str, link: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(os.path.join(directory, link))
