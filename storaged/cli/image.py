"""``storaged image …``: what can be typed, and what is done then. It needs no daemon, and asks none.

Nothing slow is imported at the top: every command pays for what the parser needs.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from storaged.cli import progress, render, signals
from storaged.cli.paths import absolute, absolute_option, absolute_source
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.layout import Layout

if TYPE_CHECKING:
    from storaged.images.commands import Task
    from storaged.images.making import Backing
    from storaged.images.operand import Wish
    from storaged.model.config import Config

_SOURCE = "a path, or a network disk, written as for storaged attach"
_FORMAT = f"its format: {', '.join(Format)} (default: what the ending of a file's name says, else raw; never guessed)"
_BACKING_FORMAT = "the backing file's format (default: what its name says, else raw)"
#: What writes into an image that is there: after a Ctrl-C in its middle the image is to be looked at.
_IN_PLACE = ("resize", "rebase", "amend", "commit")

_EXAMPLES = """\
examples:
  storaged image create disk.qcow2 10G -o compat=1.1
  storaged image convert debian10.qcow2 vitastor:image=testimg
  storaged image convert rbd:rbd/db1@monday db1.qcow2
  storaged image check db1.qcow2

The images are locked as by attach: one that is attached writable is refused. storaged image COMMAND --help tells all
options; docs/images.md tells more."""


def add_parser(parser: argparse.ArgumentParser) -> None:
    """Fill the parser of ``storaged image``."""
    parser.epilog = _EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    commands = parser.add_subparsers(dest="image_command", metavar="COMMAND", required=True, title="commands")

    command = _command(commands, "create", "make an image; what is there already is refused")
    _backing(command)
    command.add_argument(
        "size", metavar="SIZE", nargs="?",
        help="bytes, or a number with K, M, G, T or P (default: that of the backing file)",
    )

    command = _command(commands, "info", "tell what an image is")
    command.add_argument("--backing-chain", action="store_true", help="and all images below it")
    command.add_argument(
        "--force-share", action="store_true",
        help="also while it is attached writable; what is told may then be inconsistent",
    )
    _json(command, "print an object (an array with --backing-chain)")

    command = _command(commands, "resize", "give an image another size (an attached one: storaged resize)")
    command.add_argument("size", metavar="[+|-]SIZE", help="bytes, or a number with K, M, G, T or P; + and - change it")
    # argparse has no other way to say that -1G is no option; it takes -1 for a number by itself.
    command._negative_number_matcher = re.compile(r"-\d+[KMGTPE]?", re.IGNORECASE)
    command.add_argument("--shrink", action="store_true", help="it may become smaller: what is cut off is lost")
    command.add_argument("--preallocation", metavar="MODE", help="off, metadata, falloc or full (default: off)")

    _convert(commands)

    command = _command(commands, "check", "look whether an image is consistent; status 1 if not")
    command.add_argument("-r", "--repair", choices=("leaks", "all"), help="repair what is found")
    _json(command, "print an object")

    command = _command(commands, "snapshot", "list, make, apply or delete the snapshots within an image")
    action = command.add_mutually_exclusive_group(required=True)
    action.add_argument("-l", "--list", action="store_true", help="list them")
    for short, long, what in (
        ("-c", "--create", "make one"), ("-a", "--apply", "make the disk what it was"), ("-d", "--delete", "delete one")
    ):
        action.add_argument(short, long, metavar="NAME", help=what)

    command = _command(commands, "rebase", "give an image another backing file; its content stays")
    command.add_argument(
        "-b", "--backing", metavar="FILE", required=True, help="the new backing file; '' for none: all data is copied"
    )
    command.add_argument("-F", "--backing-format", type=_format, metavar="FORMAT", help=_BACKING_FORMAT)
    command.add_argument(
        "-u", "--unsafe", action="store_true",
        help="change the name in the image's header alone, as it is written, and open no backing file",
    )

    _command(commands, "amend", "change options of an image's format: -o compat=1.1")

    command = _command(commands, "commit", "write an image's data into its backing file")
    command.add_argument("-d", "--keep", action="store_true", help="do not empty the image then")
    command.add_argument("-r", "--rate", metavar="SIZE", help="at most so many bytes a second")

    _json(_command(commands, "map", "tell where the data of an image is"), "print an array")

    command = _command(commands, "compare", "tell whether two images have the same content; status 1 if not")
    command.add_argument("other", metavar="OTHER", help="the other image")
    _second(command, "--other-format", "--other-option", "the other image")
    command.add_argument("-s", "--strict", action="store_true", help="sizes and allocation count, too")
    _json(command, "print an object")


def _convert(commands: Any) -> None:
    command = _command(commands, "convert", "copy the disk in an image into another, which is made if need be")
    command.add_argument("target", metavar="TARGET", help="the image to fill; a file that is there is refused")
    _second(command, "--target-format", "--target-option", "the target", "-O")
    _backing(command, "-B")
    command.add_argument("-n", "--into", action="store_true", help="write into a target that is there")
    command.add_argument("-c", "--compress", action="store_true", help="compress the target (qcow2)")
    command.add_argument("-l", "--snapshot", metavar="NAME", help="read that snapshot within the source")
    command.add_argument("-m", "--coroutines", metavar="N", type=_count, help="requests at once, 1 to 16 (default: 8)")
    command.add_argument("-W", "--out-of-order", action="store_true", help="write in any order: faster on some storage")
    command.add_argument("-r", "--rate", metavar="SIZE", help="at most so many bytes a second")


def _command(commands: Any, name: str, what: str) -> argparse.ArgumentParser:
    from storaged.cli.parser import CollectOptions, key_value

    command: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.", allow_abbrev=False
    )
    command.add_argument("source", metavar="SOURCE", help=_SOURCE)
    command.add_argument("-f", "--format", type=_format, metavar="FORMAT", help=_FORMAT)
    further = {
        "create": "; or of the image's format, as compat=1.1", "amend": "; or of the image's format, as compat=1.1",
        "convert": "; one that the source does not know is the target's, as compat=1.1",
    }
    command.add_argument(
        "-o", "--option", metavar="KEY=VALUE", dest="options", type=key_value, action=CollectOptions, default={},
        help=f"an option of the source, as for attach{further.get(name, '')}; may be repeated",
    )
    return command


def _second(command: argparse.ArgumentParser, format: str, option: str, what: str, short: str = "-F") -> None:
    from storaged.cli.parser import CollectOptions, key_value

    command.add_argument(
        short, format, dest="second_format", type=_format, metavar="FORMAT", help=f"the format of {what}, likewise"
    )
    command.add_argument(
        option, metavar="KEY=VALUE", dest="second_options", type=key_value, action=CollectOptions, default={},
        help=f"an option of {what}; may be repeated",
    )


def _backing(command: argparse.ArgumentParser, short: str = "-b") -> None:
    command.add_argument(
        short, "--backing", metavar="FILE", help="the backing file of the new image; its own are opened only where -o"
        " backing=allow: says so" if short == "-b" else "the backing file of the target: what the source's top image"
        " does not have itself is left to it",
    )
    command.add_argument("-F", "--backing-format", type=_format, metavar="FORMAT", help=_BACKING_FORMAT)


def _json(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("--json", action="store_true", help=f"{what}, and a failure as one on stderr")


def _format(text: str) -> Format:
    try:
        return Format(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no format; known are {', '.join(Format)}") from None


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 16:
        raise argparse.ArgumentTypeError(f"{text!r} is no number from 1 to 16")
    return int(text)


def run(args: argparse.Namespace, layout: Layout) -> int:
    """Do what was typed; return the exit status."""
    from storaged.images.commands import Task

    command: str = args.image_command
    # Not with the source, which may hold a password.
    bar = progress.Bar(f"image {command}", lines=not getattr(args, "json", False))

    def spoilt(what: str) -> None:
        bar.end()
        render.note(f"storaged: {render.clean(what)} is half-written")

    task = Task(layout, _config(layout), command, bar.at, bar.doing, spoilt)
    try:
        with _interruptible():
            try:
                return _DO[command](args, task, bar)
            except KeyboardInterrupt:
                bar.end()
                if command in _IN_PLACE or getattr(args, "repair", None):
                    render.note("storaged: interrupted; storaged image check tells what became of the image")
                else:
                    render.note("storaged: interrupted")
                raise
    except StoragedError as error:
        error.volume = ""  # there is none: it is the name of an image within the command
        raise
    except PermissionError as error:
        raise StoragedError(
            ErrorCode.PERMISSION_DENIED, f"cannot use {error.filename}", cause=error.strerror or "",
            hint="run it as root: it takes the host's locks of the images",
        ) from error
    finally:
        bar.end()


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM and SIGHUP end it as Ctrl-C does: qemu-img is ended, and nothing half-made stays."""

    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    with signals.handled(interrupt, signal.SIGTERM, signal.SIGHUP):
        yield


