"""Writes and reads a disk past the page cache, and knows what was acknowledged and what was flushed.

A process of its own, because what it waits for may never come. Of the standard library alone, because each import
costs 16 times what it costs elsewhere. It takes one JSON object a line and answers with one:

=====================================  ================================================================
``{"do": "status"}``                   counters; ``longest`` is the longest request since the last status
                                       (seconds), also one that has not ended
``{"do": "stop"}``                     ends the load, flushes, and answers as ``status`` does
``{"do": "check", "path", "floor"}``   reads all of a disk, and answers with what is wrong. ``floor`` says how
                                       old a block may be: ``acked`` or ``flushed``
=====================================  ================================================================

Each of the DEPTH threads has blocks of its own and one request in flight: so it is known which write of a block is
the last. A request that fails is counted, and the thread goes on after a while.
"""

from __future__ import annotations

import argparse
import errno
import json
import mmap
import os
import random
import sys
import threading
import time
from pathlib import Path
from typing import Any

from tests.vm.faults.blocks import BLOCK, block, wrong

#: Of one request, in blocks: 32 KiB.
_LONGEST_REQUEST = 8
_FLUSH_EVERY = 0.3
_AFTER_ERROR = 0.1
_SWEEP = 64


class Load:
    """A disk, or a file on one, under requests."""

    def __init__(self, path: str, blocks: int, depth: int, mark: str, journal: str) -> None:
        self.path = path
        self.depth = depth
        self.run = random.getrandbits(63)
        self.issued = [0] * blocks
        self.acked = [0] * blocks
        self.flushed = [0] * blocks
        self.completed = 0
        self.errors: dict[str, int] = {}
        self.flush_errors = 0
        self.wrong: list[str] = []
        self.marks = 0
        """How many times the file ``mark`` was replaced and that was flushed: what a filesystem must keep."""
        self._mark = mark
        self._journal = journal
        self._began = [0.0] * (depth + 1)
        self._longest = 0.0
        self._stop = threading.Event()
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._threads = [threading.Thread(target=self._work, args=(number,), daemon=True) for number in range(depth)]
        self._flusher = threading.Thread(target=self._flush_often, daemon=True)

    def start(self) -> None:
        """Begin; the first flush is done when this returns."""
        for thread in self._threads:
            thread.start()
        self._flush()
        self._flusher.start()

    def stop(self, timeout: float) -> list[str]:
        """End it, flush and close the disk; return what is still stuck after ``timeout`` seconds."""
        self._stop.set()
        deadline = time.monotonic() + timeout
        threads = [*self._threads, self._flusher]
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        stuck = [thread.name for thread in threads if thread.is_alive()]
        if not stuck:
            self._flush()
            os.close(self._fd)
        return stuck

    def status(self) -> dict[str, Any]:
        """Counters; begins a new measurement of the longest request."""
        now = time.monotonic()
        waiting = [now - began for began in self._began if began]
        longest, self._longest = max([self._longest, *waiting]), 0.0
        return {
            "completed": self.completed, "errors": self.errors, "flush_errors": self.flush_errors,
            "wrong": self.wrong, "in_flight": len(waiting), "longest": longest, "marks": self.marks,
            "flushed": sum(1 for generation in self.flushed if generation),
        }

    # --- the load -----------------------------------------------------------------------------------

    def _work(self, number: int) -> None:
        share = len(self.issued) // self.depth
        first = number * share
        choose = random.Random(self.run + number)
        generation = 0
        buffer = memoryview(mmap.mmap(-1, _LONGEST_REQUEST * BLOCK))
        while not self._stop.is_set():
            count = choose.randint(1, _LONGEST_REQUEST)
            start = first + choose.randrange(share - count + 1)
            generation += 1
            self._began[number] = time.monotonic()
            try:
                if choose.random() < 0.3:
                    self._read(start, buffer[: count * BLOCK])
                else:
                    self._write(start, generation, buffer[: count * BLOCK])
                self.completed += 1
                self._ended(number)
            except OSError as error:
                self._ended(number)
                self._count(error)
                self._stop.wait(_AFTER_ERROR)

    def _ended(self, number: int) -> None:
        began, self._began[number] = self._began[number], 0.0
        if began:
            self._longest = max(self._longest, time.monotonic() - began)

    def _count(self, error: OSError) -> None:
        name = errno.errorcode.get(error.errno or 0, "?")
        self.errors[name] = self.errors.get(name, 0) + 1

    def _write(self, start: int, generation: int, buffer: memoryview) -> None:
        numbers = range(start, start + len(buffer) // BLOCK)
        buffer[:] = b"".join([block(self.run, number, generation) for number in numbers])
        for number in numbers:
            self.issued[number] = generation
        if os.pwritev(self._fd, [buffer], start * BLOCK) != len(buffer):
            raise OSError(errno.EIO, "a part was written")
        for number in numbers:
            self.acked[number] = generation

    def _read(self, start: int, buffer: memoryview) -> None:
        if os.preadv(self._fd, [buffer], start * BLOCK) != len(buffer):
            raise OSError(errno.EIO, "a part was read")
        _judge(self.run, start, buffer, self.acked, self.issued, self.wrong)

    def _flush_often(self) -> None:
        while not self._stop.wait(_FLUSH_EVERY):
            self._flush()

    def _flush(self) -> None:
        """Whatever was acknowledged before this began is on the disk when it ends well."""
        before = list(self.acked)
        self._began[-1] = time.monotonic()
        try:
            os.fsync(self._fd)
            self.flushed = before
            if self._mark:
                replace(self._mark, str(self.marks + 1).encode())
                self.marks += 1
        except OSError:
            self.flush_errors += 1
            self._stop.wait(_AFTER_ERROR)
        finally:
            self._ended(self.depth)
        if self._journal:
            state = {"run": self.run, "flushed": self.flushed, "marks": self.marks, "completed": self.completed}
            replace(self._journal, json.dumps(state).encode())


def _judge(run: int, start: int, buffer: memoryview, oldest: list[int], newest: list[int], into: list[str]) -> None:
    """Look at the blocks from ``start`` on that ``buffer`` has; add what is wrong."""
    for index in range(len(buffer) // BLOCK):
        number = start + index
        data = bytes(buffer[index * BLOCK : (index + 1) * BLOCK])
        found = wrong(data, run, number, oldest[number], newest[number])
        if found and len(into) < 20:
            into.append(found)


def check(path: str, run: int, oldest: list[int], newest: list[int]) -> list[str]:
    """Read a whole disk; return what is wrong. ``oldest``, ``newest``: of each block the writes that it may hold."""
    found: list[str] = []
    buffer = memoryview(mmap.mmap(-1, _SWEEP * BLOCK))
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        for start in range(0, len(oldest), _SWEEP):
            part = buffer[: min(_SWEEP, len(oldest) - start) * BLOCK]
            if os.preadv(fd, [part], start * BLOCK) != len(part):
                found.append(f"{path} ends within block {start} to {start + _SWEEP}")
                break
            _judge(run, start, part, oldest, newest, found)
    finally:
        os.close(fd)
    return found


def replace(path: str, data: bytes) -> None:
    """Replace a file so that after a power failure the old one or the new one is there."""
    with open(f"{path}.new", "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.rename(f"{path}.new", path)
    directory = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def after_power_failure(path: str, journal: str, mark: str) -> dict[str, Any]:
    """Compare a disk with what a verifier that is gone has told before it went."""
    state = json.loads(Path(journal).read_text())
    found = check(path, state["run"], state["flushed"], [sys.maxsize] * len(state["flushed"]))
    if mark and int(Path(mark).read_text()) < state["marks"]:
        found.append(f"{mark} was replaced {Path(mark).read_text()} times, not {state['marks']}")
    return {"wrong": found, "flushed": sum(1 for one in state["flushed"] if one), "marks": state["marks"]}


def main() -> None:
    """Serve the commands."""
    parser = argparse.ArgumentParser()
    parser.add_argument("path")
    parser.add_argument("--blocks", type=int, default=2048)
    parser.add_argument("--depth", type=int, default=1)
    parser.add_argument("--mark", default="", help="a file on the same filesystem that is replaced with each flush")
    parser.add_argument("--journal", default="", help="where to keep, on another disk, what was flushed")
    arguments = parser.parse_args()
    load = Load(arguments.path, arguments.blocks, arguments.depth, arguments.mark, arguments.journal)
    load.start()
    print(json.dumps(load.status()), flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        if command["do"] == "status":
            answer: dict[str, Any] = load.status()
        elif command["do"] == "stop":
            stuck = load.stop(command["patience"])
            answer = {**load.status(), "stuck": stuck}
        else:
            floor = load.acked if command["floor"] == "acked" else load.flushed
            try:
                answer = {"wrong": check(command["path"], load.run, floor, load.issued)}
            except OSError as error:
                answer = {"wrong": [str(error)]}
        print(json.dumps(answer), flush=True)
    # Threads that are stuck end with the requests that they wait for.
    os._exit(0)


if __name__ == "__main__":
    main()
