"""A small model of the world: what each step, and each accident, does to what is observed of a volume."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from storaged.model.plan import Device, Observed, Qsd, Step

BOTH = (False, True)
#: Every value that Observed can have, whether it makes sense or not.
EVERYTHING = [Observed(*facts) for facts in product(Qsd, BOTH, BOTH, BOTH, Device, BOTH, BOTH)]


def makes_sense(seen: Observed) -> bool:
    """Whether Attachment.observe can return this."""
    return not (
        (seen.opened and seen.qsd is not Qsd.RUNNING)
        or (seen.exported and seen.qsd is Qsd.NONE)
        or (seen.exported and seen.qsd is Qsd.RUNNING and not seen.opened)
        or (seen.exported and not seen.remains)
        or (seen.device is Device.HEALTHY and not seen.exported)
        or (seen.qsd is not Qsd.NONE and not seen.directory)
        or (seen.remains and not seen.directory)
    )


POSSIBLE = [seen for seen in EVERYTHING if makes_sense(seen)]


def do(step: Step, seen: Observed) -> Observed:
    """The world after a step that worked."""
    match step:
        case Step.CLEAR:
            return replace(seen, device=Device.NONE, remains=False, exported=False)
        case Step.START:
            return replace(seen, qsd=Qsd.RUNNING, opened=False, exported=False, directory=True)
        case Step.OPEN:
            return replace(seen, opened=True)
        case Step.EXPORT:
            return replace(seen, exported=True, remains=True)
        case Step.CONNECT:
            return replace(seen, device=Device.HEALTHY)
        case Step.PUBLISH:
            return replace(seen, linked=True)
        case Step.DISCONNECT:
            return replace(seen, device=Device.NONE)
        case Step.UNPUBLISH:
            return replace(seen, linked=False)
        case Step.STOP:
            return qsd_dies(seen)
        case Step.REMOVE:
            return replace(seen, directory=False)


def qsd_dies(seen: Observed) -> Observed:
    """Its mount stays behind (``remains`` is as it was)."""
    return _unserved(replace(seen, qsd=Qsd.NONE, opened=False, exported=False))


def qsd_hangs(seen: Observed) -> Observed:
    return replace(seen, qsd=Qsd.SILENT, opened=False) if seen.qsd is Qsd.RUNNING else seen


def qsd_wakes(seen: Observed) -> Observed:
    return replace(seen, qsd=Qsd.RUNNING, opened=seen.exported) if seen.qsd is Qsd.SILENT else seen


def export_vanishes(seen: Observed) -> Observed:
    return _unserved(replace(seen, exported=False, remains=False))


def device_vanishes(seen: Observed) -> Observed:
    return replace(seen, device=Device.NONE)


def link_vanishes(seen: Observed) -> Observed:
    return replace(seen, linked=False)


def _unserved(seen: Observed) -> Observed:
    return replace(seen, device=Device.STALE) if seen.device is Device.HEALTHY else seen


ACCIDENTS: list[Callable[[Observed], Observed]] = [
    qsd_dies, qsd_hangs, qsd_wakes, export_vanishes, device_vanishes, link_vanishes,
]


def after_accidents(seen: Observed) -> Iterator[Observed]:
    for accident in ACCIDENTS:
        yield accident(seen)
