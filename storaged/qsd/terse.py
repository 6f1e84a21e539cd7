"""Leaves out of a blockdev-add what QSD takes as the default anyway. Pure.

QEMU's monitor reads its commands a byte at a time (monitor_can_read in monitor/monitor.c), 2 µs for each. A pause of
the disk waits for it.
"""

from __future__ import annotations

from typing import Any

Node = dict[str, Any]
#: Defaults of BlockdevOptions that a child inherits from its parent (bdrv_inherited_options in block.c).
_INHERITED: Node = {"read-only": False, "cache": {"direct": False, "no-flush": False}}
#: Of BlockdevOptionsFile.
_DEFAULTS_OF_FILE: Node = {"aio": "threads"}
_FILE_DRIVERS = ("file", "host_device")


def terse(node: Node) -> Node:
    """Return a node that means the same to QSD, in fewer words."""
    return _terse(node, _INHERITED)


def _terse(node: Node, inherited: Node) -> Node:
    """``inherited`` are the defaults that hold here; what a parent says otherwise holds for all below it."""
    defaults = {key: value for key, value in inherited.items() if node.get(key, value) == value}
    left_out = {**defaults, **(_DEFAULTS_OF_FILE if node.get("driver") in _FILE_DRIVERS else {})}
    # A backing file is read-only by default, whatever its parent is.
    below_backing = {key: value for key, value in defaults.items() if key != "read-only"}
    return {
        key: _terse(value, below_backing if key == "backing" else defaults)
        if isinstance(value, dict) and "driver" in value else value
        for key, value in node.items() if key not in left_out or value != left_out[key]
    }
