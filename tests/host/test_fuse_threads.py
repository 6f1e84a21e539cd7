"""FUSE served by several threads, by the first QSD that can: of Debian 13's backports, which this host need not be."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests import debian
from tests.benching import tune
from tests.harness import Daemon, eventually, refuses, with_config

MIB = 1 << 20


@pytest.fixture(scope="module")
def qsd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A program that is that QSD."""
    words = debian.program(
        "trixie-backports", "qsd-11", "usr/bin/qemu-storage-daemon", "qemu-utils/trixie-backports"
    )
    path = tmp_path_factory.mktemp("qsd") / "qemu-storage-daemon"
    path.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    path.chmod(0o755)
    return path


@pytest.fixture
def older(place: Path) -> Path:
    """This host's, which Debian 12 and 13 have without their backports."""
    path = place / "older"
    path.write_text('#!/bin/sh\nexec qemu-storage-daemon "$@"\n')
    path.chmod(0o755)
    version = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
    assert int(version.split("version ")[1].split(".")[0]) < 11
    return path


@pytest.fixture
def newer(stopped: Daemon, qsd: Path) -> Daemon:
    """A daemon that has it."""
    with_config(stopped, f'[qsd]\nbinary = "{qsd}"\n')
    stopped.start()
    return stopped


def fuse_descriptors(pid: int) -> int:
    """How many of /dev/fuse a process has: one for each thread that serves the export."""
    directory = f"/proc/{pid}/fd"
    return sum(os.readlink(f"{directory}/{name}") == "/dev/fuse" for name in os.listdir(directory))


def fio(device: str, *words: str) -> None:
    """Many requests at once; each block says what it is."""
    done = subprocess.run(
        ["fio", "--name=blocks", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--iodepth=32", "--bs=4k",
         "--rw=randwrite", "--size=32M", "--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0",
         "--randseed=7", *words],
        capture_output=True, text=True, timeout=100,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_all_threads_serve_a_volume_whatever_becomes_of_qsd(newer: Daemon, place: Path) -> None:
    source = place / "a.raw"
    source.write_bytes(bytes(32 * MIB))
    volume = newer.attach("a", source, transport="fuse", options={"iothreads": "3"})
    assert fuse_descriptors(volume["qsd_pid"]) == 3
    fio(volume["device"], "--do_verify=1")
    os.kill(volume["qsd_pid"], signal.SIGKILL)
    eventually(lambda: newer.show("a")["deaths"] == 1 and newer.online("a"), "it has another QSD")
    again = newer.show("a")
    assert fuse_descriptors(again["qsd_pid"]) == 3
    fio(again["device"], "--verify_only=1")
    newer.stop()
    newer.start()
    eventually(lambda: newer.online("a"), "it is adopted")
    assert newer.show("a")["qsd_pid"] == again["qsd_pid"]
    assert newer.detach("a") == []
    # What the image itself holds, by no QSD at all.
    fio(str(source), "--verify_only=1")


def test_a_volume_has_none_unless_it_is_said(newer: Daemon, place: Path) -> None:
    (place / "a.raw").write_bytes(bytes(MIB))
    assert fuse_descriptors(newer.attach("a", place / "a.raw", transport="fuse")["qsd_pid"]) == 1


def test_a_search_tries_as_many_as_there_are_processors(newer: Daemon, place: Path) -> None:
    (place / "a.raw").write_bytes(os.urandom(MIB) * 16)
    (place / "jobs.fio").write_text("[random]\nrw=randread\nbs=4k\niodepth=4\n")
    done = tune(
        newer, place / "a.raw", "--jobs", place / "jobs.fio", "--runtime", "0.1", "--budget", "600", "--json",
        place / "tuned.json", "--transport", "fuse", "--only", "iothreads",
    )
    assert done.status == 0, done
    tried = {change["value"] for change in json.loads((place / "tuned.json").read_text())["changes"]}
    assert tried == {str(count) for count in (1, 2, 4, 8) if count <= (os.cpu_count() or 1)}


def test_a_successor_that_cannot_have_them_serves_the_volume_without(
    newer: Daemon, place: Path, qsd: Path, older: Path
) -> None:
    # One path, and another program: as a package leaves it that was made older.
    used = place / "used"
    used.symlink_to(qsd)
    newer.stop()
    with_config(newer, f'[qsd]\nbinary = "{used}"\n')
    newer.start()
    (place / "a.raw").write_bytes(os.urandom(MIB))
    pid = newer.attach("a", place / "a.raw", transport="fuse", options={"iothreads": "2"})["qsd_pid"]
    used.unlink()
    used.symlink_to(older)
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: newer.show("a")["deaths"] == 1 and newer.online("a"), "it has another QSD")
    again = newer.show("a")
    assert fuse_descriptors(again["qsd_pid"]) == 1
    assert Path(again["device"]).read_bytes() == (place / "a.raw").read_bytes()


def test_a_qsd_that_cannot_is_not_asked_for_them(stopped: Daemon, place: Path, older: Path) -> None:
    with_config(stopped, f'[qsd]\nbinary = "{older}"\n')
    stopped.start()
    (place / "a.raw").write_bytes(bytes(MIB))
    error = refuses(
        stopped, ErrorCode.INVALID_ARGUMENT, place / "a.raw", transport="fuse", options={"iothreads": "2"}
    )
    assert "main thread" in error.cause
