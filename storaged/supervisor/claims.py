"""Which volume of this daemon has which source, also while its QSD is being replaced and holds no lock."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from storaged.errors import ErrorCode, StoragedError


class Claims:
    """The source identities of the attached volumes; the value says whether it is written to. Thread-safe.

    The lock that QSD holds (storaged.host.locks) is what protects the data. This one only keeps a second volume
    from taking a source in the moment between the death of a QSD and the start of its successor.
    """

    def __init__(self) -> None:
        self._held: dict[str, Mapping[str, bool]] = {}
        self._lock = threading.Lock()

    def hold(self, volume: str, identities: Mapping[str, bool]) -> None:
        """Claim the sources of a volume, in place of what it had. Raises SOURCE_IN_USE, changing nothing."""
        with self._lock:
            for other, held in self._held.items():
                if other == volume:
                    continue
                for identity, exclusive in identities.items():
                    if identity in held and (exclusive or held[identity]):
                        raise StoragedError(
                            ErrorCode.SOURCE_IN_USE, "the source is in use", cause=f"volume {other} has it",
                            hint="detach the other volume first, or attach both with --read-only or --snapshot",
                            users=[f"volume {other}"],
                        )
            self._held[volume] = dict(identities)

    def drop(self, volume: str) -> None:
        """The volume is gone."""
        with self._lock:
            self._held.pop(volume, None)
