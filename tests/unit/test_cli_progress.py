"""What happens while a command waits: progress, Ctrl-C, and readers that went away."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.__main__ import main
from storaged.cli import commands, progress
from storaged.model.layout import Layout
from tests.unit.fake_daemon import JSON, FakeDaemon, Hangup, event, failure, volume

COMMAND = [sys.executable, "-m", "storaged"]
WEB1 = {"parameters": {"volume": volume("web1")}}


@pytest.fixture
def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDaemon]:
    """A daemon below a root that the environment names; its Watch tells two steps."""
    monkeypatch.setenv("STORAGED_ROOT", str(tmp_path))

    def watch(request: JSON) -> Iterator[JSON]:
        yield {"parameters": {"event": event("web1", "ready", state="starting")}, "continues": True}
        yield {"parameters": {"event": event("web1", "step", "opening the image")}, "continues": True}
        yield {"parameters": {"event": event("web1", "state", state="online")}, "continues": True}
        fake.pause(30)

    with FakeDaemon(Path(Layout.below(str(tmp_path)).socket)) as fake:
        fake.handlers["Watch"] = watch
        yield fake


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let progress begin after a tenth of a second instead of one."""
    monkeypatch.setattr(progress, "QUIET", 0.1)


def answers_after(daemon: FakeDaemon, seconds: float, reply: JSON) -> None:
    """Let Attach take its time."""

    def attach(request: JSON) -> Iterator[JSON]:
        daemon.pause(seconds)
        yield reply

    daemon.handlers["Attach"] = attach


def until(daemon: FakeDaemon, method: str) -> None:
    """Wait until the daemon was asked."""
    deadline = time.monotonic() + 20
    while not daemon.asked(method):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.usefixtures("impatient")
