"""Which QSD this is, and whether direct I/O under a loop device is safe with it."""

from __future__ import annotations

import shutil
import subprocess

import pytest

from storaged.qsd.version import QsdVersion, loop_direct_io_is_safe, parse_version


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("qemu-storage-daemon version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)\nCopyright (c) 2003-2022", (7, 2, 22)),
        ("qemu-storage-daemon version 10.0.13 (Debian 1:10.0.13+ds-0+deb13u1)", (10, 0, 13)),
        ("qemu-storage-daemon version 11.1.0", (11, 1, 0)),
        ("qemu-storage-daemon version 9.2.50 (v9.2.0-1-gdeadbeef)", (9, 2, 50)),
        ("version 10.0.13", (10, 0, 13)),
    ],
)
def test_a_version_is_found_in_what_it_prints(text: str, version: tuple[int, int, int]) -> None:
    assert parse_version(text) == version


@pytest.mark.parametrize("text", ["", "version", "version ", "version 7.2", "7.2.22", "bash: not found"])
def test_where_there_is_none_none_is_made_up(text: str) -> None:
    assert parse_version(text) is None


def test_versions_are_ordered_by_number_and_shown_as_written() -> None:
    assert QsdVersion(7, 2, 22) < QsdVersion(10, 0, 2) < QsdVersion(10, 0, 13) < QsdVersion(11, 0, 0)
    assert str(QsdVersion(10, 0, 13)) == "10.0.13"


@pytest.mark.parametrize(
    ("version", "safe"),
    [
        ((7, 2, 22), False), ((9, 2, 50), False), ((10, 0, 2), False), ((10, 0, 9), False), ((10, 0, 10), True),
        ((10, 0, 13), True), ((10, 1, 0), False), ((10, 1, 50), False), ((11, 0, 0), True), ((11, 1, 0), True),
        ((12, 0, 0), True),
    ],
)
def test_direct_io_is_used_only_where_it_is_known_to_keep_data_intact(
    version: tuple[int, int, int], safe: bool
) -> None:
    assert loop_direct_io_is_safe(QsdVersion(*version)) is safe


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed")
def test_the_one_of_this_host_tells_its_version() -> None:
    done = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, timeout=30)
    version = parse_version(done.stdout)
    assert version is not None
    assert str(version) in done.stdout
