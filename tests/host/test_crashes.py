"""The daemon can die at any moment, and so can QSD."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk as disks
from storaged.model.plan import Step
from tests.harness import Daemon, as_json, error_of, eventually, image, leftovers, mounted, reads, run, writes

PATTERN = b"storaged" * 8192

ATTACH_STEPS = [Step.START, Step.OPEN, Step.EXPORT, Step.CONNECT, Step.PUBLISH]
DETACH_STEPS = [Step.DISCONNECT, Step.UNPUBLISH, Step.STOP, Step.REMOVE]


def verify_writes(device: str, end: Path) -> subprocess.Popen[str]:
    """Have fio write and verify until there is a file ``end``; any I/O error or wrong block makes it fail."""
    fio = shlex.join([
        "fio", "--name=verify", f"--filename={device}", "--rw=randwrite", "--bs=4k-64k", "--size=48M",
        "--direct=1", "--ioengine=libaio", "--iodepth=8", "--verify=crc32c", "--verify_backlog=64",
        "--verify_fatal=1", "--verify_state_save=0", "--time_based", "--runtime=2", "--output-format=terse",
    ])
    # The shell has the device open between two of them.
    return subprocess.Popen(
        ["sh", "-c", f'exec 3<{device}; until [ -e "$0" ]; do {fio} || exit 1; done', end],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )


@pytest.mark.parametrize("how", ["kill", "restart"])
def test_the_device_is_in_use_all_the_while_and_sees_no_error(daemon: Daemon, place: Path, how: str) -> None:
    device = daemon.device("a", image(place / "a.qcow2"), format="qcow2")
    qsd = daemon.qsd("a")
    load = verify_writes(device, place / "end")
    for _ in range(4):
        if how == "kill":
            daemon.kill()
        else:
            assert daemon.stop() == 0
        daemon.start()
        eventually(lambda: daemon.online("a"), "adopted")
        assert load.poll() is None, "it goes on"
    (place / "end").touch()
    output, _ = load.communicate(timeout=60)
    assert load.returncode == 0, output
    assert daemon.qsd("a") == qsd
    assert daemon.show("a")["device"] == device


def test_a_filesystem_survives_kill_9_of_the_daemon_with_writes_running(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2", size="256M")
    device = daemon.device("a", source, format="qcow2")
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        script = (
            "i=0; while [ $i -lt 30 ]; do head -c 1000000 /dev/urandom >f$i || exit 1; sync f$i || exit 1; "
            "sha256sum f$i >>sums || exit 1; i=$((i+1)); done"
        )
        with subprocess.Popen(["sh", "-c", script], cwd=directory) as writer:
            eventually(lambda: (directory / "f3").exists(), "the writer writes")
            daemon.kill()
            assert writer.poll() is None
            daemon.start()
            assert writer.wait(60) == 0
        eventually(lambda: daemon.online("a"), "adopted")
        run("sh", "-c", f"cd {directory} && sha256sum --quiet -c sums && test $(wc -l <sums) = 30")
    run("fsck.ext4", "-fn", device)
    daemon.detach("a")
    run("qemu-img", "check", source)
    assert leftovers(daemon.root) == []


PLACES = [
    *(f"{when} {step}" for step in ATTACH_STEPS for when in ("before", "after")),
    "start: recorded", "start: spawned", "open: added", "connect: made",
]


@pytest.mark.parametrize("fault", PLACES)
def test_the_daemon_dies_anywhere_in_an_attach_and_the_next_one_finishes_it(
    stopped: Daemon, place: Path, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault=fault)
    lost = error_of(lambda: stopped.attach("a", source))
    assert lost.code is ErrorCode.DAEMON_UNREACHABLE
    assert "unknown" in lost.cause + lost.hint + lost.message
    stopped.wait_dead()
    stopped.start()
    device = stopped.device("a", source)  # the same wishes: it waits for what is under way
    writes(device, 0, PATTERN)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert os.readlink(stopped.layout.link("a")) == device
    assert one_of_everything(stopped)
    stopped.detach("a")
    assert leftovers(stopped.root) == []
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def queue(device: str) -> dict[str, str | None]:
    """What a device's queue has."""
    names = ("read_ahead_kb", "max_sectors_kb", "nr_requests")
    return {name: disks.attribute(device, f"queue/{name}") for name in names}


