"""The log of the requests in flight: put back where it can be, and never replaced by a wrong one."""

from __future__ import annotations

import asyncio
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import reconnectlog, vduse
from storaged.host.blocking import BlockingCalls
from storaged.host.reconnectlog import ReconnectLog
from storaged.host.vduse import Ring
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.transports import TRANSPORTS
from storaged.transports.base import Site
from tests.harness import error_of
from tests.unit.test_atomic import killed_at

QUEUES, QUEUE_SIZE = 2, 128
#: facts of a real one: 32896 bytes for two queues.
QUEUE_BYTES = 16448
ANSWERED = 65535


def content(*in_flight: int, queues: int = QUEUES, reset: bool = False) -> bytes:
    """A log as QSD writes it, with these descriptors of its first queue in flight."""
    made = b""
    for queue in range(queues):
        data = bytearray(QUEUE_BYTES)
        data[:16] = struct.pack("<QHHHH", 0, 0, 0 if reset else 1024, 17, ANSWERED)
        for counter, index in enumerate(in_flight if queue == 0 else ()):
            data[16 + 16 * index:32 + 16 * index] = struct.pack("<B5sHQ", 1, b"", 0, 70000 + counter)
        made += data
    return made


@pytest.fixture
def log(tmp_path: Path) -> ReconnectLog:
    """Of a volume whose QSD has just exported; nothing was kept yet."""
    (tmp_path / "tmp").mkdir()
    made = ReconnectLog(str(tmp_path), "storaged.a", QUEUES, QUEUE_SIZE)
    with open(made.path, "wb") as file:
        file.truncate(QUEUES * QUEUE_BYTES)
    return made


@pytest.fixture
def kept(log: ReconnectLog) -> ReconnectLog:
    """With its second link, and requests in flight."""
    reconnectlog.keep(log)
    Path(log.path).write_bytes(content(3, 5, 99))  # in place, as QSD writes through its mapping
    return log


def names(log: ReconnectLog) -> list[str]:
    return sorted(str(path.relative_to(log.directory)) for path in Path(log.directory).rglob("*") if path.is_file())


ALL = ["reconnect.inode", "reconnect.log", "tmp/vduse-blk-storaged.a"]


def is_restored(log: ReconnectLog, data: bytes) -> bool:
    """Both names are the very file, and there is nothing else."""
    return os.path.samefile(log.path, log.kept) and Path(log.path).read_bytes() == data and names(log) == ALL


def test_the_size_is_what_qsd_makes_it() -> None:
    assert ReconnectLog("/d", "n", 2, 256).size == 32896
    assert ReconnectLog("/d", "n", 1, 1024).size == 16448
    assert ReconnectLog("/d", "storaged.a", 1, 16).path == "/d/tmp/vduse-blk-storaged.a"


def test_a_log_is_kept_by_a_second_link_and_gets_all_its_room(log: ReconnectLog) -> None:
    assert os.stat(log.path).st_blocks == 0, "QSD makes it with holes"
    reconnectlog.keep(log)
    assert os.path.samefile(log.path, log.kept)
    assert os.stat(log.path).st_blocks * 512 >= log.size
    reconnectlog.keep(log)
    assert is_restored(log, bytes(log.size))


@pytest.mark.parametrize("size", [None, 0, QUEUE_BYTES])
def test_a_log_that_is_none_is_not_kept(log: ReconnectLog, size: int | None) -> None:
    if size is None:
        os.unlink(log.path)
    else:
        os.truncate(log.path, size)
    assert error_of(lambda: reconnectlog.keep(log)).code is ErrorCode.DEVICE_FAILED


@pytest.mark.parametrize("data", [content(3, 5, 127), content(), content(0, reset=True), bytes(QUEUES * QUEUE_BYTES)])
def test_a_good_log_is_left_as_it_is(kept: ReconnectLog, data: bytes) -> None:
    Path(kept.path).write_bytes(data)
    inode = os.stat(kept.path).st_ino
    assert restore(kept) == ""
    assert is_restored(kept, data)
    assert os.stat(kept.path).st_ino == inode


