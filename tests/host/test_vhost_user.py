"""vhost-user with a guest that uses the disk: what this transport promises, which gives no device of the host."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.guest import Emulator, Guest, GuestError, emulator, guest, vhost_user
from tests.harness import Daemon, error_of, eventually, image, leftovers, mounted, refuses, run

# The first needs the guest's kernel, which may have to be downloaded; and each boots a guest.
pytestmark = pytest.mark.timeout(400)

#: Writes what is in /ref to several places at once, reads it back from the disk, and compares.
LOAD = (
    "for i in 0 1 2 3; do dd if=/ref of=/dev/vda bs=4k seek=$((i*4096)) conv=notrunc,fsync 2>/dev/null & done; wait;"
    " echo 3 >/proc/sys/vm/drop_caches; for i in 0 1 2 3; do"
    " dd if=/dev/vda bs=4k skip=$((i*4096)) count=2048 2>/dev/null | cmp - /ref || exit_status=1; done;"
    " [ -z \"$exit_status\" ]"
)
MAKE_REF = "dd if=/dev/urandom of=/ref bs=1M count=8 2>/dev/null"


def attach(daemon: Daemon, source: object, name: str = "a", **wishes: object) -> str:
    """Attach for a virtual machine and return the socket."""
    volume = daemon.attach(name, source, transport="vhost-user", **wishes)
    assert volume["device"] is None
    assert volume["link"] is None
    assert volume["state"] == "online"
    return str(volume["socket"])


def attribute(machine: Guest, name: str, disk: str = "vda") -> int:
    """A number out of the guest's sysfs."""
    return int(machine.run(f"cat /sys/block/{disk}/{name}"))


def is_used_by(daemon: Daemon, qemu: Emulator) -> None:
    """A detach is refused, names the QEMU, and changes nothing."""
    before = daemon.show("a")
    error = error_of(lambda: daemon.detach("a"))
    assert error.code is ErrorCode.DEVICE_IN_USE
    assert [user.partition(" (")[0] for user in error.users] == [f"process {qemu.process.pid}"]
    after = daemon.show("a")
    assert {**after, "since": 0} == {**before, "since": 0}
    assert stat.S_ISSOCK(os.stat(str(after["socket"])).st_mode)
    assert os.listdir(os.path.dirname(str(after["socket"]))) == ["a.sock"]


def nothing_is_left(daemon: Daemon) -> None:
    """No volume, and no socket."""
    assert leftovers(daemon.root) == []
    assert os.listdir(daemon.layout.vm_sockets_dir) == []


