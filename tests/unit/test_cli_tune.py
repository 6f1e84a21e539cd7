"""What can be typed behind storaged tune, what is refused before anything is done, and what is said in the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from storaged.__main__ import main
from storaged.bench import tuning
from storaged.bench.process import Fio
from storaged.bench.search import Pair, Search, Step
from storaged.bench.session import Display
from storaged.bench.statistics import Estimate
from storaged.bench.tunereport import Change, TuneReport, changes_of, encoded, verification_of
from storaged.bench.tuning import sentence
from storaged.bench.ways import Shop, Subject
from storaged.cli.parser import build_parser
from storaged.cli.tune import _request
from storaged.cli.tunetable import table
from storaged.errors import ErrorCode, StoragedError
from storaged.images import operand
from storaged.images.operand import Wish
from storaged.images.workspace import workspace
from storaged.model.config import Config
from storaged.model.layout import Layout

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


@pytest.mark.parametrize("where", ["etc/storaged/profiles", "etc/storaged", "etc"])
@pytest.mark.parametrize("what", ["a file", "a link to nothing"])
def test_a_directory_of_profiles_that_cannot_be_is_found_out_before_the_search(
    where: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / where
    path.parent.mkdir(parents=True, exist_ok=True)
    if what == "a file":
        path.write_text("")
    else:
        path.symlink_to("nowhere")
    assert main(["--root", str(tmp_path), "tune", "x", "--write", "fast"]) == 1
    assert "is no directory" in capsys.readouterr().err


class Found(tuning.Tuning):
    """A search that has found something, and before it ends something happens."""

    happens: ClassVar[Callable[[Path], None]]
    came_to: ClassVar[Search]

    def run(self) -> None:
        self.search = Found.came_to
        Found.happens(Path(self.layout.profiles))

    def told(self, partial: str, profile: str = "") -> TuneReport:
        machine = {"host": "h", "kernel": "6", "qemu-storage-daemon": "10"}
        return report(Found.came_to, partial=partial, profile=profile, machine=machine)


def nothing(profiles: Path) -> None:
    """Happens."""


def exists(profiles: Path) -> None:
    """Somebody else has written that profile."""
    profiles.mkdir(parents=True)
    (profiles / "fast.toml").write_text("theirs")


def dangles(profiles: Path) -> None:
    """The directory leads nowhere by now."""
    profiles.parent.mkdir(parents=True)
    profiles.symlink_to("nowhere")


def read_only(profiles: Path) -> None:
    """Nothing can be written there, not by root either."""
    profiles.parent.mkdir(parents=True)
    profiles.symlink_to("/proc/self/fdinfo")


@pytest.mark.parametrize(("happens", "says"), [
    (nothing, ""), (exists, "fast.toml"), (dangles, "cannot write"), (read_only, "cannot write"),
])
def test_what_was_found_is_told_also_where_the_profile_cannot_be_written(
    happens: Callable[[Path], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Found.happens, Found.came_to = happens, searched([FASTER], Estimate(1.4, 1.2, 1.6), taken=True)
    monkeypatch.setattr(tuning, "Tuning", Found)
    result = tmp_path / "tuned.json"
    status = main(["--root", str(tmp_path), "tune", "x", "--write", "fast", "--json", str(result)])
    printed = capsys.readouterr()
    assert status == (1 if says else 0)
    assert says in printed.err
    assert "-o aio=io_uring: 1.40" in printed.out
    assert ("The profile fast was not written." in printed.out) == bool(says)
    assert msgspec.json.decode(result.read_bytes(), type=TuneReport).settings == {"aio": "io_uring"}
    profiles = tmp_path / "etc/storaged/profiles"
    if happens is exists:
        assert (profiles / "fast.toml").read_text() == "theirs"
        assert len(list(profiles.iterdir())) == 1
    if not says:
        assert "io_uring" in (profiles / "fast.toml").read_text()
        assert len(list(profiles.iterdir())) == 1


def test_what_was_not_verified_is_told_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Found.happens, Found.came_to = nothing, searched([FASTER])
    Found.came_to.unverified = "there was no time"
    monkeypatch.setattr(tuning, "Tuning", Found)
    assert main(["--root", str(tmp_path), "tune", "x", "--write", "fast"]) == 1
    printed = capsys.readouterr().out
    assert "PARTIAL: not all was done: the best was not verified: there was no time" in printed
    assert "The profile fast was not written." in printed
    assert not (tmp_path / "etc/storaged/profiles").exists()


@pytest.mark.parametrize(("left", "patience"), [(900.0, 60.0), (20.0, 20.0), (-3.0, 5.0)])
def test_an_attach_takes_no_longer_than_there_is_time(left: float, patience: float, tmp_path: Path) -> None:
    request = _request(build_parser().parse_args(["tune", "/x"]))
    layout = Layout.below(str(tmp_path))
    session = tuning.Tuning(
        request, layout, Config(), "storaged", Display(lambda *_: None, lambda _: None), budget=1000.0
    )
    session._start = time.monotonic() - (session.budget - left)
    session.fio = Fio("fio", "3.36", frozenset())
    asked: list[dict[str, Any]] = []

    class Calls(Shop):
        def call(self, method: str, parameters: dict[str, Any] | None = None, timeout: float = 0) -> dict[str, Any]:
            asked.append(dict(parameters or {}))
            raise StoragedError(ErrorCode.TIMEOUT, "it takes too long")

    with workspace(layout) as place:
        shop = Calls(layout, Config(), place, "storaged")
        one = operand.named(Wish("/x", None, {}, {}, "bench"), writable=False)
        subject = Subject("/x", {}, {}, one, None)
        pair = Pair({"aio": "native"}, {}, True, "a pair")
        if left > 0:
            # The option may be what takes so long.
            assert "too long" in session._outcome(shop, subject, pair, lambda *_: None).problem  # type: ignore[arg-type]  # never called
        else:
            with pytest.raises(StoragedError):
                session._outcome(shop, subject, pair, lambda *_: None)  # type: ignore[arg-type]  # never called
    assert asked[0]["timeout"] == pytest.approx(patience, abs=1)


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
    assert ("PARTIAL: not all was done: interrupted" in said) == bool(partial)


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
