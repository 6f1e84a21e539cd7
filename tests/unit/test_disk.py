"""What all block devices have in common; a regular file stands for the device, and a table for sysfs."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import disk
from tests.harness import error_of


@pytest.fixture
def device(tmp_path: Path) -> str:
    path = tmp_path / "vda"
    path.write_bytes(bytes(4096))
    return str(path)


@pytest.fixture
def sysfs(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The attributes of /dev/vda, by their paths below /sys/block/vda."""
    attributes: dict[str, str] = {}
    monkeypatch.setattr(disk, "attribute", lambda path, name: attributes.get(name) if path == "/dev/vda" else None)
    return attributes


class Users:
    """Who has the device open; after a number of looks nobody has."""

    def __init__(self) -> None:
        self.named: list[str] = []
        self.looks_until_gone = -1

    def __call__(self, path: str) -> list[str]:
        if self.looks_until_gone == 0:
            self.named = []
        self.looks_until_gone -= 1
        return list(self.named)


@pytest.fixture
def users(monkeypatch: pytest.MonkeyPatch) -> Users:
    found = Users()
    monkeypatch.setattr(disk, "device_users", found)
    monkeypatch.setattr(disk, "PROBE_PATIENCE", 0.05)
    return found


def there() -> bool:
    return True


def gone() -> bool:
    return False


class Removal:
    """Whether the device was taken away."""

    def __init__(self) -> None:
        self.done = False
        self.given_up = threading.Event()

    def __call__(self) -> None:
        self.done = True

    def of(self, path: str, is_there: Callable[[], bool] = there, *, read_only: bool = False) -> None:
        disk.remove_unused(path, is_there, self, read_only=read_only, given_up=self.given_up)


@pytest.fixture
def removal(users: Users) -> Removal:
    return Removal()


def fail_to_open(monkeypatch: pytest.MonkeyPatch, *errors: int) -> None:
    """The first calls of open(2) fail with these."""
    waiting, real = list(errors), os.open

    def opened(path: str, flags: int) -> int:
        assert flags & os.O_EXCL
        if waiting:
            number = waiting.pop(0)
            raise OSError(number, os.strerror(number))
        return real(path, flags)

    monkeypatch.setattr(os, "open", opened)


# sysfs --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_not_there_has_no_attributes() -> None:
    path = "/dev/no-such-device"
    assert disk.attribute(path, "size") is None
    assert (disk.size(path), disk.diskseq(path)) == (0, 0)
    assert not disk.is_read_only(path)
    assert disk.partitions(path) == {}
    with pytest.raises(FileNotFoundError):
        disk.set_attribute(path, "queue/max_sectors_kb", 4)


def test_the_kernel_counts_sectors_of_512_bytes(sysfs: dict[str, str]) -> None:
    sysfs["size"] = "2048"
    assert disk.size("/dev/vda") == 1 << 20


def test_a_kernel_before_5_15_has_no_diskseq(sysfs: dict[str, str]) -> None:
    assert disk.diskseq("/dev/vda") == 0
    sysfs["diskseq"] = "17"
    assert disk.diskseq("/dev/vda") == 17


@pytest.mark.parametrize(("ro", "read_only"), [("0", False), ("1", True)])
def test_a_device_is_read_only_where_the_kernel_says_so(sysfs: dict[str, str], ro: str, read_only: bool) -> None:
    sysfs["ro"] = ro
    assert disk.is_read_only("/dev/vda") is read_only


