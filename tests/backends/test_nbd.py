"""The nbd backend against qemu-nbd and nbdkit. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.accidents import Backed, ServerAccidents
from tests.backends.servers import EXPORT, Load, NbdServer, network
from tests.harness import Daemon, as_json, error_of, eventually, image, mounted, reads, refuses, run, size_of, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
PORT = 10809
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def disk(place: Path) -> Path:
    return image(place / "disk.raw", "raw")


@pytest.fixture
def server(place: Path, disk: Path) -> Iterator[NbdServer]:
    """A server on a unix socket."""
    found = NbdServer(disk, socket_path=place / "nbd sock")
    found.start()
    yield found
    found.kill()


@pytest.fixture
def source(place: Path) -> str:
    return f"nbd+unix:///{quote(EXPORT)}?socket={quote(str(place / 'nbd sock'))}"


@pytest.fixture(scope="module")
def wire() -> Iterator[tuple[str, str]]:
    """A network of its own: the server's address, and the cable."""
    with network(f"sd{os.getpid()}") as found:
        yield found


@pytest.fixture
def far(wire: tuple[str, str], disk: Path) -> Iterator[NbdServer]:
    """A server behind the cable."""
    found = NbdServer(disk, at=(wire[0], PORT), netns=f"sd{os.getpid()}")
    found.start()
    yield found
    found.kill()


def of(address: str) -> str:
    return f"nbd://{address}/{quote(EXPORT)}"


def is_used(daemon: Daemon, source: str, place: Path, disk: Path) -> None:
    """Attach, make a filesystem, write, detach, and look into the image by hand."""
    device = daemon.device("a", source)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    with mounted(str(disk), place / "mnt", "-o", "loop,ro") as directory:
        assert (directory / "file").read_bytes() == PATTERN


def test_a_server_on_a_unix_socket(server: NbdServer, daemon: Daemon, source: str, place: Path, disk: Path) -> None:
    is_used(daemon, source, place, disk)
    assert run("nbdinfo", "--size", source).stdout.strip() == str(disk.stat().st_size)


def test_a_server_on_the_network(
    far: NbdServer, daemon: Daemon, wire: tuple[str, str], place: Path, disk: Path
) -> None:
    is_used(daemon, of(wire[0]), place, disk)


def test_a_tree_of_nodes_names_the_same_disk_as_its_uri(
    server: NbdServer, daemon: Daemon, source: str, place: Path, disk: Path
) -> None:
    node = {"driver": "nbd", "server": {"type": "unix", "path": str(place / "nbd sock")}, "export": EXPORT}
    tree = "json:" + json.dumps({"driver": "raw", "file": node})
    device = daemon.device("a", tree)
    assert daemon.show("a")["source"] == source
    assert daemon.device("a", source) == device
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b")
    daemon.detach("a")
    is_used(daemon, tree, place, disk)


def test_nbdkit_that_is_slow(daemon: Daemon, place: Path, disk: Path, source: str) -> None:
    server = NbdServer(disk, socket_path=place / "nbd sock")
    server.run(
        "nbdkit", "-f", "-U", str(place / "nbd sock"), "--filter=delay", "file", str(disk), "delay-write=20ms",
        "delay-read=5ms",
    )
    try:
        is_used(daemon, source, place, disk)
    finally:
        server.kill()


def test_an_error_of_the_server_is_an_error_of_the_device_and_the_volume_goes_on(
    daemon: Daemon, place: Path, disk: Path, source: str
) -> None:
    server, switch = NbdServer(disk, socket_path=place / "nbd sock"), place / "errors"
    server.run(
        "nbdkit", "-f", "-U", str(place / "nbd sock"), "--filter=error", "file", str(disk), "error-pwrite=EIO",
        f"error-file={switch}", "error-pwrite-rate=1",
    )
    try:
        device = daemon.device("a", source)
        writes(device, 0, PATTERN)
        switch.touch()
        with pytest.raises(OSError, match=os.strerror(5)):
            writes(device, MIB, PATTERN)
        switch.unlink()
        writes(device, MIB, PATTERN)
        assert daemon.online("a")
        daemon.detach("a")
        assert disk.read_bytes()[MIB:MIB + len(PATTERN)] == PATTERN
    finally:
        server.kill()


