"""Completion scripts, generated from the parser by shtab: what can be typed can be completed."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from storaged.errors import ErrorCode, StoragedError

# The command is the one that was typed, and it asks the daemon whose --root was typed.
_BASH_NAMES = """
# $1=COMP_WORDS[1]
_storaged_names() {
  local root=()
  [[ ${COMP_WORDS[1]-} == --root ]] && root=(--root "${COMP_WORDS[2]-}")
  compgen -W "$("${COMP_WORDS[0]}" "${root[@]}" list --names 2>/dev/null)" -- "$1"
}
"""
# A function, since zsh would run a $(…) when it loads the script, and complete those names ever after.
_ZSH_NAMES = """
_storaged_names() {
  local -a names
  names=(${(f)"$(storaged list --names 2>/dev/null)"})
  compadd -a names
}
"""
_NAMES = {
    "bash": "_storaged_names",
    "zsh": "_storaged_names",
    "fish": "(storaged list --names 2>/dev/null)",
    "preamble": {"bash": _BASH_NAMES, "zsh": _ZSH_NAMES},
}
_FILES = (
    "source", "target", "other", "backing", "config", "kernel_config", "reports", "jobs", "json_file", "html_file",
    "svg_file", "png_file",
)
_DIRECTORIES = ("root", "snapshot_dir")


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the completion script for ``shell``."""
    import shtab

    if shell not in shtab.SUPPORTED_SHELLS:
        raise StoragedError(
            ErrorCode.UNSUPPORTED,
            f"this shtab ({shtab.__version__}) writes no completions for {shell}",
            hint="install a newer one: pip install -U shtab",
        )
    for command, action in _actions(parser, ""):
        if action.dest == "name" and command != "attach":  # attach's NAME is a new one
            completer: object = _NAMES
        elif action.dest in _FILES:
            completer = shtab.FILE
        elif action.dest in _DIRECTORIES:
            completer = shtab.DIRECTORY
        else:
            continue
        action.complete = completer  # type: ignore[attr-defined]  # shtab's way of asking for it
    return str(shtab.complete(parser, shell))


def _actions(parser: argparse.ArgumentParser, command: str) -> Iterator[tuple[str, argparse.Action]]:
    """All arguments of the parser and of its commands, with the command's name."""
    for action in parser._actions:
        yield command, action
        if isinstance(action, argparse._SubParsersAction):
            for name, subparser in action.choices.items():
                yield from _actions(subparser, name)
