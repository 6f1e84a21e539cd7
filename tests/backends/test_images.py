"""Image formats, snapshots and secrets on a source behind a server (nbd: the formats do not know the difference)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.servers import EXPORT, NbdServer
from tests.harness import Daemon, as_json, eventually, image, mounted, refuses, run

PASSPHRASE = "correct horse battery\n"
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def disk(place: Path) -> Path:
    return place / "disk"


@pytest.fixture
def server(place: Path, disk: Path) -> Iterator[NbdServer]:
    """It serves the bytes of ``disk``, which the tests make."""
    found = NbdServer(disk, socket_path=place / "nbd.sock")
    yield found
    found.kill()


@pytest.fixture
def source(place: Path) -> str:
    return f"nbd+unix:///{quote(EXPORT)}?socket={quote(str(place / 'nbd.sock'))}"


def encrypted(path: Path, format: str, *options: str) -> None:
    """An encrypted image of 16 MiB."""
    key = path.with_name("key")
    key.write_text(PASSPHRASE)
    command = ["qemu-img", "create", "-q", "-f", format, "--object", f"secret,id=k,file={key}", *options]
    # Its benchmark of the key derivation fails now and then on a busy machine.
    for _ in range(10):
        if run(*command, path, "16M", check=False).returncode == 0:
            return
    raise AssertionError(f"qemu-img cannot make {path}")


def use(device: str, place: Path) -> None:
    """Make a filesystem and write a file."""
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)


def is_used(device: str, place: Path) -> None:
    """The file is there."""
    with mounted(device, place / "mnt", "-o", "ro") as directory:
        assert (directory / "file").read_bytes() == PATTERN


@pytest.mark.parametrize("format", ["qcow2", "vdi"])
def test_an_image_behind_a_server_is_a_disk(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, place: Path, format: str
) -> None:
    image(disk, format, "32M")
    # Room for the image to grow: an export has the size of its file.
    os.truncate(disk, 64 << 20)
    server.start()
    use(daemon.device("a", source, format=format), place)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    is_used(str(daemon.show("a")["device"]), place)
    daemon.detach("a")
    server.kill()
    run("qemu-img", "check", "-q", "-f", format, disk)


def test_an_image_of_another_format_is_refused(daemon: Daemon, server: NbdServer, source: str, disk: Path) -> None:
    image(disk, "raw", "1M")
    server.start()
    refuses(daemon, ErrorCode.WRONG_FORMAT, source, format="qcow2")


@pytest.mark.parametrize("backing", ["/etc/hostname", "nbd://localhost/x"])
def test_an_image_that_names_another_file_is_refused_and_it_is_not_opened(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, backing: str
) -> None:
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", backing, disk, "1M")
    server.start()
    error = refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, source, format="qcow2")
    assert backing in error.message


def test_an_image_with_an_external_data_file_is_refused(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, place: Path
) -> None:
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={place}/data", disk, "1M")
    server.start()
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, source, format="qcow2")


def test_a_snapshot_leaves_what_is_behind_the_server_as_it_is(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, place: Path
) -> None:
    image(disk, "raw", "16M")
    before = disk.read_bytes()
    server.start()
    use(daemon.device("a", source, snapshot=True), place)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    is_used(str(daemon.show("a")["device"]), place)
    daemon.detach("a")
    assert disk.read_bytes() == before


def test_a_snapshot_is_not_put_on_a_disk_of_another_size(
    daemon: Daemon, server: NbdServer, source: str, disk: Path
) -> None:
    image(disk, "raw", "16M")
    server.start()
    daemon.attach("a", source, snapshot=True)
    server.kill()
    os.truncate(disk, 8 << 20)
    server.start()
    daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["state"] == "failed", "it is refused")
    failure = daemon.show("a")["failure"]
    assert failure["code"] == ErrorCode.SOURCE_CHANGED
    daemon.detach("a", force=True)


@pytest.mark.parametrize(("format", "wishes"), [("luks", ()), ("qcow2", ("--encrypt", "luks"))])
def test_a_passphrase_from_standard_input_serves_successors_too_and_is_seen_nowhere(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, place: Path, format: str, wishes: tuple[str, ...]
) -> None:
    extra = ("-o", "encrypt.format=luks,encrypt.key-secret=k,encrypt.iter-time=10") if format == "qcow2" else (
        "-o", "key-secret=k,iter-time=10"
    )
    encrypted(disk, format, *extra)
    os.truncate(disk, 64 << 20)
    server.start()
    command = ("attach", "a", source, "--format", format, *wishes, "-o", "key-file=-")
    device = daemon.cli(*command, stdin=PASSPHRASE).stdout.strip()
    use(device, place)
    secret_is_nowhere(daemon, PASSPHRASE.strip())
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    daemon.stop()
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    is_used(str(daemon.show("a")["device"]), place)
    daemon.detach("a")


def test_a_passphrase_that_is_wrong_or_not_there_is_said(
    daemon: Daemon, server: NbdServer, source: str, disk: Path, place: Path
) -> None:
    encrypted(disk, "luks", "-o", "key-secret=k,iter-time=10")
    server.start()
    wrong = daemon.cli("attach", "a", source, "--format", "luks", "-o", "key-file=-", check=False, stdin="wrong")
    assert wrong.returncode == 1
    assert ErrorCode.OPEN_FAILED in wrong.stderr
    assert "passphrase" in wrong.stderr
    nothing = daemon.cli("attach", "a", source, "--format", "luks", "-o", "key-file=-", check=False)
    assert ErrorCode.INVALID_ARGUMENT in nothing.stderr
    kept = ("attach", "a", source, "--format", "luks", "-o", "key-file=-", "--persist")
    assert ErrorCode.INVALID_ARGUMENT in daemon.cli(*kept, check=False, stdin=PASSPHRASE).stderr
    refuses(daemon, ErrorCode.OPEN_FAILED, source, format="luks", options={"key-file": "credential:nobody"})
    refuses(daemon, ErrorCode.OPEN_FAILED, source, format="luks", options={"key-file": str(place / "missing")})
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, format="luks", options={"key-file": "my secret"})
    assert "my secret" not in str(error)


def test_a_credential_of_the_daemons_unit_is_a_place_for_a_passphrase(
    stopped: Daemon, server: NbdServer, source: str, disk: Path, place: Path
) -> None:
    encrypted(disk, "luks", "-o", "key-secret=k,iter-time=10")
    server.start()
    (place / "credentials").mkdir(mode=0o700)
    (place / "credentials" / "disk-key").write_text(PASSPHRASE)
    stopped.start(command=["env", f"CREDENTIALS_DIRECTORY={place}/credentials"])
    stopped.attach("a", source, format="luks", options={"key-file": "credential:disk-key"})
    stopped.detach("a")


def test_discards_and_zeroes_do_as_said(daemon: Daemon, place: Path) -> None:
    disk = image(place / "disk", "raw", "16M")

    def used() -> int:
        return disk.stat().st_blocks * 512

    def write(device: str, what: str) -> None:
        run("dd", f"if={what}", f"of={device}", "bs=1M", "count=8", "oflag=direct", "conv=fsync")

    device = daemon.device("a", disk, options={"discard": "ignore", "cache": "none"})
    write(device, "/dev/urandom")
    full = used()
    subprocess.run(["blkdiscard", device], check=False, timeout=30)
    assert used() == full >= 8 << 20
    daemon.detach("a")
    device = daemon.device("a", disk, options={"detect-zeroes": "unmap"})
    write(device, "/dev/zero")
    daemon.detach("a")
    assert used() < 1 << 20


def test_the_arguments_for_qemu_read_the_image_where_the_daemon_does(
    daemon: Daemon, server: NbdServer, source: str, disk: Path
) -> None:
    image(disk, "qcow2", "16M")
    server.start()
    daemon.attach("a", source, format="qcow2", read_only=True)
    words = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)["blockdev"]
    node = as_json(words[words.index("-blockdev") + 1])
    del node["node-name"]
    told = run("qemu-img", "info", "-U", "--output=json", f"json:{json.dumps(node)}")
    assert as_json(told.stdout)["virtual-size"] == 16 << 20


def test_another_secret_for_a_volume_that_works_is_refused_and_the_good_one_stays(
    daemon: Daemon, server: NbdServer, source: str, disk: Path
) -> None:
    encrypted(disk, "luks", "-o", "key-secret=k,iter-time=10")
    server.start()
    command = ("attach", "a", source, "--format", "luks", "-o", "key-file=-")
    device = daemon.cli(*command, stdin=PASSPHRASE).stdout
    assert daemon.cli(*command, stdin=PASSPHRASE).stdout == device
    wrong = daemon.cli(*command, stdin="wrong", check=False)
    assert ErrorCode.VOLUME_EXISTS in wrong.stderr
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    daemon.detach("a")


#: An nbdkit plugin: the first read of the begin of the image gets one image, all later ones the other.
SWITCHES = """
case "$1" in
  get_size) stat -L -c %s {first} ;;
  can_write | can_flush) exit 0 ;;
  pwrite) cat >{place}/dropped ;;
  flush) ;;
  pread)
    file={second}
    [ -e {place}/seen ] || file={first}
    [ "$4" != 0 ] || touch {place}/seen
    dd if=$file iflag=skip_bytes,count_bytes,fullblock skip=$4 count=$3 bs=64k status=none ;;
  *) exit 2 ;;
