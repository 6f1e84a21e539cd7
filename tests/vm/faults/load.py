"""A disk under load while something happens to it, and the look afterwards."""

from __future__ import annotations

import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from storaged.errors import StoragedError
from tests.harness import Daemon, eventually, image, run
from tests.vm.faults.blocks import BLOCK
from tests.vm.faults.cases import Case

CHECKOUT = Path(__file__).resolve().parents[3]
#: Of the disk that is written to, from its beginning: 8 MiB.
BLOCKS = 2048


class Verifier:
    """The process that tests/vm/faults/verifier.py is."""

    def __init__(self, path: str, depth: int, *, mark: Path | None = None, journal: Path | None = None) -> None:
        options = [*(["--mark", str(mark)] if mark else []), *(["--journal", str(journal)] if journal else [])]
        self._answers: queue.Queue[str] = queue.Queue()
        self.process = subprocess.Popen(
            # It keeps the device busy with what of the processors nobody else wants: a daemon that starts beside it
            # is not held up.
            ["nice", sys.executable, "-m", "tests.vm.faults.verifier", path, f"--blocks={BLOCKS}", f"--depth={depth}",
             *options],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=CHECKOUT,
        )
        threading.Thread(target=self._listen, daemon=True).start()
        self.longest = 0.0
        """The longest request so far (seconds)."""
        try:
            self.last = self._answer(60)
        except AssertionError:
            self.end()
            raise

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def _answer(self, timeout: float) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=timeout)
        except queue.Empty:
            raise AssertionError(f"the verifier has said nothing for {timeout:.0f} s") from None
        assert line, f"the verifier has ended: {self.process.wait(10)}"
        answer: dict[str, Any] = json.loads(line)
        self.longest = max(self.longest, answer.get("longest", 0.0))
        return answer

    def ask(self, timeout: float = 60, **command: object) -> dict[str, Any]:
        """Send a command; return the answer."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return self._answer(timeout)

    def status(self) -> dict[str, Any]:
        """Counters; ``longest`` of it is the longest request since the last status."""
        self.last = self.ask(do="status")
        return self.last

    def progresses(self, requests: int = 50, timeout: float = 60) -> float:
        """Wait until so many more requests have ended well; return the longest request since the last look."""
        longest = 0.0
        before = self.last["completed"]

        def more() -> bool:
            nonlocal longest
            longest = max(longest, self.status()["longest"])
            return bool(self.last["completed"] >= before + requests)

        eventually(more, f"{requests} more requests end well: {self.last}", timeout)
        return longest

    def stop(self, timeout: float = 30) -> dict[str, Any]:
        """End the load, with a flush."""
        self.last = self.ask(timeout + 30, do="stop", patience=timeout)
        return self.last

    def wrong(self, path: object, floor: str) -> list[str]:
        """Read all of a disk and return what is wrong; ``floor``: ``acked`` or ``flushed`` must be there."""
        return list(self.ask(do="check", path=str(path), floor=floor)["wrong"])

    def end(self) -> None:
        """End the process. One that is stuck in the kernel ends as soon as the kernel lets it."""
        self.process.kill()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(1)


class Site:
    """A volume with a verifier on it."""

    def __init__(
        self, daemon: Daemon, place: Path, case: Case, source: Path | str, wishes: dict[str, Any], *, name: str = "a",
    ) -> None:
        self.daemon = daemon
        self.name = name
        self.place = place
        self.case = case
        self.source = source
        wishes = {"transport": case.transport, **wishes}
        self._attach: Callable[[], dict[str, Any]] = lambda: daemon.attach(name, source, **wishes)
        self.device = str(self._attach()["device"])
        self.directory: Path | None = None
        self.path = self.device
        self._load: Verifier | None = None

    @property
    def load(self) -> Verifier:
        """The verifier, from :meth:`begin` on."""
        assert self._load is not None
        return self._load

    def begin(self, journal: Path | None = None) -> None:
        """Put the device to its use, and the verifier to work."""
        case = self.case
        if case.use == "ext4":
            run("mkfs.ext4", "-q", "-E", "nodiscard", self.device)
            self.mount(self.device)
            with open(self.path, "wb") as file:
                file.write(bytes(BLOCKS * BLOCK))
                file.flush()
                os.fsync(file.fileno())
        mark = None if self.directory is None else self.directory / "mark"
        self._load = Verifier(self.path, case.depth, mark=mark, journal=journal)
        self.load.progresses()
        self.load.longest = 0.0
        case.notes["usual"] = round(self.load.progresses(20), 3)
        self.load.longest = 0.0

    def end(self) -> None:
        """Let go of the device, whatever has happened."""
        if self._load is not None:
            self._load.end()
        if self.directory is not None:
            run("umount", "-l", self.directory, check=False)

    def mount(self, device: str, *options: str) -> None:
        """Mount a device where the load expects it."""
        directory = self.place / "mnt"
        directory.mkdir(exist_ok=True)
        run("mount", *options, device, directory)
        self.directory = directory
        self.path = str(self.directory / "file")

    def unmount(self) -> None:
        """The opposite; the load has ended."""
        if self.directory is not None:
            run("umount", self.directory)
            self.directory = None

    def ask_again(self) -> None:
        """Wish once more for what is wished already: a volume that waits between two tries, tries at once."""
        with suppress(StoragedError):
            self._attach()

    def goes_on(self, requests: int = 50, timeout: float = 60) -> float:
        """Wait until the load does; return the longest pause since the last look (seconds)."""
        pause = self.load.progresses(requests, timeout)
        self.case.pause = max(self.case.pause or 0.0, pause)
        return pause

    def saw_no_error(self) -> None:
        """End the load: nothing failed, nothing is lost, in what is read now and in the image after the detach."""
        said = self.load.stop()
        self.case.notes["requests"] = said["completed"]
        assert not said["stuck"], said
        assert said["errors"] == {}, said
        assert said["flush_errors"] == 0, said
        assert said["wrong"] == [], said
        wrong = self.load.wrong(self.path, "acked")
        assert wrong == [], wrong[:20]
        if self.directory is not None:
            assert int((self.directory / "mark").read_text()) >= said["marks"]
            self.unmount()
            run("fsck.ext4", "-fn", self.device)
        assert self.daemon.show(self.name)["device"] == self.device
        self.daemon.detach(self.name, timeout=60)
        if self.case.use == "raw" and isinstance(self.source, Path):
            wrong = self.load.wrong(self.source, "acked")
            assert wrong == [], wrong[:20]
        self.case.outcome = "no error"

    def saw_errors(self, then: str = "") -> dict[str, Any]:
        """End the load: it failed, with EIO or because the device is gone, and nothing of it is stuck."""
        said = self.load.stop()
        assert not said["stuck"], said
        assert said["errors"] or said["flush_errors"], said
        # A disk that is gone has no size: writes beyond its end end with ENOSPC.
        assert set(said["errors"]) <= {"EIO", "ENODEV", "ENXIO", "EROFS", "ENOSPC"}, said
        assert said["wrong"] == [], said
        self.unmount()
        self.case.outcome = f"I/O errors{f', {then}' if then else ''}"
        return said

    def keeps_what_was_flushed(self, disk: str) -> None:
        """Look at a device or image that nobody writes to: what was flushed through the old device is there."""
        if self.case.use == "raw":
            wrong = self.load.wrong(disk, "flushed")
            assert wrong == [], wrong[:20]
            return
        self.mount(disk, *([] if disk.startswith("/dev/") else ["-o", "loop"]))
        assert self.directory is not None
        wrong = self.load.wrong(self.path, "flushed")
        assert wrong == [], wrong[:20]
        assert int((self.directory / "mark").read_text()) >= self.load.last["marks"]
        self.unmount()
        run("fsck.ext4", "-fn", disk)


@contextmanager
def under_load(
    daemon: Daemon, place: Path, case: Case, source: Path | str | None = None, **wishes: Any
) -> Iterator[Site]:
    """Attach a volume, by default of a new raw image, and keep it busy."""
    format = wishes.get("format", "raw")
    site = Site(daemon, place, case, source or image(place / "a.img", format, "64M"), wishes)
    try:
        site.begin()
        yield site
    finally:
        site.end()


# The machine afterwards ----------------------------------------------------------------------------------------------

_BAD = re.compile(r"BUG:|Oops|general protection|blocked for more than|WARNING:|Call Trace|lockup|stall")


class Kernel:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        os.lseek(self._fd, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """The lines that tell of a fault of the kernel itself, or of a task that hangs."""
        lines = []
        while True:
            try:
                lines.append(os.read(self._fd, 8192).decode(errors="replace").partition(";")[2].splitlines()[0])
            except BlockingIOError:
                break
            except BrokenPipeError:
                continue  # older lines were overwritten
        return [line for line in lines if _BAD.search(line)]

    def close(self) -> None:
        """Listen no more."""
        os.close(self._fd)


def stuck_tasks() -> list[str]:
    """Processes and threads in D state."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/task/[0-9]*/stat"):
        with suppress(OSError):
            name, _, rest = stat.read_text().rpartition(") ")
            if rest.startswith("D"):
                found.append(name)
    return found


def nothing_is_stuck(timeout: float = 20) -> None:
    """Wait until no process is in D; one that does I/O is, for a moment."""
    deadline = time.monotonic() + timeout
    seen = set(stuck_tasks())
    while seen:
        assert time.monotonic() < deadline, f"in D: {seen}"
        time.sleep(0.2)
        seen &= set(stuck_tasks())
