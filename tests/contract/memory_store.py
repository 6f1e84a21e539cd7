"""A store that forgets: the least that keeps the promises of storaged.store.base."""

from __future__ import annotations

from storaged.model.names import check_name
from storaged.model.spec import Desired
from storaged.store.base import Loaded


class MemoryStore:
    """Desired state in a dictionary."""

    def __init__(self) -> None:
        self._volumes: dict[str, Desired] = {}

    def load(self) -> Loaded:
        """Return everything; nothing is ever damaged."""
        return Loaded(dict(self._volumes))

    def put(self, desired: Desired) -> None:
        """Store an entry under its spec's name."""
        self._volumes[check_name(desired.spec.name)] = desired

    def delete(self, name: str) -> None:
        """Remove an entry."""
        self._volumes.pop(check_name(name), None)
