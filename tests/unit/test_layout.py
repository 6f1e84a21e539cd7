"""Directories: the real system's, or all below one root."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.layout import LOCK_DIR, Layout


@pytest.mark.parametrize("root", [None, "", "/"])
def test_without_a_root_it_is_the_real_system(root: str | None) -> None:
    layout = Layout.below(root)
    assert layout.run_dir == "/run/storaged"
    assert layout.state_dir == "/var/lib/storaged"
    assert layout.config_dir == "/etc/storaged"
    assert layout.dev_dir == "/dev/storaged"
    assert layout.socket == "/run/storaged/io.storaged"
    assert layout.volume_dir("web1") == "/run/storaged/volumes/web1"
    assert layout.link("web1") == "/dev/storaged/web1"
    assert layout.desired_persistent == "/var/lib/storaged/volumes"
    assert layout.desired_volatile == "/run/storaged/desired"
    assert layout.snapshots_dir == "/var/lib/storaged/snapshots"
    assert layout.config_file == "/etc/storaged/storaged.toml"


@given(st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_with_a_root_every_path_is_absolute_and_below_it(root: str) -> None:
    layout = Layout.below(root)
    base = "/" + layout.run_dir.removesuffix("run/storaged").strip("/")
    paths = [*dataclasses.asdict(layout).values(), layout.socket, layout.volume_dir("v"), layout.config_file]
    for path in paths:
        assert path.startswith(base)
        assert ".." not in path.split("/")


def test_a_relative_root_is_taken_from_the_working_directory(
    tmp_path: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(str(tmp_path))
    assert Layout.below("r").run_dir == f"{tmp_path}/r/run/storaged"


def test_locks_are_the_same_for_every_root() -> None:
    assert LOCK_DIR == "/run/storaged/locks"
