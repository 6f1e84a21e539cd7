"""The agent of a volume: it holds exactly the key that was given, outlives who started it, and is ended by identity."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import sshagent
from storaged.host.process import identify
from tests.harness import error_of, eventually, run

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it is root's")


@pytest.fixture
def directory(place: Path) -> Iterator[str]:
    # Longer than what a socket's name may be.
    found = place / ("x" * 60) / ("y" * 60)
    (found / "tmp").mkdir(parents=True)
    yield str(found)
    sshagent.end(str(found))


def key(place: Path, name: str = "key", passphrase: str = "", *how: str) -> bytes:
    run("ssh-keygen", "-q", "-N", passphrase, "-C", name, "-f", place / name, *(how or ("-t", "ed25519")))
    return (place / name).read_bytes()


def held(directory: str) -> list[str]:
    """The comments of the keys that it holds."""
    done = subprocess.run(
        ["ssh-add", "-l"], cwd=directory, env={**os.environ, "SSH_AUTH_SOCK": sshagent.SOCKET}, capture_output=True,
        text=True, timeout=20, check=False,
    )
    return [line.split()[2] for line in done.stdout.splitlines() if "no identities" not in line]


def processes(directory: str) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"TMPDIR={directory}/".encode() in entry.read_bytes():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


@pytest.mark.parametrize("kind", ["ed25519", "rsa", "ecdsa"])
@pytest.mark.parametrize("format", ["RFC4716", "PEM", "PKCS8"])
def test_every_kind_of_key_is_held(directory: str, place: Path, kind: str, format: str) -> None:
    data = key(place, "key", "", "-t", kind, "-m", format)
    assert sshagent.ensure(directory, data) == "agent.sock"
    assert len(held(directory)) == 1
    assert sshagent.answers(directory)


def test_a_key_without_its_last_newline_or_with_those_of_windows_is_a_key(directory: str, place: Path) -> None:
    data = key(place)
    for spelled in (data.rstrip(b"\n"), data.replace(b"\n", b"\r\n"), data + b"\n\n"):
        sshagent.ensure(directory, spelled)
        assert held(directory) == ["key"]


def test_it_is_used_again_and_holds_the_last_key_alone(directory: str, place: Path) -> None:
    sshagent.ensure(directory, key(place))
    before = processes(directory)
    sshagent.ensure(directory, key(place, "other"))
    assert processes(directory) == before
    assert len(before) == 1
    assert held(directory) == ["other"]


def test_only_root_reaches_it_and_it_has_a_session_of_its_own(directory: str, place: Path) -> None:
    sshagent.ensure(directory, key(place))
    assert os.stat(f"{directory}/agent.sock").st_mode & 0o777 == 0o600
    (pid,) = processes(directory)
    assert os.getsid(pid) == pid


def test_it_outlives_who_started_it_and_another_ends_it(directory: str, place: Path) -> None:
    data = key(place)
    program = "import sys\nfrom storaged.host import sshagent\nsshagent.ensure(sys.argv[1], sys.stdin.buffer.read())"
    subprocess.run([sys.executable, "-c", program, directory], input=data, check=True, timeout=60)
    assert held(directory) == ["key"]
    (pid,) = processes(directory)
    sshagent.end(directory)
    eventually(lambda: identify(pid) is None, "it is gone")
    assert not os.path.exists(f"{directory}/agent.sock")
    assert not sshagent.answers(directory)
    sshagent.end(directory)


def test_it_is_found_though_its_daemon_died_before_it_wrote_it_down(directory: str, place: Path) -> None:
    sshagent.ensure(directory, key(place))
    (pid,) = processes(directory)
    os.unlink(f"{directory}/agent.json")
    sshagent.end(directory)
    assert identify(pid) is None


def test_it_is_found_though_somebody_removed_its_socket(directory: str, place: Path) -> None:
    sshagent.ensure(directory, key(place))
    (pid,) = processes(directory)
    os.unlink(f"{directory}/agent.sock")
    sshagent.ensure(directory, key(place, "other"))
    assert identify(pid) is None
    assert held(directory) == ["other"]


def test_nobody_else_is_ended(directory: str, place: Path) -> None:
    """What the record says has ended, and another process has its number."""
    sshagent.ensure(directory, key(place))
    (pid,) = processes(directory)
    other = subprocess.Popen(["sleep", "100"])
    try:
        record = Path(directory, "agent.json")
        record.write_text(record.read_text().replace(f":{pid},", f":{other.pid},"))
        sshagent.end(directory)
        assert other.poll() is None
        assert identify(pid) is None, "the listener is ended all the same"
    finally:
        other.kill()
        other.wait()


def test_one_that_died_is_replaced(directory: str, place: Path) -> None:
    sshagent.ensure(directory, key(place))
    (pid,) = processes(directory)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: identify(pid) is None, "it is dead")
    assert not sshagent.answers(directory)
    sshagent.ensure(directory, key(place, "other"))
    assert held(directory) == ["other"]


@pytest.mark.parametrize("format", ["RFC4716", "PEM", "PKCS8"])
def test_a_key_with_a_passphrase_is_refused_and_nothing_stays(directory: str, place: Path, format: str) -> None:
    data = key(place, "key", "s3cret", "-t", "rsa", "-m", format)
    error = error_of(lambda: sshagent.ensure(directory, data))
    assert error.code is ErrorCode.OPEN_FAILED
    assert "passphrase" in error.message
    assert "agent=" in error.hint
    assert processes(directory) == []


@pytest.mark.parametrize("kind", ["public", "text", "cut", "nothing"])
def test_what_is_no_key_is_refused_and_never_said(directory: str, place: Path, kind: str) -> None:
    data = {
        "public": b"ssh-ed25519 AAAAs3cret x\n", "text": b"s3cret", "cut": key(place)[:150] + b"\n", "nothing": b""
    }[kind]
    error = error_of(lambda: sshagent.ensure(directory, data))
    assert error.code is ErrorCode.OPEN_FAILED
    assert error.hint
    assert "s3cret" not in f"{error} {error.hint}"
    assert processes(directory) == []


def test_without_the_program_it_is_said_what_to_install(
    directory: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = key(place)
    monkeypatch.setenv("PATH", str(place))
    error = error_of(lambda: sshagent.ensure(directory, data))
    assert "openssh-client" in error.hint
