"""udev/60-storaged.rules in a machine with udev and systemd: the same links as the daemon's, and units for them."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon, eventually, image, run

RULES = Path(__file__).parents[2] / "udev" / "60-storaged.rules"
INSTALLED = Path("/run/udev/rules.d") / RULES.name
LINKS = Path("/dev/storaged")
TRANSPORTS = ("vduse", "nbd", "fuse")
UDEV = int(re.findall("[0-9]+", run("udevadm", "--version").stdout)[0])

pytestmark = pytest.mark.timeout(400)  # the machine is emulated


@pytest.fixture(autouse=True, scope="module")
def rules() -> Iterator[None]:
    """The rules are installed as long as these tests run."""
    INSTALLED.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(RULES, INSTALLED)
    run("udevadm", "control", "--reload")
    yield
    INSTALLED.unlink()
    run("udevadm", "control", "--reload")


@pytest.fixture
def daemon(place: Path) -> Iterator[Daemon]:
    """The daemon of the real system: udev knows only that one's loop devices."""
    daemon = Daemon(Path("/"))
    daemon.log = place / "daemon.log"
    daemon.start()
    yield daemon
    daemon.end()
    settle()
    assert links() == {}
    assert os.listdir(daemon.layout.volumes_dir) == []


def settle() -> None:
    run("udevadm", "settle", "--timeout=90")


def links() -> dict[str, str]:
    """The links that are there and where they point to."""
    try:
        return {entry: os.readlink(LINKS / entry) for entry in os.listdir(LINKS)}
    except FileNotFoundError:
        return {}


def by_udev(device: str) -> str:
    """What udev's link to a device says; the daemon's are absolute."""
    return f"../{device.removeprefix('/dev/')}"


def leads_to(name: str) -> str:
    return os.path.realpath(LINKS / name)


def properties(device: str) -> dict[str, str]:
    lines = run("udevadm", "info", "--query=property", f"--name={device}").stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def unit_is(name: str) -> str:
    unit = run("systemd-escape", "--path", "--suffix=device", LINKS / name).stdout.strip()
    return run("systemctl", "is-active", unit, check=False).stdout.strip()


def partition_of(device: str, number: int) -> str:
    return f"{device}p{number}" if device[-1].isdigit() else f"{device}{number}"


if UDEV >= 254:  # which brought "udevadm verify"

    def test_udev_finds_no_fault_with_the_rules() -> None:
        done = run("udevadm", "verify", INSTALLED, check=False)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("transport", "name"), [("vduse", "Web-1_x.y"), ("nbd", "9.a-b_c.disk"), ("fuse", "storaged.x--y")]
)
def test_names_and_units_come_and_go_with_the_device(
    daemon: Daemon, place: Path, transport: str, name: str
) -> None:
    device = daemon.device(name, image(place / "disk.qcow2"), format="qcow2", transport=transport)
    assert leads_to(name) == device, "the daemon makes the link at once"
    settle()
    assert links() == {name: by_udev(device)}
    told = properties(device)
    assert told["STORAGED_VOLUME"] == name
    assert str(LINKS / name) in told["DEVLINKS"].split()
    assert "systemd" in told["TAGS"].split(":")
    eventually(lambda: unit_is(name) == "active", "the unit is active")

    run("sfdisk", "--quiet", LINKS / name, stdin="label: gpt\n, 20M\n, 20M\n")
    settle()
    first, second = partition_of(device, 1), partition_of(device, 2)
    assert links() == {
        name: by_udev(device), f"{name}-part1": by_udev(first), f"{name}-part2": by_udev(second),
    }
    eventually(lambda: unit_is(f"{name}-part2") == "active", "the partition's unit is active")
    run("mkfs.ext4", "-q", "-L", "here", LINKS / f"{name}-part1")
    settle()
    told = properties(first)
    assert told["STORAGED_VOLUME"] == name
    assert told["ID_PART_ENTRY_NUMBER"] == "1"
    assert told["ID_FS_LABEL"] == "here"
    assert leads_to(f"{name}-part1") == first

    daemon.detach(name)
    assert not (LINKS / name).exists()
    settle()
    assert links() == {}
    gone = [name, f"{name}-part1", f"{name}-part2"]
    eventually(lambda: [unit_is(link) for link in gone] == ["inactive"] * 3, "the units are inactive")
    if Path(device).exists():
        assert "STORAGED_VOLUME" not in properties(device)


