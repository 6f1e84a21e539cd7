"""The words for qemu-img, and what blockdev-create gets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.images import arguments, operand, remotecreate
from storaged.images.operand import Wish
from storaged.images.process import failure, without_trees
from storaged.model.formats import Format
from storaged.supervisor import opening
from tests.harness import error_of

LEAVES = st.none() | st.booleans() | st.integers() | st.text()
TREES = st.recursive(
    st.dictionaries(st.text(), LEAVES), lambda tree: st.dictionaries(st.text(), tree | LEAVES), max_leaves=10
)

#: What reaches the data of each source that can be attached, and that qemu-img opens as it is.
SOURCES: list[tuple[str, dict[str, str], dict[str, Any]]] = [
    ("nbd://h/x", {}, {"driver": "nbd", "export": "x"}),
    ("rbd:p/i@s:id=bob", {"cephx-key-file": "/k"}, {"driver": "rbd", "snapshot": "s", "key-secret": "image-cephx-key"}),
    ("iscsi://h/iqn.2026-01.a:b/1", {"user": "u", "password-file": "/k"}, {"driver": "iscsi", "lun": 1}),
    ("nfs://h/a/b", {}, {"driver": "nfs", "path": "/a/b"}),
    ("ssh://h/a/b", {}, {"driver": "ssh", "path": "/a/b"}),
    ("https://h/a", {}, {"driver": "https", "url": "https://h/a"}),
    ("ftp://h/a", {}, {"driver": "ftp", "url": "ftp://h/a"}),
    ("gluster://h/v/a", {}, {"driver": "gluster", "volume": "v"}),
    ("vitastor:image=testimg", {}, {"driver": "vitastor", "image": "testimg"}),
    (
        "vitastor:image=testimg:skip-parents=1:use_rdma=0:rdma_device=mlx5_0", {},
        {"driver": "vitastor", "image": "testimg", "skip-parents": 1, "use-rdma": 0, "rdma-device": "mlx5_0"},
    ),
    (
        r"vitastor:etcd_host=192.168.7.2\:2379/v3:pool=1:inode=5:size=10G", {},
        {"driver": "vitastor", "pool": 1, "inode": 5, "size": 10 << 30, "etcd-host": "192.168.7.2:2379/v3"},
    ),
]


def node_of(source: str, options: dict[str, str], *, writable: bool = False) -> dict[str, Any]:
    """The tree that qemu-img is given for a source."""
    one = operand.look(Wish(source, options=options), writable=writable)
    node, _ = opening.outside(one.opened, one.spec, "/workspace")
    name = arguments.filename(arguments.renamed(node, one.prefix))
    found = json.loads(name.removeprefix("json:"))
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(("source", "options", "expected"), SOURCES, ids=lambda value: str(value)[:40])
def test_a_source_becomes_a_tree_that_leaves_nothing_to_be_probed(
    source: str, options: dict[str, str], expected: dict[str, Any]
) -> None:
    node = node_of(source, options)
    assert node["driver"] == "raw"
    assert node["read-only"] is True
    below = node["file"]
    assert expected.items() <= below.items()
    assert below["read-only"] is True
    assert "node-name" not in json.dumps(node)


@pytest.mark.parametrize("source", ["http://h/a", "ftp://h/a"])
def test_what_can_only_be_read_is_not_opened_for_writing(source: str) -> None:
    assert error_of(lambda: node_of(source, {}, writable=True)).code is ErrorCode.INVALID_ARGUMENT


def test_a_vitastor_snapshot_is_not_written_and_a_layer_is_for_qemu_img_alone() -> None:
    error = error_of(lambda: node_of("vitastor:image=a@s", {}, writable=True))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert node_of("vitastor:image=a@s:skip_parents=1", {})["file"]["skip-parents"] == 1
    one = operand.named(Wish("vitastor:image=a:skip_parents=1"), writable=False)
    assert error_of(lambda: opening.inspect(one.spec)).code is ErrorCode.UNSUPPORTED


def test_a_disk_with_a_cache_in_qemu_is_written_without_it() -> None:
    assert node_of("rbd:p/i", {}, writable=True)["file"]["cache"] == {"direct": True, "no-flush": False}
    assert node_of("rbd:p/i", {"cache": "writeback"}, writable=True)["file"]["cache"]["direct"] is False


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("/a/b.qcow2", "qcow2"), ("b.QCOW2", "qcow2"), ("/a.qcow2/b", "raw"), ("b.img", "raw"), ("b", "raw"),
        (".qcow2", "raw"), ("a.vhd", "vpc"), ("a.vhdx", "vhdx"), ("a.vmdk", "vmdk"), ("a.raw.luks", "luks"),
    ],
)
def test_the_ending_of_a_name_says_the_format(name: str, format: str) -> None:
    assert arguments.format_of_name(name) == format


def test_the_name_of_a_source_on_the_network_says_no_format() -> None:
    assert operand.named(Wish("nfs://h/a/b.qcow2"), writable=False).spec.format is Format.RAW
    assert operand.named(Wish("/a/b.qcow2"), writable=False).spec.format is Format.QCOW2
    assert operand.named(Wish("/a/b.qcow2", Format.RAW), writable=False).spec.format is Format.RAW


@given(TREES)
def test_a_tree_survives_but_for_its_names(tree: dict[str, Any]) -> None:
    name = arguments.filename(tree)
    assert name.isascii()
    assert name.isprintable()

    def without(node: dict[str, Any]) -> dict[str, Any]:
        return {key: without(value) if isinstance(value, dict) else value
                for key, value in node.items() if key != "node-name"}

    try:
        plain = json.loads(json.dumps(without(tree)))
    except UnicodeError:
        return
    assert json.loads(name.removeprefix("json:")) == plain


@given(TREES, st.text())
def test_only_names_of_objects_get_a_prefix(tree: dict[str, Any], prefix: str) -> None:
    found = arguments.renamed({**tree, "key-secret": "x", "tls-creds": "t", "file": {"password-secret": "y"}}, prefix)
    assert (found["key-secret"], found["tls-creds"]) == (prefix + "x", prefix + "t")
    assert found["file"] == {"password-secret": prefix + "y"}
    assert all(found[key] == tree[key] for key in tree.keys() - {"key-secret", "tls-creds", "file"}
               if not isinstance(tree[key], dict) and not key.endswith("-secret"))


def test_only_the_backing_file_that_is_committed_to_may_become_writable() -> None:
    deepest = {"driver": "raw", "read-only": True, "file": {"driver": "file", "read-only": True}}
    base = {"driver": "qcow2", "read-only": True, "file": {"driver": "file", "read-only": True}, "backing": deepest}
    top = {"driver": "qcow2", "read-only": False, "file": {"driver": "file", "read-only": False}, "backing": base}
    found = arguments.committable(top)
    assert found["backing"] == {"driver": "qcow2", "file": {"driver": "file"}, "backing": deepest}
    assert {**found, "backing": base} == top


def test_creation_options_are_words_of_their_own() -> None:
    words = arguments.creation_words({"compat": "1.1", "x": "a,b"})
    assert words == ["-o", "compat=1.1", "-o", "x=a,,b"]


@pytest.mark.parametrize("option", ["backing_file", "backing_fmt", "data_file", "data_file_raw"])
def test_creation_options_name_no_files(option: str) -> None:
    error = error_of(lambda: arguments.creation_words({option: "/etc/x"}))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert error.hint


def test_the_options_that_a_source_knows_are_its_own() -> None:
    found = operand.named(
        Wish("/a/b.qcow2", options={"cache": "none", "aio": "native", "compat": "1.1"}), writable=True
    )
    assert found.spec.options == {"cache": "none", "aio": "native"}
    assert found.creation == {"compat": "1.1"}
    assert error_of(lambda: operand.refuse_creation_options(found)).code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(("text", "expected"), [("10G", str(10 << 30)), ("+1K", "+1024"), ("-512", "-512")])
def test_sizes_are_those_of_attach(text: str, expected: str) -> None:
    assert arguments.new_size(text) == expected


@pytest.mark.parametrize("text", ["", "+", "++1", "+-1", "1.5G", "0", "-"])
def test_what_is_no_size_is_refused(text: str) -> None:
    assert error_of(lambda: arguments.new_size(text)).code is ErrorCode.INVALID_SIZE


@given(st.floats(0, 100))
def test_progress_is_read_as_qemu_img_prints_it(percentage: float) -> None:
    found = arguments.progress_of(f"    ({percentage:.2f}/100%)")
    assert found is not None
    assert abs(found - percentage) <= 0.005001


@given(st.text())
def test_anything_else_is_no_progress_or_within_its_bounds(text: str) -> None:
    found = arguments.progress_of(text)
    assert found is None or 0 <= found <= 100


def test_blockdev_create_gets_what_qemu_img_calls_otherwise() -> None:
    options = {
        "compat": "0.10", "cluster_size": "4K", "lazy_refcounts": "on", "refcount_bits": "16",
        "compression_type": "zlib", "encrypt.format": "luks", "encrypt.key-secret": "s",
    }
    assert remotecreate.creation(Format.QCOW2, options) == {
        "version": "v2", "cluster-size": 4096, "lazy-refcounts": True, "refcount-bits": 16,
        "compression-type": "zlib", "encrypt": {"format": "luks", "key-secret": "s"},
    }


def test_what_is_behind_a_server_is_made_and_then_its_format() -> None:
    one = operand.named(Wish("rbd:p/i", Format.QCOW2), writable=True)
    node = {"driver": "rbd", "pool": "p", "image": "i", "read-only": False, "cache": {}, "discard": "unmap"}
    todo = remotecreate.steps(one, node, 1 << 30, {"compat": "1.1"}, is_there=False)
    assert todo == [
        {"driver": "rbd", "location": {"pool": "p", "image": "i"}, "size": 1 << 30},
        {"driver": "qcow2", "file": node, "size": 1 << 30, "version": "v3"},
    ]
    assert remotecreate.steps(one, node, 1 << 30, {}, is_there=True) == [
        {"driver": "qcow2", "file": node, "size": 1 << 30}
    ]
    # Encrypted by librbd: as a part of the location it would be left out.
    encrypt = {"format": "luks2", "key-secret": "k"}
    made, _ = remotecreate.steps(one, {**node, "encrypt": encrypt}, 1 << 30, {}, is_there=False)
    assert made == {"driver": "rbd", "location": {"pool": "p", "image": "i"}, "size": 1 << 30, "encrypt": encrypt}
    raw = operand.named(Wish("rbd:p/i"), writable=True)
    assert remotecreate.steps(raw, node, 512, {"cluster_size": "8M"}, is_there=False) == [
        {"driver": "rbd", "location": {"pool": "p", "image": "i"}, "size": 512, "cluster-size": 8 << 20}
    ]


@pytest.mark.parametrize(
    ("talk", "code"),
    [
        ('qemu-img: Could not open \'json:{"a":"x"}\': Failed to get shared "write" lock', "source-in-use"),
        ("qemu-img: Could not open 'json:{}': Image is not in qcow2 format", "wrong-format"),
        ("qemu-img: Could not open 'json:{}': CURL: Error opening file: The requested URL returned error: 404",
         "source-missing"),
        ("qemu-img: error while writing at byte 0: No space left on device", "no-space"),
        ("qemu-img: output file is smaller than input file", "image-failed"),
        ("", "image-failed"),
    ],
)
def test_the_words_of_qemu_img_become_failures(talk: str, code: str) -> None:
    error = failure("convert", talk, 1)
    assert error.code == code
    assert "json:" not in str(error)
    assert error.cause
    assert error.hint


@given(st.text())
def test_trees_are_not_shown(text: str) -> None:
    tree = arguments.filename({"driver": "nbd", "x": text})
    assert without_trees(f"Could not open '{tree}': no") == "no"


def test_one_disk_is_not_read_and_written_at_once(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(512))
    (tmp_path / "link").symlink_to(disk)
    source = operand.look(Wish(str(disk), name="source"), writable=False)
    target = operand.look(Wish(str(tmp_path / "link"), name="target"), writable=True)
    with pytest.raises(StoragedError, match="same disk"):
        operand.together([source, target])
    again = operand.look(Wish(str(tmp_path / "link"), name="other"), writable=False)
    assert operand.together([source, again]).sources == source.opened.sources
