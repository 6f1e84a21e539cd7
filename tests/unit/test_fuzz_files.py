"""Whatever a state file or a configuration file holds, it is read or refused, and never a bug (Hypothesis).

Damage of many kinds, by name: tests/contract/test_store.py. Headers of images: test_headers.py.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.host.blocking import BlockingCalls
from storaged.images import claims
from storaged.model.config import Config
from storaged.model.configcheck import parse_config
from storaged.model.history import Happening, History
from storaged.model.layout import Layout
from storaged.model.profile import parse_profile
from storaged.model.spec import VolumeSpec
from storaged.model.volumefile import parse_volume_file
from storaged.store.files import VolumeFiles
from storaged.store.local import LocalStore
from storaged.supervisor import adoption, overlay
from storaged.supervisor.records import record_path
from storaged.transports.base import Site
from tests.unit.fuzzing import DESIRED, HISTORY, MARK, RECORD, VALUES

DEEP = [b"[" * 5_000, b'{"x":' * 5_000, b'{"x":' + b"[" * 5_000 + b"]" * 5_000 + b"}"]


def damaged(good: bytes) -> st.SearchStrategy[bytes]:
    """Anything; JSON with other values, or with something deep in a member that nobody knows; changed bytes."""
    members = json.loads(good)
    other = st.fixed_dictionaries({}, optional=dict.fromkeys([*members, "newer"], VALUES))
    deep = [good.replace(b"{", b'{"newer":' + b"[" * depth + b"]" * depth + b",", 1) for depth in (10, 5_000)]
    return (
        st.binary(max_size=100) | st.sampled_from([*DEEP, *deep]) | _with_changes(good)
        | other.map(lambda found: json.dumps({**members, **found}).encode(errors="replace"))
    )


@st.composite
def _with_changes(draw: st.DrawFn, good: bytes) -> bytes:
    data = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at:at + draw(st.integers(0, 8))] = draw(st.binary(max_size=8))
    return bytes(data)


@pytest.fixture(scope="module")
def directory() -> Iterator[Path]:
    """Hypothesis wants one for all its examples."""
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


many = settings(max_examples=200, deadline=None)


@many
@given(damaged(RECORD))
def test_any_record_is_one_of_this_volume_or_damage(directory: Path, data: bytes) -> None:
    site = Site(name="a", directory=str(directory), blocking=BlockingCalls("a test"), socket_directory="")
    Path(record_path(str(directory))).write_bytes(data)
    record, damage = adoption.read_record(site)
    assert bool(damage) is (record is None)
    assert record is None or record.spec.name == "a"


@many
@given(damaged(RECORD))
def test_a_damaged_record_of_another_volume_stops_no_command_on_an_image(directory: Path, data: bytes) -> None:
    layout = Layout.below(str(directory / "root"))
    os.makedirs(layout.volume_dir("a"), exist_ok=True)
    Path(record_path(layout.volume_dir("a"))).write_bytes(data)
    claims.refuse_attached(layout, {"file:7:7": True})


@many
@given(damaged(DESIRED))
def test_any_wish_is_one_of_its_volume_or_is_set_aside(directory: Path, data: bytes) -> None:
    place = directory / "wishes"
    place.mkdir(exist_ok=True)
    (place / "a.json").write_bytes(data)
    loaded = LocalStore(str(place)).load()
    assert [wish.spec.name for wish in loaded.volumes.values()] == ["a"] * len(loaded.volumes)
    assert len(loaded.volumes) + len(loaded.damaged) == 1
    for entry in os.listdir(place):
        os.unlink(place / entry)


@many
@given(damaged(HISTORY))
def test_any_journal_can_be_used_told_and_stored(data: bytes) -> None:
    history = History.decode(data)
    history.add(Happening.DEATH, "x", now=2e9)
    assert 1 <= len(history.entries) <= 100
    assert History.decode(history.encode()).entries == history.entries
    assert len(history.pauses) > 1


@many
@given(damaged(MARK))
def test_what_is_known_of_an_overlay_is_read_or_said_to_be_damaged(directory: Path, data: bytes) -> None:
    (directory / "a.json").write_bytes(data)
    try:
        found = overlay.locate(str(directory), "a")
    except StoragedError as error:
        fine = error.code is ErrorCode.STATE_DAMAGED and bool(error.hint)
    else:
        fine = found is not None
    assert fine


@many
@given(st.binary(max_size=200))
def test_any_mark_of_a_detach_counts_or_goes(directory: Path, data: bytes) -> None:
    files, marks = directory / "files", directory / "marks"
    files.mkdir(exist_ok=True)
    marks.mkdir(exist_ok=True)
    (files / "a.toml").write_text("source = '/x'")
    (marks / "a").write_bytes(data)
    assert VolumeFiles(str(files), str(marks)).load().detached == frozenset()
    assert os.listdir(marks) == []


def toml(value: Any) -> str:
    """A value of JSON as TOML has it; not all can be one."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(key)} = {toml(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, list):
        return f"[{', '.join(map(toml, value))}]"
    return "nan" if value is None else json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


def lines(keys: list[str]) -> st.SearchStrategy[bytes]:
    """Files with the keys that there are, and others, with anything as their values."""
    line = st.builds(lambda key, value: f"{key} = {toml(value)}", st.sampled_from([*keys, "x", "a.b"]), VALUES)
    table = st.sampled_from(["[qsd]", "[metrics]", "[access]", "[[qsd]]", "[x.y]", "[", "#", "'''", '"""'])
    return st.lists(line | table, max_size=5).map(lambda found: "\n".join(found).encode(errors="replace"))


CONFIG_KEYS = [
    "attach_timeout", "snapshot_dir", "socket_group", "log_level", "qsd", "binary", "binaries", "listen", "web_config",
    "read_only", "access", "access.read_only", "qsd.binaries",
]
VOLUME_KEYS = [
    "source", "format", "transport", "read_only", "snapshot", "snapshot_dir", "profile", "options", "options.cache",
]
PROFILE_KEYS = ["transport", "options", "options.cache", "options.queues", "cache"]
DEEP_TOML = [b"x = " + b"[" * 50_000, b"x = " + b"{a = " * 50_000, b"a" + b".a" * 5_000 + b" = 1"]


@pytest.mark.parametrize(
    ("parse", "keys", "kind"),
    [
        (lambda text: parse_config(text, "/f"), CONFIG_KEYS, Config),
        (lambda text: parse_volume_file(text, "/f", "a"), VOLUME_KEYS, VolumeSpec),
        (lambda text: parse_profile(text, "/f", ["queues"]), PROFILE_KEYS, tuple),
    ],
    ids=["storaged.toml", "a volume's file", "a profile"],
)
def test_any_configuration_is_used_or_refused(
    parse: Callable[[bytes], object], keys: list[str], kind: type[object]
) -> None:
    @many
    @given(lines(keys) | st.binary(max_size=100) | st.sampled_from(DEEP_TOML))
    def check(text: bytes) -> None:
        try:
            fine = isinstance(parse(text), kind)
        except StoragedError as error:
            codes = (ErrorCode.INVALID_ARGUMENT, ErrorCode.INVALID_SOURCE, ErrorCode.UNSUPPORTED)
            fine = error.code in codes and bool(error.cause or error.hint)
        assert fine

    check()
