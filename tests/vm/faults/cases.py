"""What is tested with what: a fault, a transport, a use of the device, and how many requests are in flight."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest

TRANSPORTS = ("vduse", "nbd")
#: The device itself or a file on a mounted ext4, and the queue depth.
USES = ("raw-1", "raw-32", "ext4-1", "ext4-32")


@dataclass
class Case:
    """One row of the results; the test fills in what happened."""

    transport: str
    use: str
    depth: int
    step: str = ""
    """Where it happens, for faults that can happen in more than one place."""
    whole: bool = False
    """Whether this is the whole matrix, where there is time for more."""
    outcome: str = ""
    """What the applications saw."""
    pause: float | None = None
    """The longest request (seconds), between the fault and the first that was served afterwards."""
    notes: dict[str, Any] = field(default_factory=dict)

    def times(self, whole: int, in_ci: int) -> int:
        """How often to do it."""
        return whole if self.whole else in_ci

    def __str__(self) -> str:
        return "-".join([self.transport, self.use, str(self.depth), *([self.step] if self.step else [])])


def fault(
    title: str, *, expected: str, in_ci: Iterable[str], uses: Iterable[str] = USES,
    steps: Iterable[str] | dict[str, Iterable[str]] = ("",),
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a test run for each transport and use. ``in_ci`` names the cases that CI runs, too: ``vduse-raw-32``.

    ``steps``: places where it happens, the same for all transports or by transport.
    """
    cases = []
    for transport in TRANSPORTS:
        for use in uses:
            kind, depth = use.split("-")
            for step in steps[transport] if isinstance(steps, dict) else steps:
                cases.append(Case(transport, kind, int(depth), step))
    unknown = set(in_ci) - {str(case) for case in cases}
    assert not unknown, f"there are no such cases of {title!r}: {unknown}"
    parameters = [
        pytest.param(case, id=str(case), marks=() if str(case) in in_ci else pytest.mark.matrix) for case in cases
    ]

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        marked: Callable[..., None] = pytest.mark.parametrize("case", parameters)(function)
        marked = pytest.mark.fault(title, expected)(marked)
        return marked

    return decorate
