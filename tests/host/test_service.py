"""The daemon as a service: what it tells, its files of volumes, and what it does as the host goes down."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from storaged.errors import ErrorCode, StoragedError
from tests.harness import (
    STORAGED,
    Daemon,
    error_of,
    eventually,
    image,
    leftovers,
    luks_image,
    reads,
    run,
    writes,
)


def write(daemon: Daemon, name: str, text: str) -> Path:
    """Write the file of a volume."""
    directory = Path(daemon.layout.volume_files)
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / f"{name}.toml"
    path.write_text(text)
    return path


def reload(daemon: Daemon) -> None:
    assert daemon.process is not None
    before = daemon.log.read_text().count("files of volumes were reloaded")
    daemon.process.send_signal(signal.SIGHUP)
    eventually(lambda: daemon.log.read_text().count("files of volumes were reloaded") > before, "reloaded")


def test_files_are_attached_at_the_start_and_a_bad_one_fails_alone(stopped: Daemon, place: Path) -> None:
    path = write(stopped, "good", f"source = '{image(place / 'a.qcow2')}'\nformat = 'qcow2'\ntransport = 'fuse'")
    write(stopped, "bad", "sorce = '/x'")
    write(stopped, "secret", "source = 'iscsi://user%secret1234567@host/iqn.x/0'")
    write(stopped, "option", "source = '/x'\noptions = { cahce = 'none' }")
    missing = write(stopped, "missing", f"source = '{place / 'later.raw'}'\ntransport = 'fuse'")
    stopped.start()
    eventually(lambda: stopped.online("good"), "the good one is online")
    assert str(path) in stopped.cli("show", "good").stdout
    assert sorted(stopped.names()) == ["good", "missing"]
    wrong = error_of(lambda: stopped.show("bad"))
    assert (wrong.code, "did you mean 'source'?") == (ErrorCode.INVALID_ARGUMENT, wrong.hint)
    assert "cahce" in str(error_of(lambda: stopped.show("option")))
    assert error_of(lambda: stopped.show("secret")).code is ErrorCode.INVALID_ARGUMENT
    assert "secret1234567" not in stopped.log.read_text()
    # One that does not come up is tried again.
    eventually(lambda: stopped.show("missing")["state"] == "failed", "failed")
    image(place / "later.raw", "raw")
    eventually(lambda: stopped.online("missing"), "the missing one is online", 30)
    assert missing.exists()


def test_a_detached_one_stays_so_until_its_file_goes(stopped: Daemon, place: Path) -> None:
    text = f"source = '{image(place / 'a.raw', 'raw')}'\ntransport = 'fuse'"
    path = write(stopped, "a", text)
    stopped.start()
    eventually(lambda: stopped.online("a"), "online")
    (note,) = stopped.detach("a")
    assert str(path) in note
    reload(stopped)
    stopped.stop()
    stopped.start()
    error = error_of(lambda: stopped.show("a"))
    assert error.code is ErrorCode.NO_SUCH_VOLUME
    assert str(path) in error.cause
    path.unlink()
    reload(stopped)
    assert "file" not in str(error_of(lambda: stopped.show("a")))
    write(stopped, "a", text)
    reload(stopped)
    eventually(lambda: stopped.online("a"), "it is attached by a file that came back")
    # Or the user changes their mind.
    stopped.detach("a")
    assert error_of(lambda: stopped.call("Persist", name="a", on=False)).code is ErrorCode.UNSUPPORTED
    stopped.cli("persist", "a", "on")
    assert stopped.online("a")
    stopped.kill()
    stopped.start()
    eventually(lambda: stopped.online("a"), "adopted")


def test_a_directory_of_files_that_cannot_be_read_ends_nothing(stopped: Daemon, place: Path) -> None:
    path = write(stopped, "a", f"source = '{image(place / 'a.raw', 'raw')}'\ntransport = 'fuse'")
    stopped.start()
    eventually(lambda: stopped.online("a"), "it is online")
    stopped.detach("a")
    stopped.attach("b", image(place / "b.raw", "raw"), transport="fuse")
    path.parent.rename(place / "away")
    path.parent.touch()
    done = stopped.cli("daemon", "--reload", check=False)
    assert (done.returncode, "[invalid-argument]" in done.stderr) == (1, True)
    stopped.stop()
    stopped.start()
    eventually(lambda: stopped.online("b"), "the other is there")
    path.parent.unlink()
    (place / "away").rename(path.parent)
    reload(stopped)
    assert stopped.names() == ["b"]  # the detach of the other still counts


def test_a_refused_detach_of_one_with_a_file_changes_nothing(stopped: Daemon, place: Path) -> None:
    write(stopped, "a", f"source = '{image(place / 'a.raw', 'raw')}'\ntransport = 'fuse'")
    stopped.start()
    eventually(lambda: stopped.online("a"), "online")
    with open(stopped.show("a")["device"], "rb"):
        assert error_of(lambda: stopped.detach("a")).code is ErrorCode.DEVICE_IN_USE
    stopped.kill()
    stopped.start()
    eventually(lambda: stopped.online("a"), "it is still wanted")
    assert os.listdir(stopped.layout.detached_marks) == []


def test_what_other_wishes_have_attached_stays_when_a_file_says_otherwise(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    write(daemon, "a", f"source = '{image(place / 'b.raw', 'raw')}'")
    reload(daemon)
    assert daemon.show("a")["device"] == device
    assert "wishes for something else" in daemon.log.read_text()


def test_persist_moves_the_wish_and_a_daemon_that_dies_meanwhile_has_one_of_the_two(
    daemon: Daemon, place: Path
) -> None:
    kept, forgotten = Path(daemon.layout.desired_persistent, "a.json"), Path(daemon.layout.desired_volatile, "a.json")
    device = daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    assert "storaged persist a on" in daemon.cli("show", "a").stdout
    for on in ("on", "on", "off", "on"):
        daemon.cli("persist", "a", on)
        assert (kept.exists(), forgotten.exists()) == (on == "on", on == "off")
    assert "storaged persist a off" in daemon.cli("show", "a").stdout
    # As if it had died between the two: the one over reboots counts, and is the only one then.
    daemon.kill()
    forgotten.parent.mkdir(exist_ok=True)
    forgotten.write_bytes(kept.read_bytes().replace(b'"persist": true', b'"persist": false'))
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    assert (daemon.show("a")["persist"], daemon.show("a")["device"]) == (True, device)
    assert not forgotten.exists()
    daemon.detach("a")
    assert not kept.exists()


def test_what_could_not_be_persisted_is_not_said_to_be(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"), transport="fuse")
    stored, volatile = Path(daemon.layout.desired_persistent), Path(daemon.layout.desired_volatile)
    stored.rename(place / "away")
    stored.touch()
    for _ in range(2):
        assert daemon.cli("persist", "a", "on", check=False).returncode == 1
    stored.unlink()
    (place / "away").rename(stored)
    daemon.cli("persist", "a", "on")
    assert ((stored / "a.json").exists(), (volatile / "a.json").exists()) == (True, False)
    volatile.rename(place / "away")
    volatile.touch()
    for _ in range(2):
        assert daemon.cli("persist", "a", "off", check=False).returncode == 1
    volatile.unlink()
    (place / "away").rename(volatile)
    daemon.detach("a")
    assert not os.listdir(stored) + os.listdir(volatile)


def test_a_secret_that_was_typed_is_not_persisted(daemon: Daemon, place: Path) -> None:
    key = place / "key"
    key.write_text("secret")
    disk = luks_image(place / "a.luks", key)
    daemon.cli("attach", "a", str(disk), "--format", "luks", "--transport", "fuse", "-o", "key-file=-", stdin="secret")
    error = error_of(lambda: daemon.call("Persist", name="a", on=True))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert daemon.show("a")["persist"] is False
    daemon.detach("a")


def test_parked_volumes_are_flushed_and_ended_but_those_in_use_and_all_come_back(
    stopped: Daemon, place: Path
) -> None:
    stopped.start()
    source = image(place / "a.qcow2")
    device = stopped.device("a", source, format="qcow2", transport="fuse", persist=True)
    writes(device, 4096, b"kept")
    below = image(place / "a.raw", "raw")
    snapshot = stopped.device("s", below, snapshot=True, transport="fuse", persist=True)
    writes(snapshot, 0, b"changed")
    used = stopped.device("used", image(place / "used.raw", "raw"), transport="fuse", persist=True)
    with open(used, "rb"):
        said = stopped.cli("shutdown").stderr
        assert "volume used" in said
        assert stopped.names() == ["used"]
        assert stopped.online("used")
    run("qemu-img", "check", "-q", "-f", "qcow2", source)
    # Who takes the name for another source, or for the same, must not end what is kept of the volume.
    for other in (place / "missing.raw", below):
        refused = error_of(lambda other=other: stopped.attach("s", other, transport="fuse"))  # type: ignore[misc]
        assert refused.code is ErrorCode.VOLUME_BUSY
    assert error_of(lambda: stopped.detach("s")).code is ErrorCode.VOLUME_BUSY
    stopped.stop()
    stopped.start()
    for name in ("a", "s", "used"):
        eventually(lambda name=name: stopped.online(name), f"{name} is back")  # type: ignore[misc]
    assert reads(stopped.show("a")["device"], 4096, 4) == b"kept"
    assert reads(stopped.show("s")["device"], 0, 7) == b"changed"


class ServiceManager:
    """Receives what the daemon tells, as it comes."""

    def __init__(self, address: Path) -> None:
        self.inbox = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.inbox.bind(str(address))
        self.heard: list[tuple[float, bytes]] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while message := self.inbox.recv(4096):
            self.heard.append((time.monotonic(), message))

    def has_heard(self, beginning: bytes) -> bool:
        return any(message.startswith(beginning) for _, message in self.heard)

    def fed(self) -> list[float]:
        return [moment for moment, message in self.heard if message == b"WATCHDOG=1"]


def test_it_tells_when_it_is_ready_and_feeds_the_watchdog_while_a_volume_hangs(stopped: Daemon, place: Path) -> None:
    service = ServiceManager(place / "notify")
    patience = 6
    words = ["env", f"NOTIFY_SOCKET={place / 'notify'}", f"WATCHDOG_USEC={patience}000000"]
    stopped.start(wait=False, command=words)
    eventually(lambda: service.has_heard(b"READY=1"), "it is ready")
    assert stopped.names() == []
    source = image(place / "a.raw", "raw")
    qsd = stopped.attach("a", source, transport="fuse")["qsd_pid"]
    os.kill(qsd, signal.SIGSTOP)
    try:
        # It waits for an answer, for as long as it has patience.
        error = error_of(lambda: stopped.attach("a", source, transport="fuse"))
        assert error.code is ErrorCode.QSD_SILENT
        assert stopped.show("a")["state"] == "hung"
        before = len(service.fed())
        eventually(lambda: len(service.fed()) >= before + 2, "it is fed")
        assert service.has_heard(b"STATUS=1 volumes, 0 online; a hung")
    finally:
        os.kill(qsd, signal.SIGCONT)
    fed = service.fed()
    assert max(later - earlier for earlier, later in itertools.pairwise(fed)) < patience
    assert stopped.process is not None
    service.heard.clear()
    os.kill(stopped.process.pid, signal.SIGHUP)
    eventually(lambda: service.has_heard(b"RELOADING=1\nMONOTONIC_USEC="), "it reloads")
    eventually(lambda: service.has_heard(b"READY=1"), "it has reloaded")
    stopped.process.terminate()
    assert stopped.process.wait(20) == 0
    eventually(lambda: service.has_heard(b"STOPPING=1"), "it has told that it ends")


@contextmanager
def kept_socket(daemon: Daemon) -> Iterator[int]:
    """The API's socket, kept open as systemd does; yields its descriptor, which each daemon gets."""
    path = Path(daemon.layout.socket)
    path.parent.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        yield listener.fileno()


