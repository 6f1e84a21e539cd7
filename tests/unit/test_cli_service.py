"""What systemd's units call: wait, shutdown; and persist, and what show tells of it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.__main__ import main
from storaged.cli import render, waiting
from storaged.model.layout import Layout
from tests.unit.fake_daemon import JSON, FakeDaemon, Hangup, event, failure, volume

HANGS = {"trouble": "backend-silent", "since": 1.0, "detail": "", "policy": "wait", "acts_at": None}
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True)


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon below a root that the environment names."""
    monkeypatch.setenv("STORAGED_ROOT", str(tmp_path))
    with FakeDaemon(Path(Layout.below(str(tmp_path)).socket)) as daemon:
        yield daemon


def happens(*kinds: str) -> list[JSON]:
    return [{"continues": True, "parameters": {"event": event("web1", kind)}} for kind in ("ready", *kinds)]


def test_wait_looks_after_each_event_and_prints_the_device(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    states = iter(["starting", "exporting", "online"])
    daemon.answers("Watch", *happens("state", "state", "state"))
    daemon.handlers["Show"] = lambda _: iter([{"parameters": {"volume": volume("web1", state=next(states))}}])
    assert main(["wait", "web1", "--timeout", "20"]) == 0
    assert capsys.readouterr().out == "/dev/loop3\n"
    assert next(states, None) is None


def test_wait_goes_on_when_the_daemon_is_restarted(daemon: FakeDaemon) -> None:
    turns = iter([False, True])

    def watch(_: JSON) -> Iterator[JSON]:
        if not next(turns):
            raise Hangup
        yield from happens()

    daemon.handlers["Watch"] = watch
    daemon.answers("Show", {"parameters": {"volume": volume("web1")}})
    assert main(["wait", "web1", "--timeout", "20"]) == 0


def test_wait_says_what_the_volume_failed_of_or_that_there_is_none(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    trouble = {"code": "source-missing", "message": "there is no /x", "step": "start", "cause": "", "hint": ""}

    def watch(_: JSON) -> Iterator[JSON]:
        yield from happens()
        daemon.pause(10)

    daemon.handlers["Watch"] = watch
    daemon.answers("Show", {"parameters": {"volume": volume("web1", state="failed", failure=trouble)}})
    assert main(["wait", "web1", "--timeout", "0.3"]) == 1
    assert "it is failed, there is no /x [timeout]" in capsys.readouterr().err
    daemon.answers("Show", failure("NoSuchVolume", code="no-such-volume", message="there is no volume"))
    assert main(["wait", "web1", "--timeout", "20"]) == 1
    assert "[no-such-volume]" in capsys.readouterr().err


@given(NAMES)
def test_a_unit_s_instance_is_a_name_with_or_without_escapes(name: str) -> None:
    assert waiting.unescaped(name) == name
    assert waiting.unescaped(name.replace("-", r"\x2d")) == name


def test_shutdown_parks_and_tells_what_goes_on(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    daemon.answers("Park", {"parameters": {"notes": ["volume web1: in use"]}})
    assert main(["shutdown", "--timeout", "7"]) == 0
    assert daemon.asked("Park") == [{"timeout": 7.0}]
    assert "web1: in use" in capsys.readouterr().err


def test_shutdown_without_a_daemon_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STORAGED_ROOT", str(tmp_path))
    assert main(["shutdown"]) == 0
    assert main(["shutdown", "--stuck-after", "1"]) == 0


def test_what_hangs_for_long_enough_is_rescued_and_nothing_else(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storaged.cli.shutdown._LOOK", 0.02)
    others = [
        volume("works"), volume("refused", state="failed"), volume("vm", device=None, condition=HANGS),
        volume("gone", state="rescued", device=None),
    ]
    looks = 0
    rescued = threading.Event()

    def listed(_: JSON) -> Iterator[JSON]:
        nonlocal looks
        looks += 1
        if rescued.is_set():
            raise Hangup
        # "brief" hangs, and recovers before its time is over.
        brief = volume("brief", condition=HANGS if looks % 2 else None)
        yield {"parameters": {"volumes": [*others, brief, volume("stuck", state="stalled", condition=HANGS)]}}

    def rescue(_: JSON) -> Iterator[JSON]:
        rescued.set()
        yield failure(code="qsd-silent", message="it does not even die")

    daemon.handlers |= {"List": listed, "Rescue": rescue}
    assert main(["shutdown", "--stuck-after", "0.3"]) == 0
    assert [asked["name"] for asked in daemon.asked("Rescue")] == ["stuck"]
    assert looks > 5


def test_persist_says_on_and_off(daemon: FakeDaemon) -> None:
    daemon.answers("Persist", {"parameters": {"volume": volume("web1")}})
    assert main(["persist", "web1", "on"]) == 0
    assert main(["persist", "web1", "off"]) == 0
    assert daemon.asked("Persist") == [{"name": "web1", "on": True}, {"name": "web1", "on": False}]


def test_show_tells_for_how_long_a_volume_is_wanted_and_what_changes_that() -> None:
    def kept(**changes: object) -> str:
        lines = render.volume_details(volume("web1", **changes)).splitlines()
        return next(line for line in lines if line.startswith("kept:"))

    assert "storaged persist web1 on" in kept()
    assert "storaged persist web1 off" in kept(persist=True)
    assert "a detach lasts until that goes" in kept(file="/etc/storaged/volumes/web1.toml")
