"""The documents say all that users can meet, and their links lead somewhere."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import msgspec
import pytest

from storaged.backends import BACKENDS
from storaged.backends.base import Backend, NetworkBackend
from storaged.cli.parser import TRANSPORTS
from storaged.errors import ErrorCode
from storaged.model.config import AccessConfig, Config, MetricsConfig, QsdConfig
from storaged.model.configcheck import parse_config
from storaged.model.formats import Format
from storaged.model.plan import Step
from storaged.model.spec import COMMON_OPTIONS
from storaged.model.states import State
from storaged.transports import TRANSPORTS as ALL_TRANSPORTS

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = (ROOT / "README.md").read_text()
FAULTS = (ROOT / "docs/faults.md").read_text()
EXAMPLE = (ROOT / "docs/storaged.toml.example").read_bytes()

LOCAL_OPTIONS = {
    option for backend in BACKENDS.values() if not isinstance(backend, NetworkBackend) for option in backend.options
}
NETWORK_OPTIONS = [
    (name, option) for name, backend in BACKENDS.items() if isinstance(backend, NetworkBackend)
    for option in backend.options
]
#: Where a page is not named after the backend.
PAGES = {"https": "http", "ftps": "ftp"}
TRANSPORT_OPTIONS = [(name, option) for name, transport in ALL_TRANSPORTS.items() for option in transport.options]
SECTIONS = ("qsd", "metrics", "access")
CONFIG_KEYS = [
    field.name for struct in (Config, QsdConfig, MetricsConfig, AccessConfig)
    for field in msgspec.structs.fields(struct) if field.name not in SECTIONS
]


def rows(text: str) -> list[list[str]]:
    """The cells of all rows of all tables."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]


def row_of(text: str, first: str) -> list[str]:
    """The one row whose first cell names ``first`` as code."""
    found = [cells for cells in rows(text) if re.match(rf"`{re.escape(first)}`", cells[0])]
    assert len(found) == 1, f"{first}: {len(found)} rows"
    return found[0]


@pytest.mark.parametrize("code", ErrorCode)
def test_every_code_is_explained_with_what_to_do(code: ErrorCode) -> None:
    _, meaning, _cause, remedy = row_of(FAULTS, code)
    assert meaning
    assert remedy


def test_no_code_is_explained_that_does_not_exist() -> None:
    table = FAULTS.partition("## Codes")[2].partition("\n## ")[0]
    assert {cells[0].strip("`") for cells in rows(table)[2:]} == {code.value for code in ErrorCode}


@pytest.mark.parametrize("option", sorted(COMMON_OPTIONS.keys() | LOCAL_OPTIONS))
def test_every_option_is_in_the_readme(option: str) -> None:
    assert all(row_of(README, option))


@pytest.mark.parametrize(("backend", "option"), NETWORK_OPTIONS)
def test_every_option_of_a_source_on_the_network_is_on_its_page_with_its_default(backend: str, option: str) -> None:
    _, meaning, default = row_of((ROOT / f"docs/backends/{PAGES.get(backend, backend)}.md").read_text(), option)
    assert meaning
    if option in BACKENDS[backend].defaults:
        assert default.startswith(f"`{BACKENDS[backend].defaults[option]}`")


@pytest.mark.parametrize(("transport", "option"), TRANSPORT_OPTIONS)
def test_every_option_of_a_transport_is_in_the_readme_with_its_default(transport: str, option: str) -> None:
    _, whose, meaning, default = row_of(README, option)
    assert f"`{transport}`" in whose
    assert meaning
    said = re.search(r"default:? ([^;]+)", ALL_TRANSPORTS[transport].options[option])
    assert said is not None
    assert default.strip("`") == said[1]


def test_the_command_line_offers_every_transport() -> None:
    assert set(TRANSPORTS) == {"auto", *ALL_TRANSPORTS}


@pytest.mark.parametrize("format", Format)
def test_every_format_is_in_the_readme(format: Format) -> None:
    assert row_of(README, format)[1]


@pytest.mark.parametrize("transport", [name for name in TRANSPORTS if name != "auto"])
def test_every_transport_says_in_the_readme_what_it_survives(transport: str) -> None:
    assert all(row_of(README, transport))


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=lambda backend: backend.name)
def test_every_backend_is_in_the_readme(backend: Backend) -> None:
    assert f"`{backend.example}`" in README


@pytest.mark.parametrize("key", CONFIG_KEYS)
def test_every_key_of_the_configuration_is_in_the_readme_and_in_the_example(key: str) -> None:
    assert all(row_of(README, key))
    assert re.search(rf"^(# )?{key} = ", EXAMPLE.decode(), re.MULTILINE)


def test_the_example_is_the_default_configuration() -> None:
    assert parse_config(EXAMPLE, "the example") == Config()


def test_what_the_example_has_as_comments_can_be_used() -> None:
    everything = re.sub(rb"^# (\w+ = )", rb"\1", EXAMPLE, flags=re.MULTILINE)
    config = parse_config(everything, "the example")
    found = {**msgspec.structs.asdict(config.qsd), **msgspec.structs.asdict(config.metrics)}
    found |= msgspec.structs.asdict(config.access)
    found |= msgspec.structs.asdict(config)
    assert all(found[key] is not None for key in CONFIG_KEYS)
    assert config.qsd.binaries


def test_the_states_and_steps_are_those_of_the_code() -> None:
    text = (ROOT / "docs/architecture.md").read_text()
    states = text.partition("## States")[2].partition("\n## ")[0]
    assert all(f"`{state}" in states for state in State)
    assert all(f"`{step}`" in text for step in Step)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_within_the_checkout_resolve(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text()), target


def anchors(text: str) -> set[str]:
    """The names by which a document's headings can be linked to."""
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_that_are_named_are_there(document: Path) -> None:
    for name in re.findall(r"`((?:\w+/)+\w+\.py)`", document.read_text()):
        assert (ROOT / name).exists() or (ROOT / "storaged" / name).exists(), name


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_lines_fit_on_a_screen(document: Path) -> None:
    lines = document.read_text().splitlines()
    # The rows of a table cannot be broken.
    assert [line for line in lines if len(line) > 120 and not line.startswith("|")] == []


def test_the_demo_is_a_program_that_bash_can_parse() -> None:
    demo = ROOT / "scripts/demo"
    assert demo.stat().st_mode & 0o111
    subprocess.run(["bash", "-n", str(demo)], check=True, timeout=30)
