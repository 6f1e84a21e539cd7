"""storaged image on sources behind real servers, without a daemon."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tests.backends.ceph_cluster import POOL, USER, CephCluster
from tests.backends.iscsi_server import SECRET, IscsiServer
from tests.backends.iscsi_server import USER as ISCSI_USER
from tests.backends.nfs_server import NfsServer
from tests.backends.servers import EXPORT, NbdServer, network
from tests.backends.ssh_server import SshServer
from tests.backends.tls import key_file, with_keys
from tests.backends.web_server import PASSWORD, Nginx
from tests.backends.web_server import USER as WEB_USER
from tests.harness import Daemon, as_json, eventually, image, image_command, processes_of, run

MIB = 1 << 20
pytestmark = pytest.mark.timeout(100)


def data(path: Path, mib: int = 4) -> Path:
    path.write_bytes(os.urandom(MIB) * mib)
    return path


def failure(root: Daemon, *words: object) -> str:
    """Run a command that has to fail; return what it says on stderr."""
    done = image_command(root, *words, check=False)
    assert done.status == 1, done
    return done.stderr


def options(said: dict[str, str], flag: str = "-o") -> list[str]:
    return [word for key, value in said.items() for word in (flag, f"{key}={value}")]


@contextmanager
def slowly(root: Daemon, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """A convert of more than 4 MiB of data, which takes half a minute; it is interrupted at the end."""
    command = [*root.cli_command(), "image", "convert", "-r", "256K", *map(str, words)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        eventually(
            lambda: process.poll() is not None or any(_is_convert(pid) for pid in processes_of(root)), "it converts"
        )
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == 130
    # What is behind a server cannot be removed from here.
    assert (b"half-written" in said) == (":" in str(words[-1]))


def _is_convert(pid: str) -> bool:
    with suppress(OSError):
        return b"qemu-img\0convert\0" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def seen_of(*secrets: bytes) -> list[str]:
    """Where in the command lines and environments of all processes one of the secrets is."""
    found = []
    wanted = [*secrets, *map(base64.b64encode, secrets)]
    for entry in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            with suppress(OSError):
                text = (entry / name).read_bytes()
                found += [f"{entry.name} {name}" for secret in wanted if secret in text]
    return found


# NBD -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def nbd(place: Path) -> Iterator[NbdServer]:
    """A server of ``disk`` that shares a key with its clients."""
    key_file(place / "keys" / "keys.psk", "alice")
    found = NbdServer(place / "disk", socket_path=place / "nbd.sock", options=with_keys(place / "keys"))
    yield found
    found.kill()


def nbd_source(place: Path) -> str:
    return f"nbds+unix:///{quote(EXPORT)}?socket={quote(str(place / 'nbd.sock'))}"


def nbd_options(place: Path) -> dict[str, str]:
    return {"tls-psk-file": str(place / "keys/keys.psk"), "tls-user": "alice"}


def test_a_disk_behind_nbd_with_tls_is_written_and_read(nbd: NbdServer, root: Daemon, place: Path) -> None:
    data(place / "disk", 8)
    nbd.start()
    source, said = nbd_source(place), nbd_options(place)
    local = image(place / "a.qcow2", "qcow2", "8M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 1M 1M", local)
    image_command(root, "convert", *options(said, "--target-option"), local, source)
    assert (place / "disk").read_bytes() == bytes(MIB) + bytes([5]) * MIB + bytes(6 * MIB)
    image_command(root, "convert", *options(said), source, place / "b.raw")
    image_command(root, "compare", *options(said), source, place / "b.raw")
    assert as_json(image_command(root, "info", *options(said), "--json", source).stdout)["virtual-size"] == 8 * MIB
    too_small = image(place / "c.qcow2", "qcow2", "9M")
    said_of_it = failure(root, "convert", *options(said, "--target-option"), too_small, source)
    assert "smaller than input" in said_of_it
    assert "half-written" not in said_of_it
    assert "[invalid-argument]" in failure(root, "create", *options(said), source, "8M")


def test_an_image_behind_nbd_is_made_and_its_header_looked_at(nbd: NbdServer, root: Daemon, place: Path) -> None:
    data(place / "disk", 8)
    nbd.start()
    source, said = nbd_source(place), options(nbd_options(place))
    image_command(root, "create", "-f", "qcow2", *said, "-o", "compat=0.10", "-o", "cluster_size=4K", source, "6M")
    found = as_json(image_command(root, "info", "-f", "qcow2", *said, "--json", source).stdout)
    assert (found["virtual-size"], found["cluster-size"], found["format-specific"]["data"]["compat"]) == (
        6 * MIB, 4096, "0.10"
    )
    image_command(root, "snapshot", "-f", "qcow2", *said, "-c", "before", source)
    image_command(root, "check", "-f", "qcow2", *said, source)
    local = data(place / "a.raw", 6)
    image_command(root, "convert", "-n", "-O", "qcow2", *options(nbd_options(place), "--target-option"), local, source)
    image_command(root, "compare", "-f", "qcow2", *said, source, local)
    nbd.kill()
    # A header that names a file of this host is not followed.
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-F", "raw", "-b", "/etc/hostname", place / "disk")
    nbd.start()
    for command in (["info"], ["check"], ["map"], ["resize", "+1M"]):
        words = [command[0], "-f", "qcow2", *said, source, *command[1:]]
        assert "[backing-not-allowed]" in failure(root, *words)
    assert "[wrong-format]" in failure(root, "info", "-f", "vdi", *said, source)


def test_what_one_daemon_has_attached_is_refused_however_it_is_spelled(
    nbd: NbdServer, daemon: Daemon, place: Path
) -> None:
    data(place / "disk", 4)
    nbd.options = ()
    nbd.start()
    daemon.attach("a", f"nbd:unix:{place}/nbd.sock:exportname={EXPORT}")
    source = nbd_source(place).replace("nbds", "nbd")
    for words in (["convert", source, place / "b"], ["convert", place / "disk", source], ["info", source]):
        said = failure(daemon, *words)
        assert "[source-in-use]" in said
        assert "volume a" in said


# Ceph ------------------------------------------------------------------------------------------------------------


def test_an_image_of_ceph_is_made_filled_read_and_resized(cluster: CephCluster, root: Daemon, place: Path) -> None:
    key = place / "bob.key"
    key.write_text(cluster.key(USER) + "\n")
    key.chmod(0o600)
    source = f"rbd:{POOL}/a:conf=/dev/null:id={USER}"
    said: dict[str, Any] = {"mon-host": cluster.monitor, "cephx-key-file": str(key)}
    local = data(place / "a.raw", 8)
    image_command(root, "convert", *options(said, "--target-option"), local, source)
    assert cluster.exported(f"{POOL}/a", place / "exported").read_bytes() == local.read_bytes()
    # It is there by now.
    assert "[invalid-argument]" in failure(root, "convert", *options(said, "--target-option"), local, source)
    image_command(root, "resize", *options(said), source, "9M")
    cluster.rbd("snap", "create", "--no-progress", f"{POOL}/a@s")
    with slowly(root, *options(said), source.replace("/a:", "/a@s:"), place / "b.raw"):
        assert seen_of(cluster.key(USER).encode()) == []
    assert not (place / "b.raw").exists()
    image_command(root, "convert", *options(said), source.replace("/a:", "/a@s:"), place / "b.raw")
    assert (place / "b.raw").read_bytes() == local.read_bytes() + bytes(MIB)
    # Another format, and one that has to grow.
    image_command(root, "create", "-f", "qcow2", *options(said), source.replace("/a:", "/c:"), "4M")
    run("qemu-img", "check", "-f", "qcow2", cluster.exported(f"{POOL}/c", place / "exported"))
    assert "[source-missing]" in failure(root, "info", *options(said), source.replace("/a:", "/x:"))
    wrong = {**said, "cephx-key-file": "-", "open-timeout": "1"}
    assert cluster.key("reader") not in failure_with_stdin(root, cluster.key("reader"), *options(wrong), source)


def failure_with_stdin(root: Daemon, secret: str, *words: str) -> str:
    done = root.cli("image", "info", *words, stdin=secret, check=False)
    assert done.returncode == 1
    assert "[open-failed]" in done.stderr
    return done.stdout + done.stderr


# iSCSI, SSH, HTTP, NFS -------------------------------------------------------------------------------------------


def test_a_lun_with_a_password(root: Daemon, place: Path) -> None:
    disk = image(place / "disk.raw", "raw", "8M")
    server = IscsiServer(place, {1: disk}, user=ISCSI_USER)
    key = place / "key"
    key.write_text(SECRET + "\n")
    said = {"user": ISCSI_USER, "password-file": str(key)}
    local = data(place / "a.raw", 8)
    try:
        server.start()
        with slowly(root, *options(said, "--target-option"), local, server.source()):
            assert seen_of(SECRET.encode()) == []
        image_command(root, "convert", *options(said, "--target-option"), local, server.source())
        assert disk.read_bytes() == local.read_bytes()
        image_command(root, "compare", *options(said), server.source(), local)
        key.write_text("not the right one")
        assert "[open-failed]" in failure(root, "info", *options(said), server.source())
    finally:
        server.kill()


def test_a_file_behind_ssh_with_a_key(root: Daemon, place: Path) -> None:
    server = SshServer(place / "sshd")
    disk = place / "disk 1ä.qcow2"
    local = data(place / "a.raw", 8)
    try:
        server.start()
        said = server.options
        target = [*options(said, "--target-option"), "-O", "qcow2"]
        with slowly(root, *target, local, server.url(disk)):
            assert any("ssh-agent" in Path(f"/proc/{pid}/comm").read_text() for pid in processes_of(root))
        assert "[invalid-argument]" in failure(root, "convert", *target, local, server.url(disk))
        disk.unlink()
        image_command(root, "convert", *target, local, server.url(disk))
        run("qemu-img", "compare", "-f", "raw", "-F", "qcow2", local, disk)
        image_command(root, "amend", "-f", "qcow2", *options(said), "-o", "lazy_refcounts=on", server.url(disk))
        image_command(root, "convert", "-f", "qcow2", *options(said), server.url(disk), place / "b.raw")
        assert (place / "b.raw").read_bytes() == local.read_bytes()
        assert "[source-missing]" in failure(root, "info", *options(said), server.url(place / "none"))
    finally:
        server.kill()


def test_a_file_of_a_web_server_with_a_password_is_read_only(root: Daemon, place: Path) -> None:
    server = Nginx(place)
    disk = image(server.root / "disk.qcow2", "qcow2", "10M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 9 1M 8M", disk)
    key = place / "key"
    key.write_text(PASSWORD + "\n")
    said = {"user": WEB_USER, "password-file": str(key), "fetch": "whole"}
    source = f"{server.url}/private/disk.qcow2"
    try:
        server.start()
        image_command(root, "convert", "-f", "qcow2", *options(said), source, place / "a.raw")
        assert (place / "a.raw").read_bytes() == bytes(MIB) + bytes([9]) * 8 * MIB + bytes(MIB)
        with slowly(root, "-f", "qcow2", *options(said), source, place / "b.raw"):
            assert seen_of(PASSWORD.encode()) == []
        said_of_it = failure(root, "resize", "-f", "qcow2", *options(said), source, "5M")
        assert "can only be read" in said_of_it
        key.write_text("wrong")
        assert "[open-failed]" in failure(root, "info", *options(said), source)
    finally:
        server.kill()


def test_a_file_behind_nfs_is_made(root: Daemon, place: Path) -> None:
    exported = place / "exported"
    exported.mkdir()
    local = data(place / "a.raw", 4)
    with network(f"si{os.getpid()}", "198.18.7") as (address, _):
        server = NfsServer(place, exported, netns=f"si{os.getpid()}")
        try:
            server.start()
            source = f"nfs://{address}{exported}/b"
            image_command(root, "convert", local, source)
            assert (exported / "b").read_bytes() == local.read_bytes()
            image_command(root, "create", "-f", "qcow2", f"nfs://{address}{exported}/c", "1G")
            run("qemu-img", "check", "-f", "qcow2", exported / "c")
            image_command(root, "resize", "-f", "qcow2", f"nfs://{address}{exported}/c", "2G")
            assert "[invalid-argument]" in failure(root, "create", f"nfs://{address}{exported}/c", "1G")
        finally:
            server.end()
