"""What the cache modes mean to a block node: "cache" in qemu-system(1)."""

from __future__ import annotations

from collections.abc import Mapping

#: cache mode -> (direct, no-flush). writethrough is the export's business.
CACHE_FLAGS: dict[str, tuple[bool, bool]] = {
    "none": (True, False),
    "writeback": (False, False),
    "writethrough": (False, False),
    "directsync": (True, False),
    "unsafe": (False, True),
}


def cache_flags(options: Mapping[str, str]) -> dict[str, bool]:
    """Return BlockdevCacheOptions for a volume's options."""
    direct, no_flush = CACHE_FLAGS[options.get("cache", "writeback")]
    return {"direct": direct, "no-flush": no_flush}