def _config(layout: Layout) -> Config:
    from storaged.host.configfiles import load_config

    return load_config(layout, None)


def _wishes(args: argparse.Namespace, second: str = "") -> list[Wish]:
    """The images that were named, with the secrets that standard input holds."""
    import base64

    from storaged.cli.commands import given_secrets
    from storaged.images.operand import Wish, known_options

    source, options, others = absolute_source(args.source), dict(args.options), {}
    if second == "target":
        known = known_options(source)
        others = {key: options.pop(key) for key in list(options) if key not in known}
    named = [("source", source, args.format, options)]
    if second:
        others = {**others, **args.second_options}
        named.append((second, absolute_source(getattr(args, second)), args.second_format, others))
    wanted = {(name, key): value for name, _, _, of in named for key, value in of.items()}
    found = given_secrets(args.source, {f"{name} {key}": value for (name, key), value in wanted.items()})
    return [
        Wish(
            place, format, {key: absolute_option(key, value) for key, value in of.items()},
            {key: base64.b64decode(found[f"{name} {key}"]) for key in of if f"{name} {key}" in found}, name,
        )
        for name, place, format, of in named
    ]


def _wish(args: argparse.Namespace) -> Wish:
    return _wishes(args)[0]


def _backing_of(args: argparse.Namespace) -> Backing | None:
    from storaged.images.arguments import format_of_name
    from storaged.images.making import Backing

    if args.backing is None:
        return None
    if not args.backing:
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, "the backing file has no name", hint="leave it out")
    return Backing(absolute(args.backing), args.backing_format or format_of_name(args.backing))


