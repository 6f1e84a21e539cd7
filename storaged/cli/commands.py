"""What each command does: ask the daemon, and print the answer."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any, TypeVar

from storaged.api.client import Client, failure_of
from storaged.cli import progress, render
from storaged.cli.parser import OPTIONS_WITH_A_SWITCH
from storaged.cli.paths import absolute, absolute_option, absolute_source
from storaged.errors import ErrorCode, StoragedError
from storaged.model.layout import Layout
from storaged.model.sizes import parse_size

_T = TypeVar("_T")

#: Bytes, as the daemon takes them.
_LONGEST_SECRET = 64 * 1024
#: Seconds in which the daemon answers what it has in its head.
_QUICK = 30.0
#: Seconds that the daemon may answer late: it keeps --timeout itself, and then cleans up.
_GRACE = 15.0


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed and return its exit status."""
    return _COMMANDS[args.command](args)


def layout_of(args: argparse.Namespace) -> Layout:
    """Return the directories that --root or STORAGED_ROOT asks for."""
    return Layout.below(os.environ.get("STORAGED_ROOT") if args.root is None else args.root)


def _client(args: argparse.Namespace) -> Client:
    return Client(layout_of(args).socket, command=_command(args))


def _command(args: argparse.Namespace) -> str:
    """How the user reaches this daemon, for hints."""
    if not args.root:
        return "storaged"
    import shlex

    return f"storaged --root {shlex.quote(args.root)}"


def _request(args: argparse.Namespace, method: str, parameters: dict[str, Any]) -> dict[str, Any]:
    """Ask for a change and wait for it, with progress. Ctrl-C leaves, and says that the daemon goes on."""
    seconds, name = parameters.get("timeout"), parameters["name"]
    with _client(args) as client:
        client.send(method, parameters)
        try:
            return progress.wait_for_reply(
                client,
                _client(args),
                name,
                timeout=None if seconds is None else seconds + _GRACE,
                lines=not getattr(args, "json", False),
            )
        except KeyboardInterrupt:
            render.note(
                f"storaged: volume {render.clean(name)}: interrupted, but the daemon goes on with the"
                f" {args.command}; look with: {client.command} show {render.clean(name)}"
            )
            raise


def _attach(args: argparse.Namespace) -> int:
    said = {key: getattr(args, key.replace("-", "_")) for key in OPTIONS_WITH_A_SWITCH}
    options = {**args.options, **{key: value for key, value in said.items() if value is not None}}
    for key in said.keys() & args.options.keys():
        if said[key] not in (None, args.options[key]):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"--{key} {said[key]} and -o {key}={args.options[key]} contradict",
                volume=args.name, hint="leave one of them out",
            )
    wishes = {
        "name": args.name,
        "source": absolute_source(args.source),
        "format": args.format,
        "transport": args.transport,
        "read_only": args.read_only or None,
        "snapshot": args.snapshot or None,
        "snapshot_dir": absolute(args.snapshot_dir) if args.snapshot_dir else None,
        "options": {key: absolute_option(key, value) for key, value in options.items()} or None,
        "profile": args.profile,
        "persist": args.persist or None,
        "timeout": args.timeout,
        "secrets": given_secrets(args.name, options) or None,
    }
    return _write_device(args, _field(_request(args, "Attach", _said(wishes)), "volume", dict))


def given_secrets(name: str, options: dict[str, str]) -> dict[str, str]:
    """Return the secret that an option says is on standard input, in base64; from a terminal it is asked for."""
    wanted = [key for key, value in options.items() if value == "-"]
    if not wanted:
        return {}
    if len(wanted) > 1:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"standard input holds one secret, and {len(wanted)} options want it",
            volume=name, cause=", ".join(sorted(wanted)), hint="name files for the others, or credential:NAME",
        )
    import base64
    import sys

    if sys.stdin.isatty():
        import getpass

        data = getpass.getpass(f"{wanted[0]}: ").encode()
    else:
        data = sys.stdin.buffer.read(_LONGEST_SECRET + 1)
    if len(data) > _LONGEST_SECRET:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"what standard input holds for {wanted[0]} is no secret", volume=name,
            cause=f"it has more than {_LONGEST_SECRET} bytes", hint="was the right file redirected?",
        )
    return {wanted[0]: base64.b64encode(data).decode()}


def _write_device(args: argparse.Namespace, volume: dict[str, Any]) -> int:
    if args.json:
        render.write_json(volume)
    else:
        render.write(render.clean(volume.get("device") or volume.get("socket") or ""))
    return 0


def _detach(args: argparse.Namespace) -> int:
    wishes = {"name": args.name, "force": args.force or None, "timeout": args.timeout}
    _note_all(args.name, _field(_request(args, "Detach", _said(wishes)), "notes", list))
    return 0


def _note_all(name: str, notes: list[Any]) -> None:
    for line in notes:
        render.note(f"storaged: volume {render.clean(name)}: {render.clean(line)}")


def _resize(args: argparse.Namespace) -> int:
    _request(args, "Resize", _said({"name": args.name, "size": args.size and parse_size(args.size)}))
    return 0


def _rescue(args: argparse.Namespace) -> int:
    wishes = {"name": args.name, "keep": args.keep or None, "timeout": args.timeout}
    _note_all(args.name, _field(_request(args, "Rescue", _said(wishes)), "notes", list))
    return 0


def _resume(args: argparse.Namespace) -> int:
    wishes = {"name": args.name, "timeout": args.timeout}
    return _write_device(args, _field(_request(args, "Resume", _said(wishes)), "volume", dict))


def _upgrade(args: argparse.Namespace) -> int:
    if not args.all:
        with _client(args) as client:
            before = _field(client.call("Show", {"name": args.name}, timeout=_QUICK), "volume", dict)
        _upgrade_one(args, before)
        return 0
    status = 0
    volumes = _volumes(args)
    for index, volume in enumerate(volumes):
        name, state = volume.get("name"), volume.get("state")
        if state != "online":
            render.write(render.clean(f"{name}: skipped, it is {state or 'not online'}"))
            continue
        try:
            _upgrade_one(args, volume)
        except StoragedError as error:
            if error.code is ErrorCode.NO_SUCH_VOLUME:
                render.write(render.clean(f"{name}: skipped, it is gone by now"))
                continue
            if error.code is ErrorCode.DAEMON_UNREACHABLE:
                for left in volumes[index + 1:]:
                    render.note(render.clean(f"storaged: volume {left.get('name')}: not tried"))
                raise
            status = 1
            render.failure(error)
    return status


def _upgrade_one(args: argparse.Namespace, before: dict[str, Any]) -> None:
    """Upgrade the volume that was ``before``, and print a line about it."""
    name = str(before.get("name"))
    after = _field(_request(args, "Upgrade", _said({"name": name, "timeout": args.timeout})), "volume", dict)
    former, present = (volume.get("qsd_version") or "unknown" for volume in (before, after))
    render.write(render.clean(f"{name}: {former} -> {present}"))


def _volumes(args: argparse.Namespace) -> list[dict[str, Any]]:
    with _client(args) as client:
        return _field(client.call("List", timeout=_QUICK), "volumes", list)


def _list(args: argparse.Namespace) -> int:
    volumes = _volumes(args)
    if args.json:
        render.write_json(volumes)
    elif args.names:
        if volumes:
            render.write("\n".join(render.clean(volume.get("name")) for volume in volumes))
    else:
        render.write(render.volume_table(volumes))
    return 0


def _show(args: argparse.Namespace) -> int:
    if args.qemu_args:
        return _qemu_args(args)
    with _client(args) as client:
        volume = _field(client.call("Show", {"name": args.name}, timeout=_QUICK), "volume", dict)
    if args.json:
        render.write_json(volume)
    else:
        render.write(render.volume_details(volume))
    return 0


def _qemu_args(args: argparse.Namespace) -> int:
    with _client(args) as client:
        # The daemon looks at the source, which may take its time, and says itself when it takes too long.
        found = _field(client.call("QemuArguments", {"name": args.name}), "arguments", dict)
    if args.json:
        render.write_json(found)
    else:
        render.write(render.qemu_arguments(found))
    return 0


def _persist(args: argparse.Namespace) -> int:
    with _client(args) as client:
        client.call("Persist", {"name": args.name, "on": args.on == "on"}, timeout=2 * _QUICK)
    return 0


def _shutdown(args: argparse.Namespace) -> int:
    from storaged.cli import shutdown

    if args.stuck_after is None:
        shutdown.park(lambda: _client(args), args.timeout or _QUICK)
    else:
        shutdown.end_stuck(lambda: _client(args), args.stuck_after)
    return 0


def _wait(args: argparse.Namespace) -> int:
    from storaged.cli.waiting import unescaped, until_online

    name = unescaped(args.name) if args.unit else args.name
    return _write_device(args, until_online(lambda: _client(args), name, args.timeout or _QUICK))


def _watch(args: argparse.Namespace) -> int:
    with _client(args) as client:
        for answer in client.stream("Watch", _said({"name": args.name})):
            event = _field(answer, "event", dict)
            if args.json:
                import json

                render.write(json.dumps(event))
            elif event.get("kind") != "ready":  # it only says that from now on nothing is missed
                render.write(render.event_line(event))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from storaged import doctor

    if args.kernel_config is not None:
        return judge_kernel(args.kernel_config, as_json=args.json)
    found = doctor.examine(layout_of(args), _command(args))
    if args.json:
        render.write_json([asdict(finding) for finding in found])
    else:
        render.findings(found)
    return doctor.exit_status(found)


def judge_kernel(what: str, transport: str | None = None, *, as_json: bool = False) -> int:
    """Print what a kernel's configuration allows, and return 1 when it is no transport, or not the one named."""
    from dataclasses import asdict

    from storaged import doctor

    found, verdicts = doctor.examine_kernel(what, transport)
    if as_json:
        render.write_json([asdict(verdict) for verdict in verdicts])
    else:
        render.findings(found)
    return doctor.exit_status(found)


def _daemon(args: argparse.Namespace) -> int:
    if args.reload:
        return _reload(args)
    from storaged.supervisor.daemon import run as run_daemon

    return run_daemon(layout_of(args), absolute(args.config) if args.config else None)


def _image(args: argparse.Namespace) -> int:
    from storaged.cli import image

    return image.run(args, layout_of(args))


def _bench(args: argparse.Namespace) -> int:
    from storaged.cli import bench

    return bench.run(args, layout_of(args), _command(args))


def _tune(args: argparse.Namespace) -> int:
    from storaged.cli import tune

    return tune.run(args, layout_of(args), _command(args))


def _reload(args: argparse.Namespace) -> int:
    with _client(args) as client:
        changed = _field(client.call("Reload", timeout=_QUICK), "reloaded", dict)
    applied, waiting, attaching, differing, failures = (
        _field(changed, key, list) for key in ("applied", "needs_restart", "attaching", "differing", "failures")
    )
    if applied:
        render.write(f"in force now: {render.clean(', '.join(applied))}")
    if attaching:
        render.write(f"attaching: {render.clean(', '.join(attaching))}")
    if not (applied or waiting or attaching or differing or failures):
        render.write("nothing has changed")
    if waiting:
        render.note(
            f"needs a restart of the daemon (volumes stay attached): {render.clean(', '.join(waiting))}"
        )
    if differing:
        render.note(
            f"attached with other wishes than their files have now (detach, and reload again): "
            f"{render.clean(', '.join(differing))}"
        )
    for one in failures:
        render.failure(failure_of(one if isinstance(one, dict) else {}, "a file of a volume is wrong"))
    return 1 if failures else 0


def _config(args: argparse.Namespace) -> int:
    if args.action == "schema":
        from storaged.cli.volumefiles import schema_of

        render.write_json(schema_of(args.file))
        return 0
    from dataclasses import asdict

    from storaged.cli.volumefiles import check_below, files_below
    from storaged.host.configfiles import check_config, config_files

    layout, named = layout_of(args), absolute(args.config) if args.config else None
    below = files_below(layout) if named is None else []
    if named and (found := check_below(named)) is not None:
        files, problems = [named], found
    else:
        files = config_files(layout, named) + below
        problems = check_config(layout, named)[1] + [wrong for path in below for wrong in check_below(path) or []]
    if args.json:
        render.write_json([asdict(problem) for problem in problems])
    elif problems:
        for problem in problems:
            render.write(render.clean(problem))
    else:
        render.write(render.clean(f"{', '.join(files) or 'no file (all defaults)'}: nothing is wrong"))
    return 1 if problems else 0


def _completion(args: argparse.Namespace) -> int:
    from storaged.cli.completion import script
    from storaged.cli.parser import build_parser

    render.write(script(build_parser(), args.shell))
    return 0


def _field(answer: dict[str, Any], key: str, kind: type[_T]) -> _T:
    """Return a field of an answer, of which a newer or broken daemon may know nothing."""
    value = answer.get(key)
    if not isinstance(value, kind):
        raise StoragedError(
            ErrorCode.INTERNAL,
            "the daemon's answer cannot be understood",
            cause=f"it has no field {key}",
            hint="command and daemon may be of different versions: systemctl restart storaged",
        )
    return value


def _said(wishes: dict[str, Any]) -> dict[str, Any]:
    """Leave out what was not said: the daemon knows its defaults."""
    return {key: value for key, value in wishes.items() if value is not None}


_COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "attach": _attach,
    "bench": _bench,
    "completion": _completion,
    "config": _config,
    "daemon": _daemon,
    "detach": _detach,
    "doctor": _doctor,
    "image": _image,
    "list": _list,
    "persist": _persist,
    "rescue": _rescue,
    "resize": _resize,
    "resume": _resume,
    "show": _show,
    "shutdown": _shutdown,
    "tune": _tune,
    "upgrade": _upgrade,
    "wait": _wait,
    "watch": _watch,
}
