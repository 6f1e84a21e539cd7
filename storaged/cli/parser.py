"""What can be typed. No command runs here, and nothing slow is imported: every command pays for this file."""

from __future__ import annotations

import argparse
import math

import storaged
from storaged.cli import bench, image, tune
from storaged.model.formats import Format

SHELLS = ("bash", "zsh", "fish")
TRANSPORTS = ("auto", "vduse", "nbd", "fuse", "vhost-user")

#: Options of every volume that are asked for so often that they have a switch of their own.
OPTIONS_WITH_A_SWITCH = {
    "cache": ("MODE", "QEMU's cache mode (default: writeback)"),
    "discard": ("MODE", "unmap, or ignore (default: unmap)"),
    "detect-zeroes": ("MODE", "off, on or unmap (default: off)"),
    "encrypt": ("luks", "a qcow2 image is encrypted"),
    "logical-block-size": ("BYTES", "512 or 4096 (default: 512)"),
}

_EXIT_CODES = """\
exit status:
  0 it worked; 1 it failed (code, cause and hint on stderr); 2 wrong usage;
  130 interrupted with Ctrl-C; 141 nobody read the output"""

_EXAMPLES = """\
examples:
  storaged attach web1 /srv/web1.qcow2 --format qcow2   prints the device
  storaged attach test /srv/web1.raw --snapshot         leaves the source as it is
  storaged detach web1
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command ``storaged``. The command's name ends up in ``args.command``."""
    parser = argparse.ArgumentParser(
        prog="storaged",
        description="Attach disk images and network disks as block devices of this host.",
        epilog=_EXAMPLES + "\n" + _EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"storaged {storaged.__version__}")
    parser.add_argument(
        "--root",
        metavar="DIR",
        help="put run, state, config and device directories below DIR (default: STORAGED_ROOT, else /)",
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    _attach(commands)
    _detach(commands)

    command = _command(commands, "list", "list the volumes")
    output = command.add_mutually_exclusive_group()
    _json(output, "print an array of objects")
    output.add_argument("--names", action="store_true", help="print the names alone, one per line")

    command = _command(commands, "show", "show all about a volume")
    _name(command, "the volume")
    command.add_argument(
        "--qemu-args", action="store_true", help="print the arguments with which a virtual machine's QEMU uses it"
    )
    _json(command, "print an object")

    command = _command(commands, "watch", "print events as they happen, until Ctrl-C")
    command.add_argument("name", metavar="NAME", nargs="?", help="only those of this volume")
    _json(command, "print one object per line")

    command = _command(commands, "wait", "wait until a volume is online, and print the device (or socket)")
    _name(command, "the volume")
    command.add_argument(
        "--unit", action="store_true", help="NAME is as in storaged@NAME.service, where systemd escapes dashes"
    )
    _timeout(command)
    _json(command, "print the volume as an object, and a failure as one on stderr")

    command = _command(commands, "persist", "attach a volume again after each reboot, or do not")
    _name(command, "the volume")
    command.add_argument("on", metavar="on|off", choices=("on", "off"), help="whether")

    command = _command(
        commands, "shutdown", "for systemd, as the host goes down: flush and end what nobody uses, and keep the wishes"
    )
    command.add_argument(
        "--stuck-after", metavar="SECONDS", type=_seconds,
        help="instead, until the daemon is gone: end the I/O of volumes that have hung for so long",
    )
    _timeout(command)

    command = _command(commands, "resize", "grow a volume and its device")
    _name(command, "the volume")
    command.add_argument(
        "size", metavar="SIZE", nargs="?",
        help="the new size: bytes, or a number with K, M, G, T or P (default: what its source has by now)",
    )

    _trouble(commands)
    image.add_parser(_command(commands, "image", "create, convert, check and otherwise work on images, by qemu-img"))

    bench.add_parser(_command(
        commands, "bench", "measure how fast a source is by each way that there is to it, side by side, with fio"
    ))

    tune.add_parser(_command(
        commands, "tune", "search for settings that make a source faster than the defaults do, and write a profile"
    ))

    command = _command(
        commands, "doctor", "say what this host, its QEMU and this installation can do, and what is missing"
    )
    command.add_argument(
        "--kernel-config",
        metavar="FILE",
        nargs="?",
        const="",
        help="judge a kernel's configuration instead: a file, - for stdin, an installed kernel's release, or nothing"
        " for the running kernel",
    )
    _json(command, "print an array of findings (of transports with --kernel-config)")

    command = _command(commands, "daemon", "run the daemon in the foreground")
    how = command.add_mutually_exclusive_group()
    how.add_argument("--config", metavar="FILE", help="default: /etc/storaged/storaged.toml")
    how.add_argument(
        "--reload", action="store_true",
        help="have the daemon that runs read its configuration again, as SIGHUP does, and say what is in force now and"
        " what needs a restart",
    )
    _config(commands)

    command = _command(commands, "completion", "print the completion script of a shell")
    command.add_argument("shell", choices=SHELLS, help="the shell")
    command.epilog = 'bash: eval "$(storaged completion bash)"'
    return parser


_Commands = argparse._SubParsersAction  # it has no public name; typeshed knows it by this one


def _attach(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "attach", "attach a source as a block device, and print the device (or socket)")
    _name(command, "the volume's name: 1 to 63 of A-Z a-z 0-9 . _ -")
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a path, file:PATH, host_device:PATH, or a network disk as nbd://HOST/EXPORT, iscsi://HOST/IQN/LUN,"
        " rbd:POOL/IMAGE, ssh://HOST/PATH, json:{…}, … (a path with a colon: write ./we:ird.img)",
    )
    command.add_argument(
        "--format",
        choices=[str(format) for format in Format],
        metavar="FORMAT",
        help=f"the image's format, never guessed: {', '.join(Format)} (default: raw)",
    )
    command.add_argument("--transport", choices=TRANSPORTS, help="the way onto the host (default: auto)")
    command.add_argument("--read-only", action="store_true", help="the device refuses writes")
    command.add_argument(
        "--snapshot", action="store_true", help="writable; the changes are thrown away at detach"
    )
    command.add_argument("--snapshot-dir", metavar="DIR", help="where --snapshot keeps the changes")
    command.add_argument(
        "-o",
        "--option",
        metavar="KEY=VALUE",
        dest="options",
        type=key_value,
        action=CollectOptions,
        default={},
        help="an option of the source, its format or the transport, as backing=allow:DIR[:DIR…]; may be repeated;"
        " storaged-sources(7) has all of them",
    )
    for option, (metavar, what) in OPTIONS_WITH_A_SWITCH.items():
        command.add_argument(f"--{option}", metavar=metavar, help=f"{what}: the same as -o {option}={metavar}")
    command.add_argument(
        "--profile", metavar="NAME", help="take the options of /etc/storaged/profiles/NAME.toml that are not said here"
    )
    command.add_argument("--persist", action="store_true", help="attach again after a reboot")
    _timeout(command)
    _json(command, "print the volume as an object, and a failure as one on stderr")