@pytest.mark.parametrize("fault", ["connect: made", "connect: noted", "connect: queue set"])
def test_the_daemon_dies_while_it_sets_up_a_queue_and_the_next_one_does_the_rest_and_gives_it_back(
    stopped: Daemon, place: Path, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    # What no other test says: the device may be one that another has had.
    options = {"read-ahead-kb": "308", "max-sectors-kb": "68", "nr-requests": "37"}
    wanted = {key.replace("-", "_"): value for key, value in options.items()}
    stopped.start(fault=fault)
    assert error_of(lambda: stopped.attach("a", source, options=options)).code is ErrorCode.DAEMON_UNREACHABLE
    stopped.wait_dead()
    stopped.start()
    device = stopped.device("a", source, options=options)
    assert queue(device) == wanted
    record = as_json(Path(stopped.layout.volume_dir("a"), "record.json").read_text())
    before = {name.removeprefix("queue/"): value for name, value in record["queue"].items()}
    assert before.keys() == wanted.keys()
    assert not before.items() & wanted.items()
    stopped.detach("a")
    assert queue(device) == before


@pytest.mark.parametrize(
    "fault", [*(f"{when} {step}" for step in DETACH_STEPS for when in ("before", "after")), "before forget"]
)
def test_the_daemon_dies_anywhere_in_a_detach_and_the_next_one_finishes_it(
    stopped: Daemon, place: Path, fault: str
) -> None:
    source = image(place / "a.raw", "raw")
    stopped.start(fault=fault)
    writes(stopped.device("a", source, persist=True), 0, PATTERN)
    assert error_of(lambda: stopped.detach("a")).code is ErrorCode.DAEMON_UNREACHABLE
    stopped.wait_dead()
    stopped.start()
    eventually(lambda: stopped.names() == [], "detached")
    assert leftovers(stopped.root) == []
    assert source.read_bytes()[: len(PATTERN)] == PATTERN


def test_the_daemon_dies_while_it_makes_an_overlay(stopped: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    for fault in ("after start", "open: overlay created", "after open"):
        stopped.start(fault=fault)
        error_of(lambda: stopped.attach("a", source, snapshot=True))
        stopped.wait_dead()
        stopped.start()
        writes(stopped.device("a", source, snapshot=True), 0, PATTERN)
        stopped.detach("a")
        assert leftovers(stopped.root) == []
        stopped.stop()
    assert PATTERN not in source.read_bytes()


def one_of_everything(daemon: Daemon) -> bool:
    """Whether there is exactly one QSD and one loop device of volume a."""
    kinds = [line.split()[0] for line in leftovers(daemon.root)]
    return kinds.count("process") == 1 and kinds.count("loop") == 1


def test_a_dead_qsd_is_replaced_and_the_volume_says_so(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    writes(daemon.device("a", source, format="qcow2"), 0, PATTERN)
    former = daemon.qsd("a")
    with subprocess.Popen(
        [*daemon.cli_command(), "watch", "a", "--json"], stdout=subprocess.PIPE, text=True
    ) as watcher:
        assert watcher.stdout is not None
        watcher.stdout.readline()
        daemon.kill_qsd("a")
        lines = ""
        while '"online"' not in lines:
            lines = watcher.stdout.readline()
            if '"failure"' in lines:
                assert "SIGKILL" in lines
        watcher.terminate()
    assert daemon.qsd("a") != former
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
    assert one_of_everything(daemon)


def test_a_qsd_that_dies_under_a_mount_gives_errors_there_and_a_new_device(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.qcow2"), format="qcow2")
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt"):
        daemon.kill_qsd("a")
        eventually(lambda: daemon.show("a")["device"] not in (None, device) and daemon.online("a"), "a new device")
        fresh = str(daemon.show("a")["device"])
        assert os.readlink(daemon.layout.link("a")) == fresh
        run("fsck.ext4", "-fy", fresh, check=False)
    eventually(lambda: one_of_everything(daemon), "the old loop device goes with its last user")


def test_daemon_and_qsd_die_together(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    writes(daemon.device("a", source, format="qcow2"), 0, PATTERN)
    qsd = daemon.qsd("a")
    daemon.kill()
    os.kill(qsd, signal.SIGKILL)
    daemon.start()
    eventually(lambda: daemon.online("a"), "set up again")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN
    assert one_of_everything(daemon)


def test_a_loop_device_that_somebody_took_away_is_set_up_again(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    run("losetup", "-d", device)
    assert daemon.device("a", source)
    assert one_of_everything(daemon)


def test_after_a_reboot_persistent_volumes_come_back_and_others_do_not(daemon: Daemon, place: Path) -> None:
    writes(daemon.device("keep", image(place / "keep.raw", "raw"), persist=True), 0, PATTERN)
    daemon.attach("drop", image(place / "drop.raw", "raw"))
    reboot(daemon, "keep", "drop")
    daemon.start()
    eventually(lambda: daemon.names() == ["keep"] and daemon.online("keep"), "attached again")
    assert reads(str(daemon.show("keep")["device"]), 0, len(PATTERN)) == PATTERN


def reboot(daemon: Daemon, *names: str) -> None:
    """Do to a daemon's directories what a reboot does: no process, mount or device is left, nor /run."""
    processes = [daemon.qsd(name) for name in names]
    devices = [str(daemon.show(name)["device"]) for name in names]
    daemon.kill()
    for device in devices:
        run("losetup", "-d", device)
    for process in processes:
        os.kill(process, signal.SIGKILL)
    for name in names:
        run("umount", "-l", daemon.mountpoint(name))
        (Path(daemon.layout.dev_dir) / name).unlink()
    # With --root on a disk "run" is still there: the boot's identity tells that it means nothing.
    (Path(daemon.layout.run_dir) / "boot_id").write_text("another boot")


def test_a_volume_whose_source_is_missing_at_boot_is_tried_again(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.attach("a", source, persist=True)
    reboot(daemon, "a")
    source.rename(place / "elsewhere")
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "failed", "failed")
    assert daemon.show("a")["failure"]["code"] == "source-missing"
    (place / "elsewhere").rename(source)
    eventually(lambda: daemon.online("a"), "attached")
    assert daemon.show("a")["failure"] is None


def test_a_damaged_state_file_is_set_aside_and_the_others_come_up(daemon: Daemon, place: Path) -> None:
    for name in ("a", "b", "c"):
        daemon.attach(name, image(place / name, "raw"), persist=True)
    reboot(daemon, "a", "b", "c")
    store = Path(daemon.layout.desired_persistent)
    (store / "a.json").write_bytes((store / "a.json").read_bytes()[:40])
    (store / "b.json").write_bytes(b"\xff\x00garbage")
    daemon.start()
    eventually(lambda: daemon.names() == ["c"] and daemon.online("c"), "the third came up")
    assert sorted(path.name.split(".damaged-")[0] for path in store.glob("*.damaged-*")) == ["a.json", "b.json"]
    assert daemon.log.read_text().count("state-damaged") == 2
    for path in store.glob("*.damaged-*"):
        path.unlink()


def test_a_volume_in_use_goes_on_from_its_record_when_its_state_file_is_damaged(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    before = daemon.attach("a", source)
    daemon.kill()
    path = Path(daemon.layout.desired_volatile) / "a.json"
    path.write_text("{")
    daemon.start()
    eventually(lambda: daemon.online("a"), "adopted")
    assert daemon.show("a")["device"] == before["device"]
    assert daemon.show("a")["qsd_pid"] == before["qsd_pid"]
    for aside in path.parent.glob("*.damaged-*"):
        aside.unlink()


@pytest.mark.parametrize("damage", ["garbled", "lost", "foreign"])
def test_without_a_trustworthy_record_nothing_is_touched_until_the_user_detaches(
    daemon: Daemon, place: Path, damage: str
) -> None:
    source = image(place / "a.raw", "raw")
    device = daemon.device("a", source)
    record = Path(daemon.layout.volume_dir("a")) / "record.json"
    daemon.kill()
    if damage == "garbled":
        record.write_bytes(record.read_bytes()[:100])
    elif damage == "lost":
        record.unlink()
    else:
        record.write_text(record.read_text().replace('"name":"a"', '"name":"b"'))
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "failed", "refused")
    assert daemon.show("a")["failure"]["code"] == "adoption-refused"
    assert error_of(lambda: daemon.attach("a", source)).code is ErrorCode.ADOPTION_REFUSED
    writes(device, 0, PATTERN)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt"):
        assert error_of(lambda: daemon.detach("a")).code is ErrorCode.DEVICE_IN_USE
    daemon.detach("a")
    assert leftovers(daemon.root) == []


def test_a_record_of_a_recycled_pid_is_not_believed(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    daemon.attach("a", source)
    qsd = daemon.qsd("a")
    daemon.kill()
    os.kill(qsd, signal.SIGKILL)
    with subprocess.Popen(["sleep", "60"]) as bystander:
        record = Path(daemon.layout.volume_dir("a")) / "record.json"
        record.write_text(record.read_text().replace(f'"pid":{qsd}', f'"pid":{bystander.pid}'))
        daemon.start()
        eventually(lambda: daemon.online("a"), "set up again")
        assert bystander.poll() is None
        assert daemon.qsd("a") != bystander.pid
        bystander.kill()


def test_what_nobody_wants_any_more_is_collected_unless_it_is_used(daemon: Daemon, place: Path) -> None:
    for name in ("a", "b"):
        run("mkfs.ext4", "-q", daemon.device(name, image(place / name, "raw")))
    with mounted(daemon.layout.link("b"), place / "mnt"):
        daemon.kill()
        for name in ("a", "b"):
            (Path(daemon.layout.desired_volatile) / f"{name}.json").unlink()
        daemon.start()
        eventually(lambda: daemon.names() == ["b"] and daemon.online("b"), "a is gone, b is kept")
        (place / "mnt" / "file").write_bytes(PATTERN)
    daemon.detach("b")


def test_two_daemons_cannot_run_in_one_root(daemon: Daemon) -> None:
    second = daemon.cli("daemon", check=False)
    assert second.returncode == 1
    assert "daemon-running" in second.stderr
    assert daemon.answers()


def test_a_mount_of_the_export_that_somebody_took_away_leaves_the_device_alone(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    before = daemon.attach("a", source)
    run("mkfs.ext4", "-q", before["device"])
    with mounted(str(before["device"]), place / "mnt") as directory:
        run("umount", "-l", daemon.mountpoint("a"))
        daemon.attach("a", source)
        after = daemon.show("a")
        assert [after[key] for key in ("device", "qsd_pid")] == [before[key] for key in ("device", "qsd_pid")]
        (directory / "file").write_bytes(PATTERN)
        run("sync", directory / "file")
        assert error_of(lambda: daemon.detach("a")).code is ErrorCode.DEVICE_IN_USE
    daemon.detach("a")
    assert leftovers(daemon.root) == []
    run("fsck.ext4", "-fn", source)


def test_a_daemon_in_a_mount_namespace_of_its_own_hands_its_volumes_on(stopped: Daemon, place: Path) -> None:
    stopped.start(command=["unshare", "-m", "--propagation", "private"])
    source = image(place / "a.raw", "raw")
    device = stopped.device("a", source)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        stopped.stop()
        stopped.start()
        eventually(lambda: stopped.online("a"), "adopted")
        assert stopped.show("a")["device"] == device
        (directory / "file").write_bytes(PATTERN)
        run("sync", directory / "file")
    stopped.detach("a")


def test_a_source_that_was_replaced_while_qsd_was_down_is_not_opened_in_its_place(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    writes(daemon.device("a", source), 0, PATTERN)
    source.rename(place / "moved")
    image(source, "raw")
    daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["state"] == "failed", "refused")
    assert daemon.show("a")["failure"]["code"] == "source-changed"
    source.unlink()
    (place / "moved").rename(source)
    eventually(lambda: daemon.online("a"), "the old one is back")
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_a_storm_of_deaths_and_requests_ends_in_order(daemon: Daemon, place: Path) -> None:
    """Attach, detach, kill -9 of QSDs and of the daemon, all at once; then everything is as the last one wished."""
    names = [f"v{number}" for number in range(6)]
    for name in names:
        image(place / name, "raw")
    dice = random.Random(20)
    until = time.monotonic() + 15
    while time.monotonic() < until:
        clients = [
            subprocess.Popen(
                [*daemon.cli_command(), *dice.choice([["attach", name, str(place / name)], ["detach", name]])],
                stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )
            for name in dice.sample(names, 4)
        ]
        time.sleep(dice.uniform(0, 0.15))  # the storm is what is tested: no event to wait for
        for _ in range(2):
            pid = dice.choice([*qsd_processes(daemon.root), 0])
            if pid:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        if dice.random() < 0.3:
            daemon.kill()
            daemon.start()
        for client in clients:
            client.wait(60)
    for name in names:
        attach_in_the_end(daemon, name, place / name)
    for name in names:
        writes(str(daemon.show(name)["device"]), 0, PATTERN)
        daemon.detach(name)
    assert leftovers(daemon.root) == []


def attach_in_the_end(daemon: Daemon, name: str, source: Path) -> None:
    """Attach; a QSD that was killed a moment ago may make the first try fail."""

    def attached() -> bool:
        with suppress(StoragedError):
            daemon.attach(name, source)
            return daemon.online(name)
        return False

    eventually(attached, f"{name} is attached", 60)


def qsd_processes(root: Path) -> list[int]:
    """The QSDs of a daemon below ``root``."""
    return [int(line.split()[1]) for line in leftovers(root) if line.startswith("process ")]