def test_a_filesystem_that_a_guest_makes_is_in_the_image_after_detach(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    with guest(place / "vm", vhost_user(attach(daemon, source, format="qcow2"))) as machine:
        machine.run("mke2fs /dev/vda && mount -t ext2 /dev/vda /mnt")
        machine.run("dd if=/dev/urandom of=/mnt/file bs=64k count=64 2>/dev/null && umount /mnt")
        machine.run("echo 3 >/proc/sys/vm/drop_caches; mount -t ext2 /dev/vda /mnt")
        digest = machine.run("sha256sum </mnt/file").split()[0]
        machine.run("umount /mnt")
        assert attribute(machine, "ro") == 0
        assert attribute(machine, "size") == (64 << 20) // 512
    daemon.detach("a")
    nothing_is_left(daemon)
    run("qemu-img", "check", source)
    raw = place / "a.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, raw)
    run("e2fsck", "-fn", raw)
    with mounted(str(raw), place / "mnt", "-o", "ro,loop") as directory:
        assert run("sha256sum", directory / "file").stdout.split()[0] == digest


def test_a_guest_has_several_disks_each_as_it_was_wished(daemon: Daemon, place: Path) -> None:
    sources = {name: image(place / f"{name}.raw", "raw") for name in ("small", "large", "fixed", "scratch")}
    before = {name: source.read_bytes() for name, source in sources.items()}
    sockets = [
        attach(daemon, sources["small"], "small", options={"logical-block-size": "512"}),
        attach(daemon, sources["large"], "large", options={"logical-block-size": "4096"}),
        attach(daemon, sources["fixed"], "fixed", read_only=True),
        attach(daemon, sources["scratch"], "scratch", snapshot=True),
    ]
    with guest(place / "vm", vhost_user(*sockets)) as machine:
        assert attribute(machine, "queue/logical_block_size", "vda") == 512
        assert attribute(machine, "queue/logical_block_size", "vdb") == 4096
        assert [attribute(machine, "ro", disk) for disk in ("vda", "vdb", "vdc", "vdd")] == [0, 0, 1, 0]
        machine.fails("dd if=/dev/urandom of=/dev/vdc bs=4k count=1 conv=fsync")
        for disk, letter in (("vda", "A"), ("vdb", "B"), ("vdd", "D")):
            machine.run(f"yes {letter} | dd of=/dev/{disk} bs=4k count=16 iflag=fullblock conv=fsync")
        machine.run("echo 3 >/proc/sys/vm/drop_caches")
        assert machine.run("dd if=/dev/vdd bs=4k count=16 2>/dev/null | uniq | head -n 1") == "D"
    for name in sources:
        daemon.detach(name)
    nothing_is_left(daemon)
    assert sources["small"].read_bytes()[:65536] == b"A\n" * 32768
    assert sources["large"].read_bytes()[:65536] == b"B\n" * 32768
    for name in ("fixed", "scratch"):
        assert sources[name].read_bytes() == before[name]


def test_discard_frees_room_in_the_image(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    with guest(place / "vm", vhost_user(attach(daemon, source))) as machine:
        machine.run("dd if=/dev/urandom of=/dev/vda bs=1M count=16 conv=fsync")
        full = source.stat().st_blocks
        assert full >= (16 << 20) // 512
        machine.run("blkdiscard /dev/vda")
        assert source.stat().st_blocks < full / 4
        machine.run("mke2fs /dev/vda && mount -t ext2 /dev/vda /mnt")
        machine.run("dd if=/dev/urandom of=/mnt/file bs=1M count=16 conv=fsync && sync")
        full = source.stat().st_blocks
        machine.run("rm /mnt/file && sync && fstrim /mnt")
        assert source.stat().st_blocks < full / 4


def test_a_guest_sees_a_resize_where_qemu_can_tell_it(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    path = attach(daemon, source)
    if tuple(map(int, daemon.show("a")["qsd_version"].split(".")[:2])) < (8, 1):
        error = error_of(lambda: daemon.call("Resize", name="a", size=128 << 20))
        assert error.code is ErrorCode.UNSUPPORTED
        assert source.stat().st_size == daemon.show("a")["size"] == 64 << 20
        return
    with guest(place / "vm", vhost_user(path)) as machine:
        daemon.cli("resize", "a", "128M")
        eventually(lambda: attribute(machine, "size") == (128 << 20) // 512, "the guest sees the new size")
        machine.run("dd if=/dev/urandom of=/dev/vda bs=1M seek=127 count=1 conv=fsync,notrunc")
    daemon.detach("a")
    assert source.stat().st_size == 128 << 20


def test_a_disk_that_a_guest_uses_is_refused_until_it_is_unplugged(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    with guest(place / "vm", vhost_user(attach(daemon, source))) as machine:
        is_used_by(daemon, machine)
        machine.run("yes A | dd of=/dev/vda bs=4k count=16 iflag=fullblock conv=fsync")
        machine.qmp.execute("device_del", id="device0")
        eventually(lambda: machine.run("ls /sys/block 2>/dev/null; true") == "", "the disk is unplugged")
        # Until the chardev goes, too, QEMU is connected, and could plug it in again.
        is_used_by(daemon, machine)

        def removed() -> bool:
            try:
                machine.qmp.execute("chardev-remove", id="disk0")
            except GuestError:
                return False
            return True

        eventually(removed, "QEMU lets go of the socket")
        daemon.detach("a")
        nothing_is_left(daemon)
        assert source.read_bytes()[:65536] == b"A\n" * 32768


def test_a_detach_by_force_lets_a_guest_wait_until_the_volume_is_back(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    path = attach(daemon, source)
    with guest(place / "vm", vhost_user(path)) as machine:
        machine.run("yes A | dd of=/dev/vda bs=4k count=16 iflag=fullblock conv=fsync")
        (note,) = daemon.detach("a", force=True)
        assert f"process {machine.process.pid} (" in note
        nothing_is_left(daemon)
        assert source.read_bytes()[:65536] == b"A\n" * 32768
        machine.send("yes B | dd of=/dev/vda bs=4k count=16 iflag=fullblock conv=fsync")
        with pytest.raises(TimeoutError):
            machine.answer(3)
        assert attach(daemon, source) == path
        machine.answer()
    daemon.detach("a")
    assert source.read_bytes()[:65536] == b"B\n" * 32768


def test_a_rescue_takes_the_socket_away_and_a_resume_brings_it_back(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    path = attach(daemon, source)
    assert error_of(lambda: daemon.call("Rescue", name="a", keep=True)).code is ErrorCode.UNSUPPORTED
    with guest(place / "vm", vhost_user(path)) as machine:
        error = error_of(lambda: daemon.call("Upgrade", name="a"))
        assert error.code is ErrorCode.UNSUPPORTED
        is_used_by(daemon, machine)
        (note,) = daemon.call("Rescue", name="a")["notes"]
        assert f"process {machine.process.pid} (" in note
        assert not os.path.exists(path)
        assert daemon.show("a")["state"] == "rescued"
        assert daemon.call("Resume", name="a")["volume"]["socket"] == path
        machine.run("yes B | dd of=/dev/vda bs=4k count=16 iflag=fullblock conv=fsync")
    before = daemon.qsd("a")
    assert daemon.call("Upgrade", name="a")["volume"]["qsd_pid"] != before
    daemon.detach("a")
    assert source.read_bytes()[:65536] == b"B\n" * 32768


def test_a_guest_goes_on_when_the_daemon_is_killed_and_the_next_one_takes_over(daemon: Daemon, place: Path) -> None:
    path = attach(daemon, image(place / "a.raw", "raw"))
    with guest(place / "vm", vhost_user(path)) as machine:
        machine.run(MAKE_REF)
        before = daemon.show("a")
        machine.send(LOAD)
        daemon.kill()
        machine.answer()
        daemon.start()
        eventually(lambda: daemon.online("a"), "adopted")
        after = daemon.show("a")
        assert (after["qsd_pid"], after["socket"]) == (before["qsd_pid"], path)
        is_used_by(daemon, machine)
        # As a daemon leaves it that dies in the middle of a detach.
        daemon.kill()
        os.rename(path, os.path.join(os.path.dirname(path), ".a.sock"))
        daemon.start()
        eventually(lambda: daemon.online("a"), "adopted")
        is_used_by(daemon, machine)
        machine.run(LOAD)
        assert "Unexpected" not in machine.says(), "the connection is the first one"
    daemon.detach("a")
    nothing_is_left(daemon)


def test_a_guest_that_was_idle_goes_on_with_the_successor_of_a_dead_qsd(daemon: Daemon, place: Path) -> None:
    """Idle: nothing tells the successor of a request that was under way (README.md, Virtual machines)."""
    path = attach(daemon, image(place / "a.raw", "raw"))
    with guest(place / "vm", vhost_user(path)) as machine:
        machine.run(MAKE_REF)
        for _ in range(3):
            former = daemon.kill_qsd("a")
            machine.send(LOAD)
            eventually(lambda former=former: daemon.replaced("a", former), "replaced")  # type: ignore[misc]
            machine.answer()
        is_used_by(daemon, machine)
    daemon.detach("a")
    nothing_is_left(daemon)


def test_a_guest_without_reconnect_waits_for_ever_when_qsd_dies(daemon: Daemon, place: Path) -> None:
    with guest(place / "vm", vhost_user(attach(daemon, image(place / "a.raw", "raw")), reconnect=False)) as machine:
        former = daemon.kill_qsd("a")
        eventually(lambda: daemon.replaced("a", former), "replaced")
        machine.send("dd if=/dev/vda of=/dev/null bs=4k count=1")
        with pytest.raises(TimeoutError):
            machine.answer(5)
        # It is not connected any more, and so is no reason to refuse.
        daemon.detach("a")


def test_a_machine_keeps_its_disk_when_the_record_is_lost(daemon: Daemon, place: Path) -> None:
    path = attach(daemon, image(place / "a.raw", "raw"))
    former = daemon.qsd("a")
    with emulator(place / "vm", vhost_user(path)) as qemu:
        daemon.kill()
        (Path(daemon.layout.volume_dir("a")) / "record.json").write_text("{")
        daemon.start()
        eventually(lambda: daemon.show("a")["state"] == "failed", "refused")
        assert daemon.show("a")["failure"]["code"] == ErrorCode.ADOPTION_REFUSED
        assert daemon.show("a")["socket"] == path
        error = error_of(lambda: daemon.detach("a"))
        assert error.code is ErrorCode.DEVICE_IN_USE
        assert error.users[0].startswith(f"process {qemu.process.pid} (")
        os.kill(former, 0)
    daemon.detach("a")
    nothing_is_left(daemon)


def test_a_dead_qsd_can_be_detached(daemon: Daemon, place: Path) -> None:
    attach(daemon, image(place / "a.raw", "raw"))
    daemon.kill_qsd("a")
    daemon.detach("a")
    nothing_is_left(daemon)


def test_a_qsd_that_dies_before_its_socket_is_in_its_place_leaves_nothing(stopped: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault="after export")
    error_of(lambda: stopped.attach("a", source, transport="vhost-user"))
    stopped.wait_dead()
    os.kill(int((Path(stopped.layout.volume_dir("a")) / "qsd.pid").read_text()), signal.SIGKILL)
    stopped.start()
    eventually(lambda: stopped.online("a"), "a successor serves it")
    stopped.detach("a")
    nothing_is_left(stopped)


def test_what_a_qsd_put_in_the_place_of_its_socket_is_removed(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    attach(daemon, source)
    other = Path(daemon.layout.volume_dir("a")) / "tmp" / "vm.sock"
    (other / "x").mkdir(parents=True)
    daemon.kill_qsd("a")
    eventually(lambda: Path(str(daemon.show("a")["socket"])).is_socket(), "a successor has a socket")
    eventually(lambda: daemon.online("a"), "a successor serves it")
    daemon.detach("a")
    nothing_is_left(daemon)


def test_a_socket_that_was_removed_comes_back(daemon: Daemon, place: Path) -> None:
    path = attach(daemon, image(place / "a.raw", "raw"))
    os.unlink(path)
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "online again")
    with emulator(place / "vm", vhost_user(path)) as qemu:
        is_used_by(daemon, qemu)


def test_a_machine_in_another_network_namespace_is_seen(daemon: Daemon, place: Path) -> None:
    path = attach(daemon, image(place / "a.raw", "raw"))
    qemu = Emulator(place / "vm", ["-S", *vhost_user(path)], before=["unshare", "--net"])
    try:
        is_used_by(daemon, qemu)
    finally:
        qemu.end()
    daemon.detach("a")


def test_the_socket_belongs_to_its_owner(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    connect = [sys.executable, "-c", "import socket, sys; socket.socket(socket.AF_UNIX).connect(sys.argv[1])"]

    def can_connect(path: str, user: str, group: str) -> bool:
        drop = ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups"]
        return run(*drop, *connect, path, check=False).returncode == 0

    path = attach(daemon, source)
    seen = os.stat(path)
    assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (0, 0, 0o660)
    assert not can_connect(path, "nobody", "nogroup")
    daemon.detach("a")
    for owner, user, group, others in (
        ("nobody", 65534, 65534, ("daemon", "daemon")),
        ("daemon:nogroup", 1, 65534, ("bin", "bin")),
        ("12345:54321", 12345, 54321, ("nobody", "nogroup")),
    ):
        path = attach(daemon, source, options={"socket-owner": owner})
        seen = os.stat(path)
        assert (seen.st_uid, seen.st_gid, stat.S_IMODE(seen.st_mode)) == (user, group, 0o660)
        assert can_connect(path, str(user), "bin")
        assert can_connect(path, "bin", str(group))
        assert not can_connect(path, *others)
        former = daemon.kill_qsd("a")
        eventually(lambda former=former: daemon.replaced("a", former), "replaced")  # type: ignore[misc]
        assert os.stat(path).st_uid == user
        daemon.detach("a", force=True)
    nothing_is_left(daemon)


@pytest.mark.parametrize(
    "options",
    [{"socket-owner": "no-such-user"}, {"socket-owner": "root:no-such-group"}, {"socket-owner": ""},
     {"socket-owner": "-1"}, {"socket-owner": "4294967295"}, {"queues": "0"}, {"queues": "many"}],
)
def test_what_makes_no_sense_is_refused(daemon: Daemon, place: Path, options: dict[str, str]) -> None:
    source = image(place / "a.raw", "raw")
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, transport="vhost-user", options=options)
    assert next(iter(options)) in error.message
    assert not os.path.exists(daemon.layout.vm_sockets_dir) or not os.listdir(daemon.layout.vm_sockets_dir)


def test_a_socket_with_too_long_a_path_is_refused_before_anything_is_started(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    longest = 107 - len(daemon.layout.vm_sockets_dir) - len("/.sock")
    error = refuses(daemon, ErrorCode.UNSUPPORTED, source, "x" * (longest + 1), transport="vhost-user")
    assert "108 bytes" in error.cause
    path = attach(daemon, source, "x" * longest)
    assert len(path) == 107
    with emulator(place / "vm", vhost_user(path)):
        pass
    daemon.detach("x" * longest)
    nothing_is_left(daemon)


def test_attaching_and_detaching_leaves_nothing_behind(daemon: Daemon, place: Path) -> None:
    assert daemon.process is not None
    source = image(place / "a.raw", "raw")
    descriptors = Path(f"/proc/{daemon.process.pid}/fd")

    def cycle(number: int) -> None:
        path = attach(daemon, source)
        if number % 5 == 0:
            with emulator(place / "vm", vhost_user(path)) as qemu:
                is_used_by(daemon, qemu)
        daemon.detach("a")
        nothing_is_left(daemon)

    cycle(0)
    before = len(list(descriptors.iterdir()))
    for number in range(1, 21):
        cycle(number)
    eventually(lambda: len(list(descriptors.iterdir())) <= before, "no descriptor is left open")
