"""``storaged bench …``: what can be typed, what is shown meanwhile, and where the report goes.

Nothing slow is imported at the top: every command pays for what the parser needs.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from storaged.cli import progress, render, signals
from storaged.cli.paths import absolute, absolute_option, absolute_source
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.layout import Layout

if TYPE_CHECKING:
    from storaged.bench.jobs import JobSet
    from storaged.bench.report import Report
    from storaged.bench.session import Request

_WAYS = ("direct", "vduse", "nbd", "fuse")
_COMPARE = "compare"

_EXAMPLES = """\
examples:
  storaged bench rbd:rbd/web1                     reads only
  storaged bench /var/tmp --scratch 4G            writes, too: to an image of its own
  storaged bench nbd://server/test --destructive --jobs full --json a.json --html a.html
  storaged bench compare a.json b.json

Nothing is written without --destructive or --scratch. What is in use is refused. docs/bench.md tells how to read the
figures."""


def add_parser(command: argparse.ArgumentParser) -> None:
    """Fill the parser of ``storaged bench``."""
    from storaged.cli.parser import CollectOptions, key_value

    command.epilog = _EXAMPLES
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument(
        "source", metavar="SOURCE|NAME",
        help="a source, written as for storaged attach; a volume, whose device is measured as it is; the directory for"
        f" --scratch; or {_COMPARE}, and the two reports to compare",
    )
    command.add_argument(
        "reports", metavar="FILE", nargs="*", help=f"with {_COMPARE}: what --json wrote, before and after"
    )
    command.add_argument(
        "-f", "--format", choices=[str(format) for format in Format], metavar="FORMAT",
        help=f"its format: {', '.join(Format)} (default: what the ending of a file's name says, else raw)",
    )
    command.add_argument(
        "-o", "--option", metavar="KEY=VALUE", dest="options", type=key_value, action=CollectOptions, default={},
        help="an option of the source, as for attach; may be repeated",
    )
    command.add_argument(
        "--transports", metavar="WAY[,WAY…]", type=_ways,
        help=f"the ways that are measured, of {', '.join(_WAYS)} (default: all that there are; direct is fio's own"
        " engine, without QEMU where it has one for the source)",
    )
    command.add_argument("--jobs", metavar="quick|full|FILE", default="quick", help="what fio does (default: quick)")
    command.add_argument(
        "--runtime", metavar="SECONDS", type=seconds_of_job, help="of each job in each round (default: quick 2, else 5)"
    )
    command.add_argument(
        "--repeat", metavar="N", type=_repeat, help="rounds (default: full 6, else 4; one tells nothing of the spread)"
    )
    command.add_argument("--destructive", action="store_true", help="jobs may write: ALL DATA ON THE SOURCE IS LOST")
    command.add_argument(
        "--scratch", metavar="SIZE",
        help="make an image of that size in the directory SOURCE, write to that, and remove it",
    )
    command.add_argument("--json", metavar="FILE", dest="json_file", help="write all that was measured there")
    command.add_argument("--html", metavar="FILE", dest="html_file", help="write a page with plots there")
    command.add_argument("--svg", metavar="FILE", dest="svg_file", help="write the plots as a picture there")
    command.add_argument(
        "--png", metavar="FILE", dest="png_file", help="the same picture of pixels (needs rsvg-convert: librsvg2-bin)"
    )


def _ways(text: str) -> list[str]:
    found = text.split(",")
    for way in found:
        if way not in _WAYS:
            raise argparse.ArgumentTypeError(f"{way!r} is none of {', '.join(_WAYS)}")
    if len(set(found)) < len(found):
        raise argparse.ArgumentTypeError(f"{text!r} names one twice")
    return found


def seconds_of_job(text: str) -> float:
    """Understand a time for which a job runs."""
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0.1 <= seconds <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 0.1 to 86400")
    return seconds


def _repeat(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 100")
    return int(text)


def run(args: argparse.Namespace, layout: Layout, command: str) -> int:
    """Do what was typed; return the exit status: 1 where something could not be measured."""
    if args.source == _COMPARE and args.reports:
        return _compare(args.reports)
    if args.source == _COMPARE:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "there is nothing to compare",
            hint=f"storaged bench {_COMPARE} BEFORE.json AFTER.json; a file of that name is ./{_COMPARE}",
        )
    if args.reports:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "one source is measured at a time",
            cause=f"there is more behind {args.source}: {' '.join(args.reports)}", hint="leave it out",
        )
    from storaged.bench import pixels
    from storaged.bench.session import Display, Session
    from storaged.host.configfiles import load_config

    for path in filter(None, (args.json_file, args.html_file, args.svg_file, args.png_file)):
        refuse_unwritable(path)
    if args.png_file:
        pixels.find_converter()
    request = _request(args)
    bar = progress.Bar("bench")

    def note(text: str) -> None:
        render.note(f"storaged: {render.clean(text)}")

    session = Session(request, layout, load_config(layout, None), command, Display(bar.at_doing, note))
    partial = ""
    try:
        with interruptible():
            session.run()
    except KeyboardInterrupt:
        partial = "interrupted"
    except StoragedError as error:
        if not session.found.runs:
            error.volume = "" if error.volume == "bench" else error.volume
            raise
        bar.end()
        render.failure(error)
        partial = str(error)
    finally:
        bar.end()
    if not session.found.runs:
        note("interrupted before anything was measured")
        raise KeyboardInterrupt
    made = session.result(partial)
    _write_table(made)
    _write_files(args, made)
    if partial == "interrupted":
        raise KeyboardInterrupt
    from storaged.bench.report import failures

    return 1 if partial or failures(made) else 0


def _request(args: argparse.Namespace) -> Request:
    from storaged.bench.session import Request
    from storaged.cli.commands import given_secrets
    from storaged.model.sizes import parse_size

    options = {key: absolute_option(key, value) for key, value in args.options.items()}
    jobs = job_set(args.jobs)
    return Request(
        source=absolute_source(args.source), name=args.source, format=Format(args.format) if args.format else None,
        options=options, secrets=given_secrets(args.source, options), ways=args.transports, job_set=jobs,
        runtime=args.runtime or jobs.runtime, repeat=args.repeat or jobs.repeat, destructive=args.destructive,
        scratch=parse_size(args.scratch) if args.scratch is not None else None,
    )


def job_set(name: str) -> JobSet:
    """The jobs of that name, or of a file."""
    from storaged.bench.jobs import SETS, jobs_of_file

    if name in SETS:
        return SETS[name]
    return jobs_of_file(_read(name, "--jobs takes quick, full, or a file").decode(errors="replace"), name)


def _read(path: str, hint: str) -> bytes:
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"cannot read {path}", cause=error.strerror or str(error), hint=hint,
        ) from error


def refuse_unwritable(path: str) -> None:
    """Before it is measured for half an hour."""
    directory = os.path.dirname(absolute(path))
    if not os.path.isdir(directory) or not os.access(directory, os.W_OK) or os.path.isdir(path):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path} cannot be written",
            cause=f"{directory} is no directory that files can be made in", hint="name another file",
        )


def _write_files(args: argparse.Namespace, made: Report) -> None:
    from storaged.bench import page, pixels
    from storaged.bench.report import encoded
    from storaged.host.atomic import write_atomic

    contents: list[tuple[str | None, Callable[[Report], bytes]]] = [
        (args.json_file, encoded), (args.html_file, lambda report: page.page(report).encode()),
        (args.svg_file, lambda report: page.picture(report).encode()),
        # The last: it is the only one that can fail by itself.
        (args.png_file, lambda report: pixels.png(page.picture(report))),
    ]
    for path, make in contents:
        if path:
            write_atomic(absolute(path), make(made), mode=0o644)


def _write_table(made: Report) -> None:
    from storaged.cli.benchtable import table

    render.write(table(made))


def _compare(paths: list[str]) -> int:
    from storaged.bench.report import changes, decoded, differences
    from storaged.cli.benchtable import comparison

    if len(paths) != 2:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"two reports are compared, and {len(paths)} are named",
            hint=f"storaged bench {_COMPARE} BEFORE.json AFTER.json",
        )
    before, after = (decoded(_read(path, "name what --json has written"), path) for path in paths)
    found = changes(before, after)
    if not found:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "the two reports have nothing in common",
            cause="no job of the same name and options was measured in both by the same way",
            hint="measure both with the same --jobs and --transports",
        )
    render.write(comparison(found, differences(before, after)))
    return 0


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP end it once; while it cleans up then, a second one is not listened to."""
    interrupted = threading.Event()

    def interrupt(number: int, frame: FrameType | None) -> None:
        render.note("storaged: interrupted; everything is being taken down")
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt

    with signals.handled(interrupt, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        yield
