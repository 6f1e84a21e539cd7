"""What QSD keeps of the requests in flight, removed or damaged while it is dead, under load."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import vduse
from storaged.host.process import identify
from tests.harness import Daemon, error_of, eventually, image, leftovers, reads, run, writes

AREA = 4 << 20


class Load:
    """Writers, each with one request in flight at a time, none of which goes by the page cache."""

    def __init__(self, device: str, place: Path, writers: int) -> None:
        self.patterns = [os.urandom(AREA) for _ in range(writers)]
        self.writers = []
        for number, pattern in enumerate(self.patterns):
            (place / f"pattern{number}").write_bytes(pattern)
            self.writers.append(subprocess.Popen(
                ["dd", f"if={place}/pattern{number}", f"of={device}", "bs=4k", "oflag=direct", "conv=notrunc",
                 f"seek={number * AREA // 4096}"],
                stderr=subprocess.DEVNULL,
            ))

    def wait(self) -> list[int]:
        """Their exit statuses."""
        return [writer.wait(90) for writer in self.writers]


class Case:
    """A volume under load, whose daemon and QSD are then dead, with requests in flight."""

    def __init__(self, daemon: Daemon, place: Path, writers: int) -> None:
        self.daemon = daemon
        daemon.start()
        self.device = daemon.device("a", image(place / "a.raw", "raw"), transport="vduse")
        directory = Path(daemon.layout.volume_dir("a"))
        self.log, self.kept = directory / "tmp/vduse-blk-storaged.a", directory / "reconnect.log"
        assert os.path.samefile(self.log, self.kept), "it has its second link as soon as there is a device"
        self.former = daemon.qsd("a")
        self.load = Load(self.device, place, writers)
        written = Path(f"/sys/block/{os.path.basename(self.device)}/stat")
        eventually(lambda: int(written.read_text().split()[6]) > 200, "they write")
        daemon.kill()
        os.kill(self.former, signal.SIGKILL)
        eventually(lambda: identify(self.former) is None, "it is dead")
        in_flight = Path(f"/sys/block/{os.path.basename(self.device)}/inflight")
        eventually(lambda: sum(map(int, in_flight.read_text().split())) == writers, "all of them wait")

    def goes_on(self) -> None:
        """Without an error, and with the right data."""
        eventually(lambda: self.daemon.replaced("a", self.former), "replaced", timeout=60)
        assert self.load.wait() == [0] * len(self.load.writers)
        assert self.daemon.show("a")["device"] == self.device
        for number, pattern in enumerate(self.load.patterns):
            assert reads(self.device, number * AREA, AREA) == pattern
        assert os.path.samefile(self.log, self.kept)
        self.daemon.detach("a")
        assert leftovers(self.daemon.root) == []

    def is_lost(self) -> None:
        """It is said, by a daemon that answers."""
        def failed() -> bool:
            seen = self.daemon.show("a")
            return bool(seen["state"] == "failed" and ErrorCode.RECONNECT_LOG_LOST in str(seen))

        eventually(failed, "it is found out", timeout=60)
        begin = time.monotonic()
        assert self.daemon.names() == ["a"]
        assert "by force" in str(self.daemon.show("a"))
        assert time.monotonic() - begin < 10
        assert all(writer.poll() is None for writer in self.load.writers), "nobody got an error"


def removed(case: Case, place: Path) -> None:
    case.log.unlink()


def removed_with_its_directory(case: Case, place: Path) -> None:
    shutil.rmtree(case.log.parent)


def replaced(case: Case, place: Path) -> None:
    """By the log of a device that has nothing in flight."""
    (place / "other").write_bytes(bytes(case.log.stat().st_size))
    shutil.copy(place / "other", case.log.with_name("x"))
    case.log.with_name("x").rename(case.log)


def without_its_second_link(case: Case, place: Path) -> None:
    case.kept.unlink()


@pytest.mark.parametrize("harm", [removed, removed_with_its_directory, replaced, without_its_second_link])
def test_a_log_that_was_removed_or_replaced_is_put_back_and_nobody_notices(
    stopped: Daemon, place: Path, harm: Callable[[Case, Path], None]
) -> None:
    case = Case(stopped, place, writers=4)
    harm(case, place)
    stopped.start()
    case.goes_on()


@pytest.mark.parametrize("how", ["truncated in place", "overwritten in place", "both replaced"])
def test_one_that_is_lost_is_said_and_the_volume_goes_on_when_it_is_put_back(
    stopped: Daemon, place: Path, how: str
) -> None:
    case = Case(stopped, place, writers=4)
    good, data = place / "good", case.log.read_bytes()
    if how == "truncated in place":
        os.truncate(case.log, 4096)
    elif how == "overwritten in place":
        # As good as any log, of a device that has answered more requests.
        answered = int.from_bytes(data[14:16], "little")
        case.log.write_bytes(data[:14] + ((answered + 77) % 65536).to_bytes(2, "little") + data[16:])
    else:
        # The right one is elsewhere: kept on another path of the same filesystem.
        good = Path(stopped.layout.run_dir) / "good"
        case.log.rename(good)
        case.kept.unlink()
        for path in (case.log, case.kept):
            path.write_bytes(bytes(len(data)))
    stopped.start()
    case.is_lost()
    other = stopped.device("b", image(place / "b.raw", "raw"), transport="vduse")
    assert reads(other, 0, 4096) == bytes(4096)
    error = error_of(lambda: stopped.detach("a", timeout=30))
    assert error.code is ErrorCode.RECONNECT_LOG_LOST, "what waits would be lost"
    stopped.detach("b")
    if how != "both replaced":
        case.log.write_bytes(data)
    else:
        case.log.unlink()
        good.rename(case.log)
    case.goes_on()


def test_a_volume_whose_log_is_lost_while_nothing_is_in_flight_goes_on(stopped: Daemon, place: Path) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a.raw", "raw"), transport="vduse", options={"queues": "2"})
    writes(device, 0, b"before" * 1000)
    former = stopped.qsd("a")
    run("udevadm", "settle")  # it looks at what was written, and nobody may
    stopped.kill()
    os.kill(former, signal.SIGKILL)
    eventually(lambda: identify(former) is None, "it is dead")
    assert [ring.waiting for ring in vduse.rings("storaged.a", 2) or []] == [0, 0]
    directory = Path(stopped.layout.volume_dir("a"))
    os.truncate(directory / "reconnect.log", 0)
    (directory / "tmp/vduse-blk-storaged.a").unlink()
    stopped.start()
    eventually(lambda: stopped.replaced("a", former), "replaced", timeout=60)
    assert reads(device, 0, 6000) == b"before" * 1000
    writes(device, 0, b"after" * 1000)
    assert reads(device, 0, 5000) == b"after" * 1000
    stopped.detach("a")


def test_a_volume_whose_log_is_lost_is_detached_by_force_and_others_come_and_go_meanwhile(
    stopped: Daemon, place: Path
) -> None:
    case = Case(stopped, place, writers=1)
    os.truncate(case.log, 0)
    stopped.start()
    case.is_lost()
    done: list[object] = []

    def force() -> None:
        try:
            done.append(stopped.detach("a", force=True, timeout=50))
        except StoragedError as error:
            done.append(error)

    thread = threading.Thread(target=force)
    thread.start()
    stopped.device("b", image(place / "b.raw", "raw"), transport="vduse")
    stopped.detach("b")
    thread.join(80)
    print(done)
    # With one request in flight there is one order only in which requests can have ended: so it ends, by an error.
    assert case.load.wait() != [0]
    assert isinstance(done[0], list), done
    assert stopped.names() == []
    assert leftovers(stopped.root) == []
