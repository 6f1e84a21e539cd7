"""The configuration is read again while the daemon runs, by the command and by SIGHUP."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from tests.harness import Daemon, eventually, image


def configure(daemon: Daemon, text: str) -> None:
    os.makedirs(daemon.layout.config_dir, exist_ok=True)
    Path(daemon.layout.config_file).write_text(text)


def test_a_reload_takes_effect_and_says_what_needs_a_restart(daemon: Daemon, place: Path) -> None:
    assert daemon.cli("daemon", "--reload").stdout == "nothing has changed\n"
    configure(daemon, 'detach_timeout = 7\nsocket_group = "daemon"\n[qsd]\nbinary = "no-such-qsd"\n')
    done = daemon.cli("daemon", "--reload")
    assert done.stdout == "in force now: detach_timeout, qsd.binary\n"
    assert "needs a restart" in done.stderr
    assert "socket_group" in done.stderr
    with pytest.raises(StoragedError) as caught:
        daemon.attach("a", image(place / "a.qcow2"), format="qcow2")
    assert caught.value.code is ErrorCode.QSD_MISSING
    configure(daemon, "")
    assert daemon.cli("daemon", "--reload").stdout == "in force now: detach_timeout, qsd.binary\n"


def test_a_bad_file_changes_nothing_and_sighup_does_the_same_as_the_command(daemon: Daemon) -> None:
    assert daemon.process is not None
    configure(daemon, "detach_timeuot = 7\nattach_timeout = 5\nlog_level = 3\n")
    done = daemon.cli("daemon", "--reload", check=False)
    assert done.returncode == 1
    assert "detach_timeuot" in done.stderr
    assert "log_level" in done.stderr
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.log.read_text().count("was not reloaded, and nothing has changed") == 2, "it is refused")
    configure(daemon, "attach_timeout = 5\n")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: "reloaded; now in force: attach_timeout\n" in daemon.log.read_text(), "it is in force")
    assert daemon.answers()


def test_a_reload_fails_and_says_which_file_of_a_volume_is_wrong_and_takes_the_others(
    daemon: Daemon, place: Path
) -> None:
    files = Path(daemon.layout.volume_files)
    files.mkdir(parents=True)
    wish = f"source = '{image(place / 'a.raw', 'raw')}'\ntransport = 'fuse'\n"
    configure(daemon, "detach_timeout = 7\n")
    (files / "good.toml").write_text(wish)
    (files / "typo.toml").write_text(wish.replace("source", "sorce"))
    (files / "option.toml").write_text(wish + "options = { cahce = 'none' }\n")
    done = daemon.cli("daemon", "--reload", check=False)
    assert done.returncode == 1
    assert done.stdout == "in force now: detach_timeout\nattaching: good\n"
    assert f"storaged: volume typo: {files / 'typo.toml'}: unknown key 'sorce' [invalid-argument]" in done.stderr
    assert "hint: did you mean 'source'?" in done.stderr
    assert "storaged: volume option: " in done.stderr
    assert "cahce" in done.stderr
    eventually(lambda: daemon.online("good"), "the good one is attached")
    # It fails each time, until they are right; what is attached otherwise is told, and is no failure.
    assert daemon.cli("daemon", "--reload", check=False).returncode == 1
    (files / "typo.toml").unlink()
    (files / "option.toml").unlink()
    (files / "good.toml").write_text(wish + "read_only = true\n")
    done = daemon.cli("daemon", "--reload")
    assert "detach, and reload again): good" in done.stderr
    (files / "good.toml").write_text(wish)
    assert daemon.cli("daemon", "--reload").stdout == "nothing has changed\n"
    # A wrong configuration is found first, and changes nothing.
    (files / "other.toml").write_text(wish.replace("a.raw", "b.raw"))
    configure(daemon, "detach_timuot = 7\n")
    assert "detach_timuot" in daemon.cli("daemon", "--reload", check=False).stderr
    assert daemon.names() == ["good"]
