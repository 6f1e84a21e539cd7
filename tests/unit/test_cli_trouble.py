"""What can be typed when something hangs, and what list and show tell of it."""

from __future__ import annotations

import inspect
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.__main__ import main
from storaged.api.interface import StoragedInterface
from storaged.cli import render
from storaged.cli.parser import build_parser
from storaged.model.layout import Layout
from tests.unit.fake_daemon import JSON, FakeDaemon, Hangup, entry, failure, volume

NOW = 1_700_000_000.0
ANY = st.text(st.characters())
HOSTILE = "\x1b]0;owned\x07\x1b[2J\nname: fake\u202e"


@pytest.fixture(autouse=True)
def _utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC-2")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon below a root that the environment names."""
    monkeypatch.setenv("STORAGED_ROOT", str(tmp_path))
    with FakeDaemon(Path(Layout.below(str(tmp_path)).socket)) as daemon:
        yield daemon


# Rescue and resume


def test_rescue_passes_its_wishes_and_tells_on_stderr_what_is_left(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Rescue", {"parameters": {"notes": [f"/dev/loop3 is still open{HOSTILE}"]}})
    assert main(["rescue", "web1"]) == 0
    assert main(["rescue", "web1", "--keep", "--timeout", "3"]) == 0
    assert daemon.asked("Rescue") == [{"name": "web1"}, {"name": "web1", "keep": True, "timeout": 3.0}]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("storaged: volume web1: /dev/loop3 is still open") for line in lines)
    assert all(line.isprintable() for line in lines)


