"""Calls that never return: they hang in a process that can be left behind, and nobody else waits for them."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import nbd, netlink, worker, workerchild
from storaged.host.worker import Workers
from tests.harness import error_of, eventually


class Call:
    """A call in a thread of its own."""

    def __init__(self, function: Callable[[], Any]) -> None:
        self.result: Any = None
        self.error: BaseException | None = None
        self._function = function
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.result = self._function()
        except BaseException as error:
            self.error = error

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()


@pytest.fixture
def workers() -> Iterator[Workers]:
    """Real ones; a call is slow after a second."""
    made = Workers(slow=1.0, most=3)
    yield made
    made.close()


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """Who writes to it waits until somebody reads."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def children() -> set[int]:
    """The workers of this process that have not ended."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            command = (entry.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(parent) == os.getpid() and state != "Z" and b"workerchild.py" in command:
            found.add(int(entry.parent.name))
    return found


def test_a_write_and_a_sync_are_done_and_what_the_kernel_says_comes_back(workers: Workers, tmp_path: Path) -> None:
    (tmp_path / "a").touch()
    assert workers.call({"write": [str(tmp_path / "a"), "done"]}) is None
    assert (tmp_path / "a").read_text() == "done"
    with open(tmp_path / "a", "rb") as file:
        assert workers.call({"fsync": 0}, [file.fileno()]) is None
    reading, writing = os.pipe()
    with pytest.raises(OSError, match="Invalid argument") as caught:
        workers.call({"fsync": 0}, [reading])
    assert caught.value.errno == errno.EINVAL
    with pytest.raises(FileNotFoundError):
        workers.call({"write": [str(tmp_path / "b" / "c"), "x"]})
    os.close(reading)
    os.close(writing)


def test_a_family_that_the_kernel_has_not_is_a_clear_refusal(workers: Workers) -> None:
    assert workers.call({"family": "nlctrl"}) is True
    error = error_of(lambda: workers.call({"family": "no-such"}))
    assert error.code is ErrorCode.TRANSPORT_UNAVAILABLE
    assert "no-such" in error.message


def test_one_worker_serves_many_threads(tmp_path: Path) -> None:
    workers = Workers(slow=60)
    before = children()
    paths = [tmp_path / f"file{number}" for number in range(30)]
    for path in paths:
        path.touch()
    calls = [Call(lambda path=path: workers.call({"write": [str(path), path.name]})) for path in paths]  # type: ignore[misc]
    for call in calls:
        call.thread.join(30)
    assert [call.error for call in calls] == [None] * 30
    assert [path.read_text() for path in paths] == [path.name for path in paths]
    (pid,) = children() - before
    workers.close()
    eventually(lambda: pid not in children(), "it has ended")


def test_while_one_call_hangs_others_are_made_and_when_it_goes_on_it_is_as_if_nothing_had_been(
    workers: Workers, tmp_path: Path, fifo: Path
) -> None:
    before = children()
    hangs = Call(lambda: workers.call({"write": [str(fifo), "at last"]}))
    (tmp_path / "a").touch()
    eventually(lambda: workers.hanging == 1, "it hangs")
    for turn in range(5):
        workers.call({"write": [str(tmp_path / "a"), str(turn)]})
    assert not hangs.ended
    with open(fifo) as reader:
        assert reader.read() == "at last"
    eventually(lambda: hangs.ended, "it goes on")
    assert hangs.error is None
    assert workers.hanging == 0
    eventually(lambda: len(children() - before) <= 1, "one is enough")


def test_too_many_that_hang_are_said_and_no_more_are_begun(workers: Workers, fifo: Path) -> None:
    before = children()
    calls = [Call(lambda: workers.call({"write": [str(fifo), "x"]})) for _ in range(3)]
    eventually(lambda: workers.hanging == 3, "all hang")
    error = error_of(lambda: workers.call({"write": [str(fifo), "x"]}))
    assert error.code is ErrorCode.HOST_STUCK
    assert "3 earlier calls" in error.cause
    assert error.hint
    assert len(children() - before) == 3
    with open(fifo) as reader:
        assert reader.read() == "xxx"
    eventually(lambda: all(call.ended for call in calls), "they go on")
    workers.call({"family": "nlctrl"})


def test_a_worker_has_nothing_of_ours_and_a_session_of_its_own(workers: Workers, tmp_path: Path) -> None:
    before = children()
    with open(tmp_path / "lock", "w") as lock:
        os.set_inheritable(lock.fileno(), True)
        workers.call({"family": "nlctrl"})
        (pid,) = children() - before
        seen = [os.readlink(f"/proc/{pid}/fd/{entry}") for entry in os.listdir(f"/proc/{pid}/fd")]
    assert not any("lock" in name for name in seen), seen
    assert len([name for name in seen if name.startswith("socket:")]) == 1, "its questions"
    assert os.getsid(pid) == pid
    assert os.readlink(f"/proc/{pid}/cwd") == "/"


def test_one_that_was_killed_while_it_had_nothing_to_do_is_replaced(workers: Workers) -> None:
    before = children()
    workers.call({"family": "nlctrl"})
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: pid not in children(), "it is dead")
    assert workers.call({"family": "nlctrl"}) is True


def test_of_one_that_is_killed_within_a_call_the_outcome_is_not_known(workers: Workers, fifo: Path) -> None:
    before = children()
    call = Call(lambda: workers.call({"write": [str(fifo), "x"]}))
    eventually(lambda: workers.hanging == 1, "it hangs")
    (pid,) = children() - before
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: call.ended, "it is told")
    assert isinstance(call.error, OSError)
    assert call.error.errno == errno.EOWNERDEAD
    assert workers.call({"family": "nlctrl"}) is True


#: One that takes its time until it can be asked, as on a busy host that boots; each leaves a file.
STARTS_SLOWLY = """
import runpy, sys, tempfile, time
tempfile.mkstemp(dir=sys.argv[1])
time.sleep(3)
runpy.run_path(sys.argv[2], run_name="__main__")
"""


def test_while_one_takes_long_to_start_it_is_waited_for_and_no_others_are_started(tmp_path: Path) -> None:
    (tmp_path / "started").mkdir()
    program = (sys.executable, "-c", STARTS_SLOWLY, str(tmp_path / "started"), workerchild.__file__)
    workers = Workers(program, slow=0.5, most=3)
    workers.start()
    calls = [Call(lambda: workers.call({"write": [os.devnull, "x"]})) for _ in range(8)]
    time.sleep(1)
    assert workers.hanging == 0
    for call in calls:
        call.thread.join(30)
    assert [call.error for call in calls] == [None] * 8
    assert len(list((tmp_path / "started").iterdir())) == 1
    workers.close()


def test_one_that_does_not_start_at_all_counts_as_one_that_hangs(tmp_path: Path) -> None:
    never = STARTS_SLOWLY.replace("sleep(3)", "sleep(600)")
    before, workers = children(), Workers((sys.executable, "-c", never, str(tmp_path), workerchild.__file__),
                                          starting=0.5, most=2)
    calls = [Call(lambda: workers.call({"write": [os.devnull, "x"]})) for _ in range(2)]
    eventually(lambda: workers.hanging == 2, "both hang")
    assert error_of(lambda: workers.call({})).code is ErrorCode.HOST_STUCK

    def killed() -> bool:
        # Nobody has heard of what they were asked: others are.
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)
        return all(call.ended for call in calls)

    eventually(killed, "they give up")


def test_a_program_that_cannot_run_ends_with_a_failure_and_not_in_a_loop() -> None:
    workers = Workers(("/bin/false",))
    begin = time.monotonic()
    with pytest.raises(OSError, match="was killed"):
        workers.call({"family": "nlctrl"})
    assert time.monotonic() - begin < 5
    assert error_of(lambda: Workers(("/no/such/program",)).call({})).code is ErrorCode.INTERNAL


HOLDER = """
import fcntl, sys, threading
from storaged.host import worker
lock = open(sys.argv[1], "w")
fcntl.flock(lock, fcntl.LOCK_EX)
worker.WORKERS.call({"family": "nlctrl"})
print(worker.WORKERS._free[0].process.pid, flush=True)
worker.write(sys.argv[2], "x")
"""


def test_a_process_whose_call_hangs_can_be_killed_and_lets_go_of_its_lock_at_once(tmp_path: Path, fifo: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "lock"), str(fifo)], stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        pid = int(holder.stdout.readline())
        assert Path(f"/proc/{pid}/cmdline").read_bytes().endswith(b"workerchild.py\0")
        time.sleep(0.5)
        with open(tmp_path / "lock", "w") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            holder.kill()
            holder.wait()
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    eventually(lambda: not Path(f"/proc/{pid}").exists(), "the worker ends with it")


#: One that the kernel does not let go of: it cannot end.
CANNOT_END = """
import os, runpy, sys, threading
os._exit = lambda status: threading.Event().wait()
runpy.run_path(sys.argv[1], run_name="__main__")
"""


def test_what_still_waits_in_the_kernel_when_nobody_wants_it_any_more_has_no_descriptors_left(fifo: Path) -> None:
    """So that no device is made of the sockets of a daemon that has died."""
    child = worker.Worker((sys.executable, "-c", CANNOT_END, workerchild.__file__))
    reading, writing = os.pipe()
    try:
        assert child.send({"write": [str(fifo), "x"]}, [writing])
        os.close(writing)
        time.sleep(1)
        assert not select.select([reading], [], [], 0)[0], "it has it still"
        child.close()
        assert select.select([reading], [], [], 20)[0]
        assert os.read(reading, 1) == b"", "nobody has the other end"
        assert child.process.poll() is None
    finally:
        child.process.kill()
        child.process.wait()
        os.close(reading)


def test_descriptors_get_the_numbers_that_they_have_in_the_worker_wherever_they_are_nested() -> None:
    sockets = netlink.nested([("ITEM", netlink.nested([("FD", netlink.descriptor(index))])) for index in (1, 0)])
    assert workerchild.filled([["SIZE", 5], ["SOCKETS", sockets]], [70, 80]) == [
        ["SIZE", 5],
        ["SOCKETS", {"attrs": [["ITEM", {"attrs": [["FD", 80]]}], ["ITEM", {"attrs": [["FD", 70]]}]]}],
    ]


def test_attributes_of_an_answer_are_found_wherever_they_are_nested() -> None:
    item = {"attrs": [["INDEX", 3], ["CONNECTED", 1]]}
    answer = netlink.Answer(5, (("LIST", {"attrs": [["ITEM", item], ["ITEM", item]]}), ("OTHER", None)))
    assert answer.find("LIST", "ITEM", "INDEX") == [3, 3]
    assert answer.find("INDEX") == []


def test_a_listener_ends_when_it_is_closed_while_it_waits() -> None:
    listener = netlink.Listener("nlctrl", "notify")
    heard = Call(lambda: list(listener))
    time.sleep(0.2)
    assert not heard.ended
    listener.close()
    eventually(lambda: heard.ended, "it ends")
    assert (heard.result, heard.error) == ([], None)


def test_a_listener_whose_worker_dies_says_so() -> None:
    before = children()
    listener = netlink.Listener("nlctrl", "notify")
    (pid,) = children() - before
    heard = Call(lambda: list(listener))
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: heard.ended, "it ends")
    assert isinstance(heard.error, OSError)
    listener.close()


def test_who_listens_anew_ends_who_listened_before() -> None:
    heard = Call(lambda: list(netlink.listen("nlctrl", "notify")))
    eventually(lambda: ("nlctrl", "notify") in netlink._listeners, "it listens")
    second = netlink.listen("nlctrl", "notify")
    eventually(lambda: heard.ended, "the first one ends")
    assert heard.error is None
    second.close()


def test_a_second_disconnection_does_not_wait_behind_one_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would come when the number may be another volume's."""
    goes_on, asked = threading.Event(), []

    def request(family: str, command: int, attributes: netlink.Attributes) -> list[netlink.Answer]:
        asked.append(dict(attributes))
        assert goes_on.wait(30)
        return []

    monkeypatch.setattr("storaged.host.netlink.request", request)
    monkeypatch.setattr("storaged.host.nbd.backend", lambda device: "storaged.a")
    first = Call(lambda: nbd.disconnect("/dev/nbd3", "storaged.a"))
    eventually(lambda: asked, "it was asked")
    with pytest.raises(StoragedError) as caught:
        nbd.disconnect("/dev/nbd3", "storaged.a")
    assert caught.value.code is ErrorCode.HOST_STUCK
    goes_on.set()
    eventually(lambda: first.ended, "it ends")
    nbd.disconnect("/dev/nbd3", "storaged.a")
    assert asked == [{"NBD_ATTR_INDEX": 3}] * 2


def test_the_daemon_itself_never_imports_what_speaks_netlink() -> None:
    code = "import sys, storaged.supervisor.daemon; print([name for name in sys.modules if 'pyroute2' in name])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
