"""What a store is: it keeps one Desired per volume name, and a put or delete is all or nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from storaged.model.spec import Desired


@dataclass(frozen=True)
class Damaged:
    """An entry that could not be read: it was set aside, the others are not affected."""

    name: str
    cause: str
    set_aside: str


@dataclass(frozen=True)
class Loaded:
    """All that a store holds."""

    volumes: dict[str, Desired] = field(default_factory=dict)
    damaged: tuple[Damaged, ...] = ()


class Store(Protocol):
    """Blocking calls: the supervisor runs them in a thread with a deadline."""

    def load(self) -> Loaded:
        """Return everything; sets aside what is damaged."""

    def put(self, desired: Desired) -> None:
        """Store an entry under its spec's name, durable when this returns. Raises NO_SPACE, INTERNAL."""

    def delete(self, name: str) -> None:
        """Remove an entry, durable when this returns; it is no error when there is none."""
