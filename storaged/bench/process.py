"""Runs fio: found, old enough, started so that it never outlives the benchmark, ended when its time is over."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import select
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from storaged.bench import engines
from storaged.bench.fio import OLDEST, engines_of, version_of
from storaged.errors import ErrorCode, StoragedError

#: Seconds that fio may take beyond the time of its job: to connect, to end what is in flight, to add up.
PATIENCE = 60.0
#: Seconds for what only asks fio about itself, and for the end of one that was killed: longer, the kernel holds it.
_QUICK = 20.0
#: The same on all architectures of Linux.
_IO_URING_SETUP = 425
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "HOME", "LD_LIBRARY_PATH")
_LONGEST_WORDS = 300


@dataclass(frozen=True)
class Fio:
    """A fio that can be used."""

    path: str
    version: str
    engines: frozenset[str]


def find_fio() -> Fio:
    """Find fio in the PATH, and what it can do. Raises UNSUPPORTED where it is missing, too old or broken. Blocks."""
    path = shutil.which("fio")
    if path is None:
        raise StoragedError(ErrorCode.UNSUPPORTED, "the program fio is not there", hint="apt install fio")
    text = _ask(path, "--version").strip()
    version = version_of(text)
    wanted = ".".join(map(str, OLDEST))
    if version is None or version < OLDEST:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"{path} is too old",
            cause=f"it is {text[:40]!a}, and fio-{wanted} is what is needed",
            hint="install a newer one, and put it first in the PATH",
        )
    found = engines_of(_ask(path, "--enghelp"))
    if not _kernel_has_io_uring():
        found -= {"io_uring"}
    if _knows(path, engines.VITASTOR):
        found |= {engines.VITASTOR}
    return Fio(path, text, found)


def _ask(path: str, *words: str) -> str:
    try:
        return subprocess.run(
            [path, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=_QUICK,
            check=False, cwd="/",
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"cannot execute {path}", cause=str(error), hint="install fio again"
        ) from error


def _kernel_has_io_uring() -> bool:
    """Whether io_uring_setup(2) gets as far as to look at its arguments: containers and a sysctl forbid it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall(_IO_URING_SETUP, 1, None)
    return ctypes.get_errno() == errno.EFAULT


def _knows(path: str, engine: str) -> bool:
    """Whether fio can load an engine that is a library of its own."""
    done = subprocess.run(
        [path, f"--enghelp={engine}"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        timeout=_QUICK, check=False, cwd="/",
    )
    return done.returncode == 0


def check_words(fio: Fio, words: Sequence[str]) -> str:
    """Return what fio itself finds wrong with a command line, nothing if it would run. Nothing is opened."""
    said = subprocess.run(
        [fio.path, *words, "--parse-only"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        timeout=_QUICK, check=False, cwd="/",
    )
    return _last_words(said.stdout.decode(errors="replace")) if said.returncode else ""


def run(
    fio: Fio, words: Sequence[str], *, timeout: float, cwd: str, environment: Mapping[str, str],
    inherited: Sequence[int], server: int | None = None,
) -> str:
    """Run fio to its end and return what it printed. Blocks.

    It has a session of its own, so that Ctrl-C reaches this process alone, and dies with it (setpriv(1)); what ends the
    wait for it ends it first. ``server`` is a pidfd of who serves it, where fio would wait for the dead for ever.
    Raises UNSUPPORTED where it failed, with its words, DEVICE_FAILED where the server died, TIMEOUT, HOST_STUCK.
    """
    setpriv = shutil.which("setpriv")
    guard = [setpriv, "--pdeathsig", "KILL", "--"] if setpriv else []
    child = subprocess.Popen(
        [*guard, fio.path, *words], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=cwd,
        env={**{key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}, **environment},
        pass_fds=inherited, start_new_session=True,
    )
    try:
        with _ended_with(server, child) as server_died:
            printed, said = child.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        _end(child)
        raise StoragedError(
            ErrorCode.TIMEOUT, "fio does not end", cause=f"it was given {timeout:.0f} s",
            hint="the storage hangs, or fio's engine does",
        ) from None
    except BaseException:
        _end(child)
        raise
    if server_died.is_set():
        raise StoragedError(
            ErrorCode.DEVICE_FAILED, "what serves the disk died meanwhile", cause="qemu-storage-daemon ended",
            hint="look into the journal",
        )
    if child.returncode:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "fio failed", cause=_last_words((said + printed[:4096]).decode(errors="replace"))
            or f"it ended with status {child.returncode}",
            hint="the words are fio's",
        )
    return printed.decode(errors="replace")


@contextlib.contextmanager
def _ended_with(server: int | None, child: subprocess.Popen[bytes]) -> Iterator[threading.Event]:
    """End a child when its server has died; the event tells that it has."""
    died = threading.Event()
    if server is None:
        yield died
        return
    over = os.eventfd(0, os.EFD_CLOEXEC)

    def watch() -> None:
        # Both are read by nobody else: a pidfd can be, and stays so, once its process has ended (pidfd_open(2)).
        if over not in select.select([server, over], [], [])[0]:
            died.set()
            child.kill()

    watcher = threading.Thread(target=watch, name="server of fio", daemon=True)
    watcher.start()
    try:
        yield died
    finally:
        os.eventfd_write(over, 1)
        watcher.join()
        os.close(over)


def _end(child: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    try:
        child.wait(_QUICK)
    except subprocess.TimeoutExpired:
        raise StoragedError(
            ErrorCode.HOST_STUCK, f"fio (pid {child.pid}) cannot be ended", cause="the kernel holds it, in I/O",
            hint="it goes when the storage below answers, or when the I/O of its device is ended: storaged rescue",
        ) from None
    finally:
        for stream in (child.stdout, child.stderr):
            if stream is not None:
                stream.close()


def _last_words(text: str) -> str:
    # What comes before is how an option is written.
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith((" ", "\t", "{"))]
    return "; ".join(lines[-3:])[-_LONGEST_WORDS:]
