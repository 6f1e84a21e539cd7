"""What a backend is: one file per QEMU block driver that reaches data. Pure: nothing is opened here.

A backend has a *location* for each source: a text that says where the data is, the same for all spellings of it. For
a thing of this host it is the path; for one on the network it is a source itself, in its plainest spelling.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

Node = dict[str, Any]
"""A member of QEMU's BlockdevOptions union (qapi/block-core.json in the QEMU tree)."""


class Backend(Protocol):
    """Turns a source as the user writes it into QEMU's options for the node that reaches it."""

    @property
    def name(self) -> str:
        """The QEMU driver."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """What stands before the first colon of its sources. Those of two backends are disjoint."""

    @property
    def options(self) -> Mapping[str, str]:
        """The options (-o) that this backend knows, with a line of help each."""

    @property
    def example(self) -> str:
        """How a source is written, for hints."""

    def parse(self, source: str) -> str:
        """Return the location. Raises INVALID_SOURCE, INVALID_ARGUMENT, UNSUPPORTED."""

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT where an option of this backend has a value that it cannot have."""

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """Return the blockdev options of the protocol node, without node-name."""


@runtime_checkable
class NetworkBackend(Backend, Protocol):
    """A backend whose data is behind a server: there is no file to look at, and the server may be away for a while.

    ``parse`` of a location returns the same location.
    """

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Return what the source is locked by: the same text for every spelling that can be told to be one disk.

        It must not change when the server is restarted. ``real_path`` resolves the symbolic links of a path of this
        host (a unix socket's); it may block.
        """
