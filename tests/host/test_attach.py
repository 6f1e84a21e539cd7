"""A disk image becomes a block device of this host, and goes away again."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import fusectl
from storaged.qsd.version import loop_direct_io_is_safe, parse_version
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
    run,
    writes,
)

FORMATS = ["raw", "qcow2", "qed", "vmdk", "vdi", "vhdx", "vpc", "parallels", "qcow", "luks"]
PATTERN = bytes(range(256)) * 256


@pytest.mark.parametrize("format", FORMATS)
def test_every_format_gives_a_device_that_keeps_what_is_written(daemon: Daemon, place: Path, format: str) -> None:
    source, wishes = place / "image", {}
    if format == "luks":
        key = place / "key"
        key.write_text("correct horse")
        luks_image(source, key)
        wishes = {"options": {"key-file": str(key)}}
    else:
        image(source, format)
    device = daemon.device("a", source, format=format, **wishes)
    writes(device, 1 << 20, PATTERN)
    daemon.detach("a")
    device = daemon.device("a", source, format=format, read_only=True, **wishes)
    assert reads(device, 1 << 20, len(PATTERN)) == PATTERN
    assert daemon.show("a")["format"] == format


def test_a_second_attach_with_the_same_wishes_gives_the_same_device(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    first = daemon.attach("a", source, format="qcow2")
    assert daemon.attach("a", source, format="qcow2") == first


def test_an_attach_with_other_wishes_fails_and_changes_nothing(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    daemon.attach("a", source, format="qcow2")
    before = daemon.show("a")
    for wishes in ({"format": "raw"}, {"format": "qcow2", "read_only": True}, {"format": "qcow2", "persist": True}):
        error = error_of(lambda wishes=wishes: daemon.attach("a", source, **wishes))  # type: ignore[misc]  # mypy cannot type a default in a lambda
        assert error.code is ErrorCode.VOLUME_EXISTS
        assert error.cause
    assert daemon.show("a") == before


def test_the_stable_name_and_the_names_of_partitions_lead_to_the_devices(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    run("sfdisk", "-q", source, stdin="label: gpt\n,16M\n,16M\n")
    device = daemon.device("a", source)
    if not os.path.exists(f"{device}p1"):
        # A kernel without any partition table's parser: partx tells it. The next look finds them.
        run("partx", "-a", device)
        daemon.attach("a", source)
    links = {entry.name: os.readlink(entry) for entry in Path(daemon.layout.dev_dir).iterdir()}
    assert links == {"a": device, "a-part1": f"{device}p1", "a-part2": f"{device}p2"}
    run("mkfs.ext4", "-q", daemon.layout.link("a-part2"))
    daemon.detach("a")
    assert list(Path(daemon.layout.dev_dir).iterdir()) == []


def test_resize_never_shrinks_and_says_so_where_a_format_cannot_grow(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.qcow2"), format="qcow2")
    daemon.attach("b", image(place / "b.vmdk", "vmdk"), format="vmdk")
    assert error_of(lambda: daemon.call("Resize", name="a", size=1 << 20)).code is ErrorCode.INVALID_SIZE
    assert error_of(lambda: daemon.call("Resize", name="a", size=(128 << 20) + 1)).code is ErrorCode.INVALID_SIZE
    error = error_of(lambda: daemon.call("Resize", name="b", size=128 << 20))
    assert error.code is ErrorCode.UNSUPPORTED
    assert daemon.online("a")
    assert daemon.online("b")
    assert daemon.show("b")["size"] == 64 << 20


def test_a_host_block_device_can_be_attached_and_is_claimed_meanwhile(daemon: Daemon, place: Path) -> None:
    lower = run("losetup", "-f", "--show", image(place / "lower.raw", "raw")).stdout.strip()
    try:
        run("mkfs.ext4", "-q", lower)
        device = daemon.device("a", lower)
        assert reads(device, 1080, 2) == b"\x53\xef"  # the magic of ext4
        (place / "mnt").mkdir()
        assert run("mount", lower, place / "mnt", check=False).returncode != 0
        daemon.detach("a")
        with mounted(lower, place / "mnt"):
            error = error_of(lambda: daemon.attach("a", f"host_device:{lower}"))
            assert error.code is ErrorCode.SOURCE_IN_USE
    finally:
        run("losetup", "-d", lower)


def test_a_very_long_root_directory_works(place: Path) -> None:
    root = place / ("x" * 120) / ("y" * 120)
    root.mkdir(parents=True)
    daemon = Daemon(root)
    daemon.start()
    try:
        device = daemon.device("n" * 63, image(place / "a.qcow2"), format="qcow2")
        writes(device, 0, PATTERN)
        daemon.kill()
        daemon.start()
        eventually(lambda: daemon.online("n" * 63), "adopted")
        assert daemon.cli("list", "--names").stdout == "n" * 63 + "\n"
    finally:
        daemon.end()
    assert leftovers(root) == []


def test_watch_tells_what_happens_as_it_happens(daemon: Daemon, place: Path) -> None:
    with subprocess.Popen(
        [*daemon.cli_command(), "watch", "--json"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        first = as_json(watcher.stdout.readline())
        assert first["kind"] == "ready"
        daemon.attach("a", image(place / "a.qcow2"), format="qcow2")
        daemon.detach("a")
        kinds: list[dict[str, str]] = []
        while not kinds or kinds[-1]["kind"] != "removed":
            kinds.append(as_json(watcher.stdout.readline()))
        states = [event["state"] for event in kinds if event["kind"] == "state"]
        assert states == ["starting", "exporting", "attaching", "online", "detaching", "absent"]
        assert all(event["volume"] == "a" for event in kinds)
        watcher.terminate()


def test_the_loop_device_uses_direct_io_only_with_a_qsd_that_does_not_corrupt_data_under_it(
    daemon: Daemon, place: Path
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    direct = Path(f"/sys/block/{Path(device).name}/loop/dio").read_text().strip()
    version = parse_version(run("qemu-storage-daemon", "--version").stdout)
    assert version is not None
    assert direct == ("1" if loop_direct_io_is_safe(version) else "0")


def test_a_device_that_is_only_read_has_more_requests_in_flight_than_the_kernel_lets_a_fuse_file_have(
    daemon: Daemon, place: Path
) -> None:
    """Direct I/O of a loop device, whatever QSD: 12 at once are what each connection begins with."""
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport="fuse", read_only=True)
    loop = Path(f"/sys/block/{Path(device).name}/loop")
    assert (loop / "dio").read_text().strip() == "1"
    assert fusectl.in_flight_at_most((loop / "backing_file").read_text().strip()) >= 128


def test_a_container_with_the_same_paths_has_devices_of_its_own(stopped: Daemon, place: Path) -> None:
    """Two daemons with one /dev, each in a mount namespace with a /run of its own."""
    own_run = 'mkdir -p "$0/run" && mount -t tmpfs run "$0/run" && exec "$@"'
    container = Daemon(stopped.root)
    container.log = place / "container.log"
    container.start(command=["unshare", "--mount", "sh", "-c", own_run, str(stopped.root)], wait=False)
    assert container.process is not None
    inside = ["nsenter", f"--target={container.process.pid}", "--mount", *container.cli_command()]
    try:
        eventually(lambda: run(*inside, "list", check=False).returncode == 0, "the daemon in the container answers")
        theirs = run(*inside, "attach", "a", image(place / "theirs", "raw"), "--transport", "fuse").stdout.strip()
        writes(theirs, 0, PATTERN)
        stopped.start()
        ours = stopped.device("a", image(place / "ours", "raw"), transport="fuse")
        assert ours != theirs
        assert reads(ours, 0, len(PATTERN)) == bytes(len(PATTERN))
        stopped.kill()
        stopped.start()
        stopped.detach("a")
        assert reads(theirs, 0, len(PATTERN)) == PATTERN
    finally:
        run(*inside, "detach", "a", check=False)
        container.stop()
