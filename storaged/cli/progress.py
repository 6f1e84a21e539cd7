"""Progress of requests that take longer than a second. A faster one pays nothing for it."""

from __future__ import annotations

import contextlib
import select
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any, Protocol

from storaged.api.client import Client
from storaged.cli import render
from storaged.errors import StoragedError

#: A request that is answered within this many seconds shows nothing.
QUIET = 1.0
#: Seconds between two lines on how far something is, where there is no terminal.
_LINE_EVERY = 10.0


class Display(Protocol):
    """Shows one step at a time."""

    def show(self, text: str) -> None:
        """Show what is being done now."""


class Lines:
    """Plain lines on stderr, for logs and pipes."""

    def show(self, text: str) -> None:
        """Print the step."""
        render.note(f"storaged: {text}")


class _Silence:
    def show(self, text: str) -> None:
        pass


class Bar:
    """How far one long thing is: a bar on a terminal, elsewhere a line now and then. Nothing in the first second."""

    def __init__(self, what: str, *, lines: bool = True) -> None:
        self._what, self._percentage = what, -1.0
        self._lines = lines
        self._bar: Any = None
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._watcher: threading.Thread | None = None

    def at(self, percentage: float) -> None:
        """Show how far it is."""
        self._show(self._what, percentage)

    def at_doing(self, what: str, percentage: float) -> None:
        """Show what is being done, and how far the whole is."""
        self._show(what, percentage)

    def doing(self, what: str) -> None:
        """Show what is being done that does not tell how far it is."""
        self._show(what, -1.0)

    def end(self) -> None:
        """Show nothing any more."""
        self._ended.set()
        with self._lock:
            if self._bar is not None:
                self._bar.stop()
                self._bar = None

    def _watch(self) -> None:
        if self._ended.wait(QUIET):
            return
        with self._lock:
            if not self._ended.is_set() and sys.stderr is not None and sys.stderr.isatty():
                self._bar = _rich_bar()
            if self._bar is not None:
                self._bar.start()
                self._bar.add_task(render.clean(self._what), total=None)
        self._show(self._what, self._percentage)
        while self._lines and self._bar is None and not self._ended.wait(_LINE_EVERY):
            so_far = "" if self._percentage < 0 else f": {self._percentage:.0f}%"
            render.note(f"storaged: {render.clean(self._what)}{so_far}")

    def _show(self, what: str, percentage: float) -> None:
        with self._lock:
            self._what, self._percentage = what, percentage
            if self._watcher is None:
                # What hangs says nothing by itself. Not before: a password may have been asked for.
                self._watcher = threading.Thread(target=self._watch, daemon=True)
                self._watcher.start()
            if self._bar is not None:
                self._bar.update(
                    self._bar.task_ids[0], description=render.clean(what),
                    total=None if percentage < 0 else 100.0, completed=max(0.0, percentage),
                )


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}", markup=False), BarColumn(), TaskProgressColumn(), TimeRemainingColumn(),
        console=Console(stderr=True, highlight=False), transient=True,
    )



def wait_for_reply(
    client: Client, watcher: Client, volume: str, *, timeout: float | None = None, lines: bool = True
) -> dict[str, Any]:
    """Take the answer of the request that ``client`` has sent, and show the volume's steps meanwhile.

    ``watcher`` is not connected before it is needed. Without ``lines`` progress is shown on a terminal only.
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    if not client.wait(QUIET if timeout is None else min(QUIET, timeout)):
        with _display(lines) as display, watcher:
            display.show(f"volume {render.clean(volume)}: waiting for the daemon")
            _follow(client, watcher, volume, deadline, display)
    return client.receive(None if deadline is None else max(0.0, deadline - time.monotonic()))[0]


def _follow(
    client: Client, watcher: Client, volume: str, deadline: float | None, display: Display
) -> None:
    """Show the events of ``volume`` until the answer is there or the deadline has passed."""
    poller = select.poll()
    poller.register(client.fileno(), select.POLLIN)
    watching = -1
    # Progress is a courtesy: where it cannot be had, the answer is waited for all the same.
    with contextlib.suppress(StoragedError):
        watcher.send("Watch", {"name": volume}, more=True)
        watching = watcher.fileno()
        poller.register(watching, select.POLLIN)
    while not client.wait(0):
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return
        ready = [fd for fd, _ in poller.poll(None if left is None else left * 1000)]
        if watching in ready:
            try:
                while watcher.wait(0):
                    event, _ = watcher.receive()
                    if text := _step(event.get("event") or {}):
                        display.show(text)
            except StoragedError:
                poller.unregister(watching)
                watching = -1


def _step(event: dict[str, Any]) -> str:
    if event.get("kind") == "note":
        return ""  # the answer has them all
    text = event.get("message") or event.get("state")
    return render.clean(f"volume {event.get('volume')}: {text}") if text and event.get("volume") else ""


@contextlib.contextmanager
def _display(lines: bool) -> Iterator[Display]:
    if sys.stderr is None or not sys.stderr.isatty():
        yield Lines() if lines else _Silence()
        return
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        yield Lines()
        return
    with Console(stderr=True, highlight=False).status(Text("")) as status:

        class Spinner:
            def show(self, text: str) -> None:
                status.update(Text(text))

        yield Spinner()