esac
"""


def test_a_server_that_shows_another_header_afterwards_gets_no_file_of_this_host(
    daemon: Daemon, server: NbdServer, source: str, place: Path
) -> None:
    victim = place / "victim"
    victim.write_bytes(b"V" * (1 << 20))
    image(place / "first", "qcow2", "1M")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={victim},data_file_raw=on", place / "second", "1M")
    size = max((place / name).stat().st_size for name in ("first", "second"))
    for name in ("first", "second"):
        os.truncate(place / name, size)
    victim.write_bytes(b"V" * (1 << 20))
    plugin = place / "plugin"
    plugin.write_text(f"#!/bin/sh\n{SWITCHES.format(place=place, first=place / 'first', second=place / 'second')}")
    plugin.chmod(0o755)
    server.run("nbdkit", "-f", "-U", str(place / "nbd.sock"), "-e", EXPORT, "sh", str(plugin))
    refuses(daemon, ErrorCode.SOURCE_CHANGED, source, format="qcow2")
    assert (place / "seen").exists()
    assert victim.read_bytes() == b"V" * (1 << 20)


def test_a_passphrase_in_a_fifo_is_refused_and_the_source_is_free_afterwards(
    daemon: Daemon, place: Path
) -> None:
    disk = place / "disk"
    encrypted(disk, "luks", "-o", "key-secret=k,iter-time=10")
    os.mkfifo(place / "fifo")
    refuses(daemon, ErrorCode.OPEN_FAILED, disk, format="luks", options={"key-file": str(place / "fifo")})
    daemon.attach("a", disk, format="luks", options={"key-file": str(place / "key")})
    daemon.detach("a")
