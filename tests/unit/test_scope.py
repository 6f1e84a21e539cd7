"""A QSD gets a scope of its own; what goes wrong with that is said once, and harms nothing."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.host import scope
from storaged.host.dbus import Connection, Message, Variant
from tests.unit.fake_bus import Answer, fails, fake_bus, returns, signals

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
    monkeypatch.setattr(scope, "Connection", functools.partial(Connection, path=str(tmp_path / "bus")))
    monkeypatch.setattr(scope, "_told", set())


def systemd(result: str = "done") -> Answer:
    def answer(call: Message) -> list[bytes]:
        if call.member != "StartTransientUnit":
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
        scope.enclose(child.pid, "a", 12345)
    assert [call.member for call in calls] == ["AddMatch", "Subscribe", "StartTransientUnit"]
    unit, mode, properties, auxiliary = calls[2].body
    assert (unit, mode, auxiliary) == (f"storaged-qsd-a-{child.pid}.scope", "fail", [])
    assert dict(properties) | {"Description": None} == {
        "Description": None, "Slice": Variant("s", "storaged.slice"), "PIDs": Variant("au", [child.pid]),
        "DefaultDependencies": Variant("b", False), "CollectMode": Variant("s", "inactive-or-failed"),
        "MemorySwapMax": Variant("t", 0), "MemoryMin": Variant("t", 12345),
        "ManagedOOMPreference": Variant("s", "omit"),
    }


def test_the_minimum_of_the_slice_is_that_of_all_its_scopes(
    tmp_path: Path, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = f"/storaged.slice/{scope.unit_name('a', child.pid)}"
    places = iter(["/elsewhere", moved, moved])
    monkeypatch.setattr(scope, "cgroup_of", lambda _: next(places))
    monkeypatch.setattr(os, "listdir", lambda _: ["a.scope", "b.scope", "memory.min"])
    with fake_bus(tmp_path / "bus", systemd()) as calls:
        scope.enclose(child.pid, "a", 1000)
    assert (calls[-1].member, calls[-1].body) == (
        "SetUnitProperties", ["storaged.slice", True, [("MemoryMin", Variant("t", 2000))]]
    )


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


def test_one_that_dies_while_systemd_looks_for_it_is_no_error(
    tmp_path: Path, child: subprocess.Popen[bytes]
) -> None:
    def answer(call: Message) -> list[bytes]:
        if call.member != "StartTransientUnit":
            return [returns(call)]
        child.kill()
        child.wait()
        return [fails(call, "org.freedesktop.DBus.Error.UnixProcessIdUnknown", "no such process")]

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
