"""Everything that is wrong with the configuration is said at once, with file, line and the key that was meant."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import msgspec
import pytest

from storaged.__main__ import main
from storaged.errors import ErrorCode, StoragedError
from storaged.host.configfiles import check_config, config_files, load_config
from storaged.model.config import Config, QsdConfig, keys, schema
from storaged.model.configcheck import check_files
from storaged.model.layout import Layout
from storaged.supervisor.reloading import Reloaded, combine

WRONG = b"""\
# 1
attach_timeuot = 5
detach_timeout = "7"
binary = "/opt/qsd"
log-level = "info"
snapshot_dir = "relative"
log_level = "loud"
text = \"\"\"
attach_timeout = 1
\"\"\"

[qsd]
binaries = { rbd = 1 }
binery = "x"
"""


@pytest.fixture
def layout(tmp_path: Path) -> Layout:
    """Directories of a root, with those of the configuration."""
    layout = Layout.below(str(tmp_path))
    os.makedirs(f"{layout.config_file}.d")
    return layout


def write(layout: Layout, text: str, drop_in: str = "") -> None:
    path = f"{layout.config_file}.d/{drop_in}" if drop_in else layout.config_file
    Path(path).write_text(text)


@pytest.mark.parametrize(
    ("line", "key", "what"),
    [
        (2, "attach_timeuot", "did you mean attach_timeout?"),
        (3, "detach_timeout", "expected `float`, got `str`"),
        (4, "binary", "binary stands in [qsd]"),
        (5, "log-level", "did you mean log_level?"),
        (6, "snapshot_dir", "expected an absolute path"),
        (7, "log_level", "one of debug, info, warning, error"),
        (8, "text", "known here: access, attach_timeout"),
        (13, "qsd.binaries", "expected `str`, got `int`"),
        (14, "qsd.binery", "did you mean binary?"),
    ],
)
def test_all_that_is_wrong_is_said_with_its_line(line: int, key: str, what: str) -> None:
    config, problems = check_files([("/f", WRONG)])
    assert config is None
    assert len(problems) == 9
    (problem,) = [problem for problem in problems if problem.key == key]
    assert problem.line == line
    assert what in str(problem)
    assert str(problem).startswith(f"/f:{line}: ")


@pytest.mark.parametrize(
    ("text", "line"), [(b"a = 1\nb = = 2", 2), (b"a = 1\na = 2\n", 2), (b"\nx = '\xff'", 2), (b"x = [1,\n\n", 2)]
)
def test_what_is_no_toml_is_said_with_its_line(text: bytes, line: int) -> None:
    _, (problem,) = check_files([("/f", text)])
    assert problem.line == line


def test_drop_ins_are_merged_key_by_key_in_the_order_of_their_names(layout: Layout) -> None:
    write(layout, "attach_timeout = 1\n[qsd]\nbinary = 'a'\nbinaries = { rbd = 'r', nbd = 'n' }")
    write(layout, "attach_timeout = 3\n[qsd]\nbinaries = { nbd = 'other' }", "20-b.toml")
    write(layout, "attach_timeout = 2\ndetach_timeout = 2", "10-a.toml")
    for ignored in ("30.toml~", ".31.toml", "32.conf"):
        write(layout, "attach_timeout = 9", ignored)
    assert load_config(layout, None) == Config(
        attach_timeout=3, detach_timeout=2, qsd=QsdConfig(binary="a", binaries={"rbd": "r", "nbd": "other"})
    )


def test_drop_ins_count_without_the_file_too_and_beside_one_that_was_named(layout: Layout, tmp_path: Path) -> None:
    write(layout, "attach_timeout = 2", "10-a.toml")
    assert load_config(layout, None).attach_timeout == 2
    named = tmp_path / "named.toml"
    named.touch()
    (tmp_path / "named.toml.d").mkdir()
    (tmp_path / "named.toml.d/1.toml").write_text("attach_timeout = 4")
    assert load_config(layout, str(named)).attach_timeout == 4


def test_a_wrong_value_is_found_also_where_a_later_file_has_a_right_one(layout: Layout) -> None:
    write(layout, "attach_timeout = 0")
    write(layout, "attach_timeout = 5", "10-a.toml")
    _, (problem,) = check_config(layout, None)
    assert problem.file == layout.config_file


def test_a_group_that_this_host_does_not_have_is_a_problem(layout: Layout) -> None:
    write(layout, "socket_group = 'no-such-group'", "10-a.toml")
    config, (problem,) = check_config(layout, None)
    assert config is None
    assert problem.key == "socket_group"
    assert problem.file.endswith("10-a.toml")
    assert "groupadd" in problem.hint


def test_a_group_of_readers_that_this_host_does_not_have_is_a_problem(layout: Layout) -> None:
    write(layout, "[access]\nread_only = ['root', 'no-such-group']", "10-a.toml")
    config, (problem,) = check_config(layout, None)
    assert config is None
    assert problem.key == "access.read_only"
    assert "no-such-group" in problem.message
    assert problem.file.endswith("10-a.toml")


@pytest.mark.parametrize("value", ["'readers'", "['']", "3", "true", "[['a']]"])
def test_who_may_look_is_nobody_everybody_or_groups(value: str) -> None:
    config, (problem,) = check_files([("/f", f"[access]\nread_only = {value}".encode())])
    assert config is None
    assert problem.line == 2
    assert problem.hint == "one of nobody, everybody, a list"


def test_a_named_file_must_be_there(layout: Layout) -> None:
    with pytest.raises(StoragedError) as caught:
        config_files(layout, "/no/such/file")
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_the_command_lists_all_problems_and_fails(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    root = layout.config_dir.removesuffix("/etc/storaged")
    assert main(["--root", root, "config", "check"]) == 0
    assert "nothing is wrong" in capsys.readouterr().out
    write(layout, WRONG.decode())
    assert main(["--root", root, "config", "check"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 9
    assert main(["--root", root, "config", "check", "--json", layout.config_file]) == 1
    assert {problem["line"] for problem in json.loads(capsys.readouterr().out)} == {2, 3, 4, 5, 6, 7, 8, 13, 14}


def test_the_schema_has_every_key_with_its_meaning_and_takes_no_other(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(msgspec.json.encode(schema()))
    tables = {(): schema()["$defs"]["Config"], ("qsd",): schema()["$defs"]["QsdConfig"]}
    for key in keys():
        table = tables[key.table] if key.table in tables else schema()["$defs"][f"{key.table[-1].title()}Config"]
        assert table["properties"][key.name]["description"] == key.description
        assert table["additionalProperties"] is False


@pytest.mark.parametrize("key", keys(), ids=str)
def test_every_key_says_what_it_means(key: object) -> None:
    assert re.fullmatch(r"[a-z].{10,}[^.]", getattr(key, "description", ""))


def test_a_reload_leaves_what_needs_a_restart_as_it_was_and_says_it_each_time() -> None:
    present = Config(socket_group="a", attach_timeout=1)
    new = Config(socket_group="b", attach_timeout=2, qsd=QsdConfig(binary="x"))
    now, changed = combine(present, new)
    assert changed == Reloaded(["attach_timeout", "qsd.binary"], ["socket_group"])
    assert now == Config(socket_group="a", attach_timeout=2, qsd=QsdConfig(binary="x"))
    assert combine(now, new) == (now, Reloaded([], ["socket_group"]))


def test_what_is_wrong_with_all_files_together_is_said_where_it_was_said_last() -> None:
    localhost = b'[metrics]\nlisten = "127.0.0.1:1"\n'
    drop_in = b'\n[metrics]\n\nlisten = "[::]:1"\n'
    config, problems = check_files([("/f", localhost), ("/f.d/a", drop_in), ("/f.d/b", b"")])
    assert config is None
    (problem,) = problems
    assert (problem.file, problem.line, problem.key) == ("/f.d/a", 4, "metrics.listen")
    protected = b'[metrics]\nweb_config = "/web.yml"\n'
    config, problems = check_files([("/f", protected), ("/f.d/a", b'[metrics]\nlisten = "[::]:1"\n')])
    assert config is not None
    assert problems == []


def test_the_files_of_volumes_are_checked_too(layout: Layout, capsys: pytest.CaptureFixture[str]) -> None:
    root = layout.config_dir.removesuffix("/etc/storaged")
    os.makedirs(layout.volume_files)
    wrong = {
        "keys.toml": 'sorce = "/a"\nread_only = "yes"\nformat = "qcow3"\n',
        "option.toml": 'source = "/a"\noptions = { cahce = "none" }\n',
        "scheme.toml": 'source = "nosuch://x"\n',
        "-name.toml": 'source = "/a"\n',
        "empty.toml": "",
    }
    for name, text in {**wrong, "good.toml": 'source = "/a"\noptions = { cache = "none" }\n', ".x.toml": "="}.items():
        Path(f"{layout.volume_files}/{name}").write_text(text)
    assert main(["--root", root, "config", "check"]) == 1
    said = capsys.readouterr().out
    assert f"{layout.volume_files}/keys.toml:1: unknown key 'sorce' (did you mean source?)" in said
    assert "keys.toml:2: read_only: expected `bool`, got `str`" in said
    assert "keys.toml:3: format: " in said
    assert "raw, qcow2" in said
    for name, what in {"option": "'cahce'", "scheme": "nosuch", "-name": "name", "empty": "`source`"}.items():
        (line,) = [line for line in said.splitlines() if f"/{name}.toml" in line]
        assert what in line
    assert "good" not in said
    assert main(["--root", root, "config", "check", f"{layout.volume_files}/good.toml"]) == 0
    assert main(["--root", root, "config", "check", f"{layout.volume_files}/empty.toml"]) == 1


def test_a_fifo_among_the_drop_ins_is_refused_and_not_waited_for(layout: Layout) -> None:
    os.mkfifo(f"{layout.config_file}.d/1.toml")
    with pytest.raises(StoragedError, match="no file"):
        load_config(layout, None)
