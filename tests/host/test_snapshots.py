"""A writable device over a read-only source: the changes are kept until detach, and then thrown away."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image, leftovers, reads, run, writes

PATTERN = b"changed!" * 8192


def digest(path: Path) -> str:
    """The content of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("format", ["raw", "qcow2", "vmdk"])
def test_the_source_never_changes_and_the_changes_go_at_detach(daemon: Daemon, place: Path, format: str) -> None:
    source = image(place / "base", format)
    before = digest(source)
    device = daemon.device("a", source, format=format, snapshot=True)
    writes(device, 1 << 20, PATTERN)
    assert reads(device, 1 << 20, len(PATTERN)) == PATTERN
    overlay = Path(str(daemon.show("a")["overlay"]))
    assert overlay.is_relative_to(daemon.layout.state_dir)
    assert overlay.stat().st_mode & 0o077 == 0
    daemon.detach("a")
    assert not overlay.exists()
    assert digest(source) == before
    device = daemon.device("a", source, format=format, snapshot=True)
    assert reads(device, 1 << 20, len(PATTERN)) != PATTERN


def test_the_changes_survive_qsd_and_the_daemon(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.qcow2")
    writes(daemon.device("a", source, format="qcow2", snapshot=True), 0, PATTERN)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "set up again")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
    qsd = daemon.qsd("a")
    daemon.kill()
    os.kill(qsd, signal.SIGKILL)
    daemon.start()
    eventually(lambda: daemon.online("a"), "set up again")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_the_overlay_has_a_limit_and_the_device_says_so_when_it_is_reached(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    device = daemon.device("a", source, snapshot=True, options={"snapshot-size": "8M"})
    done = subprocess.run(
        ["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=32", "oflag=direct"], capture_output=True, text=True
    )
    assert done.returncode != 0
    assert "No space" in done.stderr or "Input/output" in done.stderr
    overlay = Path(str(daemon.show("a")["overlay"]))
    assert overlay.stat().st_size == 8 << 20
    assert daemon.online("a")
    daemon.detach("a", force=True)


def test_the_overlay_lies_where_the_user_wants_it_and_goes_from_there(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    (place / "fast").mkdir()
    done = daemon.cli("attach", "a", str(source), "--snapshot", "--snapshot-dir", str(place / "fast"))
    writes(done.stdout.strip(), 0, PATTERN)
    assert len(list((place / "fast").iterdir())) == 1
    daemon.cli("detach", "a")
    assert list((place / "fast").iterdir()) == []


def test_a_snapshot_directory_that_is_not_there_is_said(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    error = error_of(lambda: daemon.attach("a", source, snapshot=True, snapshot_dir=str(place / "missing")))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "missing" in error.message
    assert daemon.names() == []
    assert leftovers(daemon.root) == []


@pytest.mark.parametrize("where", ["state", "elsewhere"])
def test_overlays_that_a_crash_left_behind_are_collected(daemon: Daemon, place: Path, where: str) -> None:
    source = image(place / "base.raw", "raw")
    (place / "fast").mkdir()
    elsewhere = {"snapshot_dir": str(place / "fast")} if where == "elsewhere" else {}
    device = daemon.device("a", source, snapshot=True, **elsewhere)
    overlay = Path(str(daemon.show("a")["overlay"]))
    qsd = daemon.qsd("a")
    daemon.kill()
    run("losetup", "-d", device)
    os.kill(qsd, signal.SIGKILL)
    run("umount", "-l", daemon.mountpoint("a"))
    (Path(daemon.layout.dev_dir) / "a").unlink()
    (Path(daemon.layout.run_dir) / "boot_id").write_text("another boot")
    assert overlay.exists()
    daemon.start()
    eventually(lambda: daemon.names() == [], "collected")
    assert not overlay.exists()
    assert leftovers(daemon.root) == []


def test_a_persistent_snapshot_keeps_its_changes_over_a_reboot(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    device = daemon.device("a", source, snapshot=True, persist=True)
    writes(device, 0, PATTERN)
    qsd = daemon.qsd("a")
    daemon.kill()
    run("losetup", "-d", device)
    os.kill(qsd, signal.SIGKILL)
    run("umount", "-l", daemon.mountpoint("a"))
    (Path(daemon.layout.run_dir) / "boot_id").write_text("another boot")
    daemon.start()
    eventually(lambda: daemon.online("a"), "attached again")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_a_snapshot_can_grow(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    device = daemon.device("a", source, snapshot=True)
    daemon.cli("resize", "a", "128M")
    writes(device, 100 << 20, PATTERN)
    assert source.stat().st_size == 64 << 20


def test_a_full_disk_under_the_overlay_is_an_error_of_the_device_only(stopped: Daemon, place: Path) -> None:
    state = Path(stopped.layout.state_dir)
    state.mkdir(parents=True)
    run("mount", "-t", "tmpfs", "-o", "size=8m", "none", state)
    try:
        stopped.start()
        device = stopped.device("a", image(place / "base.raw", "raw"), snapshot=True)
        done = subprocess.run(
            ["dd", "if=/dev/urandom", f"of={device}", "bs=1M", "count=32", "oflag=direct"], capture_output=True
        )
        assert done.returncode != 0
        assert stopped.online("a")
        stopped.detach("a", force=True)
        error = error_of(lambda: stopped.attach("a", place / "missing", snapshot=True))
        assert error.code is ErrorCode.SOURCE_MISSING
        stopped.stop()
    finally:
        run("umount", state)


def test_the_overlay_of_a_volume_whose_entry_is_damaged_is_kept_until_the_user_detaches(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "base.raw", "raw")
    device = daemon.device("a", source, snapshot=True, persist=True)
    writes(device, 0, PATTERN)
    overlay = Path(str(daemon.show("a")["overlay"]))
    qsd = daemon.qsd("a")
    daemon.kill()
    run("losetup", "-d", device)
    os.kill(qsd, signal.SIGKILL)
    run("umount", "-l", daemon.mountpoint("a"))
    (Path(daemon.layout.run_dir) / "boot_id").write_text("another boot")
    entry = Path(daemon.layout.desired_persistent) / "a.json"
    good = entry.read_text()
    entry.write_text(good[:50])
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "failed", "it says that it cannot come up")
    assert overlay.exists()
    daemon.kill()
    entry.write_text(good)  # the administrator mends it
    for aside in entry.parent.glob("*.damaged-*"):
        aside.unlink()
    daemon.start()
    eventually(lambda: daemon.online("a"), "attached again")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_an_overlay_that_is_gone_is_never_made_anew(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    writes(daemon.device("a", source, snapshot=True), 0, PATTERN)
    overlay = Path(str(daemon.show("a")["overlay"]))
    overlay.rename(place / "elsewhere")
    daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["state"] == "failed", "refused")
    assert daemon.show("a")["failure"]["code"] == "source-missing"
    overlay.write_bytes(bytes(1 << 20))  # another file is not it
    assert "replaced" in error_of(lambda: daemon.attach("a", source, snapshot=True)).message
    overlay.unlink()
    run("cp", "-a", place / "elsewhere", overlay)  # nor is a copy
    assert "replaced" in error_of(lambda: daemon.attach("a", source, snapshot=True)).message
    (place / "elsewhere").rename(overlay)
    daemon.attach("a", source, snapshot=True)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_an_overlay_is_not_opened_over_a_source_that_changed(daemon: Daemon, place: Path) -> None:
    source = image(place / "base.raw", "raw")
    writes(daemon.device("a", source, snapshot=True), 0, PATTERN)
    qsd = daemon.qsd("a")
    daemon.kill()
    os.kill(qsd, signal.SIGKILL)
    other = Daemon(place / "other")
    other.root.mkdir()
    other.start()
    try:
        eventually(lambda: not Path(f"/proc/{qsd}").exists(), "gone")
        writes(other.device("b", source), 1 << 20, PATTERN)
    finally:
        other.end()
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "failed", "refused")
    assert daemon.show("a")["failure"]["code"] == "source-changed"


@pytest.mark.parametrize("planted", ["file", "link"])
def test_what_lies_in_the_way_of_an_overlay_is_not_opened(daemon: Daemon, place: Path, planted: str) -> None:
    source = image(place / "base.raw", "raw")
    (place / "fast").mkdir()
    device = daemon.attach("a", source, snapshot=True, snapshot_dir=str(place / "fast"))
    overlay = Path(str(device["overlay"]))
    daemon.detach("a")
    victim = image(place / "victim", "qcow2", "8M")
    before = victim.read_bytes()
    if planted == "link":
        overlay.symlink_to(victim)
    else:
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={victim},data_file_raw=on", overlay, "8M")
    error = error_of(lambda: daemon.attach("a", source, snapshot=True, snapshot_dir=str(place / "fast")))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert str(overlay) in error.message
    assert os.path.lexists(overlay)
    assert planted == "file" or victim.read_bytes() == before
    assert daemon.names() == []
