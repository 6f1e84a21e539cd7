"""storaged as a storage provider of systemd, with a real daemon and a real device: through the socket to the disk."""

from __future__ import annotations

import concurrent.futures
import errno
import json
import os
import socket
import stat
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode
from storaged.host import disk
from storaged.host.unixsock import connect_unix
from tests.harness import Daemon, error_of, eventually, image, run, with_config, writes

INTERFACE = "io.systemd.StorageProvider"
MIB = 1 << 20


@pytest.fixture
def daemon(stopped: Daemon) -> Daemon:
    """A daemon below a directory in which systemd runs, as far as the daemon can see."""
    (stopped.root / "run" / "systemd").mkdir(parents=True)
    stopped.start()
    return stopped


def ask(
    daemon: Daemon, method: str, *, more: bool = False, **parameters: Any
) -> tuple[list[dict[str, Any]], list[int]]:
    """All replies, and the descriptors that came with them, as whoever finds the socket in systemd's directory."""
    replies: list[dict[str, Any]] = []
    with connect_unix(daemon.layout.provider_hook) as connection:
        connection.settimeout(30)
        call: dict[str, Any] = {"method": f"{INTERFACE}.{method}", "parameters": parameters}
        connection.sendall(json.dumps({**call, "more": True} if more else call).encode() + b"\0")
        data, fds = b"", []
        while not replies or replies[-1].get("continues"):
            chunk, further, _, _ = socket.recv_fds(connection, 65536, 4)
            assert chunk, "the daemon closed the connection"
            fds += further
            *messages, data = (data + chunk).split(b"\0")
            replies += [json.loads(message) for message in messages]
    return replies, fds