def test_udev_alone_makes_them_while_the_daemon_is_dead(daemon: Daemon, place: Path) -> None:
    devices = {
        f"{transport}.1": daemon.device(
            f"{transport}.1", image(place / f"{transport}.qcow2"), format="qcow2", transport=transport
        )
        for transport in TRANSPORTS
    }
    settle()
    daemon.kill()
    for name in devices:
        (LINKS / name).unlink()
    run("udevadm", "trigger", "--settle", "--subsystem-match=block")
    assert links() == {name: by_udev(device) for name, device in devices.items()}
    daemon.start()
    eventually(lambda: all(daemon.online(name) for name in devices), "the next daemon has adopted them", 60)
    assert links() == {name: by_udev(device) for name, device in devices.items()}


def test_a_name_that_moves_from_device_to_device(daemon: Daemon, place: Path) -> None:
    disk, other = image(place / "disk.qcow2"), image(place / "other.qcow2")
    seen = set()
    for cycle in range(6):
        transport = TRANSPORTS[cycle % 3]
        if cycle >= 3:  # so that it is not the same number again
            daemon.attach("other", other, format="qcow2", transport=transport)
        device = daemon.device("moves", disk, format="qcow2", transport=transport)
        seen.add(device)
        settle()
        assert leads_to("moves") == device
        daemon.detach("moves")
        if cycle >= 3:
            daemon.detach("other")
        settle()
        assert links() == {}
    assert len(seen) == 6


def test_a_name_that_moves_in_a_hurry(daemon: Daemon, place: Path) -> None:
    disk = image(place / "disk.qcow2")
    for cycle in range(5):
        for transport in TRANSPORTS[cycle % 3:]:
            device = daemon.device("hurries", disk, format="qcow2", transport=transport)
            assert leads_to("hurries") == device
            daemon.detach("hurries")
        device = daemon.device("hurries", disk, format="qcow2", transport=TRANSPORTS[cycle % 3])
        settle()
        assert leads_to("hurries") == device
        assert properties(device)["STORAGED_VOLUME"] == "hurries"
        daemon.detach("hurries")
        settle()
        assert links() == {}


def test_the_name_follows_to_another_loop_device(daemon: Daemon, place: Path) -> None:
    former = daemon.device("a", image(place / "disk.qcow2"), format="qcow2", transport="fuse")
    settle()
    with open(former, "rb"):  # it stays as long as it is used, and is no volume's any more
        pid = daemon.kill_qsd("a")
        eventually(lambda: daemon.replaced("a", pid), "another QSD serves it", 60)
        device = str(daemon.show("a")["device"])
        assert device != former
        settle()
        assert leads_to("a") == device
        run("udevadm", "trigger", "--settle", former)
        assert leads_to("a") == device
        assert "STORAGED_VOLUME" not in properties(former)
    settle()
    assert leads_to("a") == device


def test_an_nbd_connection_that_is_told_of_before_its_backend_can_be_read(daemon: Daemon, place: Path) -> None:
    seen = place / "seen"
    changed = RULES.read_text().replace('TEST!="backend"', f'TEST!="{seen}"')
    changed = changed.replace('ATTRS{backend}==', f'TEST=="{seen}", ATTRS{{backend}}==')
    changed = changed.replace("then echo change", f"then touch {seen}; echo change")
    INSTALLED.write_text(changed)
    try:
        run("udevadm", "control", "--reload")
        device = daemon.device("a", image(place / "disk.qcow2"), format="qcow2", transport="nbd")
        settle()
        assert seen.exists()
        assert properties(device)["STORAGED_VOLUME"] == "a"
        daemon.detach("a")
        settle()
    finally:
        shutil.copy(RULES, INSTALLED)
        run("udevadm", "control", "--reload")


def test_devices_of_others_get_no_name(daemon: Daemon, place: Path) -> None:
    file = place / "disk"
    file.write_bytes(bytes(1 << 20))
    device = run("losetup", "--show", "--find", file).stdout.strip()
    settle()
    try:
        assert "STORAGED_VOLUME" not in properties(device)
        assert links() == {}
    finally:
        run("losetup", "--detach", device)
