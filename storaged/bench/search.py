"""Which settings are faster than the defaults, as far as measurements can tell. Pure: it asks, and is told.

A coordinate search: one setting after the other gets other values, each against the best so far. What is compared is
measured in pairs, interleaved (A B, B A, A B, …), so that what changes with time is nobody's advantage. How sure it is:

- A change is accepted when the interval of its ratio (``statistics.paired``, 95 %) lies wholly above 1, looked at once,
  after all pairs. Of changes that bring nothing at most 2.5 % are accepted so (``ERROR``).
- A change that is not ahead after some pairs is given up early. That can only reject, so it adds nothing to the error.
- The more is tried, the more of these accidents there are. So the best is measured against the defaults once more, with
  pairs that had no say in its choice, and what is not faster then is not taken. Whatever was tried, a search in which
  nothing helps ends with other settings than the defaults in at most 2.5 % of all cases.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field

from storaged.bench.statistics import Estimate, paired

#: The part of changes without effect that are accepted, at most.
ERROR = 0.025
#: Pairs for each change, and for the verification.
PAIRS, PAIRS_OF_VERIFICATION = 6, 8
#: From this pair on it is looked whether a change is ahead at all.
_LOOK_FROM = 2
#: How often all settings are gone through, as long as the last time has brought something.
PASSES = 2


@dataclass(frozen=True)
class Knob:
    """A setting that can have other values than it has by default."""

    option: str
    default: str
    """What it is when nothing is said, as users are told."""
    values: tuple[str, ...]
    """In the order in which they are tried."""
    rising: bool = False
    """Each goes further than the one before it: where one is slower, those behind it are not tried."""


@dataclass(frozen=True)
class Pair:
    """What is to be measured: settings (option → value) against others, which of them first."""

    candidate: Mapping[str, str]
    against: Mapping[str, str]
    candidate_first: bool
    what: str
    """For who waits."""


@dataclass(frozen=True)
class Outcome:
    """What came of a pair."""

    elapsed: float
    """Seconds since the search began."""
    ratio: float = 1.0
    """How many times as fast the candidate was."""
    problem: str = ""
    """Why the candidate could not be measured; empty if it could."""


@dataclass(frozen=True)
class Step:
    """A change that was tried."""

    option: str
    value: str
    former: str
    """What it was in the best so far."""
    ratio: Estimate | None
    """None: not one pair was measured."""
    pairs: int
    accepted: bool
    why: str


@dataclass
class Search:
    """A search; what it knows is here at any moment, also when nobody asks it any more."""

    knobs: Sequence[Knob]
    budget: float
    """Seconds."""
    pair_seconds: float
    """How long a pair takes, about."""
    steps: list[Step] = field(default_factory=list)
    best: dict[str, str] = field(default_factory=dict)
    """What was accepted so far, not verified yet."""
    taken: dict[str, str] = field(default_factory=dict)
    """What was accepted and verified; empty: the defaults."""
    verification: Estimate | None = None
    verified_pairs: int = 0
    unverified: str = ""
    """Why the verification did not come to its end; empty if it did, or there was nothing to verify."""
    untried: list[str] = field(default_factory=list)
    """What there was no time for."""
    elapsed: float = 0.0
    """Seconds of the budget that are over."""

    def pairs(self) -> Generator[Pair, Outcome, None]:
        """Yield what is to be measured next, and be sent what came of it; until the end."""
        tried: set[tuple[frozenset[tuple[str, str]], str, str]] = set()
        for _ in range(PASSES):
            before = len([step for step in self.steps if step.accepted])
            for knob in self.knobs:
                yield from self._turn(knob, tried)
            if len([step for step in self.steps if step.accepted]) == before:
                break
        if self.best:
            yield from self._verify()

    def _turn(
        self, knob: Knob, tried: set[tuple[frozenset[tuple[str, str]], str, str]]
    ) -> Generator[Pair, Outcome, None]:
        """Try the values of one setting."""
        for value in knob.values:
            # The rest of the best: against another value of this setting it may have won already.
            key = (frozenset(self.best.items()), knob.option, value)
            if self.best.get(knob.option) == value or key in tried:
                continue
            tried.add(key)
            name = f"{knob.option}={value}"
            if not self._has_time_for(PAIRS + PAIRS_OF_VERIFICATION):
                if name not in self.untried:
                    self.untried.append(name)
                continue
            step = yield from self._try(knob, value)
            self.steps.append(step)
            if step.accepted:
                self.best = {**self.best, knob.option: value}
            elif knob.rising and _is_slower(step.ratio):
                break

    def _try(self, knob: Knob, value: str) -> Generator[Pair, Outcome, Step]:
        candidate, former = {**self.best, knob.option: value}, self.best.get(knob.option, knob.default)
        ratios: list[float] = []

        def step(why: str, accepted: bool = False) -> Step:
            return Step(knob.option, value, former, _estimate(ratios), len(ratios), accepted, why)

        for number in range(PAIRS):
            if not self._has_time_for(1 + PAIRS_OF_VERIFICATION):
                return step("there was no time for all pairs")
            outcome = yield Pair(candidate, self.best, number % 2 == 0, f"{knob.option}={value}, pair {number + 1}")
            self._note_time(outcome)
            if outcome.problem:
                return step(f"not possible here: {outcome.problem}")
            ratios.append(outcome.ratio)
            if _LOOK_FROM <= len(ratios) < PAIRS and paired(ratios, [1.0] * len(ratios)).value <= 1:
                slower = _is_slower(_estimate(ratios))
                return step("slower" if slower else f"not ahead after {len(ratios)} pairs")
        found = _estimate(ratios)
        if found is not None and found.low is not None and found.low > 1:
            return step("faster", accepted=True)
        return step("slower" if _is_slower(found) else "within the noise")

    def _verify(self) -> Generator[Pair, Outcome, None]:
        """Measure the best against the defaults, with figures that had no say in its choice."""
        if not self._has_time_for(PAIRS_OF_VERIFICATION):
            self.unverified = "there was no time"
            return
        ratios: list[float] = []
        for number in range(PAIRS_OF_VERIFICATION):
            outcome = yield Pair(
                dict(self.best), {}, number % 2 == 0,
                f"the best against the defaults, pair {number + 1} of {PAIRS_OF_VERIFICATION}",
            )
            self._note_time(outcome)
            if outcome.problem:
                self.unverified = outcome.problem
                return
            ratios.append(outcome.ratio)
        self.verification, self.verified_pairs = _estimate(ratios), len(ratios)
        if self.verification is not None and self.verification.low is not None and self.verification.low > 1:
            self.taken = dict(self.best)

    def _has_time_for(self, pairs: int) -> bool:
        return self.elapsed + pairs * self.pair_seconds <= self.budget

    def _note_time(self, outcome: Outcome) -> None:
        if not outcome.problem:
            # What took longer once may do so again.
            self.pair_seconds = max(self.pair_seconds, outcome.elapsed - self.elapsed)
        self.elapsed = outcome.elapsed


def least_budget(pair_seconds: float) -> float:
    """Return the seconds that a search of a single change takes, and its verification."""
    return (PAIRS + PAIRS_OF_VERIFICATION) * pair_seconds


def _estimate(ratios: Sequence[float]) -> Estimate | None:
    return paired(ratios, [1.0] * len(ratios)) if ratios else None


def _is_slower(ratio: Estimate | None) -> bool:
    return ratio is not None and ratio.high is not None and ratio.high < 1