@contextmanager
def acquired(daemon: Daemon, name: str, **how: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    """The descriptor of a volume's device, and what was said of it."""
    (reply,), (fd,) = ask(daemon, "Acquire", name=name, **how)
    try:
        assert reply["parameters"]["fileDescriptorIndex"] == 0
        yield fd, reply["parameters"]
    finally:
        os.close(fd)


def refusal(daemon: Daemon, **how: Any) -> str:
    (reply,), fds = ask(daemon, "Acquire", **how)
    assert fds == []
    return str(reply["error"]).removeprefix(f"{INTERFACE}.")


def test_what_was_written_to_the_volume_is_read_through_the_descriptor(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.qcow2"), format="qcow2", transport="fuse")
    writes(device, MIB, b"from the device")
    with acquired(daemon, "a") as (fd, said):
        assert said == {"fileDescriptorIndex": 0, "type": "blk", "readOnly": False}
        assert os.fstat(fd).st_rdev == os.stat(device).st_rdev
        assert os.pread(fd, 15, MIB) == b"from the device"
        os.pwrite(fd, b"through the descriptor".ljust(4096), 2 * MIB)
        os.fsync(fd)
        # Whoever has it is a user of the device as any other: nothing is taken away from under it.
        assert error_of(lambda: daemon.detach("a")).code is ErrorCode.DEVICE_IN_USE
    daemon.detach("a", force=True)  # without, it would wait for another one that may be on its way
    run("qemu-img", "convert", "-O", "raw", place / "a.qcow2", place / "a.raw")
    assert (place / "a.raw").read_bytes()[2 * MIB:].startswith(b"through the descriptor")


def test_a_descriptor_that_is_on_its_way_is_waited_for(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"), transport="fuse")
    ours, theirs = socket.socketpair()
    with ours, theirs:
        with acquired(daemon, "a") as (fd, _):
            socket.send_fds(ours, [b"x"], [fd])
        # As when systemd-vmspawn has given it to a QEMU that has not taken it yet: no process has it.
        early = error_of(lambda: daemon.detach("a", timeout=2))
        assert (early.code, daemon.online("a")) == (ErrorCode.DEVICE_IN_USE, True)
        assert "on its way" in early.cause
        with concurrent.futures.ThreadPoolExecutor() as pool:
            detach = pool.submit(lambda: error_of(lambda: daemon.detach("a")))
            eventually(lambda: daemon.states()["a"] == "detaching", "it waits")
            _, (taken,), _, _ = socket.recv_fds(theirs, 1, 1)
            try:
                assert detach.result(30).code is ErrorCode.DEVICE_IN_USE
                assert os.pwrite(taken, bytes(512), 0) == 512
                os.fsync(taken)
            finally:
                os.close(taken)
    daemon.detach("a")


def test_a_volume_is_mounted_through_the_descriptor_as_mount_storage_does(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.qcow2"), format="qcow2", transport="fuse")
    run("mkfs.ext4", "-q", device)
    directory = place / "mnt"
    directory.mkdir()
    with acquired(daemon, "a", readOnly=False, requestAs="blk") as (fd, _):
        subprocess.run(
            ["mount", "-c", "-t", "ext4", "-o", "rw", f"/proc/self/fd/{fd}", directory], pass_fds=[fd], check=True,
            timeout=60,
        )
    (directory / "file").write_text("there")
    run("umount", directory)
    daemon.detach("a", force=True)


def test_a_read_only_volume_is_given_for_reading(daemon: Daemon, place: Path) -> None:
    daemon.device("a", image(place / "a.raw", "raw"), transport="fuse", read_only=True)
    assert refusal(daemon, name="a", readOnly=False) == "ReadOnlyVolume"
    with acquired(daemon, "a") as (fd, said):
        assert said["readOnly"]
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            os.pwrite(fd, bytes(512), 0)


def test_volumes_are_listed_and_what_is_not_there_or_not_online_is_refused(daemon: Daemon, place: Path) -> None:
    assert ask(daemon, "ListVolumes", more=True) == ([{"error": f"{INTERFACE}.NoSuchVolume"}], [])
    daemon.attach("a", image(place / "a.raw", "raw"), transport="fuse")
    daemon.attach("b", image(place / "b.raw", "raw", "128M"), transport="fuse", read_only=True)
    daemon.attach("vm", image(place / "vm.raw", "raw"), transport="vhost-user")
    replies, _ = ask(daemon, "ListVolumes", more=True)
    assert [reply["parameters"] for reply in replies] == [
        {"name": "a", "type": "blk", "readOnly": False, "sizeBytes": 64 * MIB},
        {"name": "b", "type": "blk", "readOnly": True, "sizeBytes": 128 * MIB},
    ]
    daemon.call("Rescue", name="a")
    for name, error in (("a", "io.systemd.System"), ("vm", "NoSuchVolume"), ("nosuch", "NoSuchVolume")):
        assert refusal(daemon, name=name) == error
    assert refusal(daemon, name="b", requestAs="reg") == "TypeNotSupported"
    daemon.detach("b")
    assert refusal(daemon, name="b") == "NoSuchVolume"


def test_a_device_number_that_is_another_disk_by_now_is_not_opened(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    number = disk.diskseq(device)
    os.close(disk.open_same(device, number, write=True))
    with pytest.raises(OSError, match=os.strerror(errno.ENXIO)):
        disk.open_same(device, number - 1, write=False)


def test_the_socket_is_there_as_long_as_the_daemon_and_is_made_anew_after_a_kill(daemon: Daemon) -> None:
    hook = Path(daemon.layout.provider_hook)

    def serves() -> bool:
        ((reply,), _) = ask(daemon, "ListTemplates", more=True)
        return bool(reply["error"] == f"{INTERFACE}.NoSuchTemplate")

    assert stat.S_IMODE(hook.lstat().st_mode) == 0o600
    assert serves()
    daemon.kill()
    daemon.start()
    eventually(serves, "the new daemon is found")
    assert daemon.stop() == 0
    assert list(hook.parent.iterdir()) == []
    # Somebody else's: the daemon runs without it, and leaves it as it is.
    hook.write_text("somebody else's")
    daemon.start()
    assert daemon.names() == []
    assert daemon.stop() == 0
    assert hook.read_text() == "somebody else's"


def test_the_socket_group_gets_no_descriptors(stopped: Daemon) -> None:
    (stopped.root / "run" / "systemd").mkdir(parents=True)
    with_config(stopped, 'socket_group = "daemon"\n')
    stopped.start()

    def connect_as_member(path: str) -> str:
        # Past the mode of the socket: the daemon's own check is what is looked at.
        done = run(
            "setpriv", "--reuid=1", "--regid=1", "--clear-groups", "--inh-caps=-all", "/usr/bin/python3", "-c",
            "import json,socket,sys; s=socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); "
            "s.sendall(json.dumps({'method': sys.argv[2], 'more': True, 'parameters': {}}).encode() + b'\\0'); "
            "print(json.loads(s.recv(65536)[:-1])['error'])",
            path, f"{INTERFACE}.ListVolumes", check=False,
        )
        return done.stdout.strip() or done.stderr.splitlines()[-1]

    assert "PermissionError" in connect_as_member(stopped.layout.provider_hook)
    os.chmod(stopped.layout.provider_hook, 0o666)
    assert connect_as_member(stopped.layout.provider_hook) == "org.varlink.service.PermissionDenied"
