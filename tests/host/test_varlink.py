"""Others talk to the daemon, too: systemd's varlinkctl (257 or newer), and clients that misbehave."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
from pathlib import Path

import pytest

from storaged.host.unixsock import connect_unix
from tests import debian
from tests.harness import Daemon, eventually, image, run


@pytest.fixture(scope="session")
def varlinkctl() -> list[str]:
    """The words that run a varlinkctl of systemd 257 or newer: this host's, or one of Debian 13 from a directory."""
    here = shutil.which("varlinkctl")
    if here is not None:
        version = re.match(r"systemd (\d+)", run(here, "--version").stdout)
        if version is not None and int(version[1]) >= 257:
            return [here]
    return debian.program(
        "trixie", "varlinkctl", "usr/bin/varlinkctl", "systemd", "libc6", "base-files", libraries="systemd"
    )


def test_varlinkctl_understands_the_interface(varlinkctl: list[str], daemon: Daemon) -> None:
    seen = run(*varlinkctl, "introspect", daemon.layout.socket, "io.storaged").stdout
    for method in ("Attach", "Detach", "Resize", "List", "Show", "Watch"):
        assert f"method {method}" in seen
    for error in ("Failed", "NoSuchVolume", "VolumeExists", "InUse", "InvalidArgument"):
        assert f"error {error}" in seen
    assert "io.storaged" in run(*varlinkctl, "info", daemon.layout.socket).stdout
    assert "org.varlink.service" in run(*varlinkctl, "list-interfaces", daemon.layout.socket).stdout


def test_varlinkctl_attaches_and_detaches(varlinkctl: list[str], daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")

    def call(method: str, **parameters: object) -> subprocess.CompletedProcess[str]:
        return run(
            *varlinkctl, "--json=short", "call", daemon.layout.socket, f"io.storaged.{method}",
            json.dumps(parameters), check=False,
        )

    volume = json.loads(call("Attach", name="a", source=str(source), format="qcow2").stdout)["volume"]
    assert volume["state"] == "online"
    assert Path(volume["device"]).is_block_device()
    assert [entry["name"] for entry in json.loads(call("List").stdout)["volumes"]] == ["a"]
    refused = call("Show", name="b")
    assert refused.returncode != 0
    assert "io.storaged.NoSuchVolume" in refused.stderr
    assert call("Detach", name="a").returncode == 0


def test_varlinkctl_watches(varlinkctl: list[str], daemon: Daemon, place: Path) -> None:
    with subprocess.Popen(
        [*varlinkctl, "--json=short", "--more", "call", daemon.layout.socket, "io.storaged.Watch", "{}"],
        stdout=subprocess.PIPE, text=True,
    ) as watcher:
        assert watcher.stdout is not None
        assert json.loads(watcher.stdout.readline().lstrip("\x1e"))["event"]["kind"] == "ready"
        daemon.attach("a", image(place / "a.raw", "raw"))
        assert json.loads(watcher.stdout.readline().lstrip("\x1e"))["event"]["volume"] == "a"
        watcher.terminate()


def ask(connection: socket.socket, message: object) -> dict[str, object]:
    """Send one message, whatever it is, and return the reply."""
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    connection.sendall(data + b"\0")
    reply = b""
    while not reply.endswith(b"\0"):
        chunk = connection.recv(65536)
        assert chunk, "the daemon closed the connection"
        reply += chunk
    found: dict[str, object] = json.loads(reply[:-1])
    return found


@pytest.mark.parametrize(
    ("message", "error"),
    [
        ({"method": "io.storaged.Nonsense", "parameters": {}}, "org.varlink.service.MethodNotFound"),
        ({"method": "io.nonsense.List", "parameters": {}}, "org.varlink.service.InterfaceNotFound"),
        ({"method": "io.storaged.Show", "parameters": {}}, "org.varlink.service.InvalidParameter"),
        ({"method": "io.storaged.Show", "parameters": {"name": 7}}, "org.varlink.service.InvalidParameter"),
        ({"method": "io.storaged.Show", "parameters": {"name": "a", "x": 1}}, "org.varlink.service.InvalidParameter"),
        ({"method": "io.storaged.Watch", "parameters": {}}, "org.varlink.service.ExpectedMore"),
        ({"method": "io.storaged.Attach", "parameters": {"name": "../x", "source": "/x"}},
         "io.storaged.InvalidArgument"),
        ({"method": "io.storaged.Attach", "parameters": {"name": "a", "source": "/x", "timeout": 0}},
         "io.storaged.InvalidArgument"),
    ],
)
def test_a_wrong_call_gets_a_typed_error_and_the_connection_goes_on(
    daemon: Daemon, message: dict[str, object], error: str
) -> None:
    with connect_unix(daemon.layout.socket) as connection:
        connection.settimeout(10)
        assert ask(connection, message)["error"] == error
        assert ask(connection, {"method": "io.storaged.List", "parameters": {}})["parameters"] == {"volumes": []}


def test_a_client_that_sends_garbage_or_goes_away_disturbs_nobody(daemon: Daemon) -> None:
    assert daemon.process is not None
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")
    before = len(list(descriptors.iterdir()))
    clients = []
    for data in (b"garbage\0", b"\xff\xfe\0", b"[]\0", b'{"method": "io.storaged.List"', b""):
        for more in (b"", b'{"method":"io.storaged.Watch","parameters":{},"more":true}\0'):
            connection = connect_unix(daemon.layout.socket)
            connection.sendall(data + more)
            clients.append(connection)
    assert daemon.names() == []
    for connection in clients:
        connection.close()
    eventually(lambda: len(list(descriptors.iterdir())) <= before, "the daemon let go of them")
