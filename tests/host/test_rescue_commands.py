"""When something hangs: rescue ends the I/O that waits, resume puts the source back, show tells what happened."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode
from storaged.model.history import Happening
from tests.harness import Daemon, as_json, error_of, eventually, image, mounted, reads, run, writes

PATTERN = b"storaged" * 8192
#: Seconds within which I/O that waits has to end.
SOON = 10.0


@contextmanager
def stopped_qsd(daemon: Daemon, name: str) -> Iterator[int]:
    """A volume's QSD is stopped; it goes on afterwards, if it is there still."""
    pid = daemon.qsd(name)
    os.kill(pid, signal.SIGSTOP)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


@contextmanager
def reader(device: str) -> Iterator[subprocess.Popen[str]]:
    """A process that reads from a device past the page cache, and waits for that in the kernel."""
    command = ["dd", f"if={device}", "of=/dev/null", "bs=4k", "count=1", "skip=1000", "iflag=direct"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        eventually(lambda: in_flight(device) > 0 or process.poll() is not None, "the read is on its way")
        assert process.poll() is None, "the read must wait"
        yield process


def in_flight(device: str) -> int:
    """The requests that a device has not answered (Documentation/ABI/stable/sysfs-block)."""
    return sum(map(int, Path(f"/sys/block/{Path(device).name}/inflight").read_text().split()))


def happened(daemon: Daemon, name: str) -> list[dict[str, Any]]:
    """The history of a volume."""
    return list(daemon.show(name)["history"])


def kinds(daemon: Daemon, name: str) -> list[str]:
    """What happened to a volume, without times."""
    return [entry["kind"] for entry in happened(daemon, name)]


def rescued(daemon: Daemon, source: Path, name: str = "a") -> str:
    """A volume with a pattern on it that was rescued; the device that it had."""
    device = daemon.device(name, source)
    writes(device, 0, PATTERN)
    assert daemon.cli("rescue", name).stdout == ""
    return device


# Rescue ----------------------------------------------------------------------------------------------------------


def test_rescue_ends_the_io_of_a_stopped_qsd_and_the_volume_stays_without_a_device(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    writes(device, 0, PATTERN)
    with stopped_qsd(daemon, "a") as pid, reader(device) as process:
        daemon.cli("rescue", "a")
        _, said = process.communicate(timeout=SOON)
        assert process.returncode == 1
        assert "Input/output error" in said
        assert not Path(f"/proc/{pid}").exists()
    volume = daemon.show("a")
    assert volume["state"] == "rescued"
    assert volume["device"] is None
    assert volume["link"] is None
    assert volume["qsd_pid"] is None
    assert not os.path.lexists(daemon.layout.link("a"))
    assert Happening.RESCUE in kinds(daemon, "a")
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def test_rescue_works_where_nothing_hangs_and_with_a_filesystem_mounted(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "kept").write_bytes(PATTERN)
        os.sync()
        daemon.cli("rescue", "a")
        assert daemon.show("a")["state"] == "rescued"
        # ext4 may have noticed by itself meanwhile.
        assert run("sh", "-c", f"echo new >{directory}/new && sync {directory}/new", check=False).returncode != 0
    device = daemon.cli("resume", "a").stdout.strip()
    run("fsck.ext4", "-fy", device, check=False)
    with mounted(device, place / "mnt") as directory:
        assert (directory / "kept").read_bytes() == PATTERN


def test_list_and_show_on_the_command_line_say_that_a_volume_is_rescued(daemon: Daemon, place: Path) -> None:
    rescued(daemon, image(place / "a.raw", "raw"))
    assert "rescued" in daemon.cli("list").stdout
    shown = daemon.cli("show", "a").stdout
    assert "state:      rescued" in shown
    assert "history:" in shown
    assert "  rescue  " in shown


def test_nothing_is_started_for_a_rescued_volume_by_itself_and_another_daemon_knows_it(
    daemon: Daemon, place: Path
) -> None:
    rescued(daemon, image(place / "a.raw", "raw"))
    before = happened(daemon, "a")
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "rescued", "the next daemon knows it")
    time.sleep(3)  # longer than a volume that is not online waits before it is tried again
    volume = daemon.show("a")
    assert volume["state"] == "rescued"
    assert volume["device"] is None
    assert volume["qsd_pid"] is None
    assert [entry for entry in volume["history"] if entry in before] == before
    device = daemon.cli("resume", "a").stdout.strip()
    assert reads(device, 0, len(PATTERN)) == PATTERN


def test_a_rescued_volume_can_be_detached(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    rescued(daemon, source)
    assert daemon.detach("a") == []
    assert daemon.names() == []
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def test_rescue_keep_is_refused_for_a_loop_device_and_changes_nothing(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    writes(device, 0, PATTERN)
    pid = daemon.qsd("a")
    error = error_of(lambda: daemon.call("Rescue", name="a", keep=True))
    assert error.code is ErrorCode.UNSUPPORTED
    assert error.volume == "a"
    assert error.hint
    refused = daemon.cli("rescue", "--keep", "a", check=False)
    assert refused.returncode == 1
    assert "[unsupported]" in refused.stderr
    assert "hint:" in refused.stderr
    volume = daemon.show("a")
    assert (volume["state"], volume["device"], volume["qsd_pid"]) == ("online", device, pid)
    assert reads(device, 0, len(PATTERN)) == PATTERN


@pytest.mark.parametrize("method", ["Rescue", "Resume", "Upgrade"])
def test_what_is_no_volume_is_said(daemon: Daemon, method: str) -> None:
    assert error_of(lambda: daemon.call(method, name="nosuch")).code is ErrorCode.NO_SUCH_VOLUME


# Resume ----------------------------------------------------------------------------------------------------------


def test_resume_brings_the_volume_back_with_its_data_and_prints_the_device(daemon: Daemon, place: Path) -> None:
    rescued(daemon, image(place / "a.raw", "raw"))
    done = daemon.cli("resume", "a")
    volume = daemon.show("a")
    assert volume["state"] == "online"
    assert done.stdout == f"{volume['device']}\n"
    assert os.readlink(daemon.layout.link("a")) == volume["device"]
    assert reads(volume["device"], 0, len(PATTERN)) == PATTERN
    writes(volume["device"], 1 << 20, PATTERN)
    assert [kind for kind in kinds(daemon, "a") if kind in ("rescue", "resume")] == ["rescue", "resume"]


def test_resume_json_prints_the_volume(daemon: Daemon, place: Path) -> None:
    rescued(daemon, image(place / "a.raw", "raw"))
    volume = as_json(daemon.cli("resume", "a", "--json").stdout)
    assert (volume["name"], volume["state"]) == ("a", "online")
    assert Path(volume["device"]).is_block_device()


def test_a_volume_whose_source_is_gone_can_be_resumed_when_it_is_back(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    rescued(daemon, source)
    source.rename(place / "away.raw")
    assert error_of(lambda: daemon.call("Resume", name="a", timeout=5)).code is ErrorCode.SOURCE_MISSING
    assert daemon.show("a")["device"] is None
    (place / "away.raw").rename(source)
    device = daemon.call("Resume", name="a")["volume"]["device"]
    assert reads(device, 0, len(PATTERN)) == PATTERN


# Upgrade ---------------------------------------------------------------------------------------------------------


def test_upgrade_of_a_loop_device_in_use_is_refused_and_its_user_notices_nothing(
    daemon: Daemon, place: Path
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"))
    run("mkfs.ext4", "-q", device)
    pid = daemon.qsd("a")
    with mounted(device, place / "mnt") as directory:
        (directory / "before").write_bytes(PATTERN)
        error = error_of(lambda: daemon.call("Upgrade", name="a"))
        assert error.code is ErrorCode.UNSUPPORTED
        assert error.hint
        volume = daemon.show("a")
        assert (volume["state"], volume["device"], volume["qsd_pid"]) == ("online", device, pid)
        (directory / "after").write_bytes(PATTERN)
        run("sync", "-f", directory)
    run("fsck.ext4", "-fn", device)


def test_upgrade_of_a_volume_that_nobody_uses_replaces_its_qsd_and_keeps_the_data(
    daemon: Daemon, place: Path
) -> None:
    writes(daemon.device("a", image(place / "a.qcow2"), format="qcow2"), 0, PATTERN)
    former, version = daemon.qsd("a"), daemon.show("a")["qsd_version"]
    assert daemon.cli("upgrade", "a").stdout == f"a: {version} -> {version}\n"
    assert daemon.replaced("a", former)
    assert not Path(f"/proc/{former}").exists()
    volume = daemon.show("a")
    assert reads(volume["device"], 0, len(PATTERN)) == PATTERN
    assert Happening.UPGRADE in kinds(daemon, "a")
    assert volume["deaths"] == 0, "nobody died that was not told to"


def test_upgrade_all_does_what_it_can_one_by_one_and_says_the_rest(daemon: Daemon, place: Path) -> None:
    devices = {name: daemon.device(name, image(place / f"{name}.raw", "raw")) for name in ("a", "b", "c")}
    rescued(daemon, image(place / "d.raw", "raw"), "d")
    former = {name: daemon.qsd(name) for name in devices}
    run("mkfs.ext4", "-q", devices["b"])
    with mounted(devices["b"], place / "mnt"):
        done = daemon.cli("upgrade", "--all", check=False)
        assert done.returncode == 1
        lines = done.stdout.splitlines()
        assert [line.partition(":")[0] for line in lines] == ["a", "c", "d"]
        assert " -> " in lines[0]
        assert " -> " in lines[1]
        assert lines[2] == "d: skipped, it is rescued"
        assert "volume b:" in done.stderr
        assert "[unsupported]" in done.stderr
        assert daemon.qsd("b") == former["b"]
    for name in ("a", "c"):
        assert daemon.replaced(name, former[name])


# History ---------------------------------------------------------------------------------------------------------


def test_show_tells_of_a_death_with_its_time_and_of_the_recovery_with_its_pause(daemon: Daemon, place: Path) -> None:
    daemon.device("a", image(place / "a.raw", "raw"))
    begin = time.time()
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD")
    end = time.time()
    eventually(lambda: Happening.RECOVERED in kinds(daemon, "a"), "the recovery is told")
    volume = daemon.show("a")
    death, recovered = (
        next(entry for entry in volume["history"] if entry["kind"] == kind) for kind in ("death", "recovered")
    )
    assert begin <= death["time"] <= recovered["time"] <= end + 1
    assert death["times"] == 1
    assert death["message"]
    assert 0 < recovered["seconds"] <= end - begin + 1
    assert volume["deaths"] == 1
    assert volume["paused"] == recovered["seconds"]
    assert "deaths:" in daemon.cli("show", "a").stdout
    (listed,) = daemon.call("List")["volumes"]
    assert (listed["deaths"], listed["paused"]) == (1, volume["paused"])
    assert listed.get("history") is None


@pytest.mark.parametrize("how", ["kill", "stop"])
def test_the_history_survives_the_daemon(daemon: Daemon, place: Path, how: str) -> None:
    daemon.device("a", image(place / "a.raw", "raw"))
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD")
    # It is written a moment after it is told.
    journal = Path(daemon.layout.volume_dir("a")) / "history.json"
    eventually(lambda: journal.exists() and Happening.RECOVERED in journal.read_text(), "the recovery is written")
    before = daemon.show("a")
    getattr(daemon, how)()
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    after = daemon.show("a")
    assert after["history"][: len(before["history"])] == before["history"]
    assert (after["deaths"], after["paused"]) == (1, before["paused"])


def test_a_detached_volume_takes_its_history_along(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.device("a", source)
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "another QSD")
    eventually(lambda: daemon.detach("a") == [], "detached")
    daemon.attach("a", source)
    volume = daemon.show("a")
    assert volume["deaths"] == 0
    assert "death" not in [entry["kind"] for entry in volume["history"]]


def test_an_upgrade_without_the_source_leaves_the_one_that_still_has_it(daemon: Daemon, place: Path) -> None:
    """An image that was moved or removed lives on in the QSD that has it open: it is the last that does."""
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source, transport="fuse")
    writes(device, 0, PATTERN)
    former = daemon.qsd("a")
    os.rename(source, place / "away.raw")
    assert error_of(lambda: daemon.call("Upgrade", name="a")).code is ErrorCode.SOURCE_MISSING
    image(source, "raw")
    assert error_of(lambda: daemon.call("Upgrade", name="a")).code is ErrorCode.SOURCE_CHANGED
    assert (daemon.qsd("a"), daemon.online("a")) == (former, True)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    daemon.detach("a")


def test_a_refused_adoption_stays_refused_when_it_is_resumed_or_rescued(stopped: Daemon, place: Path) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a.raw", "raw"), transport="fuse")
    stopped.kill()
    (Path(stopped.layout.volume_dir("a")) / "record.json").unlink()
    stopped.start()
    eventually(lambda: stopped.show("a")["state"] == "failed", "refused")
    for method in ("Resume", "Rescue", "Upgrade"):
        error = error_of(lambda method=method: stopped.call(method, name="a"))  # type: ignore[misc]  # a default
        assert error.code in (ErrorCode.ADOPTION_REFUSED, ErrorCode.VOLUME_BUSY)
    time.sleep(3)  # looks go on meanwhile
    seen = stopped.show("a")
    assert (seen["state"], seen["failure"]["code"]) == ("failed", ErrorCode.ADOPTION_REFUSED)
    reads(device, 0, 512)
    stopped.detach("a")


def test_a_policy_is_not_carried_out_on_a_qsd_that_goes_on_again(daemon: Daemon, place: Path) -> None:
    device = daemon.device(
        "a", image(place / "a.raw", "raw"), transport="fuse", options={"on-hang": "fail-after:8"}
    )
    with stopped_qsd(daemon, "a") as server, reader(device):
        eventually(lambda: daemon.show("a")["condition"], "the hang is found", timeout=40)
        os.kill(server, signal.SIGCONT)
    eventually(lambda: daemon.online("a") and daemon.show("a")["condition"] is None, "well again", timeout=40)
    time.sleep(5)
    assert daemon.online("a")
    daemon.detach("a")


def test_a_death_that_a_request_has_mended_is_counted_and_costs_no_more(daemon: Daemon, place: Path) -> None:
    daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    former = daemon.kill_qsd("a")
    daemon.attach("a", place / "a.raw", transport="fuse")  # the same wish: mends it if it comes first
    eventually(lambda: daemon.replaced("a", former), "replaced")
    eventually(lambda: daemon.show("a")["deaths"] == 1, "counted")
    assert daemon.process is not None
    stat = Path(f"/proc/{daemon.process.pid}/stat")

    def ticks() -> int:
        return sum(int(field) for field in stat.read_text().rpartition(")")[2].split()[11:13])

    before = ticks()
    time.sleep(3)
    assert ticks() - before < 100, "it has nothing to do"
    daemon.detach("a")
