"""What a daemon may not have, it says, and goes on without. What it has is tested in the machine, where it may."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from storaged.host import protection

#: A process that protects itself, and says what it is like then.
PROGRAM = """
from storaged.host import protection
print(protection.may_protect())
print(*protection.protect_daemon(), sep="\\n")
print("goes on with", open("/proc/self/oom_score_adj").read().strip())
bytearray(64 << 20)
"""


def protected(*before: str) -> list[str]:
    done = subprocess.run(
        [*before, sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True, timeout=60,
    )
    return done.stdout.splitlines()


def test_without_the_capability_it_goes_on_and_says_what_it_cannot_have() -> None:
    may, *failures, rest = protected(
        "prlimit", "--memlock=65536:65536", "setpriv", "--bounding-set=-sys_resource", "--inh-caps=-all"
    )
    assert may == "False"
    assert len(failures) == 3
    for failure, word in zip(failures, ["I/O flusher", "OOM killer", "swapped"], strict=True):
        assert word in failure
        assert "CAP_SYS_RESOURCE" in failure
    assert rest == f"goes on with {Path('/proc/self/oom_score_adj').read_text().strip()}"


def test_a_score_that_is_lower_already_stays() -> None:
    own = int(Path("/proc/self/oom_score_adj").read_text())
    assert protection._lower_score("self", own + 1 if own < 1000 else own) is None
    assert int(Path("/proc/self/oom_score_adj").read_text()) == own


def test_a_qsd_that_is_gone_is_no_error() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    protection.spare(child.pid)
    assert not os.path.exists(f"/proc/{child.pid}")


#: Starts a copy of a program, keeps it if it shall, ends it, and asks the kernel to evict it.
KEEPER = """
import os, subprocess, sys
from storaged.host import protection
program, keep = sys.argv[1], sys.argv[2] == "keep"
child = subprocess.Popen([program, "60"], stdout=subprocess.PIPE)
while "/libc" not in open(f"/proc/{child.pid}/maps").read():
    pass  # the program is mapped before its libraries
if keep:
    protection.keep_program(child.pid)
    protection.keep_program(child.pid)
child.kill()
child.wait()
protection.keep_program(child.pid)
file = os.open(program, os.O_RDONLY)
os.fsync(file)
os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
subprocess.run(["fincore", "--bytes", "--noheadings", "--output", "PAGES", program], check=True)
"""


@pytest.mark.parametrize("keep", [True, False])
def test_a_program_that_is_kept_stays_in_memory_when_nobody_runs_it(place: Path, keep: bool) -> None:
    program = Path(shutil.copy(str(shutil.which("sleep")), place / "program"))
    done = subprocess.run(
        [sys.executable, "-c", KEEPER, program, "keep" if keep else ""], capture_output=True, text=True, check=True,
        timeout=60,
    )
    pages = int(done.stdout)
    assert pages * 4096 >= program.stat().st_size / 2 if keep else pages == 0


def test_what_holds_secrets_writes_no_core_and_one_that_is_gone_is_no_error() -> None:
    with subprocess.Popen(["sleep", "60"]) as child:
        protection.write_no_core(child.pid)
        assert resource.prlimit(child.pid, resource.RLIMIT_CORE) == (1, 1)
        child.kill()
    protection.write_no_core(child.pid)


def test_the_daemon_of_root_writes_no_core() -> None:
    program = "from storaged.host import protection; import ctypes; protection.protect_daemon();"
    program += "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    for before, dumpable in ((["env"], "0"), (["setpriv", "--reuid=65534", "--clear-groups"], "1")):
        words = [*before, sys.executable, "-c", program]
        assert subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout.strip() == dumpable
