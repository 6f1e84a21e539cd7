"""Calls into the kernel that may never return are made by processes that can be left behind, not by this one.

A thread that is stuck in the kernel keeps its whole process from ending, and with it the process's files: a daemon
with such a thread could be killed, but the next one would not get its lock. So netlink requests, writes to sysfs that
wait for I/O, and fsync are made by a worker: a child with a session of its own that has inherited nothing. The
calling thread waits in recv(2), which ends with the process. The worker ends with the socket, at once or as soon as the
kernel lets it go (see host/workerchild.py, its program).

One worker is kept, and makes one call at a time. While it hangs another one takes its place, and there are few: what
hangs one of them mostly hangs all.
"""

from __future__ import annotations

import array
import contextlib
import errno
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from storaged.errors import ErrorCode, StoragedError

#: A worker that has not answered for so long (seconds) counts as hanging.
SLOW = 5.0
#: And one that has not started for so long. It takes a second at most, but not while a busy host boots: then nothing
#: comes of others that are started beside it, but that all of them take longer.
STARTING = 60.0
#: Workers that there may be, most of them hanging.
MOST = 8
#: How often a call is begun anew whose worker was dead before it knew of it.
_TRIES = 3
#: A packet, either way (bytes).
_LARGEST = 1 << 16
_PROGRAM = (sys.executable, "-I", os.path.join(os.path.dirname(__file__), "workerchild.py"))
#: What of the environment it gets.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL")


class Worker:
    """One child. Not for two threads at once, but for :meth:`close`."""

    def __init__(self, program: Sequence[str] = _PROGRAM) -> None:
        self.ready = False
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            with theirs:
                # Descriptors of ours are not inherited: the daemon's locks must not live on in what hangs.
                self.process = subprocess.Popen(
                    program, stdin=theirs.fileno(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
                    env={key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}, start_new_session=True,
                )
        except BaseException:
            self._socket.close()
            raise

    def send(self, question: dict[str, Any], descriptors: Sequence[int] = ()) -> bool:
        """Give it a question; false if it has ended, and will never see it."""
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", descriptors))] if descriptors else []
        try:
            self._socket.sendmsg([json.dumps(question).encode()], rights)
        except (BrokenPipeError, ConnectionResetError):
            return False
        return True

    def wait_ready(self) -> None:
        """Wait until it has started, or ended. Raises ConnectionResetError, as below."""
        if not self.ready:
            self.ready = bool(self._socket.recv(_LARGEST))

    def receive(self) -> dict[str, Any] | None:
        """Wait for the next answer, for ever; None if there will be none.

        Raises ConnectionResetError where it has ended without having read what it was sent (unix(7)).
        """
        self.wait_ready()
        packet = self._socket.recv(_LARGEST)
        return dict(json.loads(packet)) if packet else None

    def close(self) -> None:
        """Want no more answers: it ends as soon as the kernel lets it. A thread that waits for one is woken up."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        # A child that was not collected is so by the next Popen.
        self.process.poll()


class Workers:
    """Those of this process."""

    def __init__(
        self, program: Sequence[str] = _PROGRAM, *, slow: float = SLOW, starting: float = STARTING, most: int = MOST
    ) -> None:
        self._program, self._slow, self._starting, self._most = program, slow, starting, most
        self._changed = threading.Condition()
        self._free: list[Worker] = []
        #: Since when, or from when on, each of them hangs (monotonic).
        self._busy: dict[Worker, float] = {}

    def start(self) -> None:
        """Have one started, without waiting for it."""
        with self._changed:
            if not self._free and not self._busy:
                self._free.append(self._new())

    def call(self, question: dict[str, Any], descriptors: Sequence[int] = ()) -> Any:
        """Have a question answered, however long it takes. Blocks in a way that does not keep the process from ending.

        Raises OSError with the kernel's errno, HOST_STUCK where too many earlier calls hang. EOWNERDEAD: the worker was
        killed, and the outcome is not known.
        """
        answer = None
        for _ in range(_TRIES):
            worker = self._take()
            try:
                seen = worker.send(question, descriptors)
                if seen:
                    worker.wait_ready()
                    self._note_busy(worker)
                    answer = worker.receive()
            except ConnectionResetError:
                # It was killed while it had nothing to do, which is no failure.
                seen = False
            finally:
                self._give_back(worker, usable=answer is not None)
            if seen:
                break
        return result_of(answer)

    def close(self) -> None:
        """End those that do nothing."""
        with self._changed:
            for worker in self._free:
                worker.close()
            self._free.clear()

    @property
    def hanging(self) -> int:
        """How many calls take too long."""
        with self._changed:
            return len(self._slow_ones())

    def _slow_ones(self) -> list[Worker]:
        now = time.monotonic()
        return [worker for worker, hangs_from in self._busy.items() if now >= hangs_from]

    def _note_busy(self, worker: Worker) -> None:
        with self._changed:
            self._busy[worker] = time.monotonic() + (self._slow if worker.ready else self._starting)
            self._changed.notify_all()

    def _take(self) -> Worker:
        with self._changed:
            while True:
                worker = self._free.pop() if self._free else None
                if worker is None and len(self._slow_ones()) == len(self._busy):
                    if len(self._busy) >= self._most:
                        raise StoragedError(
                            ErrorCode.HOST_STUCK, "the kernel cannot be asked",
                            cause=f"{len(self._busy)} earlier calls still hang in it",
                            hint="a device without a server holds it up; look for D-state processes in ps",
                        )
                    worker = self._new()
                if worker is not None:
                    self._note_busy(worker)
                    return worker
                # Until one is free, or the one that works has become slow.
                self._changed.wait(max(0.01, max(self._busy.values()) - time.monotonic()))

    def _give_back(self, worker: Worker, *, usable: bool) -> None:
        with self._changed:
            del self._busy[worker]
            if usable and not self._free:
                self._free.append(worker)
            else:
                worker.close()
            self._changed.notify_all()

    def _new(self) -> Worker:
        try:
            return Worker(self._program)
        except OSError as error:
            raise StoragedError(
                ErrorCode.INTERNAL, "cannot start a process that talks to the kernel",
                cause=error.strerror or str(error), hint="look for what keeps this host from starting processes",
            ) from error


def result_of(answer: dict[str, Any] | None) -> Any:
    """Return what a worker found, or raise what it met: OSError, TRANSPORT_UNAVAILABLE."""
    if answer is None:
        raise OSError(errno.EOWNERDEAD, "the process that asked the kernel was killed")
    if "errno" in answer:
        raise OSError(answer["errno"], answer["text"])
    if "missing" in answer:
        raise StoragedError(
            ErrorCode.TRANSPORT_UNAVAILABLE, f"this kernel has no netlink family {answer['missing']!r}",
            cause="its module is not loaded, or this is a network namespace or container without it",
            hint="storaged doctor says what is missing",
        )
    return answer["result"]


#: Those of this process.
WORKERS = Workers()


def write(path: str, text: str) -> None:
    """Write to an attribute in sysfs, where that may wait for I/O. Raises OSError, HOST_STUCK."""
    WORKERS.call({"write": [path, text]})


def fsync(fd: int) -> None:
    """fsync(2) of a device whose server may hang. Raises OSError, HOST_STUCK."""
    WORKERS.call({"fsync": 0}, [fd])
