"""What a child that is started from within a sandbox may do, and that nobody else has lost anything by it."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import landlock, protection, sandbox, seccomp, syscalls
from storaged.host.landlock import OWN, READ, RUN, WRITE, Rule
from storaged.host.sandbox import Sandbox, confined, unreachable
from storaged.model.powers import FIRST_USER
from storaged.supervisor import confinement

PYTHON = (sys.executable, "-IS", "-c")
PROGRAMS = tuple(Rule(path, RUN) for path in ("/usr", "/lib", "/lib64", "/bin", sys.prefix, sys.base_prefix))
NOBODY = 65534
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to become somebody else")


def said_by(what: Sandbox, program: str, *arguments: object) -> Any:
    """Run a program in a sandbox; return what it prints."""
    command = [*PYTHON, "import ctypes, json, os, socket, sys\n" + program, *map(str, arguments)]
    child = confined(what, lambda: subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    out, complaint = child.communicate(timeout=60)
    assert child.returncode == 0, complaint
    return json.loads(out)


def same_user(**what: Any) -> Sandbox:
    """One that changes no user: unit tests need no root."""
    return Sandbox(**what)


def own_status() -> list[str]:
    """What this process says of its rights."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return [line for line in lines if line.startswith(("Uid", "Gid", "Groups", "Cap", "NoNewPrivs", "Seccomp"))]


def test_only_the_child_gives_anything_up() -> None:
    before = own_status()
    rules = (*PROGRAMS, Rule("/proc", READ))
    filter = seccomp.program(["ptrace"])
    said = said_by(
        same_user(rules=rules, filter=filter),
        "print(json.dumps(dict(line.split(':\\t') for line in open('/proc/self/status').read().splitlines()"
        " if line.startswith(('NoNewPrivs', 'Seccomp:', 'CapEff')))))",
    )
    assert said == {"NoNewPrivs": "1", "Seccomp": "2", "CapEff": "0" * 16}
    assert own_status() == before


def test_it_reaches_only_its_own_files(tmp_path: Path) -> None:
    assert landlock.abi() > 0, "this kernel has no Landlock"
    for name in ("read", "written", "other"):
        (tmp_path / name).write_text("x")
    (tmp_path / "own").mkdir()
    rules = (
        *PROGRAMS, Rule(str(tmp_path / "read"), READ), Rule(str(tmp_path / "written"), WRITE),
        Rule(str(tmp_path / "own"), OWN), Rule(str(tmp_path / "missing"), WRITE),
    )
    program = """
done = []
for name in ("read", "written", "other", "own/new"):
    for how, flags in (("r", os.O_RDONLY), ("w", os.O_WRONLY | os.O_CREAT)):
        try:
            os.close(os.open(f"{sys.argv[1]}/{name}", flags))
            done.append(name + " " + how)
        except OSError:
            pass
print(json.dumps(done))
"""
    said = said_by(same_user(rules=rules), program, tmp_path)
    assert said == ["read r", "written r", "written w", "own/new w"]