def test_read_only_is_read_only(server: NbdServer, daemon: Daemon, source: str, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    device = daemon.device("a", source, read_only=True)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(device, 0, b"x" * 512)


# What is refused


def test_a_server_that_is_down(daemon: Daemon) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        error = refuses(
            daemon, ErrorCode.OPEN_FAILED, f"nbd://127.0.0.1:{nobody.getsockname()[1]}/x",
            options={"open-timeout": "1"},
        )
    assert "Connection refused" in error.cause


def test_a_socket_that_is_not_there(daemon: Daemon, place: Path) -> None:
    error = refuses(
        daemon, ErrorCode.SOURCE_MISSING, f"nbd+unix:///?socket={place}/nothing", options={"open-timeout": "1"}
    )
    assert "nothing" in error.cause


def test_a_host_that_is_not_known(daemon: Daemon) -> None:
    error = refuses(daemon, ErrorCode.OPEN_FAILED, "nbd://nobody.invalid/x", options={"open-timeout": "1"})
    assert "nobody.invalid" in error.cause


def test_an_export_that_the_server_does_not_have(server: NbdServer, daemon: Daemon, place: Path) -> None:
    source = f"nbd+unix:///other?socket={quote(str(place / 'nbd sock'))}"
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options={"open-timeout": "1"})
    assert "export not available" in error.cause


def test_an_empty_disk_is_refused(server: NbdServer, daemon: Daemon, source: str, disk: Path) -> None:
    grows(server, disk, 0)
    refuses(daemon, ErrorCode.INVALID_SIZE, source)


def test_a_silent_server_is_given_up_at_the_deadline(daemon: Daemon, place: Path) -> None:
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(place / "silent"))
        silent.listen()
        begin = time.monotonic()
        error = refuses(
            daemon, ErrorCode.OPEN_FAILED, f"nbd:unix:{place}/silent", options={"open-timeout": "1"}
        )
        assert 1 <= time.monotonic() - begin < 5
    assert "timeout" in error.cause


def test_an_address_that_swallows_everything_is_given_up_at_the_deadline(
    daemon: Daemon, wire: tuple[str, str]
) -> None:
    run("ip", "link", "set", wire[1], "down")
    run("ip", "link", "set", wire[1], "up")
    run("ip", "neigh", "replace", "198.51.100.2", "lladdr", "02:00:00:00:00:01", "dev", wire[1])
    try:
        begin = time.monotonic()
        error = refuses(daemon, ErrorCode.OPEN_FAILED, of(wire[0]), options={"open-timeout": "1"})
        assert 1 <= time.monotonic() - begin < 5
    finally:
        run("ip", "neigh", "del", "198.51.100.2", "dev", wire[1])
    assert "timeout" in error.cause


def test_an_export_that_is_read_only_is_attached_read_only_or_not(
    server: NbdServer, daemon: Daemon, source: str
) -> None:
    server.kill()
    server.start("-r")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options={"open-timeout": "1"})
    assert "Permission denied" in error.cause
    assert "--read-only" in error.hint
    daemon.attach("a", source, read_only=True)


def test_what_is_not_safe_is_refused(server: NbdServer, daemon: Daemon, source: str) -> None:
    refuses(daemon, ErrorCode.INVALID_SOURCE, "nbd+unix:///x?socket=relative")
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, options={"reconnect-delay": "-1"})


def test_nobody_writes_twice(server: NbdServer, daemon: Daemon, source: str, place: Path) -> None:
    first = daemon.attach("a", source)
    (place / "link").symlink_to(place)
    other = f"nbd:unix:{place}/link/nbd sock:exportname={EXPORT}"
    assert daemon.attach("a", other) == first
    refuses(daemon, ErrorCode.SOURCE_IN_USE, other, "b")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b", read_only=True)
    # A server that was restarted has another socket, and is the same server.
    server.kill()
    server.start()
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b")


