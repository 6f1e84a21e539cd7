"""Completions offer what the parser takes, and the names of what is attached."""

from __future__ import annotations

import argparse
import os
import shlex
import stat
import subprocess
from pathlib import Path

import pytest
import shtab

from storaged.__main__ import main
from storaged.cli.completion import script
from storaged.cli.parser import SHELLS, TRANSPORTS, build_parser
from storaged.errors import ErrorCode, StoragedError


def commands() -> dict[str, argparse.ArgumentParser]:
    """Return the parser of each command."""
    for action in build_parser()._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    raise AssertionError("the parser has no commands")


def completed(line: str, directory: Path) -> list[str]:
    """Return what bash offers for the last word of ``line``, with a ``storaged`` that knows two volumes."""
    fake = directory / "storaged"
    fake.write_text(
        "#!/bin/sh\n"
        '[ "$1" = --root ] && shift 2 && set -- "$@" below\n'
        '[ "$*" = "list --names" ] && printf "web1\\nweb2\\n"\n'
        '[ "$*" = "list --names below" ] && printf "other\\n"\n'
    )
    fake.chmod(fake.stat().st_mode | stat.S_IXUSR)
    words = ["storaged", *line.split(" ")]
    program = f"""
    source completion.bash
    COMP_WORDS=({shlex.join(words)}); COMP_CWORD={len(words) - 1}
    _shtab_storaged 2>/dev/null; printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    (directory / "completion.bash").write_text(script(build_parser(), "bash"))
    done = subprocess.run(
        ["bash", "-c", program],
        cwd=directory,
        env=os.environ | {"PATH": f"{directory}:{os.environ['PATH']}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return done.stdout.split()


@pytest.mark.parametrize("shell", SHELLS)
def test_every_command_and_option_is_in_the_script(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", shell]) == 0
    text = capsys.readouterr().out
    for name, command in commands().items():
        assert name in text
        for action in command._actions:
            for option in action.option_strings:
                assert option.lstrip("-") in text, f"{name} {option}"


def test_the_script_is_one_that_bash_understands(tmp_path: Path) -> None:
    path = tmp_path / "script"
    path.write_text(script(build_parser(), "bash"))
    subprocess.run(["bash", "-n", str(path)], check=True)


def test_bash_offers_the_commands(tmp_path: Path) -> None:
    assert set(completed("", tmp_path)) == set(commands())


@pytest.mark.parametrize("command", ["detach", "show", "watch", "resize", "rescue", "resume", "upgrade"])
def test_bash_offers_the_attached_volumes(command: str, tmp_path: Path) -> None:
    assert completed(f"{command} ", tmp_path) == ["web1", "web2"]
    assert completed(f"{command} web2", tmp_path) == ["web2"]


def test_bash_asks_the_daemon_below_the_root_that_was_typed(tmp_path: Path) -> None:
    assert completed("--root /r show ", tmp_path) == ["other"]


def test_bash_offers_no_attached_name_to_attach_but_files_as_its_source(tmp_path: Path) -> None:
    (tmp_path / "disk.img").touch()
    assert "web1" not in completed("attach ", tmp_path)
    assert completed("attach web3 dis", tmp_path) == ["disk.img"]


def test_bash_offers_options_and_their_choices(tmp_path: Path) -> None:
    assert completed("attach --sn", tmp_path) == ["--snapshot", "--snapshot-dir"]
    assert completed("attach n s --transport ", tmp_path) == list(TRANSPORTS)
    assert "qcow2" in completed("attach n s --format q", tmp_path)
    assert completed("completion ", tmp_path) == list(SHELLS)


def test_zsh_asks_for_names_when_they_are_needed_and_not_when_the_script_is_loaded() -> None:
    text = script(build_parser(), "zsh")
    assert ":_storaged_names" in text
    assert "_storaged_names() {" in text
    assert "($(storaged" not in text


def test_an_old_shtab_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shtab, "SUPPORTED_SHELLS", ["bash", "zsh"])
    with pytest.raises(StoragedError) as caught:
        script(build_parser(), "fish")
    assert caught.value.code is ErrorCode.UNSUPPORTED
