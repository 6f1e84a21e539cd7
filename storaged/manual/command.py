"""storaged(1), from the parser: what it says is what ``--help`` says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator

from storaged.cli.parser import build_parser
from storaged.manual.roff import Page


def page(date: str) -> Page:
    """Return the page."""
    parser = build_parser()
    page = Page("storaged", 1, "network disks and disk images as block devices of this host", date)
    page.heading("synopsis")
    page.paragraph("`storaged` [`--root` DIR] COMMAND [ARGUMENT...]")
    page.heading("description")
    page.paragraph(parser.description or "")
    page.paragraph("The commands talk to the daemon, storaged(8), on its socket: only `doctor`, `config`, `completion` "
                   "and `daemon` itself work without it. How sources are written is in storaged-sources(7).")
    page.heading("options")
    _arguments(page, parser)
    page.heading("commands")
    for name, command in _commands(parser, ""):
        page.subheading(name)
        page.paragraph(f"`{_usage(command)}`")
        page.paragraph(command.description or "")
        _arguments(page, command)
        blocks = dict(_blocks(command.epilog or ""))
        if examples := blocks.get("examples"):
            page.paragraph("Examples:")
            page.example(examples)
            page.paragraph((command.epilog or "").replace(f"examples:\n{examples}", ""))
        elif command.epilog:
            page.paragraph(command.epilog)
    for heading, block in _blocks(parser.epilog or ""):
        page.heading(heading)
        if heading == "examples":
            page.example(block)
        else:
            for part in re.split(r";\s+", " ".join(block.split())):
                status, _, meaning = part.partition(" ")
                page.term(status, meaning)
    page.heading("environment")
    page.term("STORAGED_ROOT", "The default of `--root`.")
    page.heading("see also")
    page.paragraph("storaged.toml(5), storaged-sources(7), storaged(8), qemu-img(1)")
    return page


def _commands(parser: argparse.ArgumentParser, above: str) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """All commands, and behind one that has commands of its own, those."""
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield f"{above}{name}", command
                yield from _commands(command, f"{above}{name} ")


def _usage(command: argparse.ArgumentParser) -> str:
    """The usage on one line, without what is the same for all."""
    usage = " ".join(command.format_usage().split()).removeprefix("usage: ")
    return usage.replace("[-h] ", "").removesuffix(" [-h]")


def _arguments(page: Page, parser: argparse.ArgumentParser) -> None:
    """The arguments in the words of ``--help``: a capital letter would make another value of ``off``."""
    formatter = argparse.HelpFormatter(parser.prog)
    for action in parser._actions:
        if isinstance(action, (argparse._SubParsersAction, argparse._HelpAction)) or action.help == argparse.SUPPRESS:
            continue
        page.term(formatter._format_action_invocation(action), formatter._expand_help(action))


def _blocks(epilog: str) -> Iterator[tuple[str, str]]:
    """The blocks of the epilog: a line that ends with a colon, and the lines below it that are indented."""
    for match in re.finditer(r"^(\S[^\n]*):\n((?:[ \t]+[^\n]*\n?)+)", epilog, re.MULTILINE):
        yield match[1], match[2]
