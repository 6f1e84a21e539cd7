"""One benchmark, from what the user said to the report. Blocks."""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.bench import facts, measure, process, report, scratch
from storaged.bench.engines import BLKIO, NoDirect
from storaged.bench.fio import Leave, words
from storaged.bench.jobs import SETS, Job, JobSet
from storaged.bench.measure import Found, Plan
from storaged.bench.process import Fio
from storaged.bench.report import JobFacts, Report, WayFacts
from storaged.bench.ways import Shop, Subject, Way
from storaged.errors import ErrorCode, StoragedError
from storaged.host import imagelock
from storaged.images import operand
from storaged.images.operand import Wish
from storaged.images.workspace import workspace
from storaged.model.config import Config
from storaged.model.formats import Format
from storaged.model.layout import Layout
from storaged.model.names import check_name
from storaged.model.spec import COMMON_OPTIONS
from storaged.transports import options_of

#: In this order they are measured and shown.
WAYS = ("direct", "nbd", "vduse", "fuse")


@dataclass(frozen=True)
class Request:
    """What the user said."""

    source: str
    """Absolute, or on the network; or the directory for an image of its own; or as it was typed, if it is a name."""
    name: str
    """As it was typed: it may be that of a volume."""
    format: Format | None
    options: Mapping[str, str]
    secrets: Mapping[str, str]
    ways: Sequence[str] | None
    """None: all that this host has."""
    job_set: JobSet
    runtime: float
    repeat: int
    destructive: bool
    scratch: int | None
    """Bytes."""


@dataclass
class Display:
    """Who is told what happens meanwhile."""

    tell: Callable[[str, float], None]
    note: Callable[[str], None]


