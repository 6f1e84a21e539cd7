"""The ssh backend against OpenSSH's sshd. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.backends.servers import Load
from tests.backends.ssh_server import SshServer
from tests.backends.within import opened_within
from tests.harness import Daemon, error_of, eventually, image, mounted, reads, refuses, run, size_of, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def disk(place: Path) -> Path:
    return image(place / "disk 1ä.raw", "raw")


@pytest.fixture
def server(place: Path) -> Iterator[SshServer]:
    found = SshServer(place / "sshd")
    found.start()
    yield found
    found.kill()


@pytest.fixture
def source(server: SshServer, disk: Path) -> str:
    return server.url(disk)


def agents(daemon: Daemon) -> list[str]:
    """The processes of a daemon's agents."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/comm"):
        with suppress(OSError):
            environment = (entry.parent / "environ").read_bytes()
            if entry.read_text() == "ssh-agent\n" and f"TMPDIR={daemon.root}/".encode() in environment:
                found.append(entry.parent.name)
    return found


def kinds(daemon: Daemon, name: str) -> list[str]:
    return [entry["kind"] for entry in daemon.show(name)["history"]]


def test_a_file_is_used_and_the_servers_own_client_reads_it(
    server: SshServer, daemon: Daemon, source: str, place: Path, disk: Path
) -> None:
    device = daemon.device("a", source, options=server.options)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    server.sftp(f'get "{disk}" "{place}/copy"')
    run("debugfs", "-R", f"dump /file {place}/file", place / "copy")
    assert (place / "file").read_bytes() == PATTERN


def test_an_empty_file_is_refused(server: SshServer, daemon: Daemon, source: str, disk: Path) -> None:
    os.truncate(disk, 0)
    refuses(daemon, ErrorCode.INVALID_SIZE, source, options=server.options)


def test_a_file_that_has_grown_is_served_at_its_old_size_and_nothing_of_it_is_written_over(
    server: SshServer, daemon: Daemon, source: str, disk: Path
) -> None:
    """To grow a file, QEMU's driver writes a zero where it believes that its end shall be."""
    daemon.attach("a", source, options=server.options)
    os.truncate(disk, 128 * MIB)
    writes(str(disk), 128 * MIB - len(PATTERN), PATTERN)
    for wish in ({}, {"size": 128 * MIB}):
        error = error_of(lambda wish=wish: daemon.call("Resize", name="a", **wish))  # type: ignore[misc]  # a default
        assert error.code is ErrorCode.UNSUPPORTED
        assert "storaged upgrade a" in error.hint
    device = daemon.replace_qsd("a")
    assert size_of(device) == 64 * MIB
    daemon.cli("resize", "a")
    assert size_of(device) == 128 * MIB
    assert reads(device, 128 * MIB - len(PATTERN), len(PATTERN)) == PATTERN
    assert disk.read_bytes()[-len(PATTERN):] == PATTERN


def test_the_key_is_seen_nowhere_and_the_agent_goes_with_the_volume(
    server: SshServer, daemon: Daemon, source: str
) -> None:
    daemon.attach("a", source, options=server.options)
    secret = b"".join(server.key.read_bytes().splitlines()[2:4])
    assert len(agents(daemon)) == 1
    for pid in (*agents(daemon), str(daemon.qsd("a"))):
        for name in ("cmdline", "environ"):
            assert secret not in Path(f"/proc/{pid}/{name}").read_bytes().replace(b"\n", b"")
    for directory, _, files in os.walk(daemon.layout.volume_dir("a")):
        for name in files:
            if Path(directory, name).is_file():
                assert secret not in Path(directory, name).read_bytes().replace(b"\n", b"")
    daemon.detach("a")
    assert agents(daemon) == []


def test_the_agent_outlives_the_daemon_and_a_successor_needs_no_other(
    server: SshServer, daemon: Daemon, source: str
) -> None:
    daemon.attach("a", source, options=server.options)
    before = agents(daemon)
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "it is adopted")
    assert agents(daemon) == before
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")
    assert agents(daemon) == before
    writes(str(daemon.show("a")["device"]), 0, PATTERN)


def test_an_agent_of_the_administrators(server: SshServer, daemon: Daemon, source: str, place: Path) -> None:
    key = server.new_key("user-key", "a passphrase")
    (server.place / "authorized-keys").write_bytes(Path(f"{key}.pub").read_bytes())
    path = place / "agent"
    askpass = place / "askpass"
    askpass.write_text("#!/bin/sh\necho a passphrase\n")
    askpass.chmod(0o755)
    agent = subprocess.Popen(["ssh-agent", "-D", "-a", str(path)], stdout=subprocess.DEVNULL)
    try:
        eventually(path.exists, "the agent listens")
        run(
            "env", f"SSH_AUTH_SOCK={path}", f"SSH_ASKPASS={askpass}", "SSH_ASKPASS_REQUIRE=force", "ssh-add", "-q", key,
        )
        options = {"host-key": server.fingerprint, "agent": str(path)}
        writes(daemon.device("a", source, options=options), 0, PATTERN)
        assert agents(daemon) == []
        daemon.detach("a")
    finally:
        agent.kill()
        agent.wait()


