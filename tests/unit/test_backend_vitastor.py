"""Vitastor sources: every spelling means what Vitastor's QEMU driver says, and nothing else gets through."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.cache import CACHE_FLAGS
from storaged.backends.vitastor import BACKEND, filename
from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.refusals import explain

#: Members of BlockdevOptionsVitastor and their types, from patches/qemu-10.0-vitastor.patch in Vitastor's repository
#: at release 3.0.8; the patches for 7.2 to 10.2 have the same.
QAPI: dict[str, type] = {
    "inode": int, "pool": int, "size": int, "image": str, "config-path": str, "etcd-host": str, "etcd-prefix": str,
}
#: Members that every node has (BlockdevOptions in qapi/block-core.json of QEMU).
COMMON = {"driver", "read-only", "discard", "cache"}

NAMES = st.text(st.characters(exclude_categories=["C", "Z"], include_characters=" "), min_size=1, max_size=40)
WRITABLE = NAMES.filter(lambda name: "@" not in name)


def node(source: str, *, read_only: bool = False, cache: str = "none") -> dict[str, Any]:
    return BACKEND.node(BACKEND.parse(source, {}), read_only=read_only, options={"cache": cache})


def said(source: str) -> dict[str, Any]:
    """What the node says beside what every node says."""
    found = node(source)
    assert found["driver"] == "vitastor"
    for key in found.keys() - COMMON:
        assert type(found[key]) is QAPI[key]
    return {key: value for key, value in found.items() if key not in COMMON}


def refused(source: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        node(source)
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


def escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace(":", r"\:")


def same(name: str) -> str:
    return name


@pytest.mark.parametrize(
    ("source", "members"),
    [
        ("vitastor:image=x", {"image": "x"}),
        (
            r"vitastor:etcd_host=192.168.7.2\:2379/v3:image=debian9",
            {"image": "debian9", "etcd-host": "192.168.7.2:2379/v3"},
        ),
        (r"vitastor:etcd-host=192.168.7.2\:2379:image=x", {"image": "x", "etcd-host": "192.168.7.2:2379/v3"}),
        (r"vitastor:etcd_address=HTTP\://192.168.7.2\:2379:image=x",
         {"image": "x", "etcd-host": "192.168.7.2:2379/v3"}),
        (r"vitastor:etcd_host=[2001\:DB8\:\:0\:1]\:2379/a/b:image=x",
         {"image": "x", "etcd-host": "[2001:db8::1]:2379/a/b"}),
        (r"vitastor:etcd_host=192.0.2.2\:1,192.0.2.1\:1,192.0.2.2\:1/v3:image=x",
         {"image": "x", "etcd-host": "192.0.2.1:1/v3,192.0.2.2:1/v3"}),
        ("vitastor:image=x:etcd_prefix=/a", {"image": "x", "etcd-prefix": "/a"}),
        ("vitastor:image=x:etcd_prefix=a", {"image": "x", "etcd-prefix": "/a"}),
        ("vitastor:image=x:config_path=/a b", {"image": "x", "config-path": "/a b"}),
        ("vitastor:image=x:config_path=/etc/vitastor/vitastor.conf", {"image": "x"}),
        ("vitastor:image=x:skip_parents=0", {"image": "x"}),
        ("vitastor:image=x:cluster=east", {"image": "x"}),
        (r"vitastor:image=a\:b\\c=d,e&f", {"image": r"a:b\c=d,e&f"}),
        ("vitastor:image=a\\", {"image": "a\\"}),
        ("vitastor:image=a/b/ä", {"image": "a/b/ä"}),
        ("vitastor:pool=1:inode=5:size=10G", {"pool": 1, "inode": 5, "size": 10 << 30}),
        ("vitastor:pool=0x1:inode=0x5:size=0x1000", {"pool": 1, "inode": 5, "size": 4096}),
        ("vitastor:inode=281474976710661:size=4096", {"pool": 1, "inode": 5, "size": 4096}),
        ("vitastor:pool=1:inode=281474976710661:size=4k", {"pool": 1, "inode": 5, "size": 4096}),
        ("vitastor://?image=a:b&config_path=/c:d", {"image": "a:b", "config-path": "/c:d"}),
        (r"vitastor://?image=a\&b", {"image": "a&b"}),
    ],
)
def test_a_spelling_is_what_the_driver_makes_of_it(source: str, members: dict[str, Any]) -> None:
    assert find_backend(source) is BACKENDS["vitastor"]
    assert said(source) == members
    location = BACKEND.parse(source, {})
    assert BACKEND.parse(location, {}) == location
    assert said(location) == members


@pytest.mark.parametrize(
    "source",
    [
        "vitastor:", "vitastor:x", "vitastor:image", "vitastor:image=", "vitastor:image=x:", "vitastor::image=x",
        "vitastor:image=x:image=x", "vitastor:image=x:colour=red", "vitastor:i\\mage=x", "vitastor:IMAGE=x",
        "vitastor://image=x", "vitastor://?", "vitastor://?image=x:pool=1&", "vitastor:/x",
        "vitastor:image=a\nb", "vitastor:image=a\0b", "vitastor:image=\udcff", "vitastor:image=a\u200bb",
        "vitastor:image=x:pool=1", "vitastor:image=x:inode=1", "vitastor:image=x:size=10G",
        "vitastor:inode=5:size=4096", "vitastor:pool=1:inode=5", "vitastor:pool=1:size=4096",
        "vitastor:pool=0:inode=5:size=4096", "vitastor:pool=65536:inode=5:size=4096", "vitastor:pool=1:inode=0:size=4k",
        "vitastor:pool=2:inode=281474976710661:size=4k", "vitastor:pool=1:inode=18446744073709551616:size=4k",
        "vitastor:pool=1:inode=281474976710656:size=4k",
        # In octal it would be another one.
        "vitastor:pool=1:inode=010:size=4096", "vitastor:pool=1:inode=5:size=010G", "vitastor:pool=1:inode=+5:size=4k",
        "vitastor:pool=1:inode= 5:size=4k", "vitastor:pool=1:inode=\u0665:size=4k", "vitastor:pool=1:inode=5:size=0",
        "vitastor:pool=1:inode=5:size=4097", "vitastor:pool=1:inode=5:size=-4096", "vitastor:pool=1:inode=5:size=9999P",
        "vitastor:pool=1:inode=5:size=99999999999999999999999G", "vitastor:pool=1:inode=5:size=1.5G",
        "vitastor:image=x:config_path=a", "vitastor:image=x:config_path=", "vitastor:image=x:skip_parents=2",
        "vitastor:image=x:skip_parents=yes", "vitastor:image=x:use_rdma=on", "vitastor:image=x:rdma_mtu=x",
        # The client takes addresses, resolves no names, and would go to port 80.
        r"vitastor:image=x:etcd_host=localhost\:2379", r"vitastor:image=x:etcd_host=etcd1.example\:2379",
        "vitastor:image=x:etcd_host=", "vitastor:image=x:etcd_host=192.0.2.1",
        r"vitastor:image=x:etcd_host=192.0.2.1\:",
        r"vitastor:image=x:etcd_host=192.0.2.1\:0", r"vitastor:image=x:etcd_host=192.0.2.1\:99999",
        r"vitastor:image=x:etcd_host=192.0.2.1\:http", r"vitastor:image=x:etcd_host=192.0.2.01\:1",
        r"vitastor:image=x:etcd_host=127.1\:1", r"vitastor:image=x:etcd_host=\:\:1\:2379",
        r"vitastor:image=x:etcd_host=[\:\:1]", r"vitastor:image=x:etcd_host=[\:\:1%lo]\:1",
        r"vitastor:image=x:etcd_host=[\:\:g]\:1", r"vitastor:image=x:etcd_host=https\://192.0.2.1\:1",
        r"vitastor:image=x:etcd_host=http\://u\:p@192.0.2.1\:1", r"vitastor:image=x:etcd_host=192.0.2.1\:1/",
        r"vitastor:image=x:etcd_host=192.0.2.1\:1/v3?x", r"vitastor:image=x:etcd_host=192.0.2.1\:1,",
        r"vitastor:image=x:etcd_host=192.0.2.1\:1, 192.0.2.2\:1",
        # An unescaped colon ends the value.
        "vitastor:image=x:etcd_host=192.0.2.1:2379",
    ],
)
def test_what_is_no_disk_is_refused(source: str) -> None:
    assert refused(source).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(
    ("source", "options", "whole"),
    [
        ("vitastor:", {"image": "x"}, "vitastor:image=x"),
        ("vitastor:", {"image": "a:b\\c"}, r"vitastor:image=a\:b\\c"),
        ("vitastor:image=x", {"image": "x"}, "vitastor:image=x"),
        ("vitastor:", {"pool": "1", "inode": "5", "disk-size": "10G"}, "vitastor:pool=1:inode=5:size=10G"),
        ("vitastor:pool=1:inode=5", {"disk-size": "4096"}, "vitastor:pool=1:inode=5:size=4096"),
        ("vitastor:pool=1:inode=5:size=4k", {"disk-size": "4096"}, "vitastor:pool=1:inode=5:size=4096"),
        (
            "vitastor:image=x",
            {"etcd-host": "http://192.0.2.1:2379", "etcd-prefix": "v", "config-path": "/c", "cluster": "east"},
            r"vitastor:image=x:etcd_host=192.0.2.1\:2379:etcd_prefix=/v:config_path=/c:cluster=east",
        ),
        (r"vitastor:image=x:etcd_host=192.0.2.1\:1", {"etcd-host": "192.0.2.1:1/v3"},
         r"vitastor:image=x:etcd_host=192.0.2.1\:1"),
    ],
)
def test_options_say_the_same_as_a_source(source: str, options: dict[str, str], whole: str) -> None:
    BACKEND.check_options(options)
    location = BACKEND.parse(source, options)
    assert location == BACKEND.parse(whole, {}) == BACKEND.parse(location, options)


@pytest.mark.parametrize(
    ("source", "options"),
    [
        ("vitastor:image=x", {"image": "y"}),
        (r"vitastor:image=x:etcd_host=192.0.2.1\:1", {"etcd-host": "192.0.2.2:1"}),
        ("vitastor:pool=1:inode=5:size=8192", {"disk-size": "4096"}),
        ("vitastor:image=x:config_path=/a", {"config-path": "/b"}),
        ("vitastor:image=x", {"etcd-host": "localhost:2379"}),
        ("vitastor:image=x", {"config-path": "a"}),
        ("vitastor:", {"image": ""}),
        ("vitastor:", {"pool": "x"}),
        ("vitastor:", {"inode": "-1"}),
        ("vitastor:", {"disk-size": "10 G"}),
        ("vitastor:image=x", {"etcd-prefix": "\n"}),
        ("vitastor:image=x", {"cluster": ""}),
    ],
)
def test_options_that_contradict_the_source_or_make_no_sense_are_refused(source: str, options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize(
    ("option", "value"),
    [("etcd-host", "localhost:2379"), ("pool", "0"), ("inode", "010"), ("disk-size", "1"), ("config-path", "x")],
)
def test_an_option_is_checked_by_itself(option: str, value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({option: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert option in caught.value.message


@given(WRITABLE, NAMES, NAMES)
@example("\\", "/\\", ":")
@example(" ", "//?", "&")
def test_every_name_can_be_said_in_every_way(image: str, prefix: str, cluster: str) -> None:
    source = f"vitastor:image={escaped(image)}:etcd_prefix={escaped(prefix)}:cluster={escaped(cluster)}"
    location = BACKEND.parse(source, {})
    options = {"image": image, "etcd-prefix": prefix, "cluster": cluster}
    assert BACKEND.parse("vitastor:", options) == location == BACKEND.parse(location, options)
    assert said(location)["image"] == image
    in_uri = "&".join(
        f"{key}={value}".replace("\\", r"\\").replace("&", r"\&")
        for key, value in (("image", image), ("etcd-prefix", prefix), ("cluster", cluster))
    )
    assert BACKEND.parse(f"vitastor://?{in_uri}", {}) == location


@given(st.text())
@example("image=x\\")
def test_any_text_is_a_source_or_refused(rest: str) -> None:
    try:
        location = BACKEND.parse(f"vitastor:{rest}", {})
    except StoragedError:
        assert refused(f"vitastor:{rest}").code is ErrorCode.INVALID_SOURCE
    else:
        assert BACKEND.parse(location, {}) == location
        assert location.isprintable()


@given(st.integers(1, 65535), st.integers(1, 2**48 - 1), st.integers(1, 2**50))
def test_a_pool_is_said_by_itself_or_in_the_number_of_the_inode(pool: int, inode: int, blocks: int) -> None:
    location = BACKEND.parse(f"vitastor:pool={pool}:inode={inode}:size={blocks * 4096}", {})
    assert location == BACKEND.parse(f"vitastor:inode={(pool << 48) + inode:#x}:size={blocks * 4}K", {})
    assert said(location) == {"pool": pool, "inode": inode, "size": blocks * 4096}


@given(st.lists(st.tuples(st.ip_addresses(), st.integers(1, 65535)), min_size=1, max_size=4))
def test_etcds_are_compared_as_addresses_in_any_order(etcds: list[tuple[Any, int]]) -> None:
    def spelled(address: Any, port: int, *, loudly: bool) -> str:
        text = address.exploded.upper() if loudly else str(address)
        host = f"[{text}]" if address.version == 6 else text
        return f"http://{host}:{port}/v3" if loudly else f"{host}:{port}"

    one = ",".join(spelled(*etcd, loudly=True) for etcd in etcds)
    other = ",".join(spelled(*etcd, loudly=False) for etcd in reversed(etcds))
    assert BACKEND.parse("vitastor:image=x", {"etcd-host": one}) == BACKEND.parse(
        "vitastor:image=x", {"etcd-host": other}
    )


def test_an_image_is_known_by_its_name_and_an_inode_by_its_number() -> None:
    def identity(source: str) -> str:
        return BACKEND.identity(BACKEND.parse(source, {}), same)

    image = identity("vitastor:image=x")
    assert image == identity(r"vitastor:image=x:etcd_host=192.0.2.1\:1:etcd_prefix=/a:config_path=/b")
    assert image != identity("vitastor:image=X")
    assert image != identity("vitastor:image=x@one")
    assert image != identity("vitastor:image=x:cluster=east") == identity("vitastor://?cluster=east&image=x")
    inode = identity("vitastor:pool=1:inode=5:size=4K")
    assert inode == identity("vitastor:inode=281474976710661:size=10G")
    assert len({inode, identity("vitastor:pool=1:inode=6:size=4K"), identity("vitastor:pool=2:inode=5:size=4K")}) == 3


def test_a_snapshot_can_only_be_read() -> None:
    assert node("vitastor:image=x@one", read_only=True)["image"] == "x@one"
    assert refused("vitastor:image=x@one").code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "more",
    ["skip_parents=1", "use_rdma=1", "use_rdma=0", "rdma_device=a", "rdma_port_num=1", "rdma_gid_index=0",
     "rdma_mtu=4096"],
)
def test_what_only_qemu_img_takes_is_refused_here_and_handed_to_it(more: str) -> None:
    source = f"vitastor:image=x:{more}"
    error = refused(source)
    assert error.code is ErrorCode.UNSUPPORTED
    assert more.partition("=")[0].replace("_", "-") in error.message + error.cause
    assert filename(BACKEND.parse(source, {})) == source


def test_qemu_img_is_told_all_but_what_is_ours() -> None:
    location = BACKEND.parse(r"vitastor:cluster=east:etcd_host=192.0.2.1\:1:image=a\:b:skip-parents=1", {})
    assert filename(location) == r"vitastor:image=a\:b:etcd_host=192.0.2.1\:1/v3:skip_parents=1"
    assert BACKEND.parse(filename(location), {"cluster": "east"}) == location


@pytest.mark.parametrize("cache", sorted(CACHE_FLAGS))
def test_writes_may_wait_in_the_memory_of_qsd_where_the_user_says_so_alone(cache: str) -> None:
    """The driver lets Vitastor buffer writes unless the cache is bypassed (client_writeback_allowed)."""
    found = node("vitastor:image=x", cache=cache)["cache"]
    assert found == {"direct": cache != "writeback", "no-flush": cache == "unsafe"}
    assert BACKEND.node("vitastor:image=x", read_only=False, options={})["cache"]["direct"] is True
    assert BACKEND.caches_writes


def test_every_member_that_the_driver_publishes_is_used() -> None:
    image = said(r"vitastor:image=x:etcd_host=192.0.2.1\:1:etcd_prefix=/a:config_path=/b")
    inode = said("vitastor:pool=1:inode=5:size=4K")
    assert {*image, *inode} == QAPI.keys()


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Parameter 'driver' does not accept value 'vitastor'", ErrorCode.UNSUPPORTED),
        ("image does not exist", ErrorCode.SOURCE_MISSING),
        ("image size not specified", ErrorCode.INVALID_SIZE),
    ],
)
def test_what_qsd_says_is_explained(text: str, code: ErrorCode) -> None:
    error = explain("blockdev-add", text)
    assert error.code is code
    assert "Vitastor" in error.message + error.hint
    assert error.cause == text
