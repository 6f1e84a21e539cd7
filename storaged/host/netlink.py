"""Generic netlink requests (Documentation/userspace-api/netlink in the kernel), made by a worker (host/worker.py).

The kernel runs a request's handler within sendmsg(2), under a lock that most families share, and returns when it is
done: one device that hangs holds up all of them, and whoever asks then cannot even be killed. So this process never
asks itself.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host.worker import WORKERS, Worker, result_of

#: Names and values; a value is a number, a text, attributes made by :func:`nested`, or a :func:`descriptor`.
Attributes = Sequence[tuple[str, Any]]
#: Families that this process can speak to. When one goes with its module, :func:`request` says so.
_seen: set[str] = set()


@dataclass(frozen=True)
class Answer:
    """A message of the kernel."""

    command: int
    attributes: tuple[tuple[str, Any], ...]

    def find(self, *names: str) -> list[Any]:
        """Return the values of an attribute; with more names, of one that is nested in others."""
        return list(_find(self.attributes, names))


def _find(attributes: Any, names: Sequence[str]) -> Iterator[Any]:
    for name, value in attributes:
        if name == names[0]:
            if len(names) == 1:
                yield value
            else:
                yield from _find(value["attrs"], names[1:])


def nested(attributes: Attributes) -> dict[str, Any]:
    """The value of an attribute with attributes in it."""
    return {"attrs": [list(attribute) for attribute in attributes]}


def descriptor(index: int) -> dict[str, int]:
    """The value of an attribute that is a descriptor: that of this index among those given to :func:`request`."""
    return {"descriptor": index}


def start() -> None:
    """Have the worker started, which takes a while, without waiting for it."""
    WORKERS.start()


def has_family(family: str) -> bool:
    """Whether the kernel has a generic netlink family of that name. One that was seen is not looked for again.

    Blocks. Raises OSError, HOST_STUCK.
    """
    if family in _seen:
        return True
    try:
        WORKERS.call({"family": family})
    except StoragedError as error:
        if error.code is ErrorCode.TRANSPORT_UNAVAILABLE:
            return False
        raise
    _seen.add(family)
    return True


def request(family: str, command: int, attributes: Attributes, descriptors: Sequence[int] = ()) -> list[Answer]:
    """Send one command and return the answers. Blocks for as long as the kernel takes; this process can end meanwhile.

    If it ends, a request that still waits for its turn is not called off, but its descriptors are of no use any more.
    Raises OSError with the kernel's errno, TRANSPORT_UNAVAILABLE where the kernel has no such family, HOST_STUCK where
    too many earlier requests hang.
    """
    answers = WORKERS.call({"netlink": [family, command, [list(pair) for pair in attributes]]}, descriptors)
    return [_answer(packet) for packet in answers]


def _answer(packet: Any) -> Answer:
    return Answer(packet[0], tuple((name, value) for name, value in packet[1]))


class Listener:
    """A member of a multicast group, by a worker of its own."""

    def __init__(self, family: str, group: str) -> None:
        """Blocks until it is one. Raises OSError, TRANSPORT_UNAVAILABLE."""
        self._closed = False
        self._worker = Worker()
        try:
            self._worker.send({"listen": [family, group]})
            result_of(self._worker.receive())
        except BaseException:
            self._worker.close()
            raise

    def __iter__(self) -> Iterator[Answer]:
        """Yield what the kernel tells, until :meth:`close`. Raises OSError when the worker dies."""
        while True:
            try:
                answer = self._worker.receive()
            except OSError:
                if not self._closed:
                    raise
                answer = None
            if self._closed:
                return
            if answer is None or "event" not in answer:
                result_of(answer)
            else:
                yield _answer(answer["event"])

    def close(self) -> None:
        """End it, also while another thread waits for the next message."""
        self._closed = True
        self._worker.close()


_listeners: dict[tuple[str, str], Listener] = {}
_listeners_lock = threading.Lock()


def listen(family: str, group: str) -> Listener:
    """Become a member of a family's multicast group. An earlier membership ends: its module may have been unloaded.

    Blocks. Raises OSError, TRANSPORT_UNAVAILABLE where the kernel has no such family.
    """
    listener = Listener(family, group)
    with _listeners_lock:
        former = _listeners.pop((family, group), None)
        _listeners[family, group] = listener
    if former is not None:
        former.close()
    return listener
