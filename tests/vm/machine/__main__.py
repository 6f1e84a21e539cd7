"""The command line: ``scripts/vm --help``."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import os
import re
import shlex
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.vm.machine.checkout import ROOT
from tests.vm.machine.qemu import CACHE, MACHINES, Machine, build
from tests.vm.machine.session import MachineError, MachineGone

UP = CACHE / "up"
LAST = CACHE / "last"
TIMEOUT = 600  # of one test: the machine is slow, and slower yet when others use this one
FAILED = 125  # as with docker run: it is not the command that failed
LOGS = "/run/storaged-vm"
COLLECT = f"""
mkdir -p {LOGS}; cd {LOGS}
dmesg >dmesg.log; journalctl -b --no-pager -o short-monotonic >journal.log
ps -eo pid,ppid,stat,etimes,time,wchan:20,args >ps.log
# The boot before, where a test has kept it.
journalctl -b -1 --no-pager -o short-monotonic >journal-before.log 2>/dev/null || rm journal-before.log
tar -c .
"""


def say(text: str) -> None:
    """Tell the user."""
    print(f"vm: {text}", file=sys.stderr, flush=True)


@contextmanager
def throwaway(name: str, logs: Path = LAST, *, steady: bool = False, processors: int = 2) -> Iterator[Machine]:
    """Start a machine that lives as long as the block, and leave its logs in a directory."""
    runs = CACHE / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    for old in runs.iterdir():
        # Of a run that was killed, unless it has not come to its lock yet.
        if time.time() - old.stat().st_mtime > 600 and not Machine(name, old).alive():
            shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=f"{name}-", dir=runs, ignore_cleanup_errors=True) as directory:
        machine = Machine(name, Path(directory), steady=steady)
        try:
            machine.start(stays=False, processors=processors)
            yield machine
        finally:
            machine.end()
            keep_logs(machine, logs)


def keep_logs(machine: Machine, logs: Path) -> None:
    """Put a machine's logs where the last ones were."""
    with open(logs.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
        for path in machine.directory.iterdir():
            if path.suffix in {".log", ".xml"}:
                shutil.copy(path, logs)


def collect(machine: Machine) -> None:
    """Bring out what the machine says about itself."""
    try:
        data = machine.quietly(["/bin/sh", "-c", COLLECT], timeout=30)
        with tarfile.open(fileobj=io.BytesIO(data)) as tar:
            for member in tar:
                content = tar.extractfile(member) if member.isreg() else None
                if content is not None:
                    (machine.directory / Path(member.name).name).write_bytes(content.read())
    except (MachineError, tarfile.TarError) as error:
        say(f"its logs could not be had: {error}")


def perform(machine: Machine, command: list[str], arguments: argparse.Namespace, *, log: bool = False) -> int:
    """Run a command in the machine as if it were here."""
    machine.sync()
    environment = {name: os.environ[name] for name in ("CI", "TERM") if name in os.environ}
    if sys.stdout.isatty():
        environment["FORCE_COLOR"] = environment["PY_COLORS"] = "1"
        environment["COLUMNS"] = str(shutil.get_terminal_size().columns)
    terminal = bool(getattr(arguments, "terminal", False))
    with open(machine.directory / "output.log", "wb") if log else contextlib.nullcontext() as file:
        def output(data: bytes) -> None:
            sys.stdout.buffer.write(data)
            sys.stdout.flush()
            if file is not None:
                file.write(data)

        def error(data: bytes) -> None:
            sys.stderr.buffer.write(data)
            sys.stderr.flush()
            if file is not None:
                file.write(data)

        return machine.run(
            command, output=output, error=error, environment=environment, terminal=terminal,
            stdin=sys.stdin.buffer if terminal or getattr(arguments, "stdin", False) else None,
            deadline=None if not arguments.deadline else time.monotonic() + arguments.deadline,
        )


def running(name: str) -> Machine | None:
    """The machine of that name that was brought up, if it is."""
    machine = Machine(name, UP / name)
    return machine if machine.alive() else None


def up(arguments: argparse.Namespace) -> int:
    """Start a machine that stays."""
    machine = Machine(arguments.machine, UP / arguments.machine)
    begin = time.monotonic()
    started = machine.start(stays=True)
    machine.connect().close()
    machine.sync()
    say(f"{machine.name} is up {f'after {time.monotonic() - begin:.1f} s' if started else 'already'}")
    if machine.outdated():
        say("but from a disk that lacks later changes (packages, pyproject.toml, …): scripts/vm down, then up")
    return 0


def down(arguments: argparse.Namespace) -> int:
    """End a machine that was brought up."""
    machine = running(arguments.machine)
    if machine is None:
        say(f"{arguments.machine} is not up")
        return 0
    machine.end()
    return 0


def reboot(arguments: argparse.Namespace) -> int:
    """Restart a machine that was brought up, in good order."""
    return _restart(arguments, orderly=True)


def reset(arguments: argparse.Namespace) -> int:
    """Restart it as its button does."""
    return _restart(arguments, orderly=False)


def _restart(arguments: argparse.Namespace, *, orderly: bool) -> int:
    machine = running(arguments.machine)
    if machine is None:
        raise MachineError(f"{arguments.machine} is not up: scripts/vm up")
    machine.restart(orderly=orderly)
    return 0


def status(arguments: argparse.Namespace) -> int:
    """Tell which machines are up."""
    for name in MACHINES:
        machine = running(name)
        print(f"{name}: {f'up, its console is in {machine.console}' if machine else 'down'}")
    return 0


def run(arguments: argparse.Namespace) -> int:
    """Run a command in the machine that is up, or in one that is started for it."""
    # One word is a line for a shell, as with ssh; more are a command and its arguments.
    words = arguments.words
    line = words[0] if len(words) == 1 else shlex.join(words)
    machine = None if arguments.steady or arguments.processors else running(arguments.machine)
    if machine is not None:
        with told(machine, machine.console):
            return perform(machine, ["/bin/bash", "-c", line], arguments)
    logs = CACHE / arguments.logs
    own = throwaway(arguments.machine, logs, steady=arguments.steady, processors=arguments.processors or 2)
    with own as machine, told(machine, logs / "console.log"):
        return perform(machine, ["/bin/bash", "-c", line], arguments)


def shell(arguments: argparse.Namespace) -> int:
    """Give the user a shell in the machine."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise MachineError("a shell needs a terminal; for a command use: scripts/vm run COMMAND")
    arguments.terminal, arguments.deadline = True, 0
    command = ["/bin/bash", "-l"]
    machine = running(arguments.machine)
    if machine is not None:
        return perform(machine, command, arguments)
    say("starting the machine; it ends with the shell")
    with throwaway(arguments.machine, CACHE / arguments.logs) as machine:
        try:
            return perform(machine, command, arguments)
        except MachineGone:
            return 0  # poweroff


def test(arguments: argparse.Namespace) -> int:
    """Run pytest in a machine of its own."""
    words = arguments.words
    if not any((ROOT / word.partition("::")[0]).exists() for word in words if word):
        words = ["tests/vm", *words]
    command = [
        "python", "-m", "pytest", f"--junitxml={LOGS}/junit.xml", "-p", "no:cacheprovider", f"--timeout={TIMEOUT}",
        *words,
    ]
    logs = CACHE / arguments.logs
    say(f"pytest in a machine with Debian {arguments.machine}; logs will be in {logs}")
    with throwaway(arguments.machine, logs) as machine, told(machine, logs / "console.log"):
        try:
            return perform(machine, command, arguments, log=True)
        finally:
            if machine.alive():
                collect(machine)


@contextmanager
def told(machine: Machine, whole: Path) -> Iterator[None]:
    """When the machine fails, show the end of its console."""
    try:
        yield
    except MachineError:
        if machine.console.exists():
            lines = machine.console.read_text(errors="replace").splitlines()[-40:]
            say(f"the last lines of its console, all of which is in {whole}:")
            print(*lines, sep="\n", file=sys.stderr)
        raise


def log_directory(name: str) -> str:
    """A directory for logs, which is nothing else that is kept there."""
    if re.fullmatch(rf"{LAST.name}(-[a-z0-9]+)*", name) is None:
        raise argparse.ArgumentTypeError(f"a NAME is {LAST.name}, or begins with {LAST.name}-")
    return name


def parse(words: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="scripts/vm", description=(
        "A Debian machine under QEMU's emulator, with the checkout in /srv/storaged. "
        f"Its exit status is the command's; {FAILED} when the machine failed."
    ))
    parser.add_argument("--machine", choices=MACHINES, default=os.environ.get("MACHINE") or "trixie",
                        help="which Debian (default: $MACHINE, or trixie)")
    parser.add_argument("--deadline", type=float, default=3600, metavar="SECONDS",
                        help="how long a command may take; 0: for ever (default: %(default)s)")
    parser.add_argument("--logs", type=log_directory, default=LAST.name, metavar="NAME", help=(
        "leave the logs of a machine of its own in .cache/vm/NAME, where two run at a time (default: %(default)s)"
    ))
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for function, text in (
        (build_only, "make its disk, or find it, and print where"),
        (up, "start a machine that stays; 'run' and 'shell' then use it"),
        (down, "end it; what it has written is thrown away"),
        (reboot, "restart it in good order; what is on its disk stays"),
        (reset, "restart it as its button does"),
        (status, "which machines are up"),
        (shell, "a root shell; without 'up' in a machine that ends with it"),
    ):
        name = "build" if function is build_only else function.__name__
        commands.add_parser(name, help=text).set_defaults(function=function)
    one = commands.add_parser("run", help="run a command; without 'up' in a machine of its own")
    one.add_argument("-i", "--stdin", action="store_true", help="hand it our standard input")
    one.add_argument("-t", "--terminal", action="store_true", help="give it a terminal")
    one.add_argument("--steady", action="store_true", help=(
        "in a machine of its own whose clock counts instructions: the load of this one does not show in its figures"
    ))
    one.add_argument("--processors", type=int, choices=range(1, 9), metavar="N", help=(
        "in a machine of its own with so many processors (default: 2)"
    ))
    one.add_argument("words", nargs=argparse.REMAINDER, metavar="COMMAND", help="a line for bash, or words")
    one.set_defaults(function=run)
    tests = commands.add_parser("test", help="run pytest in a machine of its own (by default on tests/vm)")
    tests.add_argument("words", nargs=argparse.REMAINDER, metavar="ARGUMENT", help="for pytest")
    tests.set_defaults(function=test)
    arguments = parser.parse_args(words)
    if getattr(arguments, "words", None) and arguments.words[0] == "--":
        del arguments.words[0]
    if arguments.function is run and not arguments.words:
        one.error("which command?")
    return arguments


def build_only(arguments: argparse.Namespace) -> int:
    """Make the disk."""
    print(build(arguments.machine))
    return 0


def main() -> int:
    """Do what the command line says."""
    arguments = parse(sys.argv[1:])
    # So that the machine is ended in good order.
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    try:
        return int(arguments.function(arguments))
    except MachineError as error:
        say(str(error))
        return FAILED
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
