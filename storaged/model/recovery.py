"""How long to wait before a volume whose QSD died is set up again. Pure."""

from __future__ import annotations

#: A QSD that lived this long (seconds) is no longer counted as dying again and again.
STABLE_AFTER = 60.0
_LONGEST = 60.0


def backoff(deaths: int) -> float:
    """Return seconds to wait after the n-th death in a row: the first is repaired at once."""
    return 0.0 if deaths <= 1 else min(_LONGEST, 2.0 ** min(deaths - 2, 10))