def test_calls_and_sockets_that_are_denied_fail_and_others_do_not(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x" * 10)
    program = """
def outcome(call):
    try:
        call()
        return 0
    except OSError as error:
        return error.errno
print(json.dumps([
    outcome(lambda: os.truncate(sys.argv[1], 1)), outcome(lambda: socket.socket(socket.AF_INET)),
    outcome(lambda: socket.socket(socket.AF_UNIX)), outcome(lambda: os.listdir("/")),
]))
"""
    filter = seccomp.program(["truncate", "no such call"], seccomp.UNIX)
    assert said_by(same_user(filter=filter), program, tmp_path / "file") == [1, 97, 0, 0]
    assert (tmp_path / "file").read_text() == "x" * 10


def test_all_that_is_denied_has_a_number_on_each_machine() -> None:
    x86, generic = (set(syscalls.numbers(machine)) for machine in ("x86_64", "aarch64"))
    assert {*confinement._NEVER, *confinement._MOUNT, *confinement._IO_URING, "connect"} <= x86
    assert x86 - generic == {"mknod", "uselib", "modify_ldt", "iopl", "ioperm", "lookup_dcookie"}
    assert syscalls.numbers("sparc64") == {}
    assert seccomp.program(["mount"], machine="aarch64") != seccomp.program(["mount"], machine="x86_64")


def test_what_cannot_be_given_up_is_not_started() -> None:
    done: list[int] = []
    with pytest.raises(sandbox.CannotConfine, match="seccomp"):
        confined(same_user(filter=b"\xff" * 8), lambda: done.append(1))
    assert done == []
    with pytest.raises(ZeroDivisionError):
        confined(same_user(), lambda: done.append(1 // 0))


@as_root
def test_another_user_has_that_user_alone_and_the_capabilities_that_it_keeps() -> None:
    program = "print(json.dumps([os.getresuid(), os.getresgid(), os.getgroups(), open('/proc/self/status').read()]))"
    uids, gids, groups, status = said_by(Sandbox(NOBODY, frozenset({"NET_BIND_SERVICE"})), program)
    assert (set(uids), set(gids), groups) == ({NOBODY}, {NOBODY}, [])
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Cap"))
    assert {int(mask, 16) for mask in masks.values()} == {1 << 10}


@as_root
def test_who_could_open_a_file_is_asked_of_the_kernel(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    open_to_all, mine = tmp_path / "all", tmp_path / "mine"
    for path, mode in ((open_to_all, 0o644), (mine, 0o600)):
        path.write_text("")
        path.chmod(mode)
    place = next(parent for parent in tmp_path.parents if parent.stat().st_mode & 0o005 == 0o005)
    files = [(str(place), os.R_OK), (str(mine), os.R_OK), (str(mine), os.R_OK | os.W_OK)]
    assert unreachable(Sandbox(0), files) == []
    assert unreachable(Sandbox(NOBODY), files) == files[1:]
    assert unreachable(Sandbox(NOBODY, frozenset({"DAC_READ_SEARCH"})), files) == files[2:]
    assert unreachable(Sandbox(NOBODY, frozenset({"DAC_OVERRIDE"})), files) == []


def test_two_volumes_have_different_users_also_where_their_names_lead_to_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confinement, "USERS", 2)
    locks = str(tmp_path / "locks")
    first, second = (confinement._user(f"/volumes/{name}", locks, name) for name in "ab")
    assert {first[0], second[0]} == {FIRST_USER, FIRST_USER + 1}
    with pytest.raises(StoragedError) as raised:
        confinement._user("/volumes/c", locks, "c")
    assert raised.value.code is ErrorCode.INTERNAL
    for _, fd in (first, second):
        os.close(fd)
    again, fd = confinement._user("/volumes/a", locks, "a")
    assert again == first[0]
    os.close(fd)


def test_what_a_configuration_of_ceph_calls_a_keyring_may_be_read(tmp_path: Path) -> None:
    conf = tmp_path / "ceph.conf"
    conf.write_text("[global]\nkeyring = /a/one, /b/$cluster.$name.keyring\n[client.x]\n keyring=/c/x$id/k\nkey = /d\n")
    assert list(confinement._keyrings(str(conf))) == ["/a/one", "/b", "/c"]
    assert list(confinement._keyrings(str(tmp_path / "missing"))) == []


def test_what_is_started_without_a_core_has_none_and_others_keep_theirs() -> None:
    before = resource.getrlimit(resource.RLIMIT_CORE)
    program = [*PYTHON, "import resource; print(resource.getrlimit(resource.RLIMIT_CORE)[0])"]
    with protection.without_core():
        child = subprocess.run(program, capture_output=True, text=True, check=True)
    assert int(child.stdout) in (0, 1)
    assert resource.getrlimit(resource.RLIMIT_CORE) == before


def test_the_effective_capabilities_are_those_of_this_process() -> None:
    assert f"{sandbox.effective():016x}" in Path("/proc/self/status").read_text()


def test_a_container_that_has_few_users_gives_none_away(tmp_path: Path) -> None:
    (tmp_path / "map").write_text("         0     100000      65536\n")
    assert sandbox._is_mapped(str(tmp_path / "map"), 65535)
    assert not sandbox._is_mapped(str(tmp_path / "map"), FIRST_USER)


def test_what_was_looked_up_before_is_not_looked_up_again(tmp_path: Path) -> None:
    for name in ("pinned", "later"):
        (tmp_path / name).mkdir()
    (tmp_path / "later").rmdir()
    (tmp_path / "pinned" / "file").write_text("x")
    landlock.pin(str(tmp_path / name) for name in ("pinned", "later"))
    (tmp_path / "pinned").rename(tmp_path / "moved")
    (tmp_path / "later").mkdir()
    (tmp_path / "later" / "file").write_text("x")
    program = """
def readable(name):
    try:
        os.close(os.open(f"{sys.argv[1]}/{name}/file", os.O_RDONLY))
    except PermissionError:
        return False
    return True
print(json.dumps([readable(name) for name in ("moved", "later")]))
"""
    rules = (*PROGRAMS, *(Rule(str(tmp_path / name), READ) for name in ("pinned", "later")))
    assert said_by(same_user(rules=rules), program, tmp_path) == [True, False]


@as_root
def test_no_more_is_left_than_there_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    path.touch(mode=0o600)
    tmp_path.chmod(0o755)
    lacks = sandbox.effective() & ~(1 << sandbox.CAPABILITIES["DAC_READ_SEARCH"])
    monkeypatch.setattr(sandbox, "effective", lambda: lacks)
    found = confinement._least(frozenset({"DAC_READ_SEARCH"}), 0, [(str(path), os.R_OK | os.W_OK)])
    assert found == Sandbox(0, frozenset())
    found = confinement._least(frozenset(), NOBODY, [(str(path), os.R_OK)])
    assert found == Sandbox(NOBODY, frozenset({"DAC_OVERRIDE"}))
