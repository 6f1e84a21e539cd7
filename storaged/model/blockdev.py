"""Builds the tree of block nodes that QSD opens for a volume. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from storaged.model.formats import COPY_ON_WRITE, Format

Node = dict[str, Any]
#: The node that is exported, whatever lies below it.
DISK = "disk"
#: The source in its full size, where the disk has the size that it had before it grew.
FULL = "full"
#: The source once more, opened for a look at its size.
LOOK = "look"
#: The source below the overlay of a snapshot, and the overlay's file.
BASE = "base"
OVERLAY_FILE = "overlay-file"
#: The bytes behind a server, where an image format stands on them.
SOURCE = "source"
EXPORT = "export"
#: The id of the secret that opens an encrypted image.
PASSPHRASE = "passphrase"


@dataclass(frozen=True)
class Image:
    """One image of a chain: how its data is reached, and what its header says must be opened with it."""

    format: Format
    protocol: Node | str
    """A node's options, or the name of a node that is there."""
    data_file: Node | None = None
    """A node's options."""
    encrypted: bool = False
    """Within the format: qcow2's luks. (A luks image is a format of its own.)"""


def image_tree(
    chain: Sequence[Image], *, read_only: bool, node_name: str, cache: Mapping[str, bool], depth: int = 0,
    behaviour: Mapping[str, str] | None = None,
) -> Node:
    """Return one blockdev-add argument for an image and its backing chain; ``behaviour`` is of its top alone.

    Every child is named explicitly, down to ``"backing": null`` at the end, so that QEMU follows nothing that
    an image's header says. Only the first image is ever opened for writing.
    """
    image, rest = chain[0], chain[1:]
    node: Node = {
        "driver": image.format.value,
        # QEMU allows 31 characters.
        "node-name": f"{node_name}-{depth}" if depth else node_name,
        "read-only": read_only,
        "discard": "unmap",
        "cache": dict(cache),
        "file": image.protocol,
    }
    node |= behaviour or {}
    if image.format is Format.LUKS:
        node["key-secret"] = PASSPHRASE
    if image.encrypted:
        node["encrypt"] = {"format": "luks", "key-secret": PASSPHRASE}
    if image.data_file is not None:
        node["data-file"] = image.data_file
    if image.format in COPY_ON_WRITE:
        node["backing"] = (
            image_tree(rest, read_only=True, node_name=node_name, cache=cache, depth=depth + 1) if rest else None
        )
    return node


def image_nodes(
    chain: Sequence[Image], *, read_only: bool, node_name: str, cache: Mapping[str, bool],
    behaviour: Mapping[str, str] | None = None,
) -> list[Node]:
    """As :func:`image_tree`, as arguments of a blockdev-add each, the last image first.

    For a chain that is not all of this host: within one tree QEMU takes the name that the header of the upper image
    holds for that of the lower one's file, unless that has a filename (bdrv_open_backing_file in block.c).
    """
    nodes = []
    for depth, image in enumerate(chain):
        node = image_tree(
            [image], read_only=read_only or depth > 0, node_name=node_name, cache=cache, depth=depth,
            behaviour=None if depth else behaviour,
        )
        if depth + 1 < len(chain):
            node["backing"] = f"{node_name}-{depth + 1}"
        nodes.append(node)
    return nodes[::-1]


def overlay_file_node(protocol: Node, limit: int) -> Node:
    """The overlay's file as a disk of a fixed size (bytes): beyond it, writes fail with ENOSPC."""
    return {
        "driver": "raw", "node-name": OVERLAY_FILE, "size": limit, "discard": "unmap", "file": protocol,
    }


def overlay_tree(cache: Mapping[str, bool], behaviour: Mapping[str, str]) -> Node:
    """The disk of a snapshot: a qcow2 overlay whose header names no backing file; it is given here."""
    return {
        "driver": "qcow2",
        "node-name": DISK,
        "discard": "unmap",
        "cache": dict(cache),
        "file": OVERLAY_FILE,
        "backing": BASE,
        **behaviour,
    }


def clipped_node(size: int, *, read_only: bool, cache: Mapping[str, bool]) -> Node:
    """The first ``size`` bytes of the source (FULL) as the disk: BlockdevOptionsRaw in QEMU's qapi/block-core.json."""
    return {**unclipped_node(read_only=read_only, cache=cache), "size": size}


def unclipped_node(*, read_only: bool, cache: Mapping[str, bool]) -> Node:
    """The same disk with all that the source has: an argument of blockdev-reopen, which sets what is not said back."""
    return {
        "driver": "raw", "node-name": DISK, "read-only": read_only, "discard": "unmap", "cache": dict(cache),
        "file": FULL,
    }


def failing_node(size: int) -> Node:
    """A disk of ``size`` bytes of which every request fails with EIO at once: the rescue server's."""
    return {
        "driver": "blkdebug", "node-name": DISK, "discard": "unmap",
        "image": {"driver": "null-co", "size": size, "discard": "unmap"},
        "inject-error": [
            {"event": "none", "iotype": kind, "errno": 5, "once": False}
            for kind in ("read", "write", "flush", "discard", "write-zeroes")
        ],
    }


def node_names_needed(snapshot: bool) -> frozenset[str]:
    """The nodes that must exist before the disk counts as open."""
    return frozenset({DISK, BASE, OVERLAY_FILE}) if snapshot else frozenset({DISK})


