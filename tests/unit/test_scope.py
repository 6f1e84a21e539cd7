"""A QSD gets a scope of its own; what goes wrong with that is said once, and harms nothing."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jeepney import HeaderFields, Message

from storaged.host import scope
from tests.unit.fake_bus import Answer, fails, fake_bus, member, returns, signals, welcome

WHERE = ("/org/example", "org.example", "org.example.Some")
JOB = "/org/freedesktop/systemd1/job/9"


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


@pytest.fixture(autouse=True)
def anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """systemd is PID 1, its bus is ours, and nothing was told."""
    monkeypatch.setattr(scope, "available", lambda: True)
    monkeypatch.setattr(scope, "SYSTEM_BUS", str(tmp_path / "bus"))
    monkeypatch.setattr(scope, "_told", set())


def systemd(result: str = "done") -> Answer:
    def answer(call: Message) -> list[bytes]:
        if member(call) != "StartTransientUnit":
            return [returns(call)]
        other = signals("JobRemoved", "uoss", 8, f"{JOB}0", "other.scope", "failed")
        return [other, signals("JobRemoved", "uoss", 9, JOB, call.body[0], result), returns(call, "o", JOB)]

    return answer


def test_each_process_has_a_scope_and_its_name_needs_no_escaping() -> None:
    assert scope.unit_name("a-b_c.d", 12) == "storaged-qsd-a-b_c.d-12.scope"
    assert len(scope.unit_name("x" * 63, 4194304)) < 256


def test_systemd_is_asked_for_a_scope_that_is_not_swapped_has_a_minimum_and_outlives_filesystems(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    # This systemd says that it was done, and has done nothing.
    with fake_bus(tmp_path / "bus", systemd()) as calls, pytest.raises(OSError, match="has not moved it"):
        scope.enclose(child.pid, "a", "/dev/nbd0", 12345)
    assert [member(call) for call in calls] == ["AddMatch", "Subscribe", "StartTransientUnit"]
    unit, mode, properties, auxiliary = calls[2].body
    (rule,) = calls[0].body
    assert "member='JobRemoved'" in rule
    assert f"arg2='{unit}'" in rule
    assert (unit, mode, auxiliary) == (f"storaged-qsd-a-{child.pid}.scope", "fail", [])
    users = ["blockdev@dev-nbd0.target", "blockdev@dev-storaged-a.target"]
    assert dict(properties) | {"Description": None} == {
        "Description": None, "Slice": ("s", "storaged.slice"), "PIDs": ("au", [child.pid]),
        "DefaultDependencies": ("b", False), "CollectMode": ("s", "inactive-or-failed"),
        "Wants": ("as", users), "Before": ("as", users), "SurviveFinalKillSignal": ("b", True),
        "CPUAccounting": ("b", True), "IOAccounting": ("b", True), "MemoryAccounting": ("b", True),
        "MemorySwapMax": ("t", 0), "MemoryMin": ("t", 12345),
        "ManagedOOMPreference": ("s", "omit"),
    }


def test_the_minimum_of_the_slice_is_that_of_all_its_scopes(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = f"/storaged.slice/{scope.unit_name('a', child.pid)}"
    places = iter(["/elsewhere", moved, moved])
    monkeypatch.setattr(scope, "cgroup_of", lambda _: next(places))
    monkeypatch.setattr(os, "listdir", lambda _: ["a.scope", "b.scope", "memory.min"])
    with fake_bus(tmp_path / "bus", systemd()) as calls:
        scope.enclose(child.pid, "a", memory_min=1000)
    assert (member(calls[-1]), calls[-1].body) == (
        "SetUnitProperties", ("storaged.slice", True, [("MemoryMin", ("t", 2000))])
    )


def test_by_a_slice_that_goes_with_the_scope_the_volumes_and_the_network_outlive_the_mounts(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    own = scope.unit_name("a-b", child.pid)
    places = iter(["/elsewhere", *[f"/storaged.slice/{own}"] * 2])
    monkeypatch.setattr(scope, "cgroup_of", lambda _: next(places))
    monkeypatch.setattr(os, "listdir", lambda _: [])
    with fake_bus(tmp_path / "bus", systemd()) as calls:
        scope.enclose(child.pid, "a-b", "/dev/vdc")
    unit, _mode, properties, _auxiliary = calls[-1].body
    said = dict(properties)
    assert unit == f"storagedvolume_a\\x2db_{child.pid}.slice"
    assert said["BindsTo"] == ("as", [own])
    assert said["Before"] == ("as", ["blockdev@dev-vdc.target", "blockdev@dev-storaged-a\\x2db.target"])
    assert {"storaged-shutdown.service", "network.target"} <= set(said["After"][1])
    # It is ordered behind the local filesystems as it starts, and so are mounts by hand as they end.
    assert "storaged.service" not in said["After"][1]


def test_a_systemd_that_does_not_know_survivors_is_asked_without(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    def old(call: Message) -> list[bytes]:
        if member(call) == "StartTransientUnit" and "SurviveFinalKillSignal" in dict(call.body[2]):
            text = "Cannot set property SurviveFinalKillSignal, or unknown property."
            return [fails(call, "org.freedesktop.DBus.Error.PropertyReadOnly", text)]
        return list(systemd()(call))

    with fake_bus(tmp_path / "bus", old) as calls, pytest.raises(OSError, match="has not moved it"):
        scope.enclose(child.pid, "a")
    first, second = (dict(call.body[2]) for call in calls if member(call) == "StartTransientUnit")
    assert first.keys() - second.keys() == {"SurviveFinalKillSignal"}


@pytest.mark.parametrize(("path", "name"), [
    ("/dev/nbd0", "dev-nbd0"), ("/dev/storaged/a-b_c.d", "dev-storaged-a\\x2db_c.d"), ("/.x/é", "\\x2ex-\\xc3\\xa9"),
])
def test_paths_are_escaped_as_systemd_does(path: str, name: str) -> None:
    assert scope.escape_path(path) == name


def test_a_process_that_is_there_already_is_left_alone_and_one_that_is_gone_is_no_error(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_bus(tmp_path / "bus", systemd()) as calls:
        monkeypatch.setattr(scope, "cgroup_of", lambda pid: f"/x/{scope.unit_name('a', pid)}")
        scope.enclose(child.pid, "a")
        monkeypatch.undo()
        child.kill()
        child.wait()
        scope.enclose(child.pid, "a")
    assert calls == []


def unknown(call: Message) -> list[bytes]:
    return [fails(call, "org.freedesktop.DBus.Error.UnixProcessIdUnknown", "no such process")]


@pytest.mark.parametrize("end", [unknown, systemd("failed")])
def test_one_that_dies_while_systemd_looks_for_it_is_no_error(
    tmp_path: Path, child: subprocess.Popen[bytes], end: Answer
) -> None:
    def answer(call: Message) -> list[bytes]:
        if member(call) != "StartTransientUnit":
            return [returns(call)]
        child.kill()
        child.wait()
        return list(end(call))

    with fake_bus(tmp_path / "bus", answer):
        scope.enclose(child.pid, "a")


def test_what_goes_wrong_is_said_once_and_harms_nothing(
    tmp_path: Path, child: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    async def three() -> None:
        for name in ("a", "b", "c"):
            await scope.protect(child.pid, name)

    with caplog.at_level(logging.WARNING):
        asyncio.run(three())
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "of a has no systemd scope of its own, and may be swapped out" in caplog.text
        with fake_bus(tmp_path / "bus", systemd("failed")):
            asyncio.run(three())
    assert len(caplog.records) == 2
    assert "'failed'" in caplog.text


def test_without_systemd_nothing_is_asked_and_nothing_said(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scope, "available", lambda: False)
    asyncio.run(scope.protect(child.pid, "a"))
    assert caplog.records == []


def test_without_its_library_only_the_scope_is_missing(
    child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "jeepney", None)
    asyncio.run(scope.protect(child.pid, "a"))
    assert "jeepney" in caplog.text


def test_the_daemon_has_the_library_only_where_it_needs_it() -> None:
    words = "import storaged.supervisor.daemon, sys; sys.exit('jeepney' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", words]).returncode == 0


def test_an_error_reply_is_an_error_with_its_name(tmp_path: Path) -> None:
    with (
        fake_bus(tmp_path / "bus", lambda call: [fails(call, "org.example.No", "not now")]) as calls,
        scope.SystemBus(10) as bus,
        pytest.raises(OSError, match=r"org\.example\.No: not now"),
    ):
        bus.call(WHERE, "Do", "sat", "in", [1, 2])
    fields = calls[0].header.fields
    assert [fields[key] for key in (HeaderFields.path, HeaderFields.destination, HeaderFields.interface)] == [*WHERE]
    assert (member(calls[0]), calls[0].body) == ("Do", ("in", [1, 2]))


def test_the_end_of_a_job_may_come_before_or_after_the_reply_and_not_from_a_signal_of_another_kind(
    tmp_path: Path
) -> None:
    def answer(call: Message) -> list[bytes]:
        return [
            signals("JobRemoved", "uass", 1, [JOB], "x"), signals("JobRemoved", "s", JOB), signals("Other"),
            signals("JobRemoved", "uoss", 1, f"{JOB}1", "x", "canceled"), returns(call),
            signals("JobRemoved", "uoss", 1, JOB, "x", "done"),
        ]

    with fake_bus(tmp_path / "bus", answer), scope.SystemBus(10) as bus:
        bus.call(WHERE, "Do")
        assert bus.result_of(JOB) == "done"
        assert bus.result_of(f"{JOB}1") == "canceled"


def endless(call: Message) -> Iterator[bytes]:
    while True:
        yield signals("Chatter")
        time.sleep(0.001)


hears_again = threading.Event()


def deaf(call: Message) -> Iterator[bytes]:
    yield returns(call)
    hears_again.wait(20)


def nothing(call: Message) -> list[bytes]:
    return []


def half(call: Message) -> list[bytes]:
    return [returns(call, "s", "x" * 100)[:-50]]


def ask(bus: scope.SystemBus) -> None:
    bus.call(WHERE, "Do")


def ask_much(bus: scope.SystemBus) -> None:
    ask(bus)
    bus.call(WHERE, "Do", "s", "x" * (8 << 20))


def wait(bus: scope.SystemBus) -> None:
    bus.result_of(JOB)


@pytest.mark.parametrize(("greeting", "hello", "answer", "then"), [
    (b"", nothing, nothing, ask), (b"OK", nothing, nothing, ask), (b"OK 0\r\n", nothing, nothing, ask),
    (b"OK 0\r\n", endless, nothing, ask), (b"OK 0\r\n", welcome, nothing, ask), (b"OK 0\r\n", welcome, half, ask),
    (b"OK 0\r\n", welcome, endless, ask), (b"OK 0\r\n", welcome, deaf, ask_much), (b"OK 0\r\n", welcome, nothing, wait),
], ids=["greeting", "half a greeting", "hello", "hello with signals", "call", "half a reply", "signals", "deaf", "job"])
def test_a_bus_that_does_not_answer_is_waited_for_until_the_deadline_and_no_longer(
    tmp_path: Path, greeting: bytes, hello: Answer, answer: Answer, then: Callable[[scope.SystemBus], None]
) -> None:
    begin = time.monotonic()
    with fake_bus(tmp_path / "bus", answer, greeting, hello):
        hears_again.clear()
        with pytest.raises(TimeoutError) as caught, scope.SystemBus(0.3) as bus:
            then(bus)
        took = time.monotonic() - begin
        hears_again.set()
    assert 0.25 < took < 5
    assert str(caught.value)  # kept until here: it is not its end that closes the connection


@pytest.mark.parametrize("reply", [
    b"", b"?" + bytes(15), b"l\1\0\1" + b"\xff" * 12 + bytes(2 << 20), b"l\2\0\1" + bytes(4) + b"\1" * 4 + b"\x08\0\0\0"
    + b"\xff" * 8, signals("Much", "s", "x" * (2 << 20)), signals("Some", "s", "x" * 99999) * 20,
], ids=["end", "no order", "long header", "wrong header", "long", "many"])
def test_a_bus_that_ends_or_sends_garbage_or_too_much_is_a_connection_error(tmp_path: Path, reply: bytes) -> None:
    with (
        fake_bus(tmp_path / "bus", lambda call: [reply]),
        pytest.raises(ConnectionError),
        scope.SystemBus(10) as bus,
    ):
        bus.call(WHERE, "Do")


@pytest.mark.parametrize("greeting", [b"REJECTED EXTERNAL\r\n", b"OK 0\r\nREJECTED more\r\n"])
def test_a_bus_that_refuses_us_says_so(tmp_path: Path, greeting: bytes) -> None:
    with (
        fake_bus(tmp_path / "bus", nothing, greeting),
        pytest.raises(ConnectionError, match=r"refuses us: .*REJECTED"),
    ):
        scope.SystemBus(5)


def test_no_bus_is_an_error_of_the_system() -> None:
    with pytest.raises(FileNotFoundError):
        scope.SystemBus(5)