@dataclass
class Session:
    """A benchmark that may be interrupted at any moment: ``result`` says what was measured until then."""

    request: Request
    layout: Layout
    config: Config
    command: str
    display: Display
    fio: Fio = field(init=False)
    found: Found = field(default_factory=Found)
    notes: list[str] = field(default_factory=list)
    began: float = field(default_factory=time.time)
    jobs: list[Job] = field(default_factory=list)
    shown: tuple[str, str, dict[str, str]] = ("", "", {})
    """Source, format and options, without secrets."""

    def run(self) -> None:
        """Measure. Whatever ends it, nothing that it made is left; what could not be taken away is told.

        Raises StoragedError, KeyboardInterrupt.
        """
        self.fio = process.find_fio()
        self._check_jobs()
        with workspace(self.layout) as place:
            shop = Shop(self.layout, self.config, place, self.command)
            try:
                with contextlib.ExitStack() as stack:
                    self._measure(shop, stack)
            finally:
                for failure in shop.clear():
                    self.display.note(failure)

    def _measure(self, shop: Shop, stack: contextlib.ExitStack) -> None:
        ways, leave = self._ways(shop, stack)
        plan = Plan(ways, self.jobs, self.request.runtime, self.request.repeat, leave)
        self.display.note(
            f"{len(self.jobs)} jobs by {', '.join(way.name for way in ways)}, {plan.rounds} rounds: about "
            f"{lasting(plan.seconds)}"
        )
        self.notes += facts.notes_on_host()
        self.began = time.time()
        measure.measure(plan, measure.runner(self.fio, shop.place.path), self.found, self.display.tell)

    def result(self, partial: str) -> Report:
        """Return what was measured; ``partial`` says why not all was."""
        source, format, options = self.shown
        versions = [str(way.volume["qsd_version"]) for way in self.found.ways.values() if way.volume.get("qsd_version")]
        made = Report(
            source=source, format=format, options=options, size=self.found.size, began=self.began, ended=time.time(),
            partial=partial, runtime=self.request.runtime, repeat=self.request.repeat,
            job_set=self.request.job_set.name,
            machine=facts.machine(self.fio, versions[0] if versions else ""), notes=self.notes,
            jobs=[
                JobFacts(name=job.name, options=dict(job.options), writes=job.writes,
                         unit="MB/s" if job.is_linear else "IOPS")
                for job in self.jobs
            ],
            ways=sorted(self.found.ways.values(), key=lambda way: _place(way.name)), runs=self.found.runs,
        )
        made.notes.extend(notes_on_ways(made))
        against = report.reference(made)
        if self.found.runs and against != report.DIRECT:
            measured = {run.way for run in self.found.runs}
            why = "The direct way has no figures" if report.DIRECT in measured else "There is no direct way"
            made.notes.append(f"{why}: the ratios are to {against}, the fastest over all jobs.")
        return made

    # What is measured --------------------------------------------------------------------------------------------

    def _check_jobs(self) -> None:
        """Refuse what could only fail later, and what may not be done. Raises INVALID_ARGUMENT."""
        request = self.request
        self.jobs = list(request.job_set.jobs)
        if request.destructive and request.scratch is not None:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "--destructive and --scratch exclude each other",
                hint="--scratch makes an image to be overwritten; --destructive overwrites the source",
            )
        may_write = request.destructive or request.scratch is not None
        writers = [job for job in self.jobs if job.writes]
        is_own = request.job_set.name not in SETS
        if writers and not may_write:
            if is_own:
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, f"the job {writers[0].name!r} writes",
                    cause="nobody said that data may be overwritten",
                    hint="say --destructive, or have an image made for it with --scratch SIZE",
                )
            self.jobs = [job for job in self.jobs if not job.writes]
            self.notes.append(
                f"The {len(writers)} jobs that write were left out: --destructive overwrites the source, --scratch SIZE"
                " makes an image of its own."
            )
        for job in self.jobs if is_own else ():
            leave = Leave.DESTRUCTIVE if may_write else None
            wrong = process.check_words(self.fio, words(job, ["--ioengine=null", "--size=1G"], 1, leave))
            if wrong:
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, f"fio does not take the job {job.name!r}", cause=wrong,
                    hint="correct the job file",
                )

    def _ways(self, shop: Shop, stack: contextlib.ExitStack) -> tuple[list[Way], Leave | None]:
        """Return the ways in their order, and why the disk may be overwritten, if it may."""
        needs_daemon = self.request.ways is None or set(self.request.ways) != {report.DIRECT}
        request, leave = self._prepare(shop, stack, needs_daemon=needs_daemon)
        if request.scratch is None and (volume := self._volume(shop, needs_daemon)) is not None:
            return self._ways_of_volume(shop, volume, leave), leave
        return self._ways_of_source(shop, self._locked(request, leave, stack)), leave

    def _prepare(
        self, shop: Shop, stack: contextlib.ExitStack, *, needs_daemon: bool
    ) -> tuple[Request, Leave | None]:
        """Make an image where one is wanted; return what is measured, and why it may be overwritten, if it may."""
        request, leave = self.request, None
        if request.scratch is not None:
            for left in scratch.leftovers(shop, request.source):
                self.display.note(left)
            made = stack.enter_context(
                scratch.image(shop, request.source, request.scratch, request.format or Format.RAW, self.display.tell)
            )
            request, leave = _replaced(request, made), Leave.OWN
        elif any(job.writes for job in self.jobs):
            leave = Leave.DESTRUCTIVE
        if needs_daemon:
            for left in shop.leftovers():
                self.display.note(left)
        return request, leave

    def _locked(self, request: Request, leave: Leave | None, stack: contextlib.ExitStack) -> Subject:
        """The source, which nobody else writes to from now on, where that can be had."""
        subject = self._subject(request, leave)
        path = subject.one.local_path
        if path is not None and leave is None and os.path.exists(path):
            # QEMU lets others write to a raw image that it only reads: so nobody does, as long as it is measured.
            stack.callback(os.close, imagelock.take(path, write=False))
        return subject

    def _volume(self, shop: Shop, needs_daemon: bool) -> dict[str, Any] | None:
        """Return the attached volume of that name, if there is one. Raises INVALID_ARGUMENT where it may be a file."""
        name = self.request.name
        try:
            check_name(name)
            listed = shop.call("List")["volumes"]
        except StoragedError as error:
            if error.code is ErrorCode.INVALID_NAME or not needs_daemon:
                return None
            raise
        volumes: dict[str, dict[str, Any]] = {one["name"]: one for one in listed}
        if name in volumes and os.path.lexists(name):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{name} is a volume, and a file here", hint=f"write ./{name} for the file"
            )
        return volumes.get(name)

    def _ways_of_volume(self, shop: Shop, volume: dict[str, Any], leave: Leave | None) -> list[Way]:
        """Its own device, as it is: nobody else can open the source of a volume that may be written to."""
        name, transport = str(volume["name"]), str(volume["transport"])
        if self.request.format is not None or self.request.options:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "a volume is measured as it is attached", volume=name,
                hint="leave out --format and -o, or name its source",
            )
        if volume.get("device") is None or volume.get("state") != "online":
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "it has no device that could be measured", volume=name,
                cause=f"it is {volume.get('state')}, by {transport}", hint=f"look with: {self.command} show {name}",
            )
        if self.request.ways is not None and list(self.request.ways) != [transport]:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"it is attached by {transport}, and has no other way", volume=name,
                hint=f"detach it and measure its source: {self.command} bench {volume['source']}",
            )
        if leave is not None and volume.get("read_only"):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "it is attached read-only", volume=name, hint="leave out --destructive"
            )
        self.shown = (str(volume["source"]), str(volume["format"]), dict(volume["options"]))
        self.notes.append(
            f"The volume {name} was measured as it is attached: to compare it with other ways, detach it and name its "
            "source."
        )
        return [Way(transport, functools.partial(shop.held, volume, self.fio.engines), optional=False)]

    def _subject(self, request: Request, leave: Leave | None) -> Subject:
        of_source = COMMON_OPTIONS.keys() | find_backend(request.source).options.keys()
        # Those of transports apart, which a command on images does not know.
        of_transports = {
            key: value for key, value in request.options.items()
            if key not in of_source and any(key in options_of(name) for name in self._transports())
        }
        options = {key: value for key, value in request.options.items() if key not in of_transports}
        given = {key: base64.b64decode(text) for key, text in request.secrets.items()}
        wish = Wish(request.source, request.format, options, given, "bench")
        is_local = not isinstance(find_backend(operand.named(wish, writable=False).spec.source), NetworkBackend)
        if is_local and "cache" not in options:
            options["cache"] = "none"
            self.notes.append(
                "Measured with cache=none: otherwise the page cache of this host would be. -o cache=writeback is what "
                "an attach has by default."
            )
        one = operand.named(Wish(request.source, request.format, options, given, "bench"), writable=leave is not None)
        operand.refuse_creation_options(one)
        self.shown = (one.shown(), str(one.spec.format), {**one.spec.options, **of_transports})
        if one.local_path is not None:
            self.notes += facts.notes_on_file(one.local_path)
        return Subject(request.source, options, request.secrets, one, leave, of_transports)

    def _transports(self) -> Sequence[str]:
        """Those that are measured, by their names."""
        return [way for way in self.request.ways or WAYS if way != report.DIRECT]

    def _ways_of_source(self, shop: Shop, subject: Subject) -> list[Way]:
        asked = self.request.ways
        ways = []
        for name in WAYS if asked is None else asked:
            optional = asked is None
            if name != report.DIRECT:
                ways.append(Way(name, functools.partial(shop.attached, subject, name, self.fio.engines), optional))
                continue
            try:
                shop.direct_words(subject, self.fio.engines)
            except NoDirect as error:
                why = str(error)
                if BLKIO not in self.fio.engines:
                    why += f"; and it has no engine {BLKIO}, by which it could use QSD's vhost-user-blk export"
                elif (way := self._exported(shop, subject, name, why, optional=optional)) is not None:
                    ways.append(way)
                    continue
                else:
                    why += f"; and by {BLKIO} each write would be a flush, which no other way does"
                if not optional:
                    raise StoragedError(
                        ErrorCode.UNSUPPORTED, "there is no direct way to this source", cause=why,
                        hint="leave direct out of --transports",
                    ) from error
                self.found.ways[name] = WayFacts(name=name, what="", missing=why)
                continue
            ways.append(Way(name, functools.partial(shop.direct, subject, self.fio.engines), optional))
        return ways


    def _exported(self, shop: Shop, subject: Subject, name: str, why: str, *, optional: bool) -> Way | None:
        """The direct way by libblkio. None where it can do none of the jobs."""
        # Such an export flushes each write, for a virtual machine that goes on with QSD's successor.
        only_reads = subject.leave is not None and subject.one.spec.keeps_writes_in_memory
        if only_reads:
            if all(job.writes for job in self.jobs):
                return None
            self.notes.append(
                f"direct did none of the jobs that write: {why}, and by {BLKIO} each write would be a flush, which no "
                "other way does."
            )
        if self.request.ways is not None and set(self.request.ways) == {report.DIRECT}:
            # It was not asked for a daemon that serves direct alone.
            for left in shop.leftovers():
                self.display.note(left)
        # Each thread of fio has a queue of its own.
        queues = max(int(job.options.get("numjobs", "1")) for job in self.jobs)
        return Way(
            name, functools.partial(shop.exported, subject, name, queues, why), optional, only_reads=only_reads,
            lacking=frozenset({ErrorCode.TRANSPORT_UNAVAILABLE, ErrorCode.UNSUPPORTED}),
        )


def _replaced(request: Request, path: str) -> Request:
    """The same for the image that was made."""
    return replace(request, source=path, format=request.format or Format.RAW)


def _place(way: str) -> int:
    return WAYS.index(way) if way in WAYS else len(WAYS)


#: KiB: no device of storaged's has so small a largest request by itself.
_SMALL = 128


def notes_on_ways(made: Report) -> list[str]:
    """Say what of the ways a reader must know."""
    measured = {run.way for run in made.runs if run.is_good}
    notes = [
        f"The largest request of {way.name}'s device was {size} KiB, which is no kernel's default: it slows down what "
        "is larger." for way in made.ways
        if (size := way.queue.get("max_sectors_kb", "")).isdecimal() and int(size) < _SMALL
        and "max-sectors-kb" not in made.options
    ]
    if report.DIRECT in measured and measured & {"vduse", "nbd"}:
        notes.append(
            "A yardstick, for a real host with a fast network: for 4k random I/O Vitastor's documentation has VDUSE at "
            "0.78 and NBD at 0.52 of direct."
        )
    return notes


def lasting(seconds: float) -> str:
    """A time as people say it."""
    return f"{seconds:.0f} seconds" if seconds < 100 else f"{seconds / 60:.0f} minutes"
