"""What a search for settings found out, as JSON. Pure."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from storaged.bench.report import JobFacts
from storaged.bench.search import Search
from storaged.bench.statistics import Estimate


class Ratio(msgspec.Struct, frozen=True, kw_only=True):
    """How many times as fast, and the interval of 95 % that it is in; none with one pair."""

    value: float
    low: float | None
    high: float | None

    @property
    def estimate(self) -> Estimate:
        """The same, with what follows from it."""
        return Estimate(self.value, self.low, self.high)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A change that was tried, against the best so far."""

    option: str
    value: str
    former: str
    ratio: Ratio | None
    pairs: int
    accepted: bool
    why: str


class Measured(msgspec.Struct, frozen=True, kw_only=True):
    """One measurement: settings, and what each job did by them."""

    settings: dict[str, str]
    began: float
    """Seconds since the epoch."""
    load: float
    """The host's load average when it began."""
    iops: dict[str, float]
    """Job → requests a second."""


class Verification(msgspec.Struct, frozen=True, kw_only=True):
    """The best against the defaults, by pairs that had no say in its choice."""

    settings: dict[str, str]
    ratio: Ratio
    pairs: int
    taken: bool


class TuneReport(msgspec.Struct, frozen=True, kw_only=True):
    """A search for settings of one source, by one transport."""

    storaged_tune: Literal[1] = 1
    """The version of this form."""
    source: str
    """Without secrets."""
    format: str
    options: dict[str, str]
    """What was said; it was the same in all measurements."""
    transport: str
    size: int | None
    """Bytes."""
    began: float
    ended: float
    budget: float
    runtime: float
    partial: str = ""
    """Why it ended before it was over; empty if it did not."""
    machine: dict[str, str]
    notes: list[str]
    jobs: list[JobFacts]
    volume: dict[str, Any]
    queue: dict[str, str]
    """The device's with the defaults (/sys/block/X/queue)."""
    changes: list[Change]
    untried: list[str]
    """What there was no time for."""
    verification: Verification | None
    settings: dict[str, str]
    """What is faster than the defaults, verified; empty: the defaults are kept."""
    profile: str = ""
    """The file that it was written to; empty if it was not."""
    measured: list[Measured]


def changes_of(search: Search) -> list[Change]:
    """The changes that a search has tried so far."""
    return [
        Change(
            option=step.option, value=step.value, former=step.former, ratio=_ratio(step.ratio), pairs=step.pairs,
            accepted=step.accepted, why=step.why,
        )
        for step in search.steps
    ]


def verification_of(search: Search) -> Verification | None:
    """The verification of a search, if it came so far."""
    ratio = _ratio(search.verification)
    if ratio is None:
        return None
    return Verification(
        settings=dict(search.best), ratio=ratio, pairs=search.verified_pairs, taken=bool(search.taken)
    )


def _ratio(found: Estimate | None) -> Ratio | None:
    return None if found is None else Ratio(value=found.value, low=found.low, high=found.high)


def encoded(report: TuneReport) -> bytes:
    """Return the report as JSON."""
    return msgspec.json.format(msgspec.json.encode(report), indent=1)
