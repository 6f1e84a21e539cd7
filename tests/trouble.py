"""What tests of hangs have in common."""

from __future__ import annotations

import mmap
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.harness import Daemon, eventually

PATTERN = b"a bridge" * 8192
BLOCK = 4096


def direct_write(fd: int, offset: int, data: bytes) -> None:
    """Write a block past the page cache: acknowledged by QSD, and not flushed."""
    with mmap.mmap(-1, BLOCK) as buffer:
        buffer[:] = data
        assert os.pwritev(fd, [buffer], offset) == BLOCK


@contextmanager
def reader(device: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that waits in the kernel for the device."""
    with subprocess.Popen(
        ["dd", f"if={device}", "of=/dev/null", "bs=4k", "iflag=direct", "count=64"], stderr=subprocess.DEVNULL
    ) as process:
        eventually(lambda: " D " in Path(f"/proc/{process.pid}/stat").read_text(), "the reader waits")
        yield process


def kinds(daemon: Daemon, name: str = "a") -> list[str]:
    """What the volume's journal tells, in order."""
    return [entry["kind"] for entry in daemon.show(name)["history"]]


def trouble(daemon: Daemon, name: str = "a") -> str | None:
    condition: dict[str, Any] | None = daemon.show(name)["condition"]
    return None if condition is None else str(condition["trouble"])
