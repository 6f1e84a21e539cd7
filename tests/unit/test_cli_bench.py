"""What can be typed behind storaged bench, and what is refused before anything is done."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from storaged.__main__ import main
from storaged.bench.jobs import SETS
from storaged.cli.bench import _request, interruptible
from storaged.cli.parser import build_parser
from tests.unit.bench_reports import report


@pytest.mark.parametrize("words", [
    [], ["x", "--transports", "vhost-user"], ["x", "--transports", "fuse,fuse"], ["x", "--transports", ""],
    ["x", "--runtime", "0"], ["x", "--runtime", "nan"], ["x", "--runtime", "soon"], ["x", "--repeat", "0"],
    ["x", "--repeat", "1.5"], ["x", "--format", "iso"], ["x", "--destruct"], ["x", "-o", "cache"],
])
def test_wrong_usage_is_refused_as_such(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["bench", *words])
    assert caught.value.code == 2


@pytest.mark.parametrize(("words", "says"), [
    (["compare"], "nothing to compare"),
    (["compare", "a.json"], "two reports"),
    (["compare", "a.json", "b.json", "c.json"], "two reports"),
    (["compare", "a.json", "none.json"], "cannot read none.json"),
    (["x", "y"], "one source"),
    (["x", "--jobs", "none.fio"], "cannot read none.fio"),
    (["x", "--json", "none/a.json"], "cannot be written"),
    (["x", "--html", "."], "cannot be written"),
    (["x", "--svg", "none/a.svg"], "cannot be written"),
    (["x", "--png", "none/a.png"], "cannot be written"),
    (["x", "--png", "a.png"], "rsvg-convert is not there"),
    (["x", "--scratch", "many"], "'many' is not a size"),
    (["", "--jobs", "quick"], "source is empty"),
])
def test_what_could_only_fail_later_is_refused_at_once_with_a_hint(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from storaged.bench.report import encoded

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/none")
    (tmp_path / "a.json").write_bytes(encoded(report()))
    assert main(["--root", str(tmp_path), "bench", *words]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "hint: " in said
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", sorted(SETS))
def test_what_is_not_said_is_as_the_jobs_have_it(name: str) -> None:
    found = _request(build_parser().parse_args(["bench", "/x", "--jobs", name]))
    assert (found.runtime, found.repeat) == (SETS[name].runtime, SETS[name].repeat)
    assert found.ways is None
    assert not found.destructive
    assert found.scratch is None


def test_nothing_writes_unless_it_is_said_in_full() -> None:
    parser = build_parser()
    assert _request(parser.parse_args(["bench", "/x", "--destructive"])).destructive
    with pytest.raises(SystemExit):
        parser.parse_args(["bench", "/x", "--dest"])


def test_a_second_signal_does_not_interrupt_the_cleaning_up(capsys: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)

    def work() -> None:
        with interruptible():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                    signal.raise_signal(number)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert capsys.readouterr().err.count("everything is being taken down") == 4
    assert signal.getsignal(signal.SIGINT) is before
