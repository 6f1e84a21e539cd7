"""A lock on a source lives exactly as long as the process that inherited it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.locks import lock_path, take_lock

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
