"""The stable names: exactly those that shall be there, and nobody else's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.links import any_link, links_are_right, links_are_there, publish, unpublish

PARTS = {1: "/dev/loop3p1", 2: "/dev/loop3p2"}


def links(directory: Path) -> dict[str, str]:
    return {entry.name: os.readlink(entry) for entry in directory.iterdir()}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "dev" / "storaged"


def test_a_device_and_its_partitions_get_their_names(place: Path) -> None:
    publish(str(place), "web1", "/dev/loop3", PARTS)
    assert links(place) == {
        "web1": "/dev/loop3", "web1-part1": "/dev/loop3p1", "web1-part2": "/dev/loop3p2",
    }
    assert links_are_right(str(place), "web1", "/dev/loop3", PARTS)


def test_publishing_again_changes_nothing_and_a_new_device_replaces_the_old(place: Path) -> None:
    for device in ("/dev/loop3", "/dev/loop3", "/dev/loop4"):
        publish(str(place), "web1", device, {})
        assert links(place) == {"web1": device}


def test_the_names_of_partitions_that_are_gone_go(place: Path) -> None:
    publish(str(place), "web1", "/dev/loop3", PARTS)
    publish(str(place), "web1", "/dev/loop3", {1: "/dev/loop3p1"})
    assert set(links(place)) == {"web1", "web1-part1"}


@pytest.mark.parametrize(
    ("device", "partitions"),
    [("/dev/loop4", PARTS), ("/dev/loop3", {}), ("/dev/loop3", {1: "/dev/loop3p1"}),
     ("/dev/loop3", {**PARTS, 3: "/dev/loop3p3"}), ("/dev/loop3", {**PARTS, 2: "/dev/loop4p2"})],
)
def test_links_are_right_only_if_all_are(place: Path, device: str, partitions: dict[int, str]) -> None:
    publish(str(place), "web1", "/dev/loop3", PARTS)
    assert not links_are_right(str(place), "web1", device, partitions)


@pytest.mark.parametrize(
    "other", ["web", "web10", "web1-part", "web1-partx", "web1-part1x", "web1.bak", "xweb1", "webx1"]
)
def test_names_that_only_look_alike_are_left_alone(place: Path, other: str) -> None:
    place.mkdir(parents=True)
    (place / other).symlink_to("/dev/other")
    assert not any_link(str(place), "web1")
    publish(str(place), "web1", "/dev/loop3", PARTS)
    unpublish(str(place), "web1")
    assert links(place) == {other: "/dev/other"}


def test_a_dot_in_a_name_is_a_dot(place: Path) -> None:
    publish(str(place), "webx1", "/dev/loop3", {})
    unpublish(str(place), "web.1")
    assert any_link(str(place), "webx1")
    assert not any_link(str(place), "web.1")


def test_unpublishing_removes_all_links_of_a_volume_whatever_they_point_to(place: Path) -> None:
    publish(str(place), "web1", "/dev/gone", PARTS)
    unpublish(str(place), "web1")
    assert links(place) == {}
    assert not any_link(str(place), "web1")


def test_where_nothing_is_there_is_nothing_to_do(place: Path) -> None:
    unpublish(str(place), "web1")
    assert not any_link(str(place), "web1")
    assert not links_are_right(str(place), "web1", "/dev/loop3", {})


@pytest.mark.parametrize("name", ["web1", "web1-part1"])
def test_what_is_no_link_is_never_replaced_or_removed(place: Path, name: str) -> None:
    place.mkdir(parents=True)
    (place / name).write_text("precious")
    with pytest.raises(StoragedError) as caught:
        publish(str(place), "web1", "/dev/loop3", PARTS)
    assert caught.value.code is ErrorCode.DEVICE_FAILED
    assert str(place / name) in str(caught.value)
    unpublish(str(place), "web1")
    assert (place / name).read_text() == "precious"


def test_what_a_crash_left_half_made_is_no_hindrance(place: Path) -> None:
    place.mkdir(parents=True)
    (place / ".web1.tmp").symlink_to("/dev/old")
    assert not any_link(str(place), "web1")
    publish(str(place), "web1", "/dev/loop3", {})
    assert links(place) == {"web1": "/dev/loop3"}


# Those that udev made: relative, and coming and going as it likes ------------------------------------------------


@pytest.fixture
def by_udev(tmp_path: Path) -> Path:
    """Links to /dev/loop3 and its partitions, from below a root so deep that they lead to the real /dev."""
    directory = tmp_path / "dev" / "storaged"
    directory.mkdir(parents=True)
    up = "../" * (len(directory.parts) - 1)
    for link, target in {"web1": "dev/loop3", "web1-part1": "dev/loop3p1", "web1-part2": "dev/loop3p2"}.items():
        (directory / link).symlink_to(up + target)
    return directory


def test_a_link_is_right_by_where_it_leads(by_udev: Path) -> None:
    assert links_are_right(str(by_udev), "web1", "/dev/loop3", PARTS)
    assert links_are_there(str(by_udev), "web1", "/dev/loop3", PARTS)
    assert not links_are_right(str(by_udev), "web1", "/dev/loop4", PARTS)
    assert not links_are_there(str(by_udev), "web1", "/dev/loop4", PARTS)


def test_a_link_that_leads_to_the_dev_of_another_root_is_wrong(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "web1").symlink_to("../loop3")
    assert not links_are_right(str(place), "web1", "/dev/loop3", {})
    publish(str(place), "web1", "/dev/loop3", {})
    assert links(place) == {"web1": "/dev/loop3"}


def test_a_link_through_another_link_is_not_followed(place: Path) -> None:
    place.mkdir(parents=True)
    (place / "other").symlink_to("/dev/loop3")
    (place / "web1").symlink_to("other")
    assert not links_are_there(str(place), "web1", "/dev/loop3", {})


def test_publishing_leaves_right_links_as_they_are_and_replaces_wrong_ones(by_udev: Path) -> None:
    before = links(by_udev)
    publish(str(by_udev), "web1", "/dev/loop3", PARTS)
    assert links(by_udev) == before
    publish(str(by_udev), "web1", "/dev/loop3", {1: "/dev/loop3p1", 2: "/dev/loop4p2"})
    assert links(by_udev) == {**before, "web1-part2": "/dev/loop4p2"}


def test_unpublishing_removes_links_whoever_made_them(by_udev: Path) -> None:
    unpublish(str(by_udev), "web1")
    assert links(by_udev) == {}


def test_the_directory_may_go_while_a_link_is_made_in_it(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    symlink, rename = os.symlink, os.rename
    calls: list[str] = []

    def symlink_late(target: str, path: str) -> None:
        calls.append("symlink")
        if len(calls) == 1:
            place.rmdir()
        symlink(target, path)

    def rename_late(old: str, new: str) -> None:
        calls.append("rename")
        if calls.count("rename") == 1:
            Path(old).unlink()
            place.rmdir()
        rename(old, new)

    monkeypatch.setattr(os, "symlink", symlink_late)
    monkeypatch.setattr(os, "rename", rename_late)
    publish(str(place), "web1", "/dev/loop3", {})
    assert calls == ["symlink", "symlink", "rename", "symlink", "rename"]
    assert links(place) == {"web1": "/dev/loop3"}


def test_a_link_that_another_removes_first_is_no_error(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(str(place), "web1", "/dev/loop3", PARTS)
    unlink = os.unlink

    def unlink_late(path: str) -> None:
        unlink(path)
        unlink(path)

    monkeypatch.setattr(os, "unlink", unlink_late)
    publish(str(place), "web1", "/dev/loop3", {})
    unpublish(str(place), "web1")
    assert links(place) == {}
