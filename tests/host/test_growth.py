"""A source that has another size by now: one that has grown is served as it was, one that has shrunk is refused."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode
from storaged.model.history import Happening
from tests.harness import Daemon, as_json, error_of, eventually, image, reads, run, writes

MIB = 1 << 20
OLD, NEW = 64 * MIB, 128 * MIB
PATTERN = bytes(range(256)) * 256


def size_of(daemon: Daemon, name: str = "a") -> int:
    """The size of a volume's device, as the kernel has it."""
    return int(run("blockdev", "--getsize64", daemon.show(name)["device"]).stdout)


def killed(daemon: Daemon) -> None:
    """QSD dies."""
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")


def upgraded(daemon: Daemon) -> None:
    """QSD is replaced in good order."""
    daemon.call("Upgrade", name="a")


def resumed(daemon: Daemon) -> None:
    """All I/O was ended, and goes on."""
    daemon.call("Rescue", name="a")
    daemon.call("Resume", name="a")


def adopted(daemon: Daemon) -> None:
    """Daemon and QSD have died."""
    pid = daemon.qsd("a")
    daemon.kill()
    os.kill(pid, signal.SIGKILL)
    daemon.start()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")


def grown_entries(daemon: Daemon) -> list[dict[str, object]]:
    return [entry for entry in daemon.show("a")["history"] if entry["kind"] == Happening.GROWN]


@pytest.mark.parametrize("event", [killed, upgraded, resumed, adopted])
def test_a_source_that_has_grown_is_served_at_its_old_size_until_a_resize(
    daemon: Daemon, place: Path, event: object
) -> None:
    source = image(place / "a.raw", "raw")
    writes(daemon.device("a", source), OLD - len(PATTERN), PATTERN)
    os.truncate(source, NEW)
    assert callable(event)
    event(daemon)
    assert size_of(daemon) == daemon.show("a")["size"] == OLD
    assert reads(daemon.show("a")["device"], OLD - len(PATTERN), len(PATTERN)) == PATTERN
    assert daemon.show("a")["source_size"] == NEW
    (told,) = grown_entries(daemon)
    assert f"{NEW} bytes" in str(told["message"])
    assert "storaged resize a" in str(told["message"])
    assert "storaged resize takes them" in daemon.cli("show", "a").stdout
    daemon.cli("resize", "a")
    assert size_of(daemon) == daemon.show("a")["size"] == NEW
    assert daemon.show("a")["source_size"] is None
    writes(daemon.show("a")["device"], NEW - len(PATTERN), PATTERN)
    assert source.read_bytes()[-len(PATTERN):] == PATTERN
    killed(daemon)
    assert size_of(daemon) == NEW


def test_a_growth_is_told_once(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source)
    os.truncate(source, NEW)
    killed(daemon)
    killed(daemon)
    adopted(daemon)
    assert len(grown_entries(daemon)) == 1
    assert daemon.show("a")["source_size"] == NEW


@pytest.mark.parametrize("format", ["qcow2", "luks"])
def test_an_image_that_was_resized_behind_our_back_is_served_at_its_old_size(
    daemon: Daemon, place: Path, format: str
) -> None:
    source = place / "a"
    wishes: dict[str, Any] = {}
    if format == "luks":
        key = place / "key"
        key.write_text("geheim")
        key.chmod(0o600)
        secret = f"secret,id=k,file={key}"
        options = ("--object", secret, "-o", "key-secret=k,iter-time=10")
        run("qemu-img", "create", "-q", "-f", "luks", *options, source, OLD)
        wishes = {"options": {"key-file": str(key)}}
    else:
        image(source, format, str(OLD))
    writes(daemon.device("a", source, format=format, **wishes), 0, PATTERN)
    daemon.call("Rescue", name="a")
    if format == "luks":
        os.truncate(source, source.stat().st_size + OLD)
    else:
        run("qemu-img", "resize", "-q", "-f", format, source, NEW)
    daemon.call("Resume", name="a")
    assert size_of(daemon) == OLD
    assert reads(daemon.show("a")["device"], 0, len(PATTERN)) == PATTERN
    assert daemon.show("a")["source_size"] == NEW
    daemon.cli("resize", "a", str(NEW))
    assert size_of(daemon) == NEW
    daemon.detach("a")


def test_a_resize_takes_what_others_have_added_while_qsd_runs(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source)
    daemon.cli("resize", "a")  # nothing was added
    assert size_of(daemon) == OLD
    os.truncate(source, NEW)
    daemon.cli("resize", "a")
    assert size_of(daemon) == source.stat().st_size == NEW


