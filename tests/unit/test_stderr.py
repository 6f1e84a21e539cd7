"""What QSD says on standard error reaches the log, once, and neither the log nor /run is filled by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.qsd.stderr import Stderr


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "qsd.log"


def say(file: Path, text: str) -> None:
    with open(file, "a") as stream:
        stream.write(text)


def test_each_line_is_told_once_and_a_line_without_an_end_when_it_has_one(file: Path) -> None:
    stderr = Stderr(str(file))
    assert stderr.news() == []
    say(file, "one\n\ninfo: QEMU waiting for connection on: fd=3,server=on\ntwo\nthr")
    assert stderr.news() == ["one", "two"]
    say(file, "ee\n")
    assert stderr.news() == ["three"]
    assert stderr.news() == []


def test_last_words_are_told_without_an_end(file: Path) -> None:
    stderr = Stderr(str(file))
    say(file, "aborted")
    assert stderr.news() == ["aborted"]


def test_what_an_earlier_daemon_has_told_is_not_told_again(file: Path) -> None:
    say(file, "old\n")
    stderr = Stderr(str(file))
    stderr.skip()
    say(file, "new\n")
    assert stderr.news() == ["new"]
    file.unlink()
    stderr.skip()
    say(file, "another\n")
    assert stderr.news() == ["another"]


def test_of_many_lines_the_first_are_told_and_how_much_more_there_is(file: Path) -> None:
    stderr = Stderr(str(file))
    say(file, "".join(f"{number}\n" for number in range(15)))
    *told, rest = stderr.news()
    assert told == [str(number) for number in range(10)]
    assert rest.startswith("... and 15 bytes more")
    assert stderr.news() == []
    say(file, "x" * 99 + "\n" + "y\n" * 100_000)
    assert len(stderr.news()) == 11
    say(file, "z\n")
    assert stderr.news() == ["z"]


def test_a_qsd_that_never_stops_complaining_does_not_fill_run(file: Path) -> None:
    stderr = Stderr(str(file))
    with open(file, "ab", buffering=0) as stream:  # as QSD has it
        stream.write(b"complaint\n" * 200_000)
        stderr.news()
        assert file.stat().st_size == 0
        stream.write(b"one more\n")
    assert stderr.news() == ["one more"]
    assert file.read_bytes() == b"one more\n"
