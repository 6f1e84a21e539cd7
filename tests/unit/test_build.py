"""What a qemu-storage-daemon program can do is read from its help, and asked for once."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.qsd import build
from storaged.qsd.version import QsdVersion, parse_build
from tests.harness import error_of

VERSION = """\
qemu-storage-daemon version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18+b3)
Copyright (c) 2003-2022 Fabrice Bellard and the QEMU Project developers
"""

#: The exports in the help of 7.2, word for word, with what comes before and after.
HEAD = """\
Usage: qemu-storage-daemon [options]
QEMU storage daemon

  --chardev <options>    configure a character device backend
                         (see the qemu(1) man page for possible options)

"""
NBD = """\
  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,writable=on|off][,bitmap=<name>]
                         export the specified block node over NBD
                         (requires --nbd-server)

"""
FUSE = """\
  --export [type=]fuse,id=<id>,node-name=<node-name>,mountpoint=<file>
           [,growable=on|off][,writable=on|off][,allow-other=on|off|auto]
                         export the specified block node over FUSE

"""
VHOST_USER = """\
  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,
           addr.type=unix,addr.path=<socket-path>[,writable=on|off]
           [,logical-block-size=<block-size>][,num-queues=<num-queues>]
                         export the specified block node as a
                         vhost-user-blk device over UNIX domain socket
  --export [type=]vhost-user-blk,id=<id>,node-name=<node-name>,
           addr.type=fd,addr.str=<fd>[,writable=on|off]
           [,logical-block-size=<block-size>][,num-queues=<num-queues>]
                         export the specified block node as a
                         vhost-user-blk device over file descriptor

"""
VDUSE = """\
  --export [type=]vduse-blk,id=<id>,node-name=<node-name>
           ,name=<vduse-name>[,writable=on|off]
           [,num-queues=<num-queues>][,queue-size=<queue-size>]
           [,logical-block-size=<logical-block-size>]
           [,serial=<serial-number>]
                         export the specified block node as a
                         vduse-blk device

"""
TAIL = """\
  --monitor [chardev=]name[,mode=control][,pretty[=on|off]]
                         configure a QMP monitor

  --object help          list object types that can be added