def restore(log: ReconnectLog, rings: list[Ring] | None = None) -> str:
    return reconnectlog.restore(log, rings)


def removed(path: str) -> None:
    os.unlink(path)


def replaced(path: str) -> None:
    """By another volume's, as good as any."""
    Path(f"{path}.x").write_bytes(content(1, 2))
    os.rename(f"{path}.x", path)


def copied(path: str) -> None:
    """The same content, which is no use: it is not the file that QSD last wrote to."""
    shutil.copy(path, f"{path}.x")
    os.rename(f"{path}.x", path)


def linked_elsewhere(path: str) -> None:
    os.rename(path, f"{path}.x")
    os.symlink(f"{path}.x", path)


def made_a_directory(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


LOST = [removed, replaced, copied, linked_elsewhere]


@pytest.mark.parametrize("harm", LOST)
def test_one_that_was_removed_or_replaced_is_put_back(kept: ReconnectLog, harm: Callable[[str], None]) -> None:
    data = Path(kept.path).read_bytes()
    harm(kept.path)
    assert "put back" in restore(kept)
    Path(f"{kept.path}.x").unlink(missing_ok=True)
    assert is_restored(kept, data)
    assert restore(kept) == ""


def test_one_that_was_removed_with_its_directory_is_put_back(kept: ReconnectLog) -> None:
    data = Path(kept.path).read_bytes()
    shutil.rmtree(os.path.dirname(kept.path))
    assert "put back" in restore(kept)
    assert is_restored(kept, data)


@pytest.mark.parametrize("harm", LOST)
def test_a_second_link_that_was_removed_or_replaced_is_made_anew(
    kept: ReconnectLog, harm: Callable[[str], None]
) -> None:
    data = Path(kept.path).read_bytes()
    harm(kept.kept)
    assert restore(kept) == ""
    Path(f"{kept.kept}.x").unlink(missing_ok=True)
    assert is_restored(kept, data)


@pytest.mark.parametrize("harm", [*LOST, made_a_directory])
@pytest.mark.parametrize("other", LOST)
def test_where_both_are_lost_it_is_said_and_nothing_is_changed(
    kept: ReconnectLog, harm: Callable[[str], None], other: Callable[[str], None]
) -> None:
    harm(kept.path)
    other(kept.kept)
    before = names(kept)
    error = error_of(lambda: restore(kept))
    assert error.code is ErrorCode.RECONNECT_LOG_LOST
    assert kept.path in error.cause
    assert "by force" in error.hint
    assert names(kept) == before


@pytest.mark.parametrize(
    ("offset", "data"),
    [
        (0, b"\1"), (8, b"\1\0"), (10, b"\0\2"), (12, b"\x80\0"), (16, b"\2"), (17, b"x"), (22, b"\1"),
        (16 + 16 * QUEUE_SIZE, b"\1"), (24 + 16 * QUEUE_SIZE, b"\1"), (QUEUE_BYTES - 1, b"\1"),
        (QUEUE_BYTES + 10, b"\1"),
    ],
)
def test_one_that_was_damaged_in_place_is_found_out(kept: ReconnectLog, offset: int, data: bytes) -> None:
    with open(kept.path, "r+b") as file:
        file.seek(offset)
        file.write(data)
    assert error_of(lambda: restore(kept)).code is ErrorCode.RECONNECT_LOG_LOST


@pytest.mark.parametrize("size", [0, 1, QUEUE_BYTES, QUEUES * QUEUE_BYTES - 1, QUEUES * QUEUE_BYTES + 1])
def test_one_that_was_truncated_in_place_is_found_out(kept: ReconnectLog, size: int) -> None:
    os.truncate(kept.path, size)
    error = error_of(lambda: restore(kept))
    assert error.code is ErrorCode.RECONNECT_LOG_LOST
    assert f"{size} bytes" in error.cause


def test_the_log_of_a_device_with_larger_queues_copied_over_ours_is_found_out(kept: ReconnectLog) -> None:
    Path(kept.path).write_bytes(content(QUEUE_SIZE))
    assert error_of(lambda: restore(kept)).code is ErrorCode.RECONNECT_LOG_LOST


def test_without_the_inode_the_second_link_wins(kept: ReconnectLog) -> None:
    data = Path(kept.path).read_bytes()
    os.unlink(kept.identity)
    replaced(kept.path)
    assert "put back" in restore(kept)
    assert is_restored(kept, data)


def test_without_the_inode_a_good_log_that_is_not_the_one_that_was_kept_is_not_trusted(kept: ReconnectLog) -> None:
    os.unlink(kept.identity)
    os.truncate(kept.kept, 5)
    replaced(kept.path)
    assert error_of(lambda: restore(kept)).code is ErrorCode.RECONNECT_LOG_LOST


@pytest.mark.parametrize("garbage", [b"", b"x y\n", b"1\n", b"\xff\xff"])
def test_a_damaged_inode_is_made_anew(kept: ReconnectLog, garbage: bytes) -> None:
    data = Path(kept.path).read_bytes()
    Path(kept.identity).write_bytes(garbage)
    assert restore(kept) == ""
    assert is_restored(kept, data)
    replaced(kept.path)
    replaced(kept.kept)
    assert error_of(lambda: restore(kept)).code is ErrorCode.RECONNECT_LOG_LOST


def test_a_daemon_that_dies_anywhere_while_it_keeps_the_log_leaves_a_good_one(log: ReconnectLog) -> None:
    number = 0
    while True:
        for name in (log.kept, log.identity):
            Path(name).unlink(missing_ok=True)
        killed = killed_at(number, lambda: reconnectlog.keep(log))
        assert restore(log) == ""
        assert os.path.samefile(log.path, log.kept)
        for left in Path(log.directory).glob(".reconnect.inode.*"):
            left.unlink()
        if not killed:
            break
        number += 1
    assert number >= 8


def void(_: object) -> None:
    """For who wants no result."""


def test_a_daemon_that_dies_anywhere_while_it_puts_the_log_back_leaves_it_to_the_next(kept: ReconnectLog) -> None:
    data, number = Path(kept.path).read_bytes(), 0
    while True:
        replaced(kept.path)
        killed = killed_at(number, lambda: void(restore(kept)))
        restore(kept)
        assert is_restored(kept, data)
        if not killed:
            break
        number += 1
    assert number >= 4


def test_a_fresh_attachment_has_nothing_of_an_older_one(kept: ReconnectLog) -> None:
    reconnectlog.forget(kept)
    assert names(kept) == []
    reconnectlog.forget(kept)


def test_a_rescue_server_begins_without_a_log_that_is_wrong(kept: ReconnectLog) -> None:
    os.truncate(kept.path, 7)
    reconnectlog.give_up(kept)
    assert not os.path.exists(kept.path)
    reconnectlog.give_up(kept)


# The queues ------------------------------------------------------------------------------------------------------

QUIET, BUSY = Ring(ANSWERED, ANSWERED), Ring(2, ANSWERED)


@pytest.mark.parametrize("used", [ANSWERED, 0])
def test_a_log_that_goes_together_with_the_queues_is_good(kept: ReconnectLog, used: int) -> None:
    """QSD may have been killed after an answer and before it was noted; numbers begin anew after 65535."""
    assert restore(kept, [Ring(2, used), QUIET]) == ""
    assert is_restored(kept, content(3, 5, 99))


@pytest.mark.parametrize("used", [ANSWERED - 1, 1, 30000])
def test_one_that_does_not_is_another_volumes_or_old(kept: ReconnectLog, used: int) -> None:
    error = error_of(lambda: restore(kept, [QUIET, Ring(used + 2, used)]))
    assert error.code is ErrorCode.RECONNECT_LOG_LOST
    assert "requests that wait: 2" in error.cause


@pytest.mark.parametrize("harm", [removed, replaced, lambda path: os.truncate(path, 9)])
def test_a_lost_log_is_begun_anew_where_nothing_is_in_flight(
    kept: ReconnectLog, harm: Callable[[str], None]
) -> None:
    harm(kept.path)
    if os.path.exists(kept.path) and not os.path.samefile(kept.path, kept.kept):
        os.unlink(kept.kept)
    Path(kept.kept).unlink(missing_ok=True)
    assert error_of(lambda: restore(kept, [BUSY, QUIET])).code is ErrorCode.RECONNECT_LOG_LOST
    assert "begun" in restore(kept, [QUIET, QUIET])
    assert is_restored(kept, bytes(kept.size))
    assert restore(kept) == ""


def test_a_daemon_that_dies_anywhere_while_it_begins_a_new_log_leaves_it_to_the_next(kept: ReconnectLog) -> None:
    number = 0
    while True:
        os.truncate(kept.path, 9)
        killed = killed_at(number, lambda: void(restore(kept, [QUIET, QUIET])))
        restore(kept, [QUIET, QUIET])
        for left in [*Path(kept.directory).rglob(".*.tmp"), *Path(kept.directory).rglob(".*.new")]:
            left.unlink()
        assert is_restored(kept, bytes(kept.size))
        if not killed:
            break
        number += 1 if number < 8 else 2000
    assert number >= 8


def test_of_a_device_that_is_not_there_no_queues_can_be_seen() -> None:
    assert vduse.rings("storaged.no-such", 1) is None
    assert [Ring(5, 5).waiting, Ring(7, 5).waiting, Ring(1, 65535).waiting] == [0, 2, 2]


# The transport ---------------------------------------------------------------------------------------------------


@pytest.fixture
def on_the_bus(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the device is on the bus; what is not there is destroyed by nobody."""
    there = [True]
    monkeypatch.setattr("storaged.host.vdpa.exists", lambda name: there[0])
    monkeypatch.setattr("storaged.host.vduse.destroy", lambda name: None)
    return there


def prepare(log: ReconnectLog, *, rescue: bool) -> None:
    """What comes before the export of a successor, or of a rescue server."""
    record = Record(
        spec=VolumeSpec(name="a", source="/a.raw"), transport="vduse", transport_reason="", binary="", rescue=rescue,
        settings={"queues": log.queues, "queue-size": log.queue_size},
    )

    async def work() -> None:
        await TRANSPORTS["vduse"].prepare(Site("a", log.directory, BlockingCalls("a"), ""), record, 10)

    asyncio.run(work())


@pytest.mark.parametrize("rescue", [False, True])
def test_a_successor_and_a_rescue_server_get_the_log_back(
    kept: ReconnectLog, on_the_bus: list[bool], rescue: bool
) -> None:
    data = Path(kept.path).read_bytes()
    removed(kept.path)
    prepare(kept, rescue=rescue)
    assert is_restored(kept, data)


def test_without_its_log_a_successor_is_refused_and_a_rescue_server_begins_with_none(
    kept: ReconnectLog, on_the_bus: list[bool]
) -> None:
    os.truncate(kept.path, 5)
    assert error_of(lambda: prepare(kept, rescue=False)).code is ErrorCode.RECONNECT_LOG_LOST
    assert names(kept) == ALL
    prepare(kept, rescue=True)
    assert not os.path.exists(kept.path)


def test_where_no_device_is_there_whatever_is_left_of_an_older_one_goes(
    kept: ReconnectLog, on_the_bus: list[bool]
) -> None:
    on_the_bus[0] = False
    prepare(kept, rescue=False)
    assert names(kept) == []
