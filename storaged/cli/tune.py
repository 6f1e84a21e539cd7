"""``storaged tune``: what can be typed, what is shown meanwhile, and where what was found goes.

Nothing slow is imported at the top: every command pays for what the parser needs.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from typing import TYPE_CHECKING

from storaged.cli import bench, progress, render
from storaged.cli.paths import absolute, absolute_option, absolute_source
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.layout import Layout

if TYPE_CHECKING:
    from storaged.bench.jobs import JobSet
    from storaged.bench.session import Request
    from storaged.bench.tunereport import TuneReport

TRANSPORTS = ("auto", "vduse", "nbd", "fuse")
_BUDGET = 900.0

_EXAMPLES = """\
examples:
  storaged tune rbd:rbd/test                          reads only, a quarter of an hour
  storaged tune /var/tmp --scratch 4G --write fast    writes, too: to an image of its own
  storaged attach web1 rbd:rbd/web1 --profile fast

Nothing is written without --destructive, --scratch or --write. What is in use is refused. docs/tune.md tells how sure
it is."""


def add_parser(command: argparse.ArgumentParser) -> None:
    """Fill the parser of ``storaged tune``."""
    from storaged.cli.parser import CollectOptions, key_value

    command.epilog = _EXAMPLES
    command.formatter_class = argparse.RawDescriptionHelpFormatter
    command.add_argument(
        "source", metavar="SOURCE", help="a source, written as for storaged attach; or the directory for --scratch"
    )
    command.add_argument(
        "-f", "--format", choices=[str(format) for format in Format], metavar="FORMAT",
        help=f"its format: {', '.join(Format)} (default: what the ending of a file's name says, else raw)",
    )
    command.add_argument(
        "-o", "--option", metavar="KEY=VALUE", dest="options", type=key_value, action=CollectOptions, default={},
        help="an option of the source, as for attach; it stays as it is; may be repeated",
    )
    command.add_argument(
        "--transport", choices=TRANSPORTS, default="auto", help="the way onto the host (default: auto)"
    )
    command.add_argument(
        "--budget", metavar="SECONDS", type=_budget, default=_BUDGET,
        help=f"how long it may take, without the time to fill an image of --scratch (default: {_BUDGET:.0f})",
    )
    command.add_argument("--jobs", metavar="quick|full|FILE", default="quick", help="what fio does (default: quick)")
    command.add_argument(
        "--runtime", metavar="SECONDS", type=bench.seconds_of_job, help="of each job in each measurement (default: 1)"
    )
    command.add_argument(
        "--only", metavar="OPTION[,OPTION…]", type=_options, default=(), help="try these settings alone"
    )
    command.add_argument(
        "--unsafe", action="store_true", help="try settings that are not safe in all cases, too: connections"
    )
    command.add_argument("--destructive", action="store_true", help="jobs may write: ALL DATA ON THE SOURCE IS LOST")
    command.add_argument(
        "--scratch", metavar="SIZE",
        help="make an image of that size in the directory SOURCE, write to that, and remove it",
    )
    command.add_argument(
        "--write", metavar="NAME", help="write what is faster as the profile /etc/storaged/profiles/NAME.toml"
    )
    command.add_argument("--json", metavar="FILE", dest="json_file", help="write all that was measured there")


def _budget(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 1 <= seconds <= 7 * 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds from 1 to 604800")
    return seconds


def _options(text: str) -> tuple[str, ...]:
    from storaged.bench.knobs import names
    from storaged.model.volumefile import nearest

    found = tuple(text.split(","))
    for option in found:
        if option not in names():
            raise argparse.ArgumentTypeError(f"{option!r} is no setting that is tried; {nearest(option, names())}")
    return found


def run(args: argparse.Namespace, layout: Layout, command: str) -> int:
    """Do what was typed; return the exit status."""
    from storaged.bench.session import Display
    from storaged.bench.tuning import Tuning
    from storaged.host.configfiles import load_config

    if args.json_file:
        bench.refuse_unwritable(args.json_file)
    if args.write is not None:
        _refuse_profile(layout, args.write)
    request = _request(args)
    bar = progress.Bar("tune")

    def note(text: str) -> None:
        render.note(f"storaged: {render.clean(text)}")

    session = Tuning(
        request, layout, load_config(layout, None), command, Display(bar.at_doing, note), budget=args.budget,
        only=args.only, unsafe=args.unsafe, transport=args.transport,
    )
    partial, interrupted = "", False
    try:
        with bench.interruptible():
            session.run()
    except KeyboardInterrupt:
        partial, interrupted = "interrupted", True
    except StoragedError as error:
        if session.search is None or not session.search.steps:
            error.volume = "" if error.volume == "bench" else error.volume
            raise
        bar.end()
        render.failure(error)
        partial = str(error)
    finally:
        bar.end()
    if session.search is None:
        note("interrupted before anything was tried")
        raise KeyboardInterrupt
    if not partial and session.search.unverified:
        partial = f"the best was not verified: {session.search.unverified}"
    made, failed = session.told(partial), bool(partial)
    if args.write is not None and made.settings and not partial:
        try:
            made = session.told(partial, _write_profile(made, layout, args.write))
        except StoragedError as error:
            # What took a quarter of an hour is told all the same.
            render.failure(error)
            failed = True
    from storaged.cli.tunetable import table

    render.write(table(made, args.write, command))
    if args.json_file:
        from storaged.bench.tunereport import encoded
        from storaged.host.atomic import write_atomic

        write_atomic(absolute(args.json_file), encoded(made), mode=0o644)
    if interrupted:
        raise KeyboardInterrupt
    return 1 if failed else 0


def _request(args: argparse.Namespace) -> Request:
    from storaged.bench.session import Request
    from storaged.cli.commands import given_secrets
    from storaged.model.sizes import parse_size

    options = {key: absolute_option(key, value) for key, value in args.options.items()}
    jobs = _job_set(args.jobs)
    return Request(
        source=absolute_source(args.source), name=args.source, format=Format(args.format) if args.format else None,
        options=options, secrets=given_secrets(args.source, options), ways=(args.transport,), job_set=jobs,
        runtime=args.runtime or 1.0, repeat=1, destructive=args.destructive,
        scratch=parse_size(args.scratch) if args.scratch is not None else None,
    )


def _job_set(name: str) -> JobSet:
    from storaged.bench.jobs import TUNING

    return TUNING if name == TUNING.name else bench.job_set(name)


def _refuse_profile(layout: Layout, name: str) -> None:
    """Before it is searched for a quarter of an hour. Raises INVALID_NAME, INVALID_ARGUMENT."""
    from storaged.store.profiles import profile_path

    path = profile_path(layout.profiles, name)
    if os.path.lexists(path):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"there is a profile {name!r} already", cause=f"there is {path}",
            hint="choose another name, or remove that file",
        )
    above = layout.profiles
    while not os.path.lexists(above):
        above = os.path.dirname(above)
    if not os.path.isdir(above) or not os.access(above, os.W_OK):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"the profile {path} cannot be written",
            cause=f"{above} is no directory that files can be made in", hint="run it as root",
        )


def _write_profile(made: TuneReport, layout: Layout, name: str) -> str:
    """Write what was found, and what was measured with it; return the path.

    Raises INVALID_ARGUMENT, NO_SPACE, INTERNAL where that cannot be; what is there stays as it is.
    """
    from storaged.host.atomic import state_error, write_new
    from storaged.model.profile import known_options, profile_text
    from storaged.store.profiles import profile_path
    from storaged.transports import TRANSPORTS as ALL

    known = known_options(key for transport in ALL.values() for key in transport.options)
    options = {**{key: value for key, value in made.options.items() if key in known}, **made.settings}
    if "max-sectors-kb" in made.settings and "read-ahead-kb" not in options and "read_ahead_kb" in made.queue:
        # As it was measured: the kernel would compute it anew.
        options["read-ahead-kb"] = made.queue["read_ahead_kb"]
    verified = made.verification.ratio.estimate.times if made.verification is not None else ""
    # All that was measured: what it is good for is only that.
    what = ", ".join(job.name for job in made.jobs)
    comment = [
        f"Found by storaged tune on {made.machine['host']}, {time.strftime('%Y-%m-%d', time.gmtime(made.began))}: "
        f"{verified} times the defaults,",
        f"for the jobs {what}", f"by {made.transport}, of {made.source}",
        f"Linux {made.machine['kernel']}, QEMU {made.machine['qemu-storage-daemon']}",
    ]
    path = profile_path(layout.profiles, name)
    try:
        os.makedirs(layout.profiles, mode=0o755, exist_ok=True)
    except OSError as error:
        raise state_error(path, error) from error
    write_new(path, profile_text(made.transport, options, map(render.clean, comment)).encode(), mode=0o644)
    return path