def test_partitions_are_what_has_a_number_and_bears_the_name(
    sysfs: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    sysfs.update({"vda1/partition": "1", "vda15/partition": "15"})
    monkeypatch.setattr(os, "listdir", lambda path: ["vda15", "queue", "vda1", "vdax", "size"])
    assert disk.partitions("/dev/vda") == {1: "/dev/vda1", 15: "/dev/vda15"}


# Taking a device away -----------------------------------------------------------------------------------------


def test_a_device_that_nobody_uses_is_flushed_and_then_taken_away(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[bool] = []
    monkeypatch.setattr(disk, "flush", lambda fd, path: flushed.append(removal.done))
    removal.of(device)
    assert removal.done
    assert flushed == [False], "before"


def test_what_is_only_read_needs_no_flush(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "flush", lambda fd, path: pytest.fail("flushed"))
    removal.of(device, read_only=True)
    assert removal.done


def test_no_descriptor_is_left_whether_it_works_or_not(device: str, removal: Removal, users: Users) -> None:
    before = os.listdir("/proc/self/fd")
    removal.of(device)
    users.named = ["process 1 (init)"]
    error_of(lambda: removal.of(device))
    assert os.listdir("/proc/self/fd") == before


def test_a_device_that_is_gone_or_somebody_elses_by_now_is_left_alone(device: str, removal: Removal) -> None:
    removal.of(device, gone)
    removal.of(f"{device}-other")
    assert not removal.done


@pytest.mark.parametrize("error", [errno.ENXIO, errno.ENODEV])
def test_a_node_without_a_device_is_gone(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    fail_to_open(monkeypatch, error)
    removal.of(device)
    assert not removal.done


def test_a_mounted_device_is_refused_at_once_with_who_has_it(
    device: str, removal: Removal, users: Users, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, *[errno.EBUSY] * 100)
    monkeypatch.setattr(disk, "PROBE_PATIENCE", 60)
    users.named = ["mounted on /mnt", "process 7 (bash)"]
    error = error_of(lambda: removal.of(device))
    assert error.code is ErrorCode.DEVICE_IN_USE
    assert error.cause == "mounted on /mnt"
    assert error.users == ("mounted on /mnt", "process 7 (bash)")
    assert not removal.done


def test_a_claim_of_nobody_that_can_be_named_is_a_probe_and_waited_for(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, errno.EBUSY, errno.EBUSY)
    removal.of(device)
    assert removal.done


def test_but_not_for_ever(device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_to_open(monkeypatch, *[errno.EBUSY] * 10_000)
    error = error_of(lambda: removal.of(device))
    assert (error.code, error.cause) == (ErrorCode.DEVICE_IN_USE, "somebody has it open")
    assert not removal.done


def test_who_has_it_open_without_a_claim_is_found_in_proc_and_a_probe_waited_for(
    device: str, removal: Removal, users: Users
) -> None:
    users.named, users.looks_until_gone = ["process 9 (udev-worker)"], 3
    removal.of(device)
    assert removal.done


def test_who_keeps_it_open_is_named_and_the_device_stays(device: str, removal: Removal, users: Users) -> None:
    users.named = ["process 9 (dd)"]
    begun = time.monotonic()
    error = error_of(lambda: removal.of(device))
    assert time.monotonic() - begun >= 0.05
    assert (error.code, error.users) == (ErrorCode.DEVICE_IN_USE, ("process 9 (dd)",))
    assert not removal.done


def test_a_flush_that_fails_leaves_the_device_and_says_why(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fails)
    error = error_of(lambda: removal.of(device))
    assert (error.code, error.cause) == (ErrorCode.FLUSH_FAILED, os.strerror(errno.ENOSPC))
    assert "--force" in error.hint
    assert not removal.done


def test_a_flush_that_ends_after_it_was_given_up_leaves_the_device(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(disk, "flush", lambda fd, path: removal.given_up.set())
    removal.of(device)
    assert not removal.done


def test_another_failure_to_open_is_told_as_it_is(
    device: str, removal: Removal, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_to_open(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        removal.of(device)


def test_a_device_is_flushed_by_its_path_only_while_it_is_ours(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: list[str] = []
    monkeypatch.setattr(disk, "flush", lambda fd, path: flushed.append(path))
    disk.flush_path(device, gone)
    assert flushed == []
    disk.flush_path(device, there)
    assert flushed == [device]
