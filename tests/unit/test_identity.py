"""One source has one identity, however it is spelled. (Disks, partitions and loop devices: see tests/host.)"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from storaged.host.chain import ImageFile, inspect_chain
from storaged.host.identity import block_identity, file_identity, identities, own_identity
from storaged.model.formats import Format

#: The number of no block device: majors of 12 bits, and these are not given to anybody.
NO_DEVICE = os.makedev(4000, 77)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def look(path: Path) -> ImageFile:
    (file,) = inspect_chain(str(path), Format.RAW, [])
    return file


def device(file: ImageFile, number: int) -> ImageFile:
    """The same, as if it were a node of a block device."""
    return replace(file, block_device=number)


def test_a_file_is_its_device_and_inode(image: Path) -> None:
    seen = image.stat()
    assert own_identity(look(image)) == file_identity(seen.st_dev, seen.st_ino) == f"file:{seen.st_dev}:{seen.st_ino}"


def test_a_file_is_the_same_by_each_of_its_names(image: Path) -> None:
    (image.parent / "hard").hardlink_to(image)
    (image.parent / "soft").symlink_to(image)
    (image.parent / "there").symlink_to(image.parent)
    spellings = [image.parent / name for name in ("hard", "soft", "there/a.raw", "./a.raw", "there/../a.raw")]
    assert {own_identity(look(path)) for path in spellings[:-1]} == {own_identity(look(image))}


def test_a_file_with_the_same_content_or_a_new_one_of_the_same_name_is_another(image: Path) -> None:
    before = own_identity(look(image))
    other = image.parent / "b.raw"
    other.write_bytes(image.read_bytes())
    assert own_identity(look(other)) != before
    other.replace(image)
    assert own_identity(look(image)) != before


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_file_is_locked_by_itself_only(image: Path, exclusive: bool) -> None:
    file = look(image)
    assert identities(file, exclusive=exclusive) == {own_identity(file): exclusive}


def test_a_block_device_is_its_number_whatever_node_leads_to_it(image: Path) -> None:
    one, other = device(look(image), NO_DEVICE), replace(device(look(image), NO_DEVICE), device=5, inode=6, path="/x")
    assert own_identity(one) == own_identity(other) == block_identity(NO_DEVICE) == "block:4000:77"
    assert own_identity(device(look(image), os.makedev(4000, 78))) != own_identity(one)


def test_numbers_are_not_confused() -> None:
    pairs = [(1, 11), (11, 1), (111, 0), (0, 111), (8, 256), (8, 0), (259, 1 << 19)]
    assert len({block_identity(os.makedev(*pair)) for pair in pairs}) == len(pairs)
    assert len({file_identity(*pair) for pair in pairs}) == len(pairs)


@pytest.mark.parametrize("exclusive", [True, False])
def test_a_device_that_the_kernel_knows_nothing_of_is_locked_by_itself(image: Path, exclusive: bool) -> None:
    file = device(look(image), NO_DEVICE)
    assert identities(file, exclusive=exclusive) == {block_identity(NO_DEVICE): exclusive}


def real_devices() -> list[int]:
    """The block devices of this host; sysfs only, nothing is opened."""
    try:
        names = sorted(os.listdir("/sys/dev/block"))
    except OSError:
        return []
    return [os.makedev(*map(int, name.split(":"))) for name in names][:64]


def test_of_every_device_here_its_own_identity_is_locked_as_wished_and_reading_locks_nothing_exclusively(
    image: Path,
) -> None:
    for number in real_devices():
        file = device(look(image), number)
        assert identities(file, exclusive=True)[own_identity(file)] is True
        assert not any(identities(file, exclusive=False).values())
        assert identities(file, exclusive=True).keys() == identities(file, exclusive=False).keys()
