"""A node in fewer words means the same: what is left out is what QEMU takes where nothing is said."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.backends import BACKENDS
from storaged.backends.cache import CACHE_FLAGS, cache_flags
from storaged.model.blockdev import DISK, Image, image_tree
from storaged.model.formats import COPY_ON_WRITE, Format
from storaged.qsd.terse import terse

Node = dict[str, Any]
#: Below which a node is read-only unless it says otherwise.
BACKING = "backing"


def meaning(node: Node, *, read_only: bool = False, direct: bool = False, no_flush: bool = False) -> Node:
    """All that is said of a node and its children, with what QEMU takes for the rest (block.c, qapi/block-core.json).

    ``read_only``, ``direct``, ``no_flush``: what it inherits.
    """
    cache = node.get("cache", {})
    full: Node = {
        **node, "read-only": node.get("read-only", read_only),
        "cache": {"direct": cache.get("direct", direct), "no-flush": cache.get("no-flush", no_flush)},
    }
    if node["driver"] in ("file", "host_device"):
        full["aio"] = node.get("aio", "threads")
    for key, child in node.items():
        if isinstance(child, dict) and "driver" in child:
            full[key] = meaning(
                child, read_only=True if key == BACKING else full["read-only"],
                direct=full["cache"]["direct"], no_flush=full["cache"]["no-flush"],
            )
    return full


@st.composite
def nodes(draw: st.DrawFn) -> Node:
    """What storaged opens: a chain of images, each of one file or two."""
    options = {
        "cache": draw(st.sampled_from(sorted(CACHE_FLAGS))), "aio": draw(st.sampled_from(["threads", "io_uring"])),
    }
    read_only = draw(st.booleans())
    formats = draw(st.lists(st.sampled_from(sorted(COPY_ON_WRITE)), max_size=3))
    formats.append(draw(st.sampled_from(list(Format))))

    def protocol(number: int) -> Node:
        backend = BACKENDS[draw(st.sampled_from(["file", "host_device"]))]
        return backend.node(f"/{number}", read_only=read_only or number > 0, options=options)

    images = [
        Image(format, protocol(number), protocol(number) if draw(st.booleans()) else None)
        for number, format in enumerate(formats)
    ]
    return image_tree(images, read_only=read_only, node_name=DISK, cache=cache_flags(options))


@given(nodes())
def test_it_means_the_same(node: Node) -> None:
    assert meaning(terse(node)) == meaning(node)


#: Nodes with anything said, or not said, at each place.
ANY_NODE: st.SearchStrategy[Node] = st.recursive(
    st.builds(
        dict, st.fixed_dictionaries({"driver": st.sampled_from(["file", "qcow2", "nbd"])}, optional={
            "read-only": st.booleans(), "aio": st.sampled_from(["threads", "native"]), "discard": st.just("unmap"),
            "cache": st.fixed_dictionaries({}, optional={"direct": st.booleans(), "no-flush": st.booleans()}),
            "server": st.just({"type": "inet", "read-only": False}),
        }),
    ),
    lambda children: st.builds(
        lambda node, below: {**node, **below}, children,
        st.dictionaries(st.sampled_from(["file", BACKING, "data-file"]), children, min_size=1),
    ), max_leaves=6,
)


@given(ANY_NODE)
def test_so_it_does_for_nodes_that_storaged_never_makes(node: Node) -> None:
    assert meaning(terse(node)) == meaning(node)


def test_what_most_volumes_are() -> None:
    protocol = BACKENDS["file"].node("/a.raw", read_only=False, options={})
    node = image_tree([Image(Format.RAW, protocol)], read_only=False, node_name=DISK, cache=cache_flags({}))
    assert terse(node) == {
        "driver": "raw", "node-name": "disk", "discard": "unmap",
        "file": {"driver": "file", "filename": "/a.raw", "discard": "unmap"},
    }


@pytest.mark.parametrize("node", [
    # A backing file is read-only unless it is told not to be.
    {"driver": "qcow2", "backing": {"driver": "raw", "read-only": False}},
    # What a parent says holds below it.
    {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "read-only": False}},
    {"driver": "qcow2", "cache": {"direct": True}, "file": {"driver": "file", "cache": {"direct": False}}},
    # Nothing may be followed that an image's header names.
    {"driver": "qcow2", "backing": None},
    # This is no node.
    {"driver": "nbd", "server": {"type": "unix", "read-only": False}},
    {"driver": "nbd", "aio": "threads"},
])
def test_what_makes_a_difference_stays(node: Node) -> None:
    assert terse(node) == node
