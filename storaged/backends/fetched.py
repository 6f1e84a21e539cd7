"""Sources that are fetched whole and served from the copy: what their backends have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from storaged.backends.base import NetworkBackend, Node
from storaged.backends.cache import cache_flags
from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import parse_size

#: The name that the node has for the copy. Whoever opens it fetches the file first, and puts the path in its place.
COPY = "copy"
SIZE_HELP = "how large the file is; needed where the server does not tell, and else compared with what it tells"


@runtime_checkable
class FetchedBackend(NetworkBackend, Protocol):
    """A backend that may have its source fetched by curl(1)."""

    def is_fetched(self, options: Mapping[str, str]) -> bool:
        """Whether it is with these options."""

    def fetch_options(self, location: str, options: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
        """Return the long options of curl(1), beyond those that every fetch has. ``secrets`` are by option.

        Raises INVALID_ARGUMENT for a secret that cannot be handed on.
        """


def copy_node(*, read_only: bool, options: Mapping[str, str]) -> Node:
    """BlockdevOptionsFile of the copy, which nobody ever writes to."""
    return {
        "driver": "file", "filename": COPY, "read-only": read_only, "discard": "unmap", "cache": cache_flags(options),
    }


def size_of(options: Mapping[str, str]) -> int | None:
    """How large the file is by what the user said, in bytes. Raises INVALID_ARGUMENT."""
    if "size" not in options:
        return None
    try:
        return parse_size(options["size"])
    except StoragedError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"option size={options['size']!r} is no size",
            hint="write bytes, or a number with K, M, G, T or P",
        ) from error
