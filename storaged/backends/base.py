"""What a backend is: one file per QEMU block driver that reaches data. Pure: nothing is opened here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

Node = dict[str, Any]
"""A member of QEMU's BlockdevOptions union (qapi/block-core.json in the QEMU tree)."""


class Backend(Protocol):
    """Turns a source as the user writes it into QEMU's options for the node that reaches it."""

    @property
    def name(self) -> str:
        """The QEMU driver, which is also the prefix ``name:`` of its sources."""

    @property
    def options(self) -> Mapping[str, str]:
        """The options (-o) that this backend knows, with a line of help each."""

    def parse(self, source: str) -> str:
        """Return the location without the backend's prefix. Raises INVALID_SOURCE, INVALID_ARGUMENT."""

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT where an option of this backend has a value that it cannot have."""

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """Return the blockdev options of the protocol node, without node-name."""
