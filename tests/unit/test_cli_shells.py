"""The completions work in the shells themselves: zsh at a terminal, fish by its own command for it."""

from __future__ import annotations

import os
import pty
import subprocess
from collections.abc import Mapping
from pathlib import Path

import pytest

from storaged.cli.completion import script
from storaged.cli.parser import TRANSPORTS, build_parser
from tests.harness import eventually


@pytest.fixture
def environment(tmp_path: Path) -> Mapping[str, str]:
    """An empty home, and a ``storaged`` in the PATH that knows two volumes."""
    fake = tmp_path / "storaged"
    fake.write_text('#!/bin/sh\n[ "$*" = "list --names" ] && printf "alpha\\nbeta\\n"\n')
    fake.chmod(0o755)
    return {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb", "LANG": "C.UTF-8"}


def offered_by_fish(line: str, directory: Path, environment: Mapping[str, str]) -> set[str]:
    (directory / "storaged.fish").write_text(script(build_parser(), "fish"))
    done = subprocess.run(
        ["fish", "-N", "-c", f"source storaged.fish; complete -C '{line}'"],
        cwd=directory, env=environment, capture_output=True, text=True, timeout=60,
    )
    assert done.stderr == ""
    return {offer.partition("\t")[0] for offer in done.stdout.splitlines()}


def test_fish_offers_commands_volumes_and_options(tmp_path: Path, environment: Mapping[str, str]) -> None:
    (tmp_path / "disk.img").touch()
    assert {"attach", "detach", "config", "doctor"} <= offered_by_fish("storaged ", tmp_path, environment)
    assert {"alpha", "beta"} <= offered_by_fish("storaged show ", tmp_path, environment)
    assert "disk.img" in offered_by_fish("storaged attach new ./dis", tmp_path, environment) | \
        offered_by_fish("storaged attach new dis", tmp_path, environment)
    assert "--snapshot-dir" in offered_by_fish("storaged attach --snap", tmp_path, environment)
    assert set(TRANSPORTS) <= offered_by_fish("storaged attach --transport ", tmp_path, environment)


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("storaged doc", "storaged doctor"),
        ("storaged detach al", "storaged detach alpha"),
        ("storaged show be", "storaged show beta"),
        ("storaged attach new ./dis", "storaged attach new ./disk.img"),
        ("storaged attach n s --read", "storaged attach n s --read-only"),
        ("storaged attach --transport vd", "storaged attach --transport vduse"),
        ("storaged config sch", "storaged config schema"),
    ],
)
def test_zsh_completes_what_is_typed(
    typed: str, completed: str, tmp_path: Path, environment: Mapping[str, str]
) -> None:
    (tmp_path / "disk.img").touch()
    (tmp_path / "functions").mkdir()
    (tmp_path / "functions/_storaged").write_text(script(build_parser(), "zsh"))
    (tmp_path / ".zshrc").write_text(
        "fpath=($HOME/functions $fpath); autoload -Uz compinit; compinit -u\n"
        "bindkey '^I' complete-word; tell() { print -r -- $BUFFER >$HOME/new; mv $HOME/new $HOME/line }\n"
        "zle -N tell; bindkey '^X' tell; zle-line-init() { : >$HOME/ready }; zle -N zle-line-init\n"
    )
    ours, theirs = pty.openpty()
    try:
        shell = subprocess.Popen(
            ["zsh", "-d", "-i"], cwd=tmp_path, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )
        try:
            eventually((tmp_path / "ready").exists, "zsh reads a line", 60)
            os.write(ours, f"{typed}\t\x18".encode())
            eventually((tmp_path / "line").exists, "zsh has completed it", 60)
            assert (tmp_path / "line").read_text().strip() == completed
        finally:
            shell.kill()
            shell.wait()
    finally:
        os.close(theirs)
        os.close(ours)
