"""What every transport that gives a host device promises of hangs: rescue, resume, policies and upgrades."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image, reads, writes
from tests.trouble import PATTERN, kinds, reader, trouble


def test_a_rescue_ends_what_waits_for_a_stopped_qsd_and_the_volume_can_be_resumed(
    daemon: Daemon, place: Path, transport: str
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    writes(device, 0, PATTERN)
    former = daemon.qsd("a")
    os.kill(former, signal.SIGSTOP)
    with reader(device) as process:
        daemon.call("Rescue", name="a", timeout=45)
        assert process.wait(20) != 0
    seen = daemon.show("a")
    assert (seen["state"], seen["device"], seen["link"], seen["qsd_pid"]) == ("rescued", None, None, None)
    assert not os.path.exists(f"/proc/{former}")
    assert error_of(lambda: daemon.attach("a", place / "a.raw", transport=transport)).code is ErrorCode.VOLUME_BUSY
    volume = daemon.call("Resume", name="a")["volume"]
    assert volume["state"] == "online"
    assert reads(str(volume["device"]), 0, len(PATTERN)) == PATTERN
    assert kinds(daemon)[-2:] == ["rescue", "resume"]
    daemon.detach("a")


def test_a_rescued_volume_stays_rescued_when_the_daemon_is_restarted_and_can_be_detached(
    daemon: Daemon, place: Path, transport: str
) -> None:
    daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    daemon.call("Rescue", name="a")
    daemon.kill()
    daemon.start()
    eventually(lambda: daemon.show("a")["state"] == "rescued", "as it was")
    assert "rescue" in kinds(daemon)
    daemon.detach("a")


def test_a_device_that_goes_with_its_qsd_cannot_be_kept(daemon: Daemon, place: Path) -> None:
    daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    error = error_of(lambda: daemon.call("Rescue", name="a", keep=True))
    assert (error.code, bool(error.hint)) == (ErrorCode.UNSUPPORTED, True)
    assert daemon.online("a")
    daemon.detach("a")


def test_by_policy_a_stopped_qsd_is_given_up(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device(
        "a", image(place / "a.raw", "raw"), transport=transport, options={"on-hang": "fail-after:3"}
    )
    os.kill(daemon.qsd("a"), signal.SIGSTOP)
    with reader(device) as process:
        eventually(lambda: daemon.show("a")["state"] == "rescued", "rescued", timeout=60)
        assert process.wait(20) != 0
    assert daemon.show("a")["device"] == (None if transport == "fuse" else device)
    assert daemon.call("Resume", name="a")["volume"]["state"] == "online"
    daemon.detach("a")


def test_without_a_policy_a_qcow2_waits_for_its_qsd(daemon: Daemon, place: Path, transport: str) -> None:
    """Its death would lose acknowledged writes."""
    device = daemon.device("a", image(place / "a.qcow2"), format="qcow2", transport=transport)
    former = daemon.qsd("a")
    os.kill(former, signal.SIGSTOP)
    with reader(device) as process:
        eventually(lambda: trouble(daemon) == "qsd-stopped", "it is found out", timeout=90)
        condition = daemon.show("a")["condition"]
        assert (condition["policy"], condition["acts_at"]) == ("wait", None)
        os.kill(former, signal.SIGCONT)
        assert process.wait(20) == 0
    eventually(lambda: daemon.online("a") and trouble(daemon) is None, "well again")
    assert daemon.qsd("a") == former
    assert kinds(daemon)[-2:] == ["hang", "recovered"]
    daemon.detach("a")


def test_an_upgrade_of_a_device_that_cannot_wait_is_refused_while_it_is_used(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport="fuse")
    writes(device, 0, PATTERN)
    former = daemon.qsd("a")
    with open(device, "rb"):
        error = error_of(lambda: daemon.call("Upgrade", name="a"))
        assert (error.code, bool(error.hint)) == (ErrorCode.UNSUPPORTED, True)
        assert daemon.qsd("a") == former
    volume = daemon.call("Upgrade", name="a")["volume"]
    assert volume["qsd_pid"] != former
    assert reads(str(volume["device"]), 0, len(PATTERN)) == PATTERN
    daemon.detach("a")


def test_other_volumes_notice_nothing_of_one_that_hangs(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    other = daemon.device("b", image(place / "b.raw", "raw"), transport=transport)
    former = daemon.qsd("a")
    os.kill(former, signal.SIGSTOP)
    try:
        with reader(device) as process:
            writes(other, 0, PATTERN)
            assert daemon.show("a")["name"] == "a"
            assert daemon.names() == ["a", "b"]
            daemon.detach("b")
            daemon.device("b", place / "b.raw", transport=transport)
            assert reads(str(daemon.show("b")["device"]), 0, len(PATTERN)) == PATTERN
            os.kill(former, signal.SIGCONT)
            assert process.wait(20) == 0
    finally:
        os.kill(former, signal.SIGCONT)
    daemon.detach("b")
    daemon.detach("a")


def test_a_rescue_from_a_qsd_that_cannot_die_says_so_and_is_finished_when_it_can(
    daemon: Daemon, place: Path, transport: str
) -> None:
    """Its threads wait in the kernel, for storage of this host that hangs: it is a zombie that holds its device."""
    base = daemon.device("base", image(place / "base.raw", "raw"), transport="fuse")
    server = daemon.qsd("base")
    device = daemon.device("a", f"host_device:{base}", transport=transport, options={"cache": "none"})
    os.kill(server, signal.SIGSTOP)
    try:
        with reader(device) as process:
            error = error_of(lambda: daemon.call("Rescue", name="a", timeout=45))
            assert error.code is ErrorCode.QSD_SILENT, error
            assert "SIGKILL" in str(error)
            writes(daemon.device("b", image(place / "b.raw", "raw"), transport=transport), 0, PATTERN)
            daemon.detach("b")
            os.kill(server, signal.SIGCONT)
            eventually(lambda: daemon.show("a")["state"] == "rescued", "the rescue is finished", timeout=60)
            process.wait(20)
    finally:
        os.kill(server, signal.SIGCONT)
    daemon.call("Resume", name="a")
    daemon.detach("a")
    daemon.detach("base")
