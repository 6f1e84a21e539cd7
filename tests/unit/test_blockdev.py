"""The tree of nodes: QEMU is told everything, follows nothing by itself, and writes to the first image only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.backends import BACKENDS
from storaged.model.blockdev import (
    BASE,
    DISK,
    OVERLAY_FILE,
    PASSPHRASE,
    Image,
    image_nodes,
    image_tree,
    node_names_needed,
    overlay_file_node,
    overlay_tree,
)
from storaged.model.formats import COPY_ON_WRITE, Format

Node = dict[str, Any]
CACHE = {"direct": False, "no-flush": False}
#: What QEMU takes: char node_name[32] in include/block/block_int-common.h.
LONGEST_NODE_NAME = 31


def protocol(path: str, read_only: bool) -> Node:
    return BACKENDS["file"].node(path, read_only=read_only, options={})


def chain_of(formats: list[Format], *, read_only: bool = False, data_files: bool = False) -> list[Image]:
    return [
        Image(
            format, protocol(f"/{number}", read_only or number > 0),
            protocol(f"/{number}.data", read_only or number > 0) if data_files else None,
        )
        for number, format in enumerate(formats)
    ]


def tree(chain: list[Image], *, read_only: bool = False) -> Node:
    return image_tree(chain, read_only=read_only, node_name=DISK, cache=CACHE)


def format_nodes(node: Node) -> list[Node]:
    below = node.get("backing")
    return [node, *(format_nodes(below) if below is not None else [])]


def all_nodes(value: Any) -> Iterator[Node]:
    if isinstance(value, dict):
        if "driver" in value:
            yield value
        for child in value.values():
            yield from all_nodes(child)


COW = st.sampled_from(sorted(COPY_ON_WRITE))
CHAINS = st.tuples(st.lists(COW, max_size=12), st.sampled_from(Format)).map(lambda parts: [*parts[0], parts[1]])


@given(CHAINS, st.booleans(), st.booleans())
def test_no_image_is_left_to_find_its_own_backing_file(
    formats: list[Format], read_only: bool, data_files: bool
) -> None:
    for node in all_nodes(tree(chain_of(formats, data_files=data_files), read_only=read_only)):
        assert ("backing" in node) == (node["driver"] in COPY_ON_WRITE)


@given(CHAINS)
def test_the_chain_is_opened_in_order_and_ends_where_it_ends(formats: list[Format]) -> None:
    nodes = format_nodes(tree(chain_of(formats)))
    assert [node["driver"] for node in nodes] == formats
    assert [node["file"]["filename"] for node in nodes] == [f"/{number}" for number in range(len(formats))]
    assert nodes[-1].get("backing") is None


@given(CHAINS, st.booleans())
def test_only_the_first_image_is_ever_opened_for_writing(formats: list[Format], read_only: bool) -> None:
    first, *rest = format_nodes(tree(chain_of(formats, read_only=read_only, data_files=True), read_only=read_only))
    assert first["read-only"] is read_only
    assert first["file"]["read-only"] is read_only
    for image in rest:
        assert all(node["read-only"] is True for node in all_nodes(image))


@given(CHAINS)
def test_node_names_are_unique_and_the_disk_is_on_top(formats: list[Format]) -> None:
    names = [node["node-name"] for node in format_nodes(tree(chain_of(formats)))]
    assert names[0] == DISK
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("top", [DISK, BASE])
def test_node_names_fit_into_qemu_however_long_the_chain_is(top: str) -> None:
    chain = chain_of([Format.QCOW2] * 16)
    for node in format_nodes(image_tree(chain, read_only=True, node_name=top, cache=CACHE)):
        assert len(node["node-name"]) <= LONGEST_NODE_NAME


def test_every_node_has_the_cache_mode() -> None:
    cache = {"direct": True, "no-flush": False}
    for node in format_nodes(image_tree(chain_of([Format.QCOW2] * 3), read_only=True, node_name=DISK, cache=cache)):
        assert node["cache"] == cache


@pytest.mark.parametrize("format", Format)
def test_only_a_luks_image_is_given_the_passphrase(format: Format) -> None:
    node = tree(chain_of([format]))
    assert (node.get("key-secret") == PASSPHRASE) == (format is Format.LUKS)
    assert ("key-secret" in node) == (format is Format.LUKS)


def test_an_external_data_file_is_named_and_others_have_none() -> None:
    with_data, without = tree(chain_of([Format.QCOW2], data_files=True)), tree(chain_of([Format.QCOW2]))
    assert with_data["data-file"]["filename"] == "/0.data"
    assert "data-file" not in without


def test_an_overlay_stands_on_the_base_and_takes_nothing_from_its_header() -> None:
    node = overlay_tree(CACHE, {})
    assert (node["node-name"], node["backing"], node["file"]) == (DISK, BASE, OVERLAY_FILE)
    assert not node.get("read-only")


def test_an_overlay_cannot_outgrow_its_limit() -> None:
    node = overlay_file_node(protocol("/o", False), 4 << 20)
    assert (node["driver"], node["size"], node["node-name"]) == ("raw", 4 << 20, OVERLAY_FILE)


def test_a_snapshot_counts_as_open_when_overlay_and_base_are() -> None:
    assert node_names_needed(False) == {DISK}
    assert node_names_needed(True) == {DISK, BASE, OVERLAY_FILE}


def test_a_chain_in_nodes_of_their_own_is_named_from_below_and_only_its_top_is_written_to() -> None:
    base = Image(Format.RAW, {"driver": "nbd"})
    chain = [Image(Format.QCOW2, "source"), Image(Format.QCOW2, protocol("/b", True)), base]
    nodes = image_nodes(chain, read_only=False, node_name="disk", cache={}, behaviour={"discard": "ignore"})
    assert [node["node-name"] for node in nodes] == ["disk-2", "disk-1", "disk"]
    assert [node.get("backing") for node in nodes] == [None, "disk-2", "disk-1"]
    assert [node["read-only"] for node in nodes] == [True, True, False]
    assert [node["discard"] for node in nodes] == ["unmap", "unmap", "ignore"]
    assert image_nodes(chain[:1], read_only=True, node_name="base", cache={})[0]["backing"] is None
