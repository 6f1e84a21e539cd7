"""Which transport is taken, and what its options may be."""

from __future__ import annotations

import os
import pwd
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.blocking import BlockingCalls
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build, QsdVersion
from storaged.transports import (
    HOST_TRANSPORTS,
    TRANSPORTS,
    check_transport,
    choose_transport,
    fuse,
    nbd,
    options_of,
    vduse,
    vhost_user,
)
from storaged.transports.base import Availability, HostDevice, Site
from tests.harness import error_of

OLD = Build(QsdVersion(7, 2, 22), frozenset({"nbd", "fuse", "vhost-user-blk", "vduse-blk"}), vduse_serial=True)
NEW = Build(QsdVersion(10, 0, 2), OLD.exports, vduse_serial=True)
BARE = Build(QsdVersion(7, 2, 22), frozenset())


def spec(name: str = "a", **options: str) -> VolumeSpec:
    """A volume with these options; _ stands for -."""
    return VolumeSpec(
        name=name, source="/a.raw", options={key.replace("_", "-"): value for key, value in options.items()}
    )


def site(directory: str, name: str = "a") -> Site:
    return Site(name, directory, BlockingCalls(name), directory)


# The choice ---------------------------------------------------------------------------------------------------


class Fake(HostDevice):
    """A transport that is there or not, and that can be made ready or not."""

    def __init__(self, name: str, *, lacks: str = "", fails: StoragedError | None = None) -> None:
        self.name = name
        self.readied: list[float] = []
        self._lacks, self._fails = lacks, fails

    def probe(self, build: Build | None) -> Availability:
        return Availability(not self._lacks, self._lacks or "it is there")

    def make_ready(self, timeout: float) -> None:
        self.readied.append(timeout)
        if self._fails is not None:
            raise self._fails


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Put these in the place of the real ones, in the order in which they are given."""

    def put(*fakes: Fake) -> None:
        monkeypatch.setattr("storaged.transports.TRANSPORTS", {fake.name: fake for fake in fakes})
        monkeypatch.setattr("storaged.transports.HOST_TRANSPORTS", tuple(fake.name for fake in fakes))

    return put


def no_module() -> StoragedError:
    return StoragedError(ErrorCode.TRANSPORT_UNAVAILABLE, "a module cannot be loaded", cause="blacklisted")


def test_auto_takes_the_first_that_can_be_and_loads_nothing_else(use: Callable[..., None]) -> None:
    first, second, third = Fake("one", lacks="no module one"), Fake("two"), Fake("three")
    use(first, second, third)
    taken, why = choose_transport("auto", OLD, 10)
    assert taken.name == "two"
    assert why == "one: no module one; two: it is there"
    assert (len(first.readied), len(second.readied), len(third.readied)) == (0, 1, 0)


def test_auto_takes_the_next_where_one_cannot_be_made_ready_and_says_why(use: Callable[..., None]) -> None:
    use(Fake("one", fails=no_module()), Fake("two"))
    taken, why = choose_transport("auto", OLD, 10)
    assert taken.name == "two"
    assert why == "one: a module cannot be loaded: blacklisted; two: it is there"


def test_where_none_can_be_all_reasons_are_said(use: Callable[..., None]) -> None:
    use(Fake("one", lacks="no module one"), Fake("two", fails=no_module()))
    error = error_of(lambda: choose_transport("auto", OLD, 10))
    assert error.code is ErrorCode.TRANSPORT_UNAVAILABLE
    assert error.cause == "one: no module one; two: a module cannot be loaded: blacklisted"
    assert "doctor" in error.hint


def test_one_that_is_asked_for_is_taken_or_refused_and_never_replaced(use: Callable[..., None]) -> None:
    first, second = Fake("one"), Fake("two")
    use(first, second)
    taken, why = choose_transport("two", OLD, 10)
    assert (taken.name, why) == ("two", "as asked for")
    assert first.readied == []

    use(Fake("one"), Fake("two", lacks="no module two"))
    error = error_of(lambda: choose_transport("two", OLD, 10))
    assert (error.code, error.cause) == (ErrorCode.TRANSPORT_UNAVAILABLE, "two: no module two")


def test_the_failure_of_one_that_is_asked_for_is_told_as_it_is(use: Callable[..., None]) -> None:
    failure = no_module()
    use(Fake("one", fails=failure), Fake("two"))
    assert error_of(lambda: choose_transport("one", OLD, 10)) is failure


def test_what_is_made_ready_gets_what_is_left_of_the_time(use: Callable[..., None]) -> None:
    first, second = Fake("one", fails=no_module()), Fake("two")
    use(first, second)
    choose_transport("auto", OLD, 10)
    assert 9 < second.readied[0] <= first.readied[0] <= 10
    choose_transport("auto", OLD, -5)
    assert second.readied[1] > 0


def wish(transport: str, **options: str) -> VolumeSpec:
    return VolumeSpec(name="v", source="/a", transport=transport, options=options)


@pytest.mark.parametrize(
    "call", [lambda name: check_transport(wish(name)), lambda name: choose_transport(name, OLD, 10)]
)
def test_an_unknown_transport_is_refused_with_those_that_there_are(call: Callable[[str], object]) -> None:
    error = error_of(lambda: call("floppy"))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert all(name in error.hint for name in ("auto", *TRANSPORTS))


def test_a_value_that_no_transport_could_use_is_found_out_whichever_would_be_taken() -> None:
    error = error_of(lambda: check_transport(wish("auto", connections="0")))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "connections" in error.message


def test_a_check_looks_and_loads_nothing(use: Callable[..., None]) -> None:
    there, lacks = Fake("one", fails=no_module()), Fake("two", lacks="no module two")
    use(there, lacks)
    check_transport(wish("auto"))
    check_transport(wish("one"))
    assert error_of(lambda: check_transport(wish("two"))).cause == "two: no module two"
    assert there.readied == []


def test_auto_prefers_those_that_survive_qsd_and_takes_only_those_with_a_device() -> None:
    assert HOST_TRANSPORTS == ("vduse", "nbd", "fuse")
    assert {*HOST_TRANSPORTS, "vhost-user"} == TRANSPORTS.keys()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_a_qsd_without_the_export_is_told_before_the_kernel_is_asked(name: str) -> None:
    seen = TRANSPORTS[name].probe(BARE)
    assert not seen.available
    assert "qemu-storage-daemon 7.2.22 has no" in seen.reason


# Options ------------------------------------------------------------------------------------------------------


def test_the_options_of_auto_are_those_of_all_that_it_may_take() -> None:
    known = {key for name in HOST_TRANSPORTS for key in options_of(name)}
    assert options_of("auto").keys() == known
    assert "socket-owner" not in known
    assert "socket-owner" in options_of("vhost-user")
    assert options_of("floppy") == {}


def test_no_two_transports_that_auto_may_take_mean_different_things_by_one_option() -> None:
    for name in HOST_TRANSPORTS:
        assert options_of(name).items() <= options_of("auto").items()


@pytest.mark.parametrize("name", TRANSPORTS)
def test_every_option_says_what_it_means(name: str) -> None:
    assert all(TRANSPORTS[name].options.values())


def chosen(transport: str, build: Build = OLD, **options: str) -> dict[str, int]:
    return TRANSPORTS[transport].settings(spec(**options), build)


def test_vduse_has_one_queue_unless_more_are_wished_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    assert chosen("vduse") == {"queues": 1, "queue-size": 256, "msg-timeout": 30, "serial": 1}
    assert chosen("vduse", queues="3")["queues"] == 3
    assert chosen("vduse", queues="64")["queues"] == 4, "the kernel takes no more than it has CPUs"


def test_vduse_takes_its_limits_from_the_user() -> None:
    settings = chosen("vduse", queue_size="1024", msg_timeout="5", bounce_size="128M")
    assert (settings["queue-size"], settings["msg-timeout"], settings["bounce-size"]) == (1024, 5, 128 << 20)


def test_nbd_refuses_to_poll_where_qsd_has_no_io_thread() -> None:
    wanted = msgspec.structs.replace(spec(poll_max_ns="0"), transport="nbd")
    error = error_of(lambda: nbd.TRANSPORT.settings(wanted, OLD))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "poll-max-ns" in error.message
    assert "7.2.22" in error.cause
    assert nbd.TRANSPORT.settings(wanted, NEW)["poll-max-ns"] == 0
    check_transport(msgspec.structs.replace(wanted, transport="auto"))
    # As every option that the transport which auto took does not have.
    assert "poll-max-ns" not in nbd.TRANSPORT.settings(msgspec.structs.replace(wanted, transport="auto"), OLD)


def test_fuse_refuses_threads_where_qsd_cannot_have_them() -> None:
    newest = Build(QsdVersion(11, 1, 3), OLD.exports)
    wanted = msgspec.structs.replace(spec(iothreads="2"), transport="fuse")
    error = error_of(lambda: fuse.TRANSPORT.settings(wanted, NEW))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "iothreads" in error.message
    assert "10.0.2" in error.cause
    assert fuse.TRANSPORT.settings(wanted, newest) == {"iothreads": 2}
    # As every option that the transport which auto took does not have.
    assert fuse.TRANSPORT.settings(msgspec.structs.replace(wanted, transport="auto"), NEW) == {}
    for build in (OLD, newest):
        assert fuse.TRANSPORT.settings(spec(iothreads="0"), build) == {}


def test_vduse_names_a_disk_only_where_qsd_can() -> None:
    assert "serial" not in chosen("vduse", Build(QsdVersion(7, 1, 0), OLD.exports))


def test_nbd_is_safe_unless_the_user_insists() -> None:
    assert chosen("nbd") == {"connections": 1, "timeout": 0, "dead-timeout": 3600, "iothread": 0}
    assert chosen("nbd", NEW)["iothread"] == 1, "7.2 aborts with one when the client goes"
    settings = chosen("nbd", connections="4", timeout="30", dead_timeout="60")
    assert (settings["connections"], settings["timeout"], settings["dead-timeout"]) == (4, 30, 60)


def test_fuse_has_nothing_to_choose() -> None:
    assert chosen("fuse") == {}


def test_the_socket_for_a_virtual_machine_belongs_to_whom_the_user_says() -> None:
    settings = chosen("vhost-user", queues="8")
    assert (settings["queues"], settings["uid"], settings["gid"]) == (8, os.geteuid(), os.getegid())
    root = pwd.getpwnam("root")
    settings = chosen("vhost-user", socket_owner="root")
    assert (settings["queues"], settings["uid"], settings["gid"]) == (1, root.pw_uid, root.pw_gid)
    nobody = pwd.getpwnam("nobody")
    settings = chosen("vhost-user", socket_owner="nobody:root")
    assert (settings["uid"], settings["gid"]) == (nobody.pw_uid, 0)


@pytest.mark.parametrize("owner", ["", "no-such-user", "root:no-such-group", ":root", "root:root:root"])
def test_an_owner_that_the_host_does_not_have_is_refused(owner: str) -> None:
    error = error_of(lambda: chosen("vhost-user", socket_owner=owner))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "socket-owner" in error.message


@pytest.mark.parametrize(
    ("transport", "key", "wanted", "values"),
    [
        ("vduse", "queues", "a number from 1 to 64", ["0", "65", "-1", "x", "", "1.5", "0x2"]),
        ("vduse", "queue-size", "a power of two from 16 to 1024", ["8", "100", "2048", "x"]),
        ("vduse", "msg-timeout", "a number from 1 to 3600", ["0", "3601", "1s"]),
        ("vduse", "bounce-size", "a size from 1048576 to 1073741824", ["0", "1023K", "2G", "much"]),
        ("nbd", "connections", "a number from 1 to 16", ["0", "17", "x"]),
        ("nbd", "timeout", "a number from 0 to 86400", ["-1", "86401", "never"]),
        ("nbd", "dead-timeout", "a number from 1 to 31536000", ["0", "31536001", "1h"]),
        ("vhost-user", "queues", "a number from 1 to 256", ["0", "257", "x"]),
    ],
)
def test_a_number_out_of_its_range_is_refused_with_the_range(
    transport: str, key: str, wanted: str, values: list[str]
) -> None:
    for value in values:
        error = error_of(lambda: chosen(transport, OLD, **{key: value}))  # noqa: B023 -- called at once
        assert error.code is ErrorCode.INVALID_ARGUMENT
        assert error.message == f"option {key}={value!r}"
        assert error.volume == "a"
        assert wanted in error.hint


# Names and paths ----------------------------------------------------------------------------------------------


def test_a_socket_whose_path_is_too_long_for_qemu_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    transport = vhost_user.TRANSPORT
    room = 107 - len("/a.sock")
    fits = "/" + "d" * (room - 1)
    assert len(transport.socket(site(fits))) == 107
    transport.refuse_foreign(site(fits))
    error = error_of(lambda: transport.refuse_foreign(site(fits, "ab")))
    assert error.code is ErrorCode.UNSUPPORTED
    assert "108 bytes" in error.cause
    assert "shorter name" in error.hint


def test_only_names_that_all_of_the_host_share_are_locked(tmp_path: Path) -> None:
    here = site(str(tmp_path), "web1")
    assert vduse.TRANSPORT.claims(here) == ("vdpa:storaged.web1",)
    assert nbd.TRANSPORT.claims(here) == ("nbd:storaged.web1",)
    assert fuse.TRANSPORT.claims(here) == ()
    assert vhost_user.TRANSPORT.claims(here) == ()


def test_a_device_on_the_bus_that_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    destroyed: list[str] = []
    monkeypatch.setattr("storaged.host.vduse.destroy", destroyed.append)
    monkeypatch.setattr("storaged.host.vdpa.exists", lambda name: name == "storaged.a")
    error = error_of(lambda: vduse.TRANSPORT.refuse_foreign(site(str(tmp_path))))
    assert error.code is ErrorCode.NAME_TAKEN
    assert "storaged.a" in error.message
    assert destroyed == []
    vduse.TRANSPORT.refuse_foreign(site(str(tmp_path), "b"))
    assert destroyed == ["storaged.b"], "a node that nobody serves is a leftover"


def test_an_nbd_device_with_our_identifier_that_is_not_ours_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from storaged.host.disk import Disk

    found: dict[str, Any] = {"storaged.a": Disk("/dev/nbd7", 1)}
    monkeypatch.setattr("storaged.host.nbd.find", found.get)
    error = error_of(lambda: nbd.TRANSPORT.refuse_foreign(site(str(tmp_path))))
    assert error.code is ErrorCode.NAME_TAKEN
    assert "/dev/nbd7" in error.message
    nbd.TRANSPORT.refuse_foreign(site(str(tmp_path), "b"))


# The kernel's netlink ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "family"), [("vduse", "vdpa"), ("nbd", "nbd")])
@pytest.mark.parametrize("answer", [False, OSError(97, "Address family not supported by protocol")])
def test_a_transport_whose_netlink_family_cannot_be_seen_is_not_ready(
    monkeypatch: pytest.MonkeyPatch, name: str, family: str, answer: bool | OSError
) -> None:
    def has_family(asked: str) -> bool:
        assert asked == family
        if isinstance(answer, OSError):
            raise answer
        return answer

    monkeypatch.setattr("storaged.host.netlink.has_family", has_family)
    monkeypatch.setattr("storaged.host.modules.load", lambda name, timeout: None)
    error = error_of(lambda: TRANSPORTS[name].make_ready(1))
    assert error.code is ErrorCode.TRANSPORT_UNAVAILABLE
    assert family in error.message
    assert ("not supported" if answer else "network namespace") in error.cause
    assert "--transport fuse" in error.hint


def test_what_to_do_about_a_transport_that_is_asked_for_is_its_own_hint(use: Callable[..., None]) -> None:
    class Hinted(Fake):
        def probe(self, build: Build | None) -> Availability:
            return Availability(False, "no module one", "install it")

    use(Hinted("one"), Fake("two"))
    assert error_of(lambda: choose_transport("one", OLD, 10)).hint == "install it"
    assert error_of(lambda: check_transport(wish("one"))).hint == "install it"
    _, why = choose_transport("auto", OLD, 10)
    assert why == "one: no module one; two: it is there"