def test_read_only_is_read_only(server: SshServer, daemon: Daemon, source: str, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    device = daemon.device("a", source, read_only=True, options=server.options)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)


# What is refused


def test_a_server_that_is_down(server: SshServer, daemon: Daemon, source: str) -> None:
    server.kill()
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options=server.options)
    assert "Connection refused" in error.cause
    assert agents(daemon) == []


def test_a_key_that_the_server_does_not_know(server: SshServer, daemon: Daemon, source: str) -> None:
    options = {**server.options, "ssh-key": str(server.new_key("other-key"))}
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options=options)
    assert "authenticate" in error.cause
    assert "ssh-key" in error.hint
    assert agents(daemon) == []


@pytest.mark.parametrize("kind", ["protected", "no key", "public", "missing"])
def test_a_key_that_cannot_be_used(server: SshServer, daemon: Daemon, source: str, place: Path, kind: str) -> None:
    path = place / "key"
    if kind == "protected":
        path = server.new_key("other-key", "s3cret")
    elif kind == "no key":
        path.write_text("s3cret\n")
    elif kind == "public":
        path = Path(f"{server.key}.pub")
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, source, options={**server.options, "ssh-key": str(path)}
    )
    assert "s3cret" not in str(error)
    assert ("agent=" in error.hint) == (kind == "protected")


def test_a_host_key_that_is_another_one(server: SshServer, daemon: Daemon, source: str) -> None:
    options = server.options
    server.kill()
    server.new_key("host-key")
    server.start()
    error = refuses(daemon, ErrorCode.SOURCE_CHANGED, source, options=options)
    assert "host_key_check" in error.cause
    assert "fingerprint" in error.hint
    daemon.attach("a", source, options=server.options)


def test_the_host_key_must_be_known_unless_the_user_says_that_nothing_is_checked(
    server: SshServer, daemon: Daemon, source: str
) -> None:
    options = {"ssh-key": str(server.key)}
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options=options)
    assert "host-key=SHA256" in error.hint
    daemon.attach("a", source, options={**options, "host-key": "none"})
    daemon.detach("a")
    known = Path("/etc/ssh/ssh_known_hosts")
    before = known.read_text() if known.exists() else None
    try:
        with known.open("a") as file:
            file.write(f"[127.0.0.1]:{server.port} {server.public('host-key')}\n")
        daemon.attach("a", source, options=options)
        daemon.detach("a")
        server.kill()
        server.new_key("host-key")
        server.start()
        error = refuses(daemon, ErrorCode.SOURCE_CHANGED, source, options=options)
        assert "possible attack" in error.cause
    finally:
        if before is None:
            known.unlink()
        else:
            known.write_text(before)


def test_a_file_that_is_not_there(server: SshServer, daemon: Daemon, source: str) -> None:
    error = refuses(daemon, ErrorCode.SOURCE_MISSING, f"{source}-x", options=server.options)
    assert "No such file" in error.cause


def test_a_directory(server: SshServer, daemon: Daemon, place: Path) -> None:
    refuses(daemon, ErrorCode.OPEN_FAILED, server.url(place), options=server.options)


def test_a_user_that_is_not_there(server: SshServer, daemon: Daemon, source: str) -> None:
    refuses(daemon, ErrorCode.OPEN_FAILED, source, options={**server.options, "user": "nobody-of-that-name"})


def test_a_server_that_says_nothing_is_given_up_after_ten_seconds(
    server: SshServer, daemon: Daemon, disk: Path
) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        begin = time.monotonic()
        error = refuses(
            daemon, ErrorCode.OPEN_FAILED, f"ssh://127.0.0.1:{silent.getsockname()[1]}{disk}", options=server.options
        )
        assert 9 < time.monotonic() - begin < 15
    assert "Timeout" in error.cause


def test_what_is_not_safe_is_refused(server: SshServer, daemon: Daemon, source: str) -> None:
    refuses(daemon, ErrorCode.INVALID_SOURCE, source.replace("ssh://", "ssh://root:s3cret@"))
    refuses(daemon, ErrorCode.INVALID_SOURCE, f"{source}?host_key_check=no")
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, options={"host-key": "md5:" + "0" * 32})
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, options={**server.options, "ssh-key": "a key"})
    refuses(daemon, ErrorCode.UNSUPPORTED, "sheepdog:vdi")


