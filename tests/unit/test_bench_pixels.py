"""The picture as PNG: what is handed to rsvg-convert, and what is told when it fails. tests/host draws a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.bench.pixels import png
from storaged.errors import ErrorCode, StoragedError


def converter(place: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program of that name into the PATH."""
    program = place / "rsvg-convert"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{place}:/usr/bin:/bin")


def test_the_picture_goes_in_and_what_comes_out_is_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    converter(tmp_path, monkeypatch, 'echo "$*"; cat')
    assert png("<svg/>") == b"--format png --zoom 2\n<svg/>"


@pytest.mark.parametrize(("script", "says"), [
    ("cat >/dev/null; echo 'no such element' >&2; exit 1", "no such element"),
    ("cat >/dev/null", "ended with status 0"),
    ("exec /none", "/none"),
])
def test_where_it_fails_its_words_are_told_and_another_way(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    converter(tmp_path, monkeypatch, script)
    with pytest.raises(StoragedError) as caught:
        png("<svg/>")
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert says in caught.value.cause
    assert "--svg" in caught.value.hint


def test_where_the_program_is_missing_it_is_said_how_to_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/none")
    with pytest.raises(StoragedError, match="rsvg-convert") as caught:
        png("<svg/>")
    assert "librsvg2-bin" in caught.value.hint
