"""Processes by identity: one that got the number of another is never taken for it."""

from __future__ import annotations

import os
import select
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from storaged.errors import ErrorCode
from storaged.host.process import boot_id, find_by_arguments, identify, kill, open_pidfd, reap
from storaged.model.record import ProcessIdentity
from storaged.qsd.process import died


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as child:
        yield child
        child.kill()


def known(pid: int) -> ProcessIdentity:
    identity = identify(pid)
    assert identity is not None
    return identity


def ended(pidfd: int, seconds: float) -> bool:
    return bool(select.select([pidfd], [], [], seconds)[0])


def wait_for_zombie(pid: int) -> None:
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)


def test_a_process_is_itself_every_time_and_no_other(child: subprocess.Popen[bytes]) -> None:
    assert known(child.pid) == known(child.pid)
    assert known(child.pid) != known(os.getpid())
    executable = os.stat(f"/proc/{child.pid}/exe")
    assert (known(child.pid).exe_device, known(child.pid).exe_inode) == (executable.st_dev, executable.st_ino)


def seconds_since_start(pid: int) -> float:
    return float(Path("/proc/uptime").read_text().split()[0]) - known(pid).start_time / os.sysconf("SC_CLK_TCK")


def test_the_start_time_is_that_of_the_kernel(child: subprocess.Popen[bytes]) -> None:
    assert 0 <= seconds_since_start(child.pid) < 60


def test_a_name_with_a_parenthesis_deceives_nobody(tmp_path: Path) -> None:
    program = tmp_path / "x) R 1 1 (y"
    shutil.copy(str(shutil.which("sleep")), program)
    with subprocess.Popen([str(program), "60"]) as child:
        assert known(child.pid).exe_inode == program.stat().st_ino
        assert seconds_since_start(child.pid) < 60
        child.kill()


def test_a_zombie_is_no_process(child: subprocess.Popen[bytes]) -> None:
    identity = known(child.pid)
    child.kill()
    wait_for_zombie(child.pid)
    assert identify(child.pid) is None
    assert open_pidfd(identity) is None


def test_one_that_is_gone_is_none(child: subprocess.Popen[bytes]) -> None:
    identity = known(child.pid)
    child.kill()
    child.wait()
    assert identify(child.pid) is None
    assert open_pidfd(identity) is None


@pytest.mark.parametrize("field", ["start_time", "exe_device", "exe_inode"])
def test_another_process_with_the_same_number_is_not_opened(child: subprocess.Popen[bytes], field: str) -> None:
    identity = known(child.pid)
    other = msgspec.structs.replace(identity, **{field: getattr(identity, field) + 1})
    before = os.listdir("/proc/self/fd")
    assert open_pidfd(other) is None
    assert os.listdir("/proc/self/fd") == before


def test_a_pidfd_tells_of_the_end_and_reaping_tells_how(child: subprocess.Popen[bytes]) -> None:
    pidfd = open_pidfd(known(child.pid))
    assert pidfd is not None
    assert not ended(pidfd, 0)
    assert reap(pidfd) == ""
    kill(pidfd)
    assert ended(pidfd, 5)
    assert reap(pidfd) == "it was ended by SIGKILL"
    assert reap(pidfd) == ""
    kill(pidfd)
    os.close(pidfd)


@pytest.mark.parametrize(
    ("script", "how"),
    [
        ("read x; exit 3", "it exited with status 3"),
        ("read x; exit 0", "it exited with status 0"),
        ("read x; kill -SEGV $$", "it was ended by SIGSEGV"),
        (f"read x; kill -{signal.SIGRTMIN + 5} $$", f"it was ended by signal {signal.SIGRTMIN + 5}"),
    ],
)
def test_every_way_to_end_is_told(script: str, how: str) -> None:
    with subprocess.Popen(["bash", "-c", f"ulimit -c 0; {script}"], stdin=subprocess.PIPE) as child:
        pidfd = open_pidfd(known(child.pid))
        assert pidfd is not None
        assert child.stdin is not None
        child.stdin.close()
        assert ended(pidfd, 5)
        assert reap(pidfd) == how
        os.close(pidfd)


def test_one_that_is_not_our_child_is_not_ours_to_collect() -> None:
    pidfd = open_pidfd(known(os.getppid()))
    assert pidfd is not None
    assert reap(pidfd) == ""
    os.close(pidfd)


def test_a_process_is_found_by_exactly_its_arguments_one_after_another(tmp_path: Path) -> None:
    argument = str(tmp_path / "volumes" / "a" / "qsd.pid")
    command = ["bash", "-c", "echo runs; read x", "qsd", "--pidfile", argument]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"runs\n"
        for words in ([argument], ["--pidfile", argument], ["qsd", "--pidfile", argument]):
            assert find_by_arguments(*words) == [known(child.pid)]
        for words in (
            [argument[:-1]], [f"{argument}x"], ["--pidfile", argument[:-1]], ["--pidfile", f"{argument}x"],
            ["pidfile", argument], ["qsd", argument], [argument, "--pidfile"], ["--pidfile", argument, ""],
        ):
            assert find_by_arguments(*words) == []
        child.kill()
        wait_for_zombie(child.pid)
        assert find_by_arguments("--pidfile", argument) == []


def test_a_boot_has_an_identity() -> None:
    assert boot_id() == boot_id()
    assert len(boot_id()) == 36


@pytest.mark.parametrize(
    ("words", "hint"), [
        ("qemu-storage-daemon: Error reading configuration from etcd: Connection refused", "-o etcd-host"),
        ("etcd_address is missing in Vitastor configuration", "-o etcd-host"),
        ("double free or corruption", "qsd.log"),
    ],
)
def test_the_last_words_of_a_library_that_ends_qsd_have_a_hint(tmp_path: Path, words: str, hint: str) -> None:
    (tmp_path / "qsd.log").write_text(f"{words}\n")
    error = died(str(tmp_path), "it exited with status 1")
    assert error.code is ErrorCode.QSD_DIED
    assert words in error.cause
    assert hint in error.hint
