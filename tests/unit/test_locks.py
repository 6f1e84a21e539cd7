"""A lock on a source lives exactly as long as the process that inherited it."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.locks import claim_block_device, lock_path, refuse_claimed, take_lock

IDENTITY = "file:2049:12"


@pytest.fixture
def place(tmp_path: Path) -> str:
    return str(tmp_path / "run" / "locks")


@pytest.fixture
def opened() -> Iterator[list[int]]:
    descriptors: list[int] = []
    yield descriptors
    for fd in descriptors:
        os.close(fd)


def take(place: str, opened: list[int], owner: str, *, exclusive: bool, identity: str = IDENTITY) -> int:
    fd = take_lock(place, identity, exclusive=exclusive, owner=owner)
    opened.append(fd)
    return fd


def refused(place: str, *, exclusive: bool) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        take_lock(place, IDENTITY, exclusive=exclusive, owner="late")
    assert caught.value.code is ErrorCode.SOURCE_IN_USE
    assert caught.value.hint
    return caught.value


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_writer_is_alone_and_the_holder_is_named(place: str, opened: list[int], first: bool, second: bool) -> None:
    take(place, opened, "volume a (/run/x)", exclusive=first)
    error = refused(place, exclusive=second)
    assert error.cause == "held by volume a (/run/x)"
    assert error.users == ("volume a (/run/x)",)


def test_any_number_may_read(place: str, opened: list[int]) -> None:
    for owner in "abc":
        take(place, opened, owner, exclusive=False)


def test_sources_do_not_get_in_each_others_way(place: str, opened: list[int]) -> None:
    for identity in ("file:1:1", "file:1:11", "file:11:1", "../../etc/passwd", "x" * 1000, "ä/\n"):
        take(place, opened, "a", exclusive=True, identity=identity)
        assert os.path.dirname(lock_path(place, identity)) == place


def test_what_was_let_go_can_be_taken_and_names_its_new_holder(place: str, opened: list[int]) -> None:
    os.close(take_lock(place, IDENTITY, exclusive=True, owner="a much longer name"))
    take(place, opened, "b", exclusive=True)
    assert refused(place, exclusive=True).users == ("b",)


def test_a_reader_that_comes_after_a_writer_is_named_and_not_the_writer(place: str, opened: list[int]) -> None:
    os.close(take_lock(place, IDENTITY, exclusive=True, owner="gone"))
    take(place, opened, "reader", exclusive=False)
    assert refused(place, exclusive=True).users != ("gone",)


@pytest.mark.parametrize("exclusive", [True, False])
def test_it_lives_on_in_a_child_that_inherited_it_and_ends_with_it(place: str, exclusive: bool) -> None:
    fd = take_lock(place, IDENTITY, exclusive=exclusive, owner="a")
    with subprocess.Popen(["sleep", "60"], pass_fds=[fd]) as child:
        os.close(fd)
        try:
            refused(place, exclusive=True)
        finally:
            child.kill()
    os.close(take_lock(place, IDENTITY, exclusive=True, owner="b"))


def test_a_child_that_did_not_inherit_it_does_not_hold_it(place: str) -> None:
    fd = take_lock(place, IDENTITY, exclusive=True, owner="a")
    with subprocess.Popen(["sleep", "60"], close_fds=False) as child:
        try:
            os.close(fd)
            os.close(take_lock(place, IDENTITY, exclusive=True, owner="b"))
        finally:
            child.kill()


def test_a_refusal_leaves_no_descriptor_open(place: str, opened: list[int]) -> None:
    take(place, opened, "a", exclusive=True)
    before = os.listdir("/proc/self/fd")
    refused(place, exclusive=True)
    assert os.listdir("/proc/self/fd") == before


def test_only_root_can_look_and_no_link_is_followed(place: str, opened: list[int], tmp_path: Path) -> None:
    take(place, opened, "a", exclusive=True)
    assert os.stat(place).st_mode & 0o077 == 0
    assert os.stat(lock_path(place, IDENTITY)).st_mode & 0o077 == 0
    victim = tmp_path / "victim"
    victim.write_text("precious")
    os.symlink(victim, lock_path(place, "file:6:6"))
    with pytest.raises(OSError, match="symbolic links"):
        take_lock(place, "file:6:6", exclusive=True, owner="a")
    assert victim.read_text() == "precious"


# Claims. (Real devices that are mounted: see tests/host.)

every_claim = pytest.mark.parametrize("claim", [claim_block_device, refuse_claimed])


@every_claim
@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EBUSY, ErrorCode.SOURCE_IN_USE), (errno.EIO, ErrorCode.OPEN_FAILED), (errno.EACCES, ErrorCode.OPEN_FAILED)],
)
def test_a_device_that_somebody_claimed_is_in_use_and_any_other_failure_is_told_as_it_is(
    monkeypatch: pytest.MonkeyPatch, claim: Callable[[str], object], number: int, code: ErrorCode
) -> None:
    flags: list[int] = []

    def fails(_: str, how: int) -> int:
        flags.append(how)
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", fails)
        with pytest.raises(StoragedError) as caught:
            claim("/dev/sdx")
    assert caught.value.code is code
    assert "/dev/sdx" in str(caught.value)
    assert caught.value.cause == os.strerror(number)
    assert caught.value.hint
    assert flags[0] & os.O_EXCL
    assert flags[0] & os.O_ACCMODE == (os.O_RDWR if claim is claim_block_device else os.O_RDONLY)


@every_claim
def test_a_device_that_is_gone_cannot_be_opened(tmp_path: Path, claim: Callable[[str], object]) -> None:
    with pytest.raises(StoragedError) as caught:
        claim(str(tmp_path / "missing"))
    assert caught.value.code is ErrorCode.OPEN_FAILED


def test_looking_whether_it_is_claimed_holds_nothing(tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    before = os.listdir("/proc/self/fd")
    refuse_claimed(str(tmp_path / "a"))
    assert os.listdir("/proc/self/fd") == before
