"""A record can be written on a filesystem that is full, as /run may be."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host.atomic import write_atomic
from storaged.host.reconnectlog import ReconnectLog, keep
from storaged.host.reserve import SIZE, write_reserved
from tests.harness import error_of, run

OLD, NEW = b"a" * 3000, b"b" * 6000


@pytest.fixture(params=["size=1m,nr_inodes=1000", "size=8m,nr_inodes=40"])
def full_soon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A tmpfs with little room, or with few inodes."""
    run("mount", "-t", "tmpfs", "-o", request.param, "tmpfs", tmp_path)
    try:
        yield tmp_path
    finally:
        run("umount", tmp_path)


def fill(directory: Path) -> None:
    """Until not a page, or not an inode, is left."""
    for number, size in product(range(1000), (1 << 20, 8192, 4096)):
        with suppress(OSError):
            (directory / f"fill{number}-{size}").write_bytes(bytes(size))
    with pytest.raises(OSError, match="No space left"):
        (directory / "fill one more").write_bytes(bytes(4096))


def test_a_record_is_written_though_the_filesystem_is_full_and_the_room_comes_back(full_soon: Path) -> None:
    volume = full_soon / "a"
    volume.mkdir()
    path, reserve = volume / "record.json", volume / "reserve"
    write_reserved(str(path), OLD)
    assert reserve.stat().st_blocks * 512 == SIZE, "really there, and no hole"
    fill(full_soon)
    assert error_of(lambda: write_atomic(str(path), NEW)).code is ErrorCode.NO_SPACE
    assert path.read_bytes() == OLD

    write_reserved(str(path), NEW)
    assert path.read_bytes() == NEW
    for turn in range(10):
        # The volume comes back: half a dozen writes follow the first, while nobody else takes what was given up.
        write_reserved(str(path), NEW + bytes([turn]))
        assert path.read_bytes() == NEW + bytes([turn])
    for filler in full_soon.glob("fill*"):
        filler.unlink()
    write_reserved(str(path), OLD)
    assert path.read_bytes() == OLD
    assert reserve.stat().st_blocks * 512 == SIZE
    assert sorted(entry.name for entry in volume.iterdir()) == ["record.json", "reserve"]


def test_without_room_and_without_reserve_it_is_said_and_the_old_record_stays(full_soon: Path) -> None:
    path = full_soon / "record.json"
    write_reserved(str(path), OLD)
    (full_soon / "reserve").unlink()
    fill(full_soon)
    error = error_of(lambda: write_reserved(str(path), NEW))
    assert error.code is ErrorCode.NO_SPACE
    assert str(full_soon) in error.hint
    assert path.read_bytes() == OLD


def test_a_reserve_that_a_crash_left_half_made_is_made_anew(full_soon: Path) -> None:
    (full_soon / "reserve").touch()
    (full_soon / "reserve.new").write_bytes(b"half")
    write_reserved(str(full_soon / "record.json"), OLD)
    assert (full_soon / "reserve").stat().st_blocks * 512 == SIZE
    assert not (full_soon / "reserve.new").exists()


def test_a_log_of_requests_in_flight_that_has_no_room_is_found_out_before_there_is_a_device(full_soon: Path) -> None:
    """QSD makes it with holes, and would be killed by SIGBUS when it fills one on a full filesystem."""
    log = ReconnectLog(str(full_soon), "storaged.a", 1, 256)
    (full_soon / "tmp").mkdir()
    with open(log.path, "wb") as file:
        file.truncate(log.size)
    fill(full_soon)
    assert error_of(lambda: keep(log)).code is ErrorCode.NO_SPACE


def test_another_failure_does_not_use_up_the_reserve(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_reserved(str(path), OLD)
    former = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.open("/", os.O_RDONLY)  # the lowest number that no file has: other tests may have left holes
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, former[1]))
    try:
        error = error_of(lambda: write_reserved(str(path), NEW))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, former)
    assert error.code is ErrorCode.INTERNAL
    assert path.read_bytes() == OLD
    assert (tmp_path / "reserve").exists()