def _write(bar: progress.Bar, text: str) -> None:
    """Print what qemu-img printed: names in it may be hostile, its own line ends are not."""
    bar.end()
    if text:
        render.write("\n".join(render.clean(line) if not line.isprintable() else line for line in text.split("\n")))


def _create(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import making

    making.create(task, _wish(args), args.size, _backing_of(args))
    return 0


def _do_convert(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import making

    source, target = _wishes(args, "target")
    manner = making.Manner(
        into=args.into, compress=args.compress, snapshot=args.snapshot, coroutines=args.coroutines,
        out_of_order=args.out_of_order, rate=args.rate,
    )
    making.convert(task, source, target, manner, _backing_of(args))
    return 0


def _info(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    _write(bar, commands.info(
        task, _wish(args), backing_chain=args.backing_chain, force_share=args.force_share, as_json=args.json
    ))
    return 0


def _check(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    text, well = commands.check(task, _wish(args), repair=args.repair, as_json=args.json)
    _write(bar, text)
    return 0 if well else 1


def _map(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    _write(bar, commands.map(task, _wish(args), as_json=args.json))
    return 0


def _compare(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    one, other = _wishes(args, "other")
    same, words = commands.compare(task, one, other, strict=args.strict)
    bar.end()
    if args.json:
        render.write_json({"identical": same, "detail": words})
    else:
        _write(bar, words)
    return 0 if same else 1


def _resize(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    commands.resize(task, _wish(args), args.size, shrink=args.shrink, preallocation=args.preallocation)
    return 0


def _snapshot(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    actions = {"-c": args.create, "-a": args.apply, "-d": args.delete}
    action, name = next(((key, value) for key, value in actions.items() if value is not None), ("-l", None))
    _write(bar, commands.snapshot(task, _wish(args), action=action, name=name))
    return 0


def _rebase(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    # Without a look at the file, its name is what shall stand in the header, relative to the image or not.
    backing = args.backing if args.unsafe or not args.backing else absolute(args.backing)
    commands.rebase(task, _wish(args), backing, args.backing_format, unsafe=args.unsafe)
    return 0


def _amend(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    commands.amend(task, _wish(args))
    return 0


def _commit(args: argparse.Namespace, task: Task, bar: progress.Bar) -> int:
    from storaged.images import commands

    commands.commit(task, _wish(args), keep=args.keep, rate=args.rate)
    return 0


_DO = {
    "amend": _amend, "check": _check, "commit": _commit, "compare": _compare, "convert": _do_convert,
    "create": _create, "info": _info, "map": _map, "rebase": _rebase, "resize": _resize, "snapshot": _snapshot,
}