def test_resume_prints_the_device_and_nothing_else(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Resume", {"parameters": {"volume": volume("web1")}})
    assert main(["resume", "web1", "--timeout", "3"]) == 0
    assert capsys.readouterr() == ("/dev/loop3\n", "")
    assert daemon.asked("Resume") == [{"name": "web1", "timeout": 3.0}]


def test_resume_prints_the_socket_of_a_volume_without_a_device(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Resume", {"parameters": {"volume": volume("vm1", device=None, socket="/run/vm1.sock")}})
    assert main(["resume", "vm1"]) == 0
    assert capsys.readouterr().out == "/run/vm1.sock\n"


def test_resume_json_prints_the_volume_and_a_failure_as_an_object(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    daemon.answers("Resume", {"parameters": {"volume": volume("web1")}})
    assert main(["resume", "web1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == volume("web1")
    daemon.answers("Resume", failure(code="volume-busy", message="it is not rescued", volume="web1"))
    assert main(["resume", "web1", "--json"]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "volume-busy"


@pytest.mark.parametrize(
    ("method", "line"), [("Rescue", "rescue n"), ("Resume", "resume n"), ("Upgrade", "upgrade n")]
)
def test_what_is_sent_is_what_the_interface_takes(method: str, line: str) -> None:
    taken = set(inspect.signature(getattr(StoragedInterface, method)).parameters) - {"self"}
    offered = set(vars(build_parser().parse_args(line.split())))
    assert taken == offered - {"command", "root", "json", "all"}


def test_an_answer_that_got_lost_says_that_the_outcome_is_unknown_and_where_to_look(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    for method, line in (("Rescue", "rescue web1"), ("Resume", "resume web1")):
        daemon.hangs_up(method)
        assert main(line.split()) == 1
        err = capsys.readouterr().err
        assert "outcome is unknown" in err
        assert "storaged show web1" in err


# Upgrades


def upgrades(daemon: FakeDaemon, volumes: list[JSON], replies: dict[str, JSON]) -> None:
    """Let the daemon have these volumes; an upgrade answers what ``replies`` say, None ends the connection."""

    def upgrade(request: JSON) -> Iterator[JSON]:
        reply = replies.get(request["parameters"]["name"])
        if reply is None:
            raise Hangup
        yield reply

    daemon.answers("List", {"parameters": {"volumes": volumes}})
    daemon.answers("Show", {"parameters": {"volume": volumes[0]}} if volumes else failure("NoSuchVolume"))
    daemon.handlers["Upgrade"] = upgrade


def upgraded(name: str, version: str = "11.1.0") -> JSON:
    return {"parameters": {"volume": volume(name, qsd_version=version)}}


REFUSED = failure(
    "InUse", code="unsupported", message="a loop device cannot get another server", volume="web2", hint="unmount it"
)


def test_upgrade_prints_the_old_and_the_new_version(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    upgrades(daemon, [volume("web1", state="hung")], {"web1": upgraded("web1")})
    assert main(["upgrade", "web1", "--timeout", "9"]) == 0
    assert capsys.readouterr() == ("web1: 10.0.13 -> 11.1.0\n", "")
    assert daemon.asked("Upgrade") == [{"name": "web1", "timeout": 9.0}]


def test_upgrade_of_one_that_fails_exits_1(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    upgrades(daemon, [volume("web2")], {"web2": REFUSED})
    assert main(["upgrade", "web2"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "[unsupported]" in err
    assert "hint: unmount it" in err


def test_upgrade_all_goes_through_what_is_online_one_after_the_other(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = [volume("web1"), volume("web2", state="stalled"), volume("web3", qsd_version=None)]
    upgrades(daemon, volumes, {"web1": upgraded("web1"), "web3": upgraded("web3")})
    assert main(["upgrade", "--all", "--timeout", "9"]) == 0
    assert capsys.readouterr() == (
        "web1: 10.0.13 -> 11.1.0\nweb2: skipped, it is stalled\nweb3: unknown -> 11.1.0\n", "",
    )
    assert daemon.asked("Upgrade") == [{"name": "web1", "timeout": 9.0}, {"name": "web3", "timeout": 9.0}]


def test_upgrade_all_asks_for_the_next_only_after_the_answer_to_the_one_before(daemon: FakeDaemon) -> None:
    at_work: list[str] = []
    most = 0

    def upgrade(request: JSON) -> Iterator[JSON]:
        nonlocal most
        name = request["parameters"]["name"]
        at_work.append(name)
        most = max(most, len(at_work))
        daemon.pause(0.05)
        at_work.remove(name)
        yield upgraded(name)

    upgrades(daemon, [volume("a"), volume("b"), volume("c")], {})
    daemon.handlers["Upgrade"] = upgrade
    assert main(["upgrade", "--all"]) == 0
    assert most == 1


def test_upgrade_all_reports_a_failure_goes_on_with_the_rest_and_exits_1(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    volumes = [volume("web1"), volume("web2"), volume("web3")]
    upgrades(daemon, volumes, {"web1": upgraded("web1"), "web2": REFUSED, "web3": upgraded("web3")})
    assert main(["upgrade", "--all"]) == 1
    out, err = capsys.readouterr()
    assert out == "web1: 10.0.13 -> 11.1.0\nweb3: 10.0.13 -> 11.1.0\n"
    assert err.splitlines() == [
        "storaged: volume web2: a loop device cannot get another server [unsupported]", "hint: unmount it",
    ]


def test_upgrade_all_passes_over_a_volume_that_was_detached_meanwhile(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = failure("NoSuchVolume", code="no-such-volume", message="there is no volume 'web1'")
    upgrades(daemon, [volume("web1"), volume("web2")], {"web1": gone, "web2": upgraded("web2")})
    assert main(["upgrade", "--all"]) == 0
    assert capsys.readouterr().out == "web1: skipped, it is gone by now\nweb2: 10.0.13 -> 11.1.0\n"


def test_upgrade_all_stops_when_the_daemon_dies_and_names_what_was_not_tried(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    upgrades(daemon, [volume("web1"), volume("web2"), volume("web3")], {"web1": upgraded("web1")})
    assert main(["upgrade", "--all"]) == 1
    out, err = capsys.readouterr()
    assert out == "web1: 10.0.13 -> 11.1.0\n"
    assert err.splitlines()[0] == "storaged: volume web3: not tried"
    assert "volume web2: the outcome is unknown" in err
    assert len(daemon.asked("Upgrade")) == 2


def test_upgrade_all_of_nothing_does_nothing(daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]) -> None:
    upgrades(daemon, [], {})
    assert main(["upgrade", "--all"]) == 0
    assert capsys.readouterr() == ("", "")


# What list and show tell


AWAY: JSON = {
    "trouble": "network-away", "since": NOW - 200, "detail": "no answer from 192.0.2.7:3260", "policy": "wait",
    "acts_at": None,
}


def test_list_shows_the_trouble_beside_the_state_and_how_long_it_lasts() -> None:
    volumes = [volume("a", state="stalled", condition=AWAY), volume("b")]
    header, first, second = render.volume_table(volumes, width=200, now=NOW).splitlines()
    assert first.startswith("a     stalled (network-away, 3m)  /dev/loop3")
    assert header.index("DEVICE") == first.index("/dev/loop3") == second.index("/dev/loop3")


@pytest.mark.parametrize("width", [80, 120])
def test_a_list_with_trouble_fits_the_terminal(width: int) -> None:
    volumes = [volume("a", state="stalled", condition=AWAY), volume("db", state="recovering")]
    table = render.volume_table(volumes, width=width, now=NOW).splitlines()
    assert all(len(line) <= width for line in table)
    assert "stalled (network-away, 3m)" in table[1]


def test_show_tells_the_trouble_and_that_nothing_is_done_by_itself() -> None:
    lines = render.volume_details(volume("a", state="stalled", condition=AWAY), now=NOW).splitlines()
    assert lines[-3:] == [
        "trouble:    network-away since 2023-11-15T00:10:00+02:00 (3m ago)",
        "detail:     no answer from 192.0.2.7:3260",
        "policy:     wait; nothing is done by itself",
    ]


@pytest.mark.parametrize(
    ("acts_at", "shown"),
    [
        (NOW + 90, "restart-after:300, in 1m (2023-11-15T00:14:50+02:00)"),
        (NOW - 1, "restart-after:300, now (2023-11-15T00:13:19+02:00)"),
    ],
)
def test_show_tells_what_the_policy_will_do_and_when(acts_at: float, shown: str) -> None:
    condition = AWAY | {"policy": "restart-after:300", "acts_at": acts_at}
    lines = render.volume_details(volume("a", condition=condition), now=NOW).splitlines()
    assert lines[-1] == f"policy:     {shown}"


def test_show_counts_deaths_and_tells_the_last_pause_where_there_were_any() -> None:
    lines = render.volume_details(volume("a", deaths=3, paused=0.412), now=NOW).splitlines()
    assert lines[-2:] == ["deaths:     3", "last pause: 0.41s"]
    assert "deaths" not in render.volume_details(volume("a"), now=NOW)


def test_show_tells_the_history_newest_last() -> None:
    history = [
        entry("death", "killed by signal 9", NOW - 60),
        entry("recovered", "another QSD serves it", NOW - 59, seconds=0.5),
        entry("hang", "no answer", NOW - 50, seconds=300.0, times=4, last=NOW - 10),
    ]
    text = render.volume_details(volume("a", history=history), now=NOW, width=200)
    assert text.partition("\n\n")[2].splitlines() == [
        "history:",
        "TIME                       WHAT       TOOK   MESSAGE",
        "2023-11-15T00:12:20+02:00  death      -      killed by signal 9",
        "2023-11-15T00:12:21+02:00  recovered  0.50s  another QSD serves it",
        "2023-11-15T00:12:30+02:00  hang       5m     4 times, last 2023-11-15T00:13:10+02:00: no answer",
    ]


def test_show_prints_the_newest_twenty_and_says_how_many_more_there_are(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    history = [entry("death", f"number {number}", NOW + number) for number in range(50)]
    daemon.answers("Show", {"parameters": {"volume": volume("a", history=history)}})
    assert main(["show", "a"]) == 0
    table = capsys.readouterr().out.partition("\n\n")[2].splitlines()
    assert table[0] == "history (the oldest 30 are left out here; --json has them):"
    assert [line.split()[-1] for line in table[2:]] == [str(number) for number in range(30, 50)]
    assert main(["show", "a", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["history"] == history


@pytest.mark.parametrize("state", [None, []])
def test_show_of_a_volume_to_which_nothing_happened_has_no_table(state: list[JSON] | None) -> None:
    assert "history" not in render.volume_details(volume("a", history=state), now=NOW)


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_long_message_takes_three_lines_of_a_terminal_and_no_more(width: int) -> None:
    history = [entry("failure", "the source cannot be opened: " * 30), entry("death", "short")]
    lines = render.volume_details(volume("a", history=history), now=NOW, width=width).splitlines()
    table = lines[lines.index("history:") + 1:]
    assert len(table) == 1 + 3 + 1
    assert table[3].endswith("…")
    if width >= 80:
        assert all(len(line) <= width for line in table)
        start = table[0].index("MESSAGE")
        assert {line[start - 1] for line in table} == {" "}


def test_what_is_no_terminal_gets_the_whole_message_on_one_line() -> None:
    message = "no blank " * 100 + "the end"
    text = render.volume_details(volume("a", history=[entry("failure", message)]), now=NOW, width=render._ENDLESS)
    assert text.endswith(message)


@given(ANY, ANY, st.integers(1, 200))
def test_no_terminal_obeys_a_message_and_none_makes_a_line_too_many(kind: str, message: str, width: int) -> None:
    lines = render.volume_details(volume("a", history=[entry(kind, message)]), now=NOW, width=width).splitlines()
    assert all(line.isprintable() for line in lines)
    table = lines[lines.index("history:") + 1:]
    assert 2 <= len(table) <= 4


def test_hostile_text_in_trouble_and_history_is_shown_and_not_obeyed() -> None:
    sick = volume(
        "a", condition=AWAY | {"detail": HOSTILE, "trouble": HOSTILE, "policy": HOSTILE}, history=[entry("x", HOSTILE)]
    )
    text = render.volume_details(sick, now=NOW, width=120) + "\n" + render.volume_table([sick], width=120, now=NOW)
    assert all(line.isprintable() for line in text.split("\n"))
    assert not re.search(r"^name: fake", text, re.MULTILINE)
    assert r"\x1b]0;owned\x07" in text


@given(ANY, st.integers(2, 60), st.integers(1, 4))
def test_folded_text_fits_and_loses_no_word(text: str, width: int, most: int) -> None:
    line = render.clean(text)
    folded = render._folded(line, width, most)
    assert 1 <= len(folded) <= most
    assert all(render._cells(part) <= width for part in folded)
    if not folded[-1].endswith("…"):
        assert "".join("".join(folded).split()) == "".join(line.split())


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "-"), ("x", "-"), (0, "0.00s"), (0.4123, "0.41s"), (9.99, "9.99s"), (42.6, "43s"), (100, "1m"),
        (7300, "2h"), (-1, "0s"), (float("nan"), "-"), (float("inf"), "-"),
    ],
)
def test_how_long_something_took_is_said_as_exactly_as_it_matters(seconds: Any, shown: str) -> None:
    assert render._lasting(seconds) == shown


@pytest.mark.parametrize("seconds", [1e300, -1e300, float("inf"), float("nan")])
def test_a_time_in_no_year_is_a_dash(seconds: float) -> None:
    assert render.timestamp(seconds) == "-"
    assert render.moment(seconds, NOW).startswith("- ")


# What the documents say


def test_every_command_is_in_the_table_of_the_readme() -> None:
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    table = readme.partition("\n## Commands\n")[2].partition("\n## ")[0]
    said = set(re.findall(r"^\| `([a-z]+)", table, re.MULTILINE))
    (action,) = (action for action in build_parser()._actions if action.dest == "command")
    assert action.choices is not None
    assert said == set(action.choices)
