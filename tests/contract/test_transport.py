"""What every transport that gives a host device promises; a new one has to keep all of it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import disk
from storaged.transports import TRANSPORTS
from tests.contract.conftest import IN_MACHINE
from tests.harness import (
    Daemon,
    as_json,
    error_of,
    eventually,
    image,
    leftovers,
    luks_image,
    mounted,
    reads,
    refuses,
    run,
    size_of,
    writes,
)

PATTERN = bytes(range(256)) * 256


def test_a_filesystem_on_an_attached_qcow2_is_in_the_image_after_detach(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a.qcow2", size="256M")
    device = daemon.device("a", source, format="qcow2", transport=transport)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN * 64)
    run("fsck.ext4", "-fn", device)
    daemon.detach("a")
    assert not os.path.exists(daemon.layout.link("a"))
    assert leftovers(daemon.root) == []
    run("qemu-img", "check", source)
    # Read back without storaged: another QSD export of the same image.
    raw = place / "a.raw"
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", source, raw)
    with mounted(str(raw), place / "mnt", "-o", "ro,loop") as directory:
        assert (directory / "file").read_bytes() == PATTERN * 64


def test_a_read_only_volume_cannot_be_written_to(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    before = source.read_bytes()
    device = daemon.device("a", source, read_only=True, transport=transport)
    assert run("blockdev", "--getro", device).stdout.strip() == "1"
    with pytest.raises(PermissionError):
        writes(device, 0, b"x" * 512)
    daemon.detach("a")
    assert source.read_bytes() == before


@pytest.mark.parametrize("size", [512, 4096])
def test_the_logical_block_size_is_carried_through(daemon: Daemon, place: Path, transport: str, size: int) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, options={"logical-block-size": str(size)}, transport=transport)
    assert run("blockdev", "--getss", device).stdout.strip() == str(size)
    assert daemon.show("a")["logical_block_size"] == size


def test_discard_frees_room_in_the_image(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport=transport)
    writes(device, 0, os.urandom(16 << 20))
    full = source.stat().st_blocks
    run("blkdiscard", device)
    daemon.detach("a")
    assert source.stat().st_blocks < full / 4


def test_a_flush_reaches_the_image_while_the_volume_is_attached(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    writes(daemon.device("a", source, transport=transport), 4096, PATTERN)
    with open(source, "rb") as file:
        file.seek(4096)
        assert file.read(len(PATTERN)) == PATTERN


@pytest.mark.parametrize(("format", "how"), [("raw", "cli"), ("qcow2", "api")])
def test_resize_grows_image_and_device_while_it_is_mounted(
    daemon: Daemon, place: Path, transport: str, format: str, how: str
) -> None:
    source = image(place / "a", format)
    device = daemon.device("a", source, format=format, transport=transport)
    if not TRANSPORTS[transport].grows:
        assert error_of(lambda: daemon.call("Resize", name="a", size=128 << 20)).code is ErrorCode.UNSUPPORTED
        assert size_of(device) == 64 << 20
        assert daemon.show("a")["size"] == 64 << 20
        return
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
        if how == "cli":
            daemon.cli("resize", "a", "128M")
        else:
            assert daemon.call("Resize", name="a", size=128 << 20)["volume"]["size"] == 128 << 20
        assert size_of(device) == 128 << 20
    run("fsck.ext4", "-fy", device)  # resize2fs wants a check after the last mount
    run("resize2fs", device)
    with mounted(device, place / "mnt") as directory:
        assert (directory / "file").read_bytes() == PATTERN
    daemon.detach("a")
    assert as_json(run("qemu-img", "info", "-f", format, "--output=json", source).stdout)["virtual-size"] == 128 << 20


def test_a_source_that_has_grown_is_served_at_its_old_size_until_a_resize(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a", "raw")
    writes(daemon.device("a", source, transport=transport), 4096, PATTERN)
    os.truncate(source, 128 << 20)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "a successor serves it")
    device = str(daemon.show("a")["device"])
    assert size_of(device) == 64 << 20
    assert reads(device, 4096, len(PATTERN)) == PATTERN
    assert daemon.show("a")["source_size"] == 128 << 20
    if not TRANSPORTS[transport].grows:
        assert error_of(lambda: daemon.call("Resize", name="a")).code is ErrorCode.UNSUPPORTED
        writes(device, (64 << 20) - len(PATTERN), PATTERN)
        return
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
        daemon.cli("resize", "a")
        assert size_of(device) == 128 << 20
    run("fsck.ext4", "-fy", device)
    run("resize2fs", device)
    with mounted(device, place / "mnt") as directory:
        assert (directory / "file").read_bytes() == PATTERN
    writes(device, (128 << 20) - len(PATTERN), PATTERN)
    daemon.detach("a")
    assert source.read_bytes()[-len(PATTERN):] == PATTERN


def test_what_is_written_under_load_is_what_is_read(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.qcow2", size="256M"), format="qcow2", transport=transport)
    size = 64 if IN_MACHINE else 200
    run(
        "fio", "--name=verify", f"--filename={device}", "--rw=randrw", "--bs=4k-64k", f"--size={size}M", "--direct=1",
        "--ioengine=libaio", "--iodepth=32", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
        f"--io_size={2 * size}M", "--output-format=terse",
    )


def test_a_snapshot_takes_writes_and_leaves_its_source_alone(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    before = source.read_bytes()
    device = daemon.device("a", source, snapshot=True, transport=transport)
    writes(device, 4096, PATTERN)
    assert reads(device, 4096, len(PATTERN)) == PATTERN
    daemon.detach("a")
    assert source.read_bytes() == before


def test_an_encrypted_image_keeps_what_is_written(daemon: Daemon, place: Path, transport: str) -> None:
    key = place / "key"
    key.write_text("correct horse")
    source = luks_image(place / "a.luks", key)
    for again in (False, True):
        device = daemon.device("a", source, format="luks", options={"key-file": str(key)}, transport=transport)
        if not again:
            writes(device, 1 << 20, PATTERN)
        assert reads(device, 1 << 20, len(PATTERN)) == PATTERN
        daemon.detach("a")
    assert PATTERN not in source.read_bytes()


def test_the_next_daemon_takes_the_device_over(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.qcow2")
    before = daemon.attach("a", source, format="qcow2", transport=transport)
    writes(str(before["device"]), 0, PATTERN)
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    after = daemon.show("a")
    for key in ("device", "qsd_pid", "size"):
        assert after[key] == before[key]
    assert after["transport"] == transport
    assert reads(str(after["device"]), 0, len(PATTERN)) == PATTERN


def test_a_dead_qsd_is_replaced(daemon: Daemon, place: Path, transport: str) -> None:
    writes(daemon.device("a", image(place / "a.raw", "raw"), transport=transport), 0, PATTERN)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


#: What no other test says: a loop or NBD device may be one that another test has had.
QUEUE = {"max-sectors-kb": "68", "nr-requests": "37", "read-ahead-kb": "308"}


def queue_of(device: str) -> dict[str, str | None]:
    """What a device's queue has, by the names of options."""
    return {name: disk.attribute(device, f"queue/{name.replace('-', '_')}") for name in QUEUE}