def test_a_slow_attach_tells_its_steps_on_stderr(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_after(daemon, 1, WEB1)
    assert main(["attach", "web1", "/x"]) == 0
    out, err = capsys.readouterr()
    assert out == "/dev/loop3\n"
    assert err.splitlines() == [
        "storaged: volume web1: waiting for the daemon",
        "storaged: volume web1: starting",
        "storaged: volume web1: opening the image",
        "storaged: volume web1: online",
    ]
    assert daemon.asked("Watch") == [{"name": "web1"}]


@pytest.mark.usefixtures("impatient")
def test_a_slow_attach_that_fails_tells_its_steps_and_then_why(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_after(daemon, 1, failure(code="open-failed", message="cannot open", volume="web1"))
    assert main(["attach", "web1", "/x"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert "storaged: volume web1: opening the image" in lines
    assert lines[-1] == "storaged: volume web1: cannot open [open-failed]"


@pytest.mark.usefixtures("impatient")
def test_with_json_stderr_holds_nothing_but_the_failure(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    answers_after(daemon, 0.5, failure(code="open-failed"))
    assert main(["attach", "web1", "/x", "--json"]) == 1
    assert json.loads(capsys.readouterr().err)["error"]["code"] == "open-failed"


@pytest.mark.usefixtures("impatient")
def test_detach_and_resize_show_progress_too(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(request: JSON) -> Iterator[JSON]:
        daemon.pause(0.5)
        yield {"parameters": {"notes": []}}

    daemon.handlers["Detach"] = daemon.handlers["Resize"] = slow
    assert main(["detach", "web1"]) == 0
    assert main(["resize", "web1", "1G"]) == 0
    assert capsys.readouterr().err.count("opening the image") == 2


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("fault", ["refused", "hangup", "garbage"])
def test_without_progress_the_answer_is_waited_for_all_the_same(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str], fault: str
) -> None:
    def watch(request: JSON) -> Iterator[JSON]:
        if fault == "refused":
            yield failure(code="no-such-volume")
        elif fault == "garbage":
            yield {"parameters": 5}
        raise Hangup

    daemon.handlers["Watch"] = watch
    answers_after(daemon, 0.5, WEB1)
    assert main(["attach", "web1", "/x"]) == 0
    assert capsys.readouterr().out == "/dev/loop3\n"


@pytest.mark.usefixtures("impatient")
def test_an_answer_that_never_comes_is_a_timeout_while_progress_is_shown(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(commands, "_GRACE", 0.2)
    answers_after(daemon, 30, WEB1)
    assert main(["attach", "web1", "/x", "--timeout", "0.2"]) == 1
    err = capsys.readouterr().err
    assert "[timeout]" in err
    assert "show web1" in err


@pytest.mark.usefixtures("impatient")
def test_a_daemon_that_dies_meanwhile_leaves_an_unknown_outcome(
    daemon: FakeDaemon, capsys: pytest.CaptureFixture[str]
) -> None:
    def attach(request: JSON) -> Iterator[JSON]:
        daemon.pause(0.5)
        raise Hangup
        yield

    daemon.handlers["Attach"] = attach
    assert main(["attach", "web1", "/x"]) == 1
    assert "the outcome is unknown" in capsys.readouterr().err


def test_on_a_terminal_the_steps_are_one_line_that_goes_away(daemon: FakeDaemon) -> None:
    answers_after(daemon, 2.5, WEB1)
    master, terminal = pty.openpty()
    done = subprocess.Popen(
        [*COMMAND, "attach", "web1", "/x"],
        stdout=subprocess.PIPE,
        stderr=terminal,
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(master, 65536):
            shown += data
    except OSError:  # how a pty says that nobody has it open any more
        pass
    os.close(master)
    assert done.communicate()[0] == b"/dev/loop3\n"
    assert done.returncode == 0
    assert b"volume web1: online" in shown
    assert shown.rstrip().endswith(b"\x1b[2K"), "the line is not erased"


def test_ctrl_c_during_attach_exits_130_and_says_that_the_daemon_goes_on(daemon: FakeDaemon) -> None:
    answers_after(daemon, 30, WEB1)
    line = [*COMMAND, "attach", "web1", "/x"]
    done = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    until(daemon, "Attach")
    time.sleep(0.2)
    done.send_signal(signal.SIGINT)
    out, err = done.communicate(timeout=20)
    assert done.returncode == 130
    assert out == b""
    assert b"the daemon goes on with the attach; look with: storaged show web1" in err
    assert b"Traceback" not in err


def test_ctrl_c_during_watch_exits_130_without_a_word(daemon: FakeDaemon) -> None:
    done = subprocess.Popen([*COMMAND, "watch"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert done.stdout is not None
    assert b"opening the image" in done.stdout.readline()  # at once, not when a buffer is full
    done.send_signal(signal.SIGINT)
    _, err = done.communicate(timeout=20)
    assert done.returncode == 130
    assert err == b""


@pytest.mark.parametrize("line", ["list", "list --json", "list --names", "watch", "completion bash"])
def test_a_reader_that_went_away_ends_the_command_quietly(daemon: FakeDaemon, line: str) -> None:
    daemon.answers("List", {"parameters": {"volumes": [volume("web1")]}})
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([*COMMAND, *line.split()], stdout=writing, stderr=subprocess.PIPE, check=False)
    os.close(writing)
    assert done.returncode == 141
    assert done.stderr == b""


def test_output_that_cannot_be_written_is_a_failure(daemon: FakeDaemon) -> None:
    daemon.answers("Attach", WEB1)
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [*COMMAND, "attach", "web1", "/x"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr.splitlines()[0].endswith("No space left on device [no-space]")


def test_a_closed_stdout_is_no_failure(daemon: FakeDaemon) -> None:
    daemon.answers("Attach", WEB1)
    done = subprocess.run(
        ["/bin/sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "attach", "web1", "/x"],
        stderr=subprocess.PIPE,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_locale_without_the_letters_is_no_failure(daemon: FakeDaemon) -> None:
    daemon.answers("List", {"parameters": {"volumes": [volume("web1", source="/srv/日本.raw")]}})
    done = subprocess.run(
        [*COMMAND, "list"],
        stdout=subprocess.PIPE,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
        check=True,
    )
    assert rb"/srv/\u65e5\u672c.raw" in done.stdout
