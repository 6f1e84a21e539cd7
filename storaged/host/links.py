"""The stable names /dev/storaged/NAME and NAME-partN, where no udev makes them."""

from __future__ import annotations

import contextlib
import os
import re

from storaged.errors import ErrorCode, StoragedError


def links_are_right(directory: str, name: str, device: str, partitions: dict[int, str]) -> bool:
    """Whether exactly the links that shall be there are there."""
    return _present(directory, name) == _wanted(name, device, partitions)


def links_are_there(directory: str, name: str, device: str, partitions: dict[int, str]) -> bool:
    """Whether the links that shall be there are there, whatever else is: cheaper than to look at all."""
    try:
        return all(
            os.readlink(os.path.join(directory, link)) == target
            for link, target in _wanted(name, device, partitions).items()
        )
    except OSError:
        return False


def publish(directory: str, name: str, device: str, partitions: dict[int, str]) -> None:
    """Make the links, each replaced atomically, and remove those of partitions that are gone.

    Raises DEVICE_FAILED where something that is no link stands in the way.
    """
    os.makedirs(directory, mode=0o755, exist_ok=True)
    wanted = _wanted(name, device, partitions)
    for link, target in wanted.items():
        path = os.path.join(directory, link)
        if os.path.lexists(path) and not os.path.islink(path):
            raise StoragedError(
                ErrorCode.DEVICE_FAILED, f"{path} is in the way", cause="it is not a link",
                hint="move it away: that name belongs to the volume",
            )
        temporary = os.path.join(directory, f".{link}.tmp")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        os.symlink(target, temporary)
        os.rename(temporary, path)
    for link in _present(directory, name).keys() - wanted.keys():
        os.unlink(os.path.join(directory, link))


def unpublish(directory: str, name: str) -> None:
    """Remove the links; no error when there are none."""
    for link in _present(directory, name):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, link))


def any_link(directory: str, name: str) -> bool:
    """Whether any link of this volume is there."""
    return bool(_present(directory, name))


def _wanted(name: str, device: str, partitions: dict[int, str]) -> dict[str, str]:
    return {name: device, **{f"{name}-part{number}": path for number, path in partitions.items()}}


def _present(directory: str, name: str) -> dict[str, str]:
    pattern = re.compile(re.escape(name) + r"(-part[0-9]+)?")
    found: dict[str, str] = {}
    try:
        entries = os.listdir(directory)
    except FileNotFoundError:
        return found
    for entry in entries:
        if entry.startswith(name) and pattern.fullmatch(entry):
            with contextlib.suppress(OSError):
                found[entry] = os.readlink(os.path.join(directory, entry))
    return found