def test_a_socket_from_the_service_manager_outlives_the_daemon(stopped: Daemon) -> None:
    with kept_socket(stopped) as listener:
        stopped.start(listener=listener)
        assert stopped.names() == []
        assert stopped.stop() == 0
        assert Path(stopped.layout.socket).exists()
        stopped.start(listener=listener)
        assert stopped.stop() == 0
    stopped.start()


def test_who_asks_while_the_daemon_is_started_anew_gets_an_answer(stopped: Daemon) -> None:
    over, answers, errors = threading.Event(), itertools.count(), []

    def ask() -> None:
        while not over.is_set():
            try:
                stopped.call("List")
                next(answers)
            except StoragedError as error:
                errors.append(error)

    askers = [threading.Thread(target=ask) for _ in range(4)]
    with kept_socket(stopped) as listener:
        stopped.start(listener=listener)
        for asker in askers:
            asker.start()
        try:
            for number in (signal.SIGTERM, signal.SIGKILL) * 2:
                asked = next(answers)
                eventually(lambda asked=asked: next(answers) > asked + 50, "they ask")  # type: ignore[misc]
                assert stopped.process is not None
                stopped.process.send_signal(number)
                stopped.process.wait(60)
                stopped.start(listener=listener)
        finally:
            over.set()
            for asker in askers:
                asker.join()
        assert errors == []
        assert stopped.stop() == 0
    stopped.start()


def test_wait_ends_when_the_volume_is_online_and_says_why_it_is_not(stopped: Daemon, place: Path) -> None:
    write(stopped, "a-b", f"source = '{place / 'a.raw'}'\ntransport = 'fuse'")
    stopped.start()
    late = stopped.cli("wait", "a-b", "--timeout", "0.5", check=False)
    assert late.returncode == 1
    assert "[timeout]" in late.stderr
    assert stopped.cli("wait", "none", check=False).returncode == 1
    words = [*STORAGED, "--root", str(stopped.root), "wait", "--unit", r"a\x2db", "--timeout", "60"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as waiting:
        # A daemon that is started anew meanwhile is waited for.
        stopped.kill()
        image(place / "a.raw", "raw")
        stopped.start()
        said, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 0
    assert said.strip() == stopped.show("a-b")["device"]
    stopped.detach("a-b")
    assert leftovers(stopped.root) == []
