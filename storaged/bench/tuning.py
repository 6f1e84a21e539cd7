"""One search for settings, from what the user said to what was found. Blocks.

It is a benchmark whose ways are the same source by the same transport with other options, attached anew each time.
What is tried and what is accepted ``search`` decides.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from storaged.backends import find_backend
from storaged.bench import facts, measure
from storaged.bench.fio import Leave
from storaged.bench.jobs import check_size
from storaged.bench.knobs import Host, knobs, pinned
from storaged.bench.measure import Runner
from storaged.bench.report import JobFacts
from storaged.bench.search import Outcome, Pair, Search, Step, least_budget
from storaged.bench.session import Request, Session, lasting
from storaged.bench.statistics import mean
from storaged.bench.tunereport import Measured, TuneReport, changes_of, verification_of
from storaged.bench.ways import PATIENCE, Shop, Subject, Target
from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk
from storaged.qsd.version import fuse_has_threads, parse_version
from storaged.transports import options_of
from storaged.transports.nbd import has_iothread

#: Seconds that devices are read before anything counts, at most.
_WARM, _WORTH_WARMING = 0.5, 0.5
#: Seconds that an attach may take beyond the budget: the last ones of a search are its verification.
_LEAST_PATIENCE = 5.0
#: A pair may take so much longer than the first look has taken for its half.
_LONGER = 1.2
#: Failures of an attach that say that the host is in trouble, and not that an option cannot be.
_GRAVE = frozenset({
    ErrorCode.HOST_STUCK, ErrorCode.DAEMON_UNREACHABLE, ErrorCode.SOURCE_IN_USE, ErrorCode.DEVICE_IN_USE,
    ErrorCode.NO_SPACE, ErrorCode.VOLUME_EXISTS,
})
_QUEUE = ("scheduler", "read_ahead_kb", "max_sectors_kb", "max_hw_sectors_kb", "nr_requests")


@dataclass
class Tuning(Session):
    """A search that may be interrupted at any moment: ``told`` says what was found until then."""

    budget: float = 0.0
    """Seconds."""
    only: tuple[str, ...] = ()
    """The settings that are tried; empty: all that there are."""
    unsafe: bool = False
    transport: str = "auto"
    search: Search | None = None
    measured: list[Measured] = field(default_factory=list)
    volume: dict[str, Any] = field(default_factory=dict)
    queue: dict[str, str] = field(default_factory=dict)
    leave: Leave | None = None
    _start: float = 0.0

    def _measure(self, shop: Shop, stack: contextlib.ExitStack) -> None:
        self._start = time.monotonic()
        request, self.leave = self._prepare(shop, stack, needs_daemon=True)
        if request.scratch is None and (volume := self._volume(shop, needs_daemon=True)) is not None:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "a volume that is attached cannot be tuned", volume=str(volume["name"]),
                cause="it would have to be attached anew for each setting",
                hint=f"detach it, and tune its source: {self.command} tune {volume['source']}",
            )
        subject = self._locked(request, self.leave, stack)
        self.notes += facts.notes_on_host()
        run = measure.runner(self.fio, shop.place.path)
        # An image of our own is none of the budget.
        self.began, self._start = time.time(), time.monotonic()
        self.display.tell("looking at the defaults", 0.0)
        self._one(shop, subject, {}, run)
        self.transport = str(self.volume["transport"])
        search = self._search(subject)
        self.display.note(
            f"{len(self.jobs)} jobs by {self.transport}, {sum(len(knob.values) for knob in search.knobs)} values of "
            f"{', '.join(knob.option for knob in search.knobs)}: {lasting(self.budget)} at most"
        )
        asked = search.pairs()
        with contextlib.suppress(StopIteration):
            pair = next(asked)
            told = 0
            while True:
                self.display.tell(pair.what, min(99.0, 100 * self._elapsed() / self.budget))
                pair = asked.send(self._outcome(shop, subject, pair, run))
                told = self._tell_steps(search, told)
        self._tell_steps(search, told)
        self.display.tell("done", 100.0)

    def _subject(self, request: Request, leave: Leave | None) -> Subject:
        """What was said of the transport stays as it is, as what was said of the source."""
        subject = super()._subject(request, leave)
        return replace(subject, options={**subject.options, **subject.of_transports}, of_transports={})

    def _transports(self) -> Sequence[str]:
        return [self.transport]

    def _tell_steps(self, search: Search, told: int) -> int:
        """Say what the changes have brought that were not told yet."""
        for step in search.steps[told:]:
            self.display.note(sentence(step))
        return len(search.steps)

    def _search(self, subject: Subject) -> Search:
        """Decide what is tried. Raises INVALID_ARGUMENT where there is nothing, or no time for anything."""
        spec = subject.one.spec
        options = find_backend(spec.source).options.keys() | options_of(self.transport).keys()
        version = parse_version(f"version {self.volume.get('qsd_version')}")
        polls = self.transport != "nbd" or version is None or has_iothread(version)
        several = version is not None and fuse_has_threads(version)
        host = Host(os.cpu_count() or 1, self.queue, polls, several)
        found, notes = knobs(options, subject.options, host, self.jobs, unsafe=self.unsafe)
        if self.only:
            found = [knob for knob in found if knob.option in self.only]
            notes = [note for note in notes if note.partition(" ")[0] in self.only]
        self.notes += notes
        if not found:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"there is nothing to be tried by {self.transport}",
                cause=" ".join(notes) or f"neither the transport nor the source have {', '.join(self.only)}",
                hint="leave out --only, or -o for what shall be tried",
            )
        pair = 2 * self._elapsed() * _LONGER
        least = self._elapsed() + least_budget(pair)
        if self.budget < least:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{lasting(self.budget)} are too few to tell anything",
                cause=f"a pair of measurements takes {pair:.1f} s, and a single change needs {lasting(least)}",
                hint=f"say --budget {int(least) + 1} or more, or fewer jobs (--jobs FILE), or a shorter --runtime",
            )
        self.search = Search(found, self.budget, pair, elapsed=self._elapsed())
        return self.search

    # Measurements ------------------------------------------------------------------------------------------------

    def _elapsed(self) -> float:
        return time.monotonic() - self._start

    def _patience(self) -> float:
        """Seconds for an attach: no more than are left, and enough for one that is nothing special."""
        return min(PATIENCE, max(_LEAST_PATIENCE, self.budget - self._elapsed()))

    def _outcome(self, shop: Shop, subject: Subject, pair: Pair, run: Runner) -> Outcome:
        """Measure a pair. Raises StoragedError where what was measured before cannot be any more."""
        figures: dict[bool, dict[str, float]] = {}
        for is_candidate in (True, False) if pair.candidate_first else (False, True):
            try:
                figures[is_candidate] = self._one(
                    shop, subject, pair.candidate if is_candidate else pair.against, run
                )
            except StoragedError as error:
                if not is_candidate or error.code in _GRAVE or self._elapsed() >= self.budget:
                    raise
                return Outcome(self._elapsed(), problem=f"{error.message}: {error.cause}" if error.cause
                               else error.message)
        ratios = [figures[True][job.name] / figures[False][job.name] for job in self.jobs]
        return Outcome(self._elapsed(), mean(ratios).value)

    def _one(self, shop: Shop, subject: Subject, settings: Mapping[str, str], run: Runner) -> dict[str, float]:
        """Attach with these settings, run all jobs, and detach. Raises StoragedError."""
        began, load = time.time(), os.getloadavg()[0]
        with shop.attached(
            replace(subject, options={**self._pinned(settings), **subject.options, **settings}), self.transport,
            self.fio.engines, self._patience(),
        ) as target:
            if target.size is not None:
                check_size(self.jobs, target.size)
                self.found.size = target.size
            if not self.volume:
                self._remember(target)
            if self.request.runtime >= _WORTH_WARMING:
                with contextlib.suppress(StoragedError, ValueError):  # it fails with the first job, too, which tells
                    run(measure.WARM_UP, target, min(_WARM, self.request.runtime), None)
            figures = {}
            for job in self.jobs:
                if not target.is_still_there():
                    _fail(job.name, "the device is another one by now: what served it died")
                try:
                    figures[job.name] = run(job, target, self.request.runtime, self.leave).iops
                except ValueError as error:
                    _fail(job.name, str(error))
                if figures[job.name] <= 0:
                    _fail(job.name, "not one request ended in that time")
        self.measured.append(Measured(settings=dict(settings), began=began, load=load, iops=figures))
        return figures

    def _pinned(self, settings: Mapping[str, str]) -> dict[str, str]:
        """What is said of the device's queue, so that it is the same but for the settings that are tried."""
        return pinned(options_of(self.transport).keys(), self.queue, settings) if self.queue else {}

    def _remember(self, target: Target) -> None:
        """What the device of the defaults is like."""
        self.volume = dict(target.volume)
        device = str(self.volume["device"])
        self.queue = {name: text for name in _QUEUE if (text := disk.attribute(device, f"queue/{name}")) is not None}

    def told(self, partial: str, profile: str = "") -> TuneReport:
        """Return what was found; ``partial`` says why it is not all, ``profile`` the file that it was written to."""
        source, format, options = self.shown
        search = self.search or Search([], self.budget, 0.0)
        return TuneReport(
            source=source, format=format, options=options, transport=self.transport, size=self.found.size,
            began=self.began, ended=time.time(), budget=self.budget, runtime=self.request.runtime, partial=partial,
            machine=facts.machine(self.fio, str(self.volume.get("qsd_version") or "")), notes=self.notes,
            jobs=[
                JobFacts(name=job.name, options=dict(job.options), writes=job.writes,
                         unit="MB/s" if job.is_linear else "IOPS")
                for job in self.jobs
            ],
            volume=self.volume, queue=self.queue, changes=changes_of(search), untried=list(search.untried),
            verification=verification_of(search), settings=dict(search.taken), profile=profile, measured=self.measured,
        )


def sentence(step: Step) -> str:
    """What a change has brought, as it is told meanwhile."""
    brought = f"{step.ratio.times} times as fast, {step.pairs} pairs: " if step.ratio is not None else ""
    return f"{step.option} {step.value} (was {step.former}): {brought}{step.why}" + (
        "; it is kept" if step.accepted else ""
    )


def _fail(job: str, cause: str) -> NoReturn:
    raise StoragedError(
        ErrorCode.DEVICE_FAILED, f"the job {job!r} could not be measured", cause=cause,
        hint="look into the journal; storaged bench says more of a single way",
    )