def test_readers_share(server: NbdServer, daemon: Daemon, source: str) -> None:
    daemon.attach("a", source, read_only=True)
    daemon.attach("b", source, read_only=True)


# Accidents. QEMU looks for a lost server after 1, 2, 4, … and at most 16 seconds (nbd/client-connection.c).


@pytest.fixture
def backed(server: NbdServer, source: str) -> Backed:
    """For the accidents that befall all servers."""
    return Backed(server, source)


class TestAccidents(ServerAccidents):
    """Those that befall all servers."""

    soon: ClassVar = {"open-timeout": "1"}


def test_the_network_is_cut_for_twenty_seconds(
    far: NbdServer, daemon: Daemon, wire: tuple[str, str], place: Path, disk: Path
) -> None:
    load = Load(daemon.device("a", of(wire[0])), place, seconds=3)
    time.sleep(1)
    run("ip", "link", "set", wire[1], "down")
    time.sleep(20)
    assert load.runs
    run("ip", "link", "set", wire[1], "up")
    load.succeeded()
    daemon.detach("a")
    load.is_in(disk)


def test_requests_fail_after_the_delay_that_was_said_and_the_device_goes_on_afterwards(
    server: NbdServer, daemon: Daemon, source: str
) -> None:
    device = daemon.device("a", source, options={"reconnect-delay": "1"})
    server.kill()
    begin = time.monotonic()
    with pytest.raises(OSError, match=os.strerror(5)):
        writes(device, 0, PATTERN)
    assert time.monotonic() - begin < 10
    server.start()
    eventually(lambda: readable(device), "the device works again")
    writes(device, 0, PATTERN)


def readable(device: str) -> bool:
    try:
        reads(device, 8 * MIB, 4096)
    except OSError:
        return False
    return True


def test_a_disk_that_shrinks_ends_qsd_and_not_the_daemon(
    server: NbdServer, daemon: Daemon, source: str, disk: Path
) -> None:
    """QSD aborts on a read past the new end; what is below it is still right."""
    device = daemon.device("a", source)
    writes(device, 0, PATTERN)
    pid = daemon.qsd("a")
    server.kill()
    os.truncate(disk, 8 * MIB)
    server.start()
    with pytest.raises(OSError, match=f"{os.strerror(5)}|{os.strerror(107)}"):
        reads(device, 32 * MIB, 4096)
    eventually(lambda: daemon.show("a")["qsd_pid"] != pid, "QSD has ended")
    assert disk.read_bytes()[:len(PATTERN)] == PATTERN
    # Each try finds the disk too small; between them it waits, longer and longer.
    eventually(lambda: (daemon.show("a")["failure"] or {}).get("code") == ErrorCode.SOURCE_CHANGED, "it says why")
    assert str(8 * MIB) in daemon.show("a")["failure"]["message"]
    assert daemon.show("a")["state"] == "failed"
    time.sleep(3)
    tries = [entry for entry in daemon.show("a")["history"] if entry["kind"] == "failure"]
    assert sum(entry["times"] for entry in tries) <= 4
    server.kill()
    os.truncate(disk, 64 * MIB)
    server.start()
    eventually(lambda: daemon.online("a"), "it is served again", 40)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def grows(server: NbdServer, disk: Path, size: int) -> None:
    """The server comes back with a larger disk."""
    server.kill()
    os.truncate(disk, size)
    server.start()


def test_a_disk_that_has_grown_is_served_at_its_old_size_until_a_resize(
    server: NbdServer, daemon: Daemon, source: str, disk: Path
) -> None:
    writes(daemon.device("a", source), 0, PATTERN)
    grows(server, disk, 128 * MIB)
    device = daemon.replace_qsd("a")
    assert size_of(device) == 64 * MIB
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert daemon.show("a")["source_size"] == 128 * MIB
    daemon.cli("resize", "a")
    assert size_of(device) == 128 * MIB
    writes(device, 128 * MIB - len(PATTERN), PATTERN)
    daemon.detach("a")
    assert disk.read_bytes()[-len(PATTERN):] == PATTERN