"""
EXPORTS = {"nbd": NBD, "fuse": FUSE, "vhost-user-blk": VHOST_USER, "vduse-blk": VDUSE}


def test_all_exports_of_a_full_build_are_found() -> None:
    found = parse_build(VERSION, HEAD + "".join(EXPORTS.values()) + TAIL)
    assert found is not None
    assert found.version == QsdVersion(7, 2, 22)
    assert found.exports == EXPORTS.keys()
    assert found.vduse_serial


@pytest.mark.parametrize("missing", EXPORTS)
def test_what_was_not_compiled_in_is_missing(missing: str) -> None:
    text = HEAD + "".join(about for name, about in EXPORTS.items() if name != missing) + TAIL
    found = parse_build(VERSION, text)
    assert found is not None
    assert found.exports == EXPORTS.keys() - {missing}


def test_a_serial_number_counts_only_at_vduse() -> None:
    without = VDUSE.replace("           [,serial=<serial-number>]\n", "")
    text = HEAD + without + NBD + TAIL + "  --object secret,serial=<number>\n"
    found = parse_build(VERSION, text)
    assert found is not None
    assert "vduse-blk" in found.exports
    assert not found.vduse_serial


def test_a_help_without_exports_is_a_build_that_can_do_nothing() -> None:
    found = parse_build(VERSION, HEAD + TAIL)
    assert found is not None
    assert found.exports == frozenset()


def test_a_program_that_tells_no_version_is_none() -> None:
    assert parse_build("bash: no such option", HEAD + NBD) is None


@pytest.mark.skipif(shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed")
def test_the_one_of_this_host_has_the_exports_that_its_help_names() -> None:
    binary = str(shutil.which("qemu-storage-daemon"))
    text = subprocess.run([binary, "--help"], capture_output=True, text=True, timeout=30).stdout
    found = build.build_of(binary)
    # NBD's is always there, and Debian builds the others.
    assert found.exports == {name for name in EXPORTS if f"--export [type=]{name}," in text}
    assert "nbd" in found.exports


# Asked once ---------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_known", {})


def program(path: Path, *, version: str = VERSION, help: str = HEAD + FUSE + TAIL) -> Path:
    """A fake qemu-storage-daemon that counts its runs."""
    texts = path.with_name(f"{path.name}.texts")
    texts.mkdir(exist_ok=True)
    (texts / "--version").write_text(version)
    (texts / "--help").write_text(help)
    path.write_text(f'#!/bin/sh\necho "$1" >> {path}.runs\ncat {texts}/"$1"\n')
    path.chmod(0o755)
    return path


def runs(path: Path) -> list[str]:
    return Path(f"{path}.runs").read_text().split()


def test_a_program_is_run_once_for_its_version_and_once_for_its_help(tmp_path: Path) -> None:
    binary = program(tmp_path / "qsd")
    first = build.build_of(str(binary))
    assert first.exports == {"fuse"}
    assert build.build_of(str(binary)) is first
    assert sorted(runs(binary)) == ["--help", "--version"]


def test_a_program_that_was_replaced_is_asked_again(tmp_path: Path) -> None:
    binary = program(tmp_path / "qsd")
    assert build.build_of(str(binary)).exports == {"fuse"}
    # As dpkg does it: a new file in the place of the old one.
    new = program(tmp_path / "qsd.new", version=VERSION.replace("7.2.22", "10.0.2"), help=HEAD + NBD + TAIL)
    os.replace(new, binary)
    found = build.build_of(str(binary))
    assert found.version == QsdVersion(10, 0, 2)
    assert found.exports == {"nbd"}


def test_a_program_that_was_overwritten_in_place_is_asked_again(tmp_path: Path) -> None:
    binary = program(tmp_path / "qsd")
    build.build_of(str(binary))
    program(binary, help=HEAD + NBD + TAIL)
    seen = binary.stat()
    os.utime(binary, ns=(seen.st_atime_ns, seen.st_mtime_ns + 1))
    assert build.build_of(str(binary)).exports == {"nbd"}


def test_two_programs_are_two(tmp_path: Path) -> None:
    one, other = program(tmp_path / "one"), program(tmp_path / "other", help=HEAD + NBD + TAIL)
    assert build.build_of(str(one)).exports == {"fuse"}
    assert build.build_of(str(other)).exports == {"nbd"}


def test_another_program_is_refused_and_asked_again_next_time(tmp_path: Path) -> None:
    binary = program(tmp_path / "qsd", version="GNU bash\n")
    error = error_of(lambda: build.build_of(str(binary)))
    assert error.code is ErrorCode.QSD_MISSING
    assert str(binary) in error.message
    assert "storaged.toml" in error.hint
    program(binary)
    assert build.build_of(str(binary)).exports == {"fuse"}


def test_what_cannot_be_run_is_missing(tmp_path: Path) -> None:
    no_program = tmp_path / "qsd"
    assert error_of(lambda: build.build_of(str(no_program))).code is ErrorCode.QSD_MISSING
    no_program.write_text("#!/bin/sh\n")
    no_program.chmod(0o644)
    assert error_of(lambda: build.build_of(str(no_program))).code is ErrorCode.QSD_MISSING
    no_program.write_text("#!/no/such/interpreter\n")
    no_program.chmod(0o755)
    assert error_of(lambda: build.build_of(str(no_program))).code is ErrorCode.QSD_MISSING


def test_a_program_that_does_not_end_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "_DEADLINE", 0.1)
    binary = tmp_path / "qsd"
    binary.write_text("#!/bin/sh\nexec sleep 30\n")
    binary.chmod(0o755)
    error = error_of(lambda: build.build_of(str(binary)))
    assert error.code is ErrorCode.QSD_MISSING
    assert "timed out" in error.cause
