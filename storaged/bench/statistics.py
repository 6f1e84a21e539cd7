"""What repeated rounds say: means, ratios of pairs, and how sure they are. Pure.

All is done with logarithms: a figure that is twice as large is as far away as one that is half as large. The mean is
the geometric mean; the interval is Student's t of the logarithms, 95 % (of a ratio: of the logarithms of the ratios,
round by round). Whatever the rounds say, an interval reaches ``RESOLUTION`` to both sides: requests are counted from
the start of fio to the end of its time, with those in flight at both, and less than that nobody can tell.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

#: The least half of an interval, as a part of the figure.
RESOLUTION = 0.01
#: Student's t, 97.5 %, for 1 to 30 degrees of freedom.
_T = (
    12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281,
    2.2010, 2.1788, 2.1604, 2.1448, 2.1314, 2.1199, 2.1098, 2.1009, 2.0930, 2.0860,
    2.0796, 2.0739, 2.0687, 2.0639, 2.0595, 2.0555, 2.0518, 2.0484, 2.0452, 2.0423,
)
_NORMAL = 1.959964
_WILD = 10


def student(freedom: float) -> float:
    """Return Student's t for a two-sided interval of 95 %; a part of a degree of ``freedom`` is dropped (at least 1).

    Beyond the table, Cornish and Fisher's expansion (Abramowitz and Stegun 26.7.5), which is exact to 4 digits there.
    """
    whole = max(1, int(freedom))
    if whole <= len(_T):
        return _T[whole - 1]
    z = _NORMAL
    return z + (z**3 + z) / (4 * whole) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * whole**2)


@dataclass(frozen=True)
class Estimate:
    """A figure or a ratio, and the interval that it is in; without one where a single round tells nothing."""

    value: float
    low: float | None
    high: float | None

    @property
    def spread(self) -> float | None:
        """How far the interval reaches above the figure, as a part of it."""
        return None if self.high is None else self.high / self.value - 1

    @property
    def tells_a_difference(self) -> bool:
        """Of a ratio: whether the spread is smaller than what differs from 1."""
        return self.low is not None and self.high is not None and not self.low <= 1 <= self.high

    @property
    def times(self) -> str:
        """The ratio with its interval, as text; an interval of several powers of ten says no more than that."""
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        if self.high > _WILD * self.value:
            return f"{self.value:.2f} (anything)"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


def mean(values: Sequence[float]) -> Estimate:
    """Return the geometric mean of figures above 0, at least one of them."""
    return _estimate([math.log(value) for value in values])


def paired(ones: Sequence[float], others: Sequence[float]) -> Estimate:
    """Return how many times the others the ones are, from rounds in which both were measured."""
    return _estimate([math.log(one / other) for one, other in zip(ones, others, strict=True)])


def unpaired(ones: Sequence[float], others: Sequence[float]) -> Estimate:
    """The same for figures of two runs, which have no rounds in common: Welch's interval."""
    logs = [[math.log(value) for value in side] for side in (ones, others)]
    centre = statistics.fmean(logs[0]) - statistics.fmean(logs[1])
    if min(map(len, logs)) < 2:
        return Estimate(math.exp(centre), None, None)
    parts = [statistics.variance(side) / len(side) for side in logs]
    total = sum(parts)
    if total == 0:
        return _around(centre, 0.0)
    freedom = total**2 / sum(part**2 / (len(side) - 1) for part, side in zip(parts, logs, strict=True))
    return _around(centre, student(freedom) * math.sqrt(total))


def _estimate(logs: Sequence[float]) -> Estimate:
    centre = statistics.fmean(logs)
    if len(logs) < 2:
        return Estimate(math.exp(centre), None, None)
    return _around(centre, student(len(logs) - 1) * statistics.stdev(logs) / math.sqrt(len(logs)))


def _around(centre: float, half: float) -> Estimate:
    # exp() of what two wild rounds make of t would be more than a float can hold.
    half = min(max(half, math.log1p(RESOLUTION)), 300.0)
    return Estimate(math.exp(centre), math.exp(centre - half), math.exp(centre + half))