def test_a_disk_that_has_grown_is_taken_over_while_qsd_goes_on_once_it_is_connected_anew(
    server: NbdServer, daemon: Daemon, source: str, disk: Path
) -> None:
    device = daemon.device("a", source)
    grows(server, disk, 128 * MIB)
    reads(device, 0, 4096)  # QEMU's driver notices the loss, and connects again
    assert size_of(device) == 64 * MIB
    daemon.cli("resize", "a")
    assert size_of(device) == 128 * MIB


def test_a_disk_of_which_qsd_has_not_noticed_that_it_has_grown_needs_another_qsd(
    daemon: Daemon, place: Path, disk: Path, source: str
) -> None:
    """nbdkit looks at the file for each client: those that are connected keep the size that they were told."""
    server = NbdServer(disk, socket_path=place / "nbd sock")
    server.run("nbdkit", "-f", "-U", str(place / "nbd sock"), "file", str(disk))
    try:
        daemon.attach("a", source)
        os.truncate(disk, 128 * MIB)
        error = error_of(lambda: daemon.call("Resize", name="a"))
        assert error.code is ErrorCode.UNSUPPORTED
        assert "storaged upgrade a" in error.hint
        daemon.call("Upgrade", name="a")
        assert size_of(daemon.show("a")["device"]) == 64 * MIB
        daemon.call("Resize", name="a")
        assert size_of(daemon.show("a")["device"]) == 128 * MIB
    finally:
        server.kill()


def test_a_snapshot_does_not_mind_that_its_source_has_grown(
    server: NbdServer, daemon: Daemon, source: str, disk: Path
) -> None:
    writes(daemon.device("a", source, snapshot=True), 0, PATTERN)
    grows(server, disk, 128 * MIB)
    writes(str(disk), 64 * MIB, PATTERN)
    device = daemon.replace_qsd("a")
    assert size_of(device) == 64 * MIB
    assert reads(device, 0, len(PATTERN)) == PATTERN
    daemon.call("Resize", name="a", size=96 * MIB)
    # What the source has there is none of the snapshot's.
    assert reads(device, 64 * MIB, len(PATTERN)) == bytes(len(PATTERN))


def test_what_qemu_args_prints_opens_it(server: NbdServer, daemon: Daemon, source: str, disk: Path) -> None:
    writes(str(disk), 0, PATTERN)
    daemon.attach("a", source)
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    daemon.detach("a")
    drive = found["drive"][found["drive"].index("-drive") + 1]
    options = drive.removeprefix("if=none,id=sd-a,")
    assert options != drive
    run("qemu-img", "compare", "--image-opts", options, f"driver=raw,file.filename={disk}")
    blockdev = found["blockdev"][found["blockdev"].index("-blockdev") + 1]
    assert as_json(blockdev)["file"]["driver"] == "nbd"
    tree = {key: value for key, value in as_json(blockdev).items() if key != "node-name"}
    run("qemu-io", "-c", f"read -P 0 {32 * MIB} 4096", f"json:{json.dumps(tree)}")


def test_a_device_is_taken_away_by_force_though_the_kernel_lets_nobody_open_it(
    server: NbdServer, daemon: Daemon, source: str
) -> None:
    device = daemon.device("a", source)
    server.signal(signal.SIGSTOP)
    with (
        subprocess.Popen(["dd", "if=/dev/zero", f"of={device}", "bs=4k", "count=1", "conv=fsync"]) as writer,
        # Now and then it gets to hold the lock that an open needs, and waits with it for what was written.
        subprocess.Popen(["blockdev", "--rereadpt", device]) as reader,
    ):
        eventually(lambda: " D " in Path(f"/proc/{writer.pid}/stat").read_text(), "it waits")
        daemon.detach("a", force=True, timeout=25)
        assert writer.wait(20) != 0
        reader.wait(20)
    server.signal(signal.SIGCONT)