def test_a_part_of_a_block_is_not_cut_off(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source, options={"logical-block-size": "4096"})
    os.truncate(source, NEW + 512)
    refused = error_of(lambda: daemon.call("Resize", name="a"))
    assert (refused.code, f"{NEW + 4096} bytes" in refused.hint) == (ErrorCode.INVALID_SIZE, True)
    assert source.stat().st_size == NEW + 512
    os.truncate(source, NEW + 4096)
    daemon.call("Resize", name="a")
    assert size_of(daemon) == source.stat().st_size == NEW + 4096


@pytest.mark.parametrize("seen", [False, True], ids=["not seen", "seen"])
def test_a_resize_never_cuts_off_what_others_have_added(daemon: Daemon, place: Path, seen: bool) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source)
    os.truncate(source, NEW)
    if seen:
        killed(daemon)
    error = error_of(lambda: daemon.call("Resize", name="a", size=NEW - MIB))
    assert error.code is ErrorCode.INVALID_SIZE
    assert error.hint
    assert source.stat().st_size == NEW
    assert size_of(daemon) == OLD
    daemon.call("Resize", name="a", size=NEW + MIB)
    assert size_of(daemon) == source.stat().st_size == NEW + MIB


@pytest.mark.parametrize("fault", ["resize: reopened", "resize: grown"])
def test_a_resize_that_the_daemon_did_not_live_to_finish_is_finished_by_another(
    stopped: Daemon, place: Path, fault: str
) -> None:
    stopped.start()
    source = image(place / "a.raw", "raw")
    stopped.device("a", source)
    os.truncate(source, NEW)
    killed(stopped)
    stopped.kill()
    stopped.start(fault=fault)
    device = stopped.attach("a", source)["device"]
    error_of(lambda: stopped.call("Resize", name="a"))
    stopped.wait_dead()
    stopped.start()
    assert stopped.attach("a", source)["device"] == device
    assert size_of(stopped) == stopped.show("a")["size"] == OLD
    stopped.call("Resize", name="a")
    assert size_of(stopped) == stopped.show("a")["size"] == NEW
    killed(stopped)
    assert size_of(stopped) == NEW


def test_a_format_that_does_not_tell_needs_a_size(daemon: Daemon, place: Path) -> None:
    daemon.device("a", image(place / "a.qcow2"), format="qcow2")
    done = daemon.cli("resize", "a", check=False)
    assert done.returncode == 1
    assert "say the new size" in done.stderr


def flushes(device: str) -> int:
    """How many flushes a block device has done (Documentation/block/stat.rst in the kernel)."""
    return int(Path(f"/sys/block/{Path(device).name}/stat").read_text().split()[15])


def test_what_was_acknowledged_before_is_flushed_by_the_next_flush_of_a_source_that_has_grown(
    daemon: Daemon, place: Path
) -> None:
    """As of one that has not: QEMU leaves out the flush of what it has not written itself."""
    disk = image(place / "disk", "raw")
    source = run("losetup", "--find", "--show", disk).stdout.strip()
    try:
        run("dd", "if=/dev/urandom", f"of={daemon.device('a', source)}", "bs=4k", "count=1", "oflag=direct")
        os.truncate(disk, NEW)
        run("losetup", "--set-capacity", source)
        before = flushes(source)
        killed(daemon)
        assert daemon.show("a")["source_size"] == NEW
        fd = os.open(daemon.show("a")["device"], os.O_RDWR)
        os.fsync(fd)
        os.close(fd)
        assert flushes(source) > before
        daemon.cli("resize", "a")
        assert size_of(daemon) == NEW
        daemon.detach("a")
    finally:
        run("losetup", "--detach", source)


def test_a_source_that_has_shrunk_is_refused_until_it_has_its_size_again(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    os.truncate(source, OLD // 2)
    error = error_of(lambda: daemon.call("Upgrade", name="a"))
    assert error.code is ErrorCode.SOURCE_CHANGED
    assert daemon.online("a")
    assert daemon.show("a")["device"] == device
    pid = daemon.kill_qsd("a")
    eventually(lambda: (daemon.show("a")["failure"] or {}).get("code") == ErrorCode.SOURCE_CHANGED, "refused")
    os.truncate(source, OLD)
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")
    assert size_of(daemon) == OLD


def test_show_says_it_as_json_too(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source)
    assert as_json(daemon.cli("show", "a", "--json").stdout)["source_size"] is None
    os.truncate(source, NEW)
    killed(daemon)
    assert as_json(daemon.cli("show", "a", "--json").stdout)["source_size"] == NEW