def _detach(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "detach", "take a volume away; refuses while its device is in use")
    _name(command, "the volume")
    command.add_argument(
        "--force",
        action="store_true",
        help="also while it is in use or hangs: whoever uses it gets I/O errors (rescue does so and keeps the volume)",
    )
    _timeout(command)


def _config(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "config", "check the daemon's configuration, or describe it")
    actions = command.add_subparsers(dest="action", metavar="ACTION", required=True, title="actions")

    action = _command(
        actions, "check", "check storaged.toml, its drop-ins, the files of volumes and profiles, and say all that is"
        " wrong"
    )
    action.add_argument(
        "config", metavar="FILE", nargs="?",
        help="a storaged.toml, or a volume's file in a directory volumes, or a profile in one called profiles (default:"
        " all of /etc/storaged)",
    )
    _json(action, "print an array of problems")

    action = _command(actions, "schema", "print the JSON schema of storaged.toml, of a volume's file or of a profile")
    action.add_argument(
        "file", metavar="storaged|volume|profile", nargs="?", choices=("storaged", "volume", "profile"),
        default="storaged", help="which (default: storaged)",
    )


def _trouble(commands: _Commands[argparse.ArgumentParser]) -> None:
    command = _command(commands, "rescue", "end the waiting I/O of a volume with errors, and keep the volume")
    _name(command, "the volume")
    command.add_argument(
        "--keep", action="store_true", help="the device stays, and fails all I/O, until resume (default: it goes away)"
    )
    _timeout(command)

    command = _command(commands, "resume", "put the source of a rescued volume back, and print the device (or socket)")
    _name(command, "the volume")
    _timeout(command)
    _json(command, "print the volume as an object, and a failure as one on stderr")

    command = _command(
        commands, "upgrade", "replace a volume's QEMU by the one that is installed now, while the device is in use"
    )
    which = command.add_mutually_exclusive_group(required=True)
    which.add_argument("name", metavar="NAME", nargs="?", help="the volume")
    which.add_argument("--all", action="store_true", help="all volumes that are online, one after the other")
    _timeout(command)


def _command(
    commands: _Commands[argparse.ArgumentParser], name: str, what: str
) -> argparse.ArgumentParser:
    sentence = f"{what[0].upper()}{what[1:]}."
    return commands.add_parser(name, help=what, description=sentence, allow_abbrev=False)


def _name(command: argparse.ArgumentParser, what: str) -> None:
    command.add_argument("name", metavar="NAME", help=what)


def _json(command: argparse._ActionsContainer, what: str) -> None:
    command.add_argument("--json", action="store_true", help=what)


def _timeout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, help="give up after this long (default: the daemon's)"
    )


class CollectOptions(argparse.Action):
    """Collects KEY=VALUE pairs; a key said twice is refused, since one of the two would not count."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        assert isinstance(values, tuple)
        key, value = values
        collected: dict[str, str] = getattr(namespace, self.dest)
        if key in collected:
            parser.error(f"argument {option_string}: {key} is given twice")
        setattr(namespace, self.dest, {**collected, key: value})


def key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY=VALUE")
    return key, value


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds
