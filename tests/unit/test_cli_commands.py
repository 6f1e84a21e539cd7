"""The commands, their exit codes and what they print, against a daemon that answers as told."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storaged
from storaged.__main__ import main
from storaged.cli import commands
from storaged.cli.parser import OPTIONS_WITH_A_SWITCH, build_parser
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.layout import Layout
from tests.unit.fake_daemon import FakeDaemon, event, failure, volume

WEB1 = {"parameters": {"volume": volume("web1")}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon below a root that the environment names."""
    monkeypatch.setenv("STORAGED_ROOT", str(tmp_path))
    with FakeDaemon(Path(Layout.below(str(tmp_path)).socket)) as daemon:
        yield daemon


def usage_error(*argv: str) -> None:
    """Run a command line that must be refused as wrongly used."""
    with pytest.raises(SystemExit) as caught:
        main(argv)
    assert caught.value.code == 2


def test_attach_prints_the_device_and_nothing_else(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Attach", WEB1)
    assert main(["attach", "web1", "/srv/web1.raw"]) == 0
    assert capsys.readouterr() == ("/dev/loop3\n", "")
    assert daemon.asked("Attach") == [{"name": "web1", "source": "/srv/web1.raw"}]
    assert daemon.asked("Watch") == []


def test_attach_sends_all_that_was_said(
    daemon: FakeDaemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon.answers("Attach", WEB1)
    monkeypatch.chdir(tmp_path)
    line = (
        "attach web1 disk.img --format qcow2 --transport fuse --read-only --snapshot --snapshot-dir snaps"
        " -o backing=allow:base -o cache=none --persist --timeout 7.5"
    )
    assert main(line.split()) == 0
    assert daemon.asked("Attach") == [
        {
            "name": "web1",
            "source": f"{tmp_path}/disk.img",
            "format": "qcow2",
            "transport": "fuse",
            "read_only": True,
            "snapshot": True,
            "snapshot_dir": f"{tmp_path}/snaps",
            "options": {"backing": f"allow:{tmp_path}/base", "cache": "none"},
            "persist": True,
            "timeout": 7.5,
        }
    ]


def test_what_attach_sends_is_what_the_interface_takes() -> None:
    import inspect

    from storaged.api.interface import StoragedInterface

    taken = set(inspect.signature(StoragedInterface.Attach).parameters) - {"self"}
    offered = set(vars(build_parser().parse_args(["attach", "n", "s"])))
    switches = {key.replace("-", "_") for key in OPTIONS_WITH_A_SWITCH}
    # Those are options, and a secret comes from standard input.
    assert taken - {"secrets"} == offered - switches - {"command", "root", "json"}


def test_attach_json_prints_the_volume(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers("Attach", WEB1)
    assert main(["attach", "web1", "/x", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == volume("web1")


def test_detach_is_silent_and_passes_its_wishes(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Detach", {"parameters": {"notes": []}})
    assert main(["detach", "web1"]) == 0
    assert main(["detach", "web1", "--force", "--timeout", "3"]) == 0
    assert capsys.readouterr() == ("", "")
    assert daemon.asked("Detach") == [{"name": "web1"}, {"name": "web1", "force": True, "timeout": 3.0}]


def test_detach_tells_on_stderr_what_is_left(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Detach", {"parameters": {"notes": ["the overlay was kept"]}})
    assert main(["detach", "web1"]) == 0
    assert capsys.readouterr() == ("", "storaged: volume web1: the overlay was kept\n")


def test_resize_without_a_size_leaves_it_to_the_source(daemon: FakeDaemon) -> None:
    daemon.answers("Resize", WEB1)
    assert main(["resize", "web1"]) == 0
    assert daemon.asked("Resize") == [{"name": "web1"}]


def test_resize_sends_bytes(daemon: FakeDaemon) -> None:
    daemon.answers("Resize", WEB1)
    assert main(["resize", "web1", "20G"]) == 0
    assert daemon.asked("Resize") == [{"name": "web1", "size": 20 << 30}]


@pytest.mark.parametrize("size", ["0", "x", "-1G", "99999999P"])
def test_resize_refuses_what_is_no_size_and_asks_nobody(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(["resize", "web1", "--", size]) == 1
    assert "[invalid-size]" in capsys.readouterr().err
    assert daemon.requests == []


def test_list_names_prints_the_names_for_completion(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("List", {"parameters": {"volumes": [volume("a"), volume("b")]}})
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out == "a\nb\n"


def test_list_names_of_nothing_prints_nothing(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("List", {"parameters": {"volumes": []}})
    assert main(["list", "--names"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("volumes", [[], [volume("a"), volume("b", state="failed")]])
def test_list_json_is_an_array(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], volumes: list[dict[str, Any]]
) -> None:
    daemon.answers("List", {"parameters": {"volumes": volumes}})
    assert main(["list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == volumes


def test_show_json_is_an_object(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers("Show", WEB1)
    assert main(["show", "web1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == volume("web1")
    assert daemon.asked("Show") == [{"name": "web1"}]


EVENTS = [event("web1", "ready"), event("web1", "step", "opening"), event("web1", "state", state="online")]
WATCHED: list[dict[str, Any]] = [
    *({"parameters": {"event": one}, "continues": True} for one in EVENTS[:-1]),
    {"parameters": {"event": EVENTS[-1]}},
]


def test_watch_json_is_one_object_per_line(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers("Watch", *WATCHED)
    assert main(["watch", "--json"]) == 0
    assert [json.loads(line) for line in capsys.readouterr().out.splitlines()] == EVENTS
    assert daemon.asked("Watch") == [{}]


def test_watch_prints_a_line_per_event_but_for_the_first(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Watch", *WATCHED)
    assert main(["watch", "web1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1:] for line in lines] == [["web1", "step", "opening"], ["web1", "state", "online"]]
    assert daemon.asked("Watch") == [{"name": "web1"}]


def test_watch_fails_when_the_daemon_goes_away(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.hangs_up("Watch")
    assert main(["watch"]) == 1
    assert "[daemon-unreachable]" in capsys.readouterr().err


OPEN_FAILED = failure(
    code="open-failed",
    message="cannot open the image",
    volume="web1",
    step="open",
    cause="Permission denied",
    hint="check the owner",
    users=["mount /mnt", "pid 12 (bash)"],
)


def test_a_failure_exits_1_with_code_users_and_hint_on_stderr(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Attach", OPEN_FAILED)
    assert main(["attach", "web1", "/x"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "storaged: volume web1: cannot open the image (at step open): Permission denied [open-failed]",
        "in use by: mount /mnt",
        "in use by: pid 12 (bash)",
        "hint: check the owner",
    ]


def test_a_failure_with_json_is_an_object_on_stderr(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Attach", OPEN_FAILED)
    assert main(["attach", "web1", "/x", "--json"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert json.loads(err) == {"error": OPEN_FAILED["parameters"]}


@pytest.mark.parametrize(
    "line",
    [
        "attach n /x", "detach n", "list", "show n", "watch", "resize n 1G", "rescue n", "resume n", "upgrade n",
        "upgrade --all",
    ],
)
def test_without_a_daemon_every_command_fails_and_says_how_to_start_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    assert main(["--root", str(tmp_path), *line.split()]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "[daemon-unreachable]" in err
    assert f"hint: start it with: storaged --root {tmp_path} daemon" in err


@pytest.mark.parametrize(
    ("method", "line"),
    [
        ("Attach", "attach n /x"), ("Detach", "detach n"), ("List", "list"), ("Show", "show n"),
        ("Rescue", "rescue n"), ("Resume", "resume n"), ("Show", "upgrade n"), ("List", "upgrade --all"),
    ],
)
def test_an_answer_without_the_field_is_an_internal_failure(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], method: str, line: str
) -> None:
    daemon.answers(method, {"parameters": {}})
    assert main(line.split()) == 1
    assert "[internal]" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        "",
        "fly",
        "attach",
        "attach n",
        "attach n /x --format zip",
        "attach n /x --transport pigeon",
        "attach n /x -o novalue",
        "attach n /x -o =value",
        "attach n /x -o a=1 -o a=2",
        "attach n /x --timeout 0",
        "attach n /x --timeout -1",
        "attach n /x --timeout nan",
        "attach n /x --timeout inf",
        "attach n /x --timeout soon",
        "attach n /x --read",
        "detach",
        "detach n --json",
        "list --json --names",
        "show",
        "resize",
        "rescue",
        "rescue n --json",
        "resume",
        "resume n --keep",
        "upgrade",
        "upgrade n --all",
        "upgrade n m",
        "completion",
        "completion csh",
        "list --root /r",
    ],
)
def test_wrong_usage_exits_2(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    usage_error(*line.split())
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("option", "shown"), [("--version", f"storaged {storaged.__version__}\n"), ("--help", "usage: storaged")]
)
def test_version_and_help_exit_0(capsys: pytest.CaptureFixture[str], option: str, shown: str) -> None:
    with pytest.raises(SystemExit) as caught:
        main([option])
    assert caught.value.code == 0
    assert capsys.readouterr().out.startswith(shown)


def test_root_on_the_command_line_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGED_ROOT", "/env")
    parse = build_parser().parse_args
    assert commands.layout_of(parse(["list"])) == Layout.below("/env")
    assert commands.layout_of(parse(["--root", "/line", "list"])) == Layout.below("/line")
    assert commands.layout_of(parse(["--root", "", "list"])) == Layout.below(None)
    monkeypatch.delenv("STORAGED_ROOT")
    assert commands.layout_of(parse(["list"])) == Layout.below(None)


@given(st.text(st.characters(exclude_characters="="), min_size=1), st.text())
def test_an_option_is_all_before_and_all_after_the_first_equals_sign(key: str, value: str) -> None:
    args = build_parser().parse_args(["attach", "n", "/x", f"-o{key}={value}"])
    assert args.options == {key: value}


def test_every_format_can_be_said() -> None:
    for format in Format:
        assert build_parser().parse_args(["attach", "n", "/x", "--format", format]).format == format


def test_options_do_not_leak_from_one_parse_to_the_next() -> None:
    parser = build_parser()
    parser.parse_args(["attach", "n", "/x", "-o", "a=1"])
    assert parser.parse_args(["attach", "n", "/x"]).options == {}


@pytest.fixture
def supervisor(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """Stand in for the daemon's module, which is imported when it is run."""
    module = types.ModuleType("storaged.supervisor.daemon")
    monkeypatch.setitem(sys.modules, "storaged.supervisor.daemon", module)
    return module


def test_daemon_runs_with_the_layout_and_an_absolute_configuration(
    supervisor: types.ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Layout, str | None]] = []

    def run(layout: Layout, config_file: str | None) -> int:
        seen.append((layout, config_file))
        return 0

    monkeypatch.setattr(supervisor, "run", run, raising=False)
    monkeypatch.chdir(tmp_path)
    assert main(["--root", "/r", "daemon"]) == 0
    assert main(["--root", "", "daemon", "--config", "my.toml"]) == 0
    assert seen == [(Layout.below("/r"), None), (Layout.below(None), f"{tmp_path}/my.toml")]


def test_a_daemon_that_cannot_start_says_why(
    supervisor: types.ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(layout: Layout, config_file: str | None) -> int:
        raise StoragedError(ErrorCode.DAEMON_RUNNING, "another daemon runs already")

    monkeypatch.setattr(supervisor, "run", run, raising=False)
    assert main(["daemon"]) == 1
    assert capsys.readouterr().err == "storaged: another daemon runs already [daemon-running]\n"
