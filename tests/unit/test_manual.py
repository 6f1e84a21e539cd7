"""The man pages say what the program says, and man can read them."""

from __future__ import annotations

import argparse
import re
import signal
import subprocess
from pathlib import Path

import pytest

from storaged.backends import BACKENDS
from storaged.cli.parser import build_parser
from storaged.manual import daemon as daemon_page
from storaged.manual.__main__ import main, pages
from storaged.manual.roff import Page
from storaged.model.config import keys
from storaged.model.layout import LOCK_DIR, Layout
from storaged.model.spec import COMMON_OPTIONS
from storaged.transports import TRANSPORTS

ROOT = Path(__file__).parents[2]
PAGES = pages(ROOT / "docs", "2026-01-31")


def shown(name: str, directory: Path) -> str:
    """A page as a reader has it, on one line without the breaks of lines and words."""
    (directory / name).write_text(PAGES[name])
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=1000", directory / name], capture_output=True, text=True, check=True
    )
    return " ".join(re.sub(".\b", "", done.stdout).split())


@pytest.mark.parametrize("name", sorted(PAGES))
def test_man_reads_every_page_without_a_warning(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(PAGES[name])
    for command in (["mandoc", "-T", "lint", "-W", "warning"], ["groff", "-ww", "-man", "-z", "-T", "ascii"]):
        done = subprocess.run([*command, tmp_path / name], capture_output=True, text=True)
        assert (done.stdout + done.stderr, done.returncode) == ("", 0)


def test_the_command_writes_the_four_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1769817600")
    main([str(tmp_path / "man"), "--docs", str(ROOT / "docs")])
    written = {path.name: path.read_text() for path in (tmp_path / "man").iterdir()}
    assert written == PAGES
    assert sorted(written) == ["storaged-sources.7", "storaged.1", "storaged.8", "storaged.toml.5"]


def test_every_command_and_argument_is_on_the_page_with_its_help(tmp_path: Path) -> None:
    text = shown("storaged.1", tmp_path)

    def check(parser: argparse.ArgumentParser) -> None:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for command in action.choices.values():
                    check(command)
                    assert " ".join((command.description or "").split()) in text
            elif action.help and "-h" not in action.option_strings:
                said = argparse.HelpFormatter("")._expand_help(action)
                assert " ".join(said.split()).replace("…", "...") in text
                assert all(option in text for option in action.option_strings)

    check(build_parser())
    assert "storaged config check [--json] [FILE]" in text
    assert "EXIT STATUS 0 it worked 1 it failed" in text


def test_every_key_is_on_the_page_with_what_a_reload_does_to_it(tmp_path: Path) -> None:
    text = shown("storaged.toml.5", tmp_path)
    for key in keys():
        assert f"{key.name} {key.description}" in text
        assert key.at_once in text
    assert "[qsd] Which program serves the volumes." in text


def test_every_source_and_option_is_on_the_page(tmp_path: Path) -> None:
    text = shown("storaged-sources.7", tmp_path)
    registries = [COMMON_OPTIONS, *(backend.options for backend in BACKENDS.values())]
    registries += [transport.options for transport in TRANSPORTS.values()]
    for option, about in (item for registry in registries for item in registry.items()):
        assert f"-o {option}= {' '.join(about.split())}".replace("…", "...") in text
    for backend in BACKENDS.values():
        assert backend.name in text
        assert any(f"{scheme}:" in text for scheme in backend.schemes)


def test_the_daemon_page_has_the_paths_of_the_layout_and_its_signals() -> None:
    layout = Layout.below(None)
    paths = {
        layout.config_file, f"{layout.volume_files}/NAME.toml", f"{layout.profiles}/NAME.toml",
        f"{layout.detached_marks}/",
        layout.link("NAME"), layout.socket, layout.provider_hook, f"{layout.volume_dir('NAME')}/",
        f"{layout.vm_sockets_dir}/NAME.sock", f"{layout.desired_volatile}/", f"{LOCK_DIR}/",
        f"{layout.desired_persistent}/", f"{layout.snapshots_dir}/",
    }
    assert set(daemon_page.FILES) == paths
    for names in daemon_page.SIGNALS:
        assert all(hasattr(signal, name) for name in names.split(", "))


def test_text_is_never_taken_for_a_request(tmp_path: Path) -> None:
    page = Page("x", 1, "y", "2026-01-31")
    page.heading("text")
    page.paragraph(".TH x")
    page.paragraph("'br \\fB-o \\n[.t] ~^`.code\\`")
    page.term(".x", ".y")
    page.example(".z\n  'a\\c")
    (tmp_path / "x.1").write_text(str(page))
    done = subprocess.run(["mandoc", "-T", "utf8", tmp_path / "x.1"], capture_output=True, text=True, check=True)
    text = re.sub(".\b", "", done.stdout)
    for part in (".TH x", "'br \\fB-o \\n[.t] ~^.code\\", ".x", ".y", ".z\n", "  'a\\c"):
        assert part in text


def test_each_example_of_a_command_is_a_line_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "storaged.1").write_text(PAGES["storaged.1"])
    done = subprocess.run(
        ["mandoc", "-T", "utf8", "-O", "width=200", tmp_path / "storaged.1"], capture_output=True, text=True, check=True
    )
    lines = [line.strip() for line in re.sub(".\b", "", done.stdout).splitlines()]
    for example in ("storaged bench compare a.json b.json", "storaged tune /var/tmp --scratch 4G --write fast"):
        assert [line for line in lines if line.startswith(example)], example
    assert not [line for line in lines if line.count(" storaged bench ") > 1]
