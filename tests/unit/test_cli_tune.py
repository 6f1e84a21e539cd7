"""What can be typed behind storaged tune, what is refused before anything is done, and what is said in the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from storaged.__main__ import main
from storaged.bench.search import Search, Step
from storaged.bench.statistics import Estimate
from storaged.bench.tunereport import Change, TuneReport, changes_of, encoded, verification_of
from storaged.bench.tuning import sentence
from storaged.cli.parser import build_parser
from storaged.cli.tune import _request
from storaged.cli.tunetable import table

FASTER = Step("aio", "io_uring", "threads", Estimate(1.4, 1.3, 1.5), 6, True, "faster")
SLOWER = Step("scheduler", "bfq", "none", Estimate(0.7, 0.6, 0.8), 2, False, "slower")
IMPOSSIBLE = Step("aio", "native", "io_uring", None, 0, False, "not possible here: the kernel has none")


def report(search: Search, **changes: Any) -> TuneReport:
    """What is told of a search."""
    facts: dict[str, Any] = {
        "source": "/a.raw", "format": "raw", "options": {"cache": "none"}, "transport": "fuse", "size": 1 << 30,
        "began": 0.0, "ended": 1.0, "budget": 60.0, "runtime": 1.0, "machine": {}, "notes": ["A note."], "jobs": [],
        "volume": {}, "queue": {}, "changes": changes_of(search), "untried": list(search.untried),
        "verification": verification_of(search), "settings": dict(search.taken), "measured": [],
    }
    return TuneReport(**{**facts, **changes})


def searched(
    steps: Sequence[Step], verification: Estimate | None = None, *, taken: bool = False, untried: Sequence[str] = ()
) -> Search:
    """A search that came to this."""
    found = Search([], 60.0, 1.0, steps=list(steps), verification=verification, untried=list(untried))
    found.best = {step.option: step.value for step in steps if step.accepted}
    found.taken = dict(found.best) if taken else {}
    found.verified_pairs = 8 if verification is not None else 0
    return found


@pytest.mark.parametrize("words", [
    [], ["x", "--transport", "vhost-user"], ["x", "--budget", "0"], ["x", "--budget", "soon"], ["x", "--runtime", "0"],
    ["x", "--only", "cache"], ["x", "--only", ""], ["x", "--format", "iso"], ["x", "--destruct"], ["x", "y"],
])
def test_wrong_usage_is_refused_as_such(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["tune", *words])
    assert caught.value.code == 2


@pytest.mark.parametrize(("words", "says"), [
    (["x", "--jobs", "none.fio"], "cannot read none.fio"),
    (["x", "--json", "none/a.json"], "cannot be written"),
    (["x", "--write", "fast"], "there is a profile 'fast' already"),
    (["x", "--write", ".fast"], "name of a profile"),
    (["x", "--scratch", "many"], "'many' is not a size"),
    (["", "--jobs", "quick"], "source is empty"),
])
def test_what_could_only_fail_later_is_refused_at_once_with_a_hint(
    words: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    profile = tmp_path / "etc/storaged/profiles/fast.toml"
    profile.parent.mkdir(parents=True)
    profile.write_text("")
    assert main(["--root", str(tmp_path), "tune", *words]) == 1
    said = capsys.readouterr().err
    assert says in said
    assert "hint: " in said
    assert profile.read_text() == ""


def test_a_setting_that_is_not_tried_is_told_with_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["tune", "x", "--only", "read-ahed-kb"])
    assert "did you mean 'read-ahead-kb'?" in capsys.readouterr().err


def test_nothing_writes_unless_it_is_said_in_full() -> None:
    found = _request(build_parser().parse_args(["tune", "/x"]))
    assert not found.destructive
    assert found.scratch is None
    assert _request(build_parser().parse_args(["tune", "/x", "--destructive"])).destructive


def test_what_was_found_is_told_with_how_sure_it_is_and_how_it_is_used() -> None:
    search = searched([FASTER, SLOWER, IMPOSSIBLE], Estimate(1.4, 1.2, 1.6), taken=True, untried=["nr=1"])
    said = table(report(search, profile="/etc/storaged/profiles/fast.toml"), "fast", "storaged", 200)
    assert "aio=io_uring" in said
    assert "1.40 (1.30 to 1.50)" in said
    assert "kept: faster" in said
    assert "no: slower" in said
    assert "no: not possible here: the kernel has none" in said
    assert "-o aio=io_uring: 1.40 (1.20 to 1.60) times as fast as the defaults, 8 pairs." in said
    assert "2.5 %" in said
    assert "storaged attach NAME SOURCE --profile fast" in said
    assert "There was no time for nr=1" in said
    assert "A note." in said
    assert b'"storaged_tune": 1' in encoded(report(search))


@pytest.mark.parametrize(("search", "partial", "says"), [
    (searched([SLOWER]), "", "Nothing was faster than the defaults, beyond the noise: they are kept."),
    (searched([FASTER], Estimate(1.02, 0.9, 1.2)), "", "That is no more than noise: the defaults are kept."),
    (searched([FASTER]), "interrupted", "Until then -o aio=io_uring was faster. It was not verified"),
    (searched([]), "interrupted", "Until then nothing was faster"),
])
def test_where_the_defaults_are_kept_it_is_said_and_that_no_profile_was_written(
    search: Search, partial: str, says: str
) -> None:
    said = table(report(search, partial=partial), "fast", "storaged", 200)
    assert says in said
    assert "The profile fast was not written." in said
    assert ("PARTIAL: not all was tried: interrupted" in said) == bool(partial)


def test_each_change_is_told_in_a_sentence_when_it_was_tried() -> None:
    assert sentence(FASTER) == (
        "aio io_uring (was threads): 1.40 (1.30 to 1.50) times as fast, 6 pairs: faster; it is kept"
    )
    assert sentence(IMPOSSIBLE) == "aio native (was io_uring): not possible here: the kernel has none"


def test_a_change_without_a_pair_has_no_ratio() -> None:
    assert changes_of(searched([IMPOSSIBLE])) == [Change(
        option="aio", value="native", former="io_uring", ratio=None, pairs=0, accepted=False,
        why="not possible here: the kernel has none",
    )]