def queue_before(daemon: Daemon) -> dict[str, str]:
    """What it had, as volume a was told."""
    record = as_json(Path(daemon.layout.volume_dir("a"), "record.json").read_text())
    return {name.removeprefix("queue/").replace("_", "-"): value for name, value in record["queue"].items()}


def test_a_queue_is_as_it_was_said_also_of_a_successor_s_device_and_is_given_back(
    daemon: Daemon, place: Path, transport: str
) -> None:
    source = image(place / "a.raw", "raw")
    error = refuses(
        daemon, ErrorCode.INVALID_ARGUMENT, source, transport=transport, options={**QUEUE, "scheduler": "nosuch"}
    )
    assert "scheduler=nosuch" in error.message
    device = daemon.device("a", source, transport=transport, options=QUEUE)
    assert queue_of(device) == QUEUE
    device = daemon.replace_qsd("a")
    assert queue_of(device) == QUEUE
    before = queue_before(daemon)
    assert before.keys() == QUEUE.keys()
    assert not before.items() & QUEUE.items()
    daemon.detach("a")
    if os.path.exists(f"/sys/block/{os.path.basename(device)}"):  # VDUSE's goes, with its queue
        assert queue_of(device) == before


@pytest.mark.parametrize("fault", ["connect: made", "connect: noted"])
def test_a_queue_that_a_daemon_did_not_come_to_is_set_up_by_the_next_one(
    stopped: Daemon, place: Path, transport: str, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault=fault)
    error_of(lambda: stopped.attach("a", source, transport=transport, options=QUEUE))
    stopped.wait_dead()
    stopped.start()
    device = stopped.device("a", source, transport=transport, options=QUEUE)
    assert queue_of(device) == QUEUE
    assert not queue_before(stopped).items() & QUEUE.items()