def test_nobody_writes_twice(server: SshServer, daemon: Daemon, source: str, disk: Path) -> None:
    first = daemon.attach("a", source, options=server.options)
    other = f"ssh://root@127.0.0.1:0{server.port}/{os.path.dirname(disk)}/./{disk.name}"
    assert daemon.attach("a", other, options=server.options) == first
    refuses(daemon, ErrorCode.SOURCE_IN_USE, other, "b", options=server.options)
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b", read_only=True, options=server.options)


# Accidents


def test_the_server_is_killed_while_nothing_happens_and_the_volume_comes_back_with_it(
    server: SshServer, daemon: Daemon, source: str
) -> None:
    """QEMU's driver would fail each request for good."""
    writes(daemon.device("a", source, options=server.options), 0, PATTERN)
    pid = daemon.qsd("a")
    server.kill()
    eventually(
        lambda: "Connection refused" in (daemon.show("a")["failure"] or {"cause": ""})["cause"],
        "the volume says that nobody is there", 10,
    )
    server.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    device = str(daemon.show("a")["device"])
    assert reads(device, 0, len(PATTERN)) == PATTERN
    writes(device, MIB, PATTERN)
    told = "\n".join(entry["message"] for entry in daemon.show("a")["history"])
    assert "lost its server" in told
    assert kinds(daemon, "a")[-1] == "recovered"


def test_a_session_that_ends_while_the_server_stays_is_replaced_at_once(
    server: SshServer, daemon: Daemon, source: str
) -> None:
    daemon.attach("a", source, options=server.options)
    pid = daemon.qsd("a")
    begin = time.monotonic()
    server.end_sessions()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")
    # Looks come every 15 seconds: it was told.
    assert time.monotonic() - begin < 12
    writes(str(daemon.show("a")["device"]), 0, PATTERN)


def test_an_adopted_volume_is_watched_as_well(server: SshServer, daemon: Daemon, source: str) -> None:
    pid = int(daemon.attach("a", source, options=server.options)["qsd_pid"])
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "it is adopted")
    assert daemon.qsd("a") == pid
    server.end_sessions()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 10)


def test_the_server_dies_while_the_daemon_does_not_look(server: SshServer, daemon: Daemon, source: str) -> None:
    pid = int(daemon.attach("a", source, options=server.options)["qsd_pid"])
    daemon.kill()
    server.kill()
    server.start()
    daemon.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    writes(str(daemon.show("a")["device"]), 0, PATTERN)


def test_a_host_key_that_changed_meanwhile_is_not_taken(server: SshServer, daemon: Daemon, source: str) -> None:
    pid = int(daemon.attach("a", source, options=server.options)["qsd_pid"])
    server.kill()
    right = (server.place / "host-key").read_bytes()
    server.new_key("host-key")
    server.start()

    def is_refused() -> bool:
        failure = daemon.show("a")["failure"]
        return failure is not None and failure["code"] == ErrorCode.SOURCE_CHANGED

    eventually(is_refused, "the volume says that the key is another one", 40)
    server.kill()
    (server.place / "host-key").write_bytes(right)
    server.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)


def test_requests_in_flight_fail_when_the_server_is_killed_and_the_volume_comes_back(
    server: SshServer, daemon: Daemon, source: str, place: Path
) -> None:
    load = Load(daemon.device("a", source, options=server.options), place, seconds=20)
    pid = daemon.qsd("a")
    time.sleep(1)
    server.kill()
    eventually(lambda: not load.runs, "the load ends with an error")
    server.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    writes(str(daemon.show("a")["device"]), 0, PATTERN)


def test_the_server_is_stopped_under_load_and_goes_on(
    server: SshServer, daemon: Daemon, source: str, place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", source, options=server.options), place, seconds=3)
    pid = daemon.qsd("a")
    time.sleep(1)
    server.signal(signal.SIGSTOP)
    time.sleep(4)
    assert load.runs
    server.signal(signal.SIGCONT)
    load.succeeded()
    assert daemon.qsd("a") == pid
    daemon.detach("a")
    load.is_in(disk)


@pytest.mark.parametrize("away", ["killed", "stopped"])
def test_a_detach_by_force_ends_while_the_server_is_away(
    server: SshServer, daemon: Daemon, source: str, place: Path, away: str
) -> None:
    load = Load(daemon.device("a", source, options=server.options), place, seconds=4)
    time.sleep(1)
    if away == "killed":
        server.kill()
    else:
        server.signal(signal.SIGSTOP)
    time.sleep(1)
    daemon.detach("a", force=True, timeout=30)
    assert daemon.names() == []
    assert agents(daemon) == []
    load.kill()


def test_all_but_its_user_is_taken_from_it(server: SshServer, daemon: Daemon, source: str) -> None:
    opened_within(daemon, source, root=True, options=server.options)
