"""Figures as people read them, the same in the terminal, on the page and in its plots. Pure."""

from __future__ import annotations

from storaged.bench.report import CONSUMERS, Line
from storaged.bench.statistics import Estimate

#: Behind a ratio that is no more than the spread of the rounds, and what it means.
MARK = "~"
_UNTOLD = f"{MARK} the spread of the rounds is larger than the difference: none is told"


def figure(line: Line) -> str:
    """The figure with its unit."""
    return f"{number(line.figure.value)} {line.job.unit}"


def number(value: float) -> str:
    """A figure with as many digits as mean something."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def spread(estimate: Estimate) -> str:
    """How far the interval reaches, empty where there is none."""
    if estimate.spread is None:
        return ""
    return f"{100 * estimate.spread:.0f}%" if estimate.spread < 10 else ">1000%"


def untold(rounds: int) -> str:
    """What MARK means."""
    return _UNTOLD if rounds > 1 else f"{MARK} one round tells nothing of the spread, and so of no difference"


def ratio(estimate: Estimate | None) -> str:
    """A ratio, marked where it tells nothing."""
    if estimate is None:
        return ""
    return estimate.times if estimate.tells_a_difference else f"{estimate.times} {MARK}"


def latency(nanoseconds: float | None) -> str:
    """A latency in the unit that fits."""
    if nanoseconds is None:
        return ""
    for unit, size in (("s", 1e9), ("ms", 1e6)):
        if nanoseconds >= size:
            return f"{_short(nanoseconds / size)}{unit}"
    return f"{_short(nanoseconds / 1e3)}µs"


def consumption(cpu: dict[str, float]) -> str:
    """Microseconds for each request, by who used them."""
    last = max((place for place, who in enumerate(CONSUMERS) if who in cpu), default=-1)
    # Who is not there used nothing; the places tell who is who.
    return "+".join(_short(cpu.get(who, 0.0)) for who in CONSUMERS[:last + 1])


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 10 else f"{value:.3g}"
