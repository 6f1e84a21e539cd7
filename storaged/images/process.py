"""Runs qemu-img: with its progress, to its end or ours, and with its words turned into failures."""

from __future__ import annotations

import os
import re
import selectors
import signal
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError
from storaged.images.arguments import progress_of
from storaged.images.child import start
from storaged.images.provide import Provided
from storaged.qsd.refusals import explain

#: Seconds that qemu-img may take to end when it is told to. Then the kernel holds it, in I/O.
_LAST_WORDS = 5.0
#: Bytes of what it says on stderr, of which the last tell what went wrong.
_LONGEST_TALK = 64 * 1024

#: How lines begin in which a qemu-img refuses before it writes anything (img_convert in qemu-img.c, all that comes
#: before convert_do_copy). Of those that are not here it is not known.
_REFUSALS = (
    "Could not open ", "Compression not supported for this file format", "Failed to load snapshot: ",
    "output file is smaller than input file",
)

Progress = Callable[[float], None]


@dataclass(frozen=True)
class Outcome:
    """How a qemu-img ended that did not fail."""

    status: int
    text: str
    """What it printed, without its progress."""
    talk: str
    """What it said on stderr."""


def run(
    command: str, words: Sequence[str], given: Provided, *, progress: Progress | None = None,
    accept: Sequence[int] = (0,), spoilt: Callable[[], None] = lambda: None,
) -> Outcome:
    """Run ``qemu-img COMMAND WORDS…`` and return how it ended, if with a status of ``accept``. Blocks.

    ``progress`` is told the percentage, of a command that has ``-p``. Whatever ends the wait for it, as Ctrl-C does,
    ends it, too. ``spoilt`` is called where it failed or was ended, and may have written something by then. Raises what
    its words amount to, IMAGE_FAILED; HOST_STUCK where it cannot be ended.
    """
    line = [given.program, command, *(["-p"] if progress is not None else []), *given.objects, *words]
    child = start(line, given, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        text, talk = _listen(child, progress)
        status = child.wait()
    except BaseException:
        spoilt()
        _end(child)
        raise
    text, talk = given.readable(text, as_json="--output=json" in words), given.readable(talk)
    if status not in accept:
        if not _refused(talk):
            spoilt()
        raise failure(command, talk, status)
    return Outcome(status, text, talk)


def _refused(talk: str) -> bool:
    """Whether a qemu-img that failed has written nothing, to judge by its words."""
    said = [line.removeprefix("qemu-img: ") for line in talk.splitlines() if line.startswith("qemu-img: ")]
    return any(line.startswith(_REFUSALS) for line in said)


def _listen(child: subprocess.Popen[bytes], progress: Progress | None) -> tuple[str, str]:
    assert child.stdout is not None
    assert child.stderr is not None
    printed, said = bytearray(), bytearray()
    with selectors.DefaultSelector() as selector:
        for stream, buffer in ((child.stdout, printed), (child.stderr, said)):
            selector.register(stream, selectors.EVENT_READ, buffer)
        while selector.get_map():
            for key, _ in selector.select():
                data = os.read(key.fd, 65536)
                if not data:
                    selector.unregister(key.fileobj)
                    continue
                key.data.extend(data)
                if key.data is said:
                    del said[:-_LONGEST_TALK]
                elif progress is not None:
                    _tell(printed, progress)
    child.stdout.close()
    child.stderr.close()
    text = printed.decode(errors="replace")
    return text.rpartition("\r")[2].lstrip("\n") if progress is not None else text, said.decode(errors="replace")


def _tell(printed: bytearray, progress: Progress) -> None:
    """Tell the last percentage that was printed, and forget it and all before it."""
    done, end, _ = bytes(printed).rpartition(b"\r")
    if end:
        percentage = progress_of(done.decode(errors="replace"))
        if percentage is not None:
            del printed[:len(done) + 1]
            progress(percentage)


def _end(child: subprocess.Popen[bytes]) -> None:
    """End it, and wait until it is gone. Raises HOST_STUCK where the kernel does not let it go."""
    # A second Ctrl-C must not leave the rest undone.
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        for number in (signal.SIGTERM, signal.SIGKILL):
            child.send_signal(number)
            try:
                child.wait(_LAST_WORDS)
            except subprocess.TimeoutExpired:
                continue
            return
    finally:
        signal.signal(signal.SIGINT, before)
    raise StoragedError(
        ErrorCode.HOST_STUCK, f"qemu-img (pid {child.pid}) cannot be ended", cause="the kernel holds it, in I/O",
        hint="it goes, and with it the lock of its images, when the storage below answers",
    )


def failure(command: str, talk: str, status: int) -> StoragedError:
    """Return the failure that the last words of a qemu-img amount to."""
    lines = [line for line in talk.splitlines() if line.strip() and ": warning: " not in line]
    text = "; ".join(line.strip().removeprefix("qemu-img: ") for line in lines[-3:])
    cause = without_trees(text)
    if cause:
        known = explain("blockdev-add" if text != cause else f"qemu-img {command}", cause)
        if known.code is not ErrorCode.QSD_REFUSED:
            return known
    ended = f"it ended with status {status}" if status >= 0 else f"it was ended by signal {-status}"
    return StoragedError(
        ErrorCode.IMAGE_FAILED, f"qemu-img {command} failed", cause=cause or ended,
        hint="the words are qemu-img's; storaged image info and check may tell more",
    )


def without_trees(text: str) -> str:
    """Leave out of qemu-img's words the trees of nodes that were its file names."""
    text = re.sub(r"Could not open 'json:\{.*\}': ", "", text, flags=re.DOTALL)
    text = re.sub(r"Could not open '[^']*': ", "", text)
    return re.sub(r"'?json:\{.*\}'?", "the image", text, flags=re.DOTALL)
