"""Signals that a command handles while it has something to clean up: signal(7)."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def handled(handler: Callable[[int, FrameType | None], None], *numbers: signal.Signals) -> Iterator[None]:
    """Have these signals handled meanwhile; one that is ignored stays so (nohup(1)). Afterwards it is as before."""
    before = {
        number: signal.signal(number, handler) for number in numbers
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
