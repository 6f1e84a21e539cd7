"""Gluster sources: every spelling means what QEMU says, and nothing else gets through."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.gluster import BACKEND
from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import VolumeSpec
from storaged.qsd.refusals import explain

#: What can be in a name of a file.
NAMES = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda text: text not in (".", ".."))


def node(source: str, **options: str) -> dict[str, Any]:
    BACKEND.check_options(options)
    return BACKEND.node(BACKEND.parse(source, options), read_only=False, options=options)


def refused(source: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, {})
    assert caught.value.hint
    return caught.value


def inet(host: str, port: str = "24007") -> dict[str, Any]:
    return {"type": "inet", "host": host, "port": port}


@pytest.mark.parametrize(
    ("source", "server", "path"),
    [
        ("gluster://host/v1/d.img", inet("host"), "d.img"),
        ("gluster+tcp://HOST.Example:024007/v1/a/b c", inet("host.example"), "a/b c"),
        ("gluster://192.0.2.1:1//v1//a//b/", inet("192.0.2.1", "1"), "a/b"),
        ("gluster://[2001:DB8::0:1]/v1/%C3%A4%20%3F%23%25:@", inet("2001:db8::1"), "ä ?#%:@"),
        ("gluster+unix:///v1/d.img?socket=/run/a%26b", {"type": "unix", "path": "/run/a&b"}, "d.img"),
    ],
)
def test_a_spelling_is_a_server_a_volume_and_a_file(source: str, server: dict[str, Any], path: str) -> None:
    assert find_backend(source) is BACKENDS["gluster"]
    found = node(source)
    assert (found["server"], found["volume"], found["path"]) == ([server], "v1", path)


@pytest.mark.parametrize(
    "source",
    [
        "gluster:", "gluster:host/v/p", "gluster://", "gluster://host", "gluster://host/", "gluster://host/v",
        "gluster://host/v/", "gluster:///v/p", "gluster://host/v/../p", "gluster://host/v/./p", "gluster://host/v/a/..",
        "gluster://host/a b/p", "gluster://host/-v/p", "gluster://host/v.w/p", "gluster://host:0/v/p",
        "gluster://host:x/v/p", "gluster://u@host/v/p", "gluster://host/v/p?socket=/s", "gluster://host/v/p?",
        "gluster://host/v/p#x", "gluster://host/v/%00", "gluster://host/v/%ff", "gluster://host/v/%2e%2e/p",
        "gluster://127.1/v/p", f"gluster://host/v/{'x' * 4096}", "gluster+unix:///v/p", "gluster+unix:///v/p?socket=",
        "gluster+unix:///v/p?socket=s", "gluster+unix://host/v/p?socket=/s", "gluster+unix:///v/p?path=/s",
        "gluster+unix:///v/p?socket=/s&x=y", f"gluster+unix:///v/p?socket=/{'x' * 107}",
    ],
)
def test_what_is_no_file_of_a_volume_is_refused(source: str) -> None:
    assert refused(source).code is ErrorCode.INVALID_SOURCE


def test_rdma_is_refused_and_not_taken_for_tcp() -> None:
    error = refused("gluster+rdma://host/v/p")
    assert error.code is ErrorCode.UNSUPPORTED
    assert "gluster+tcp://" in error.hint


@given(st.lists(NAMES, min_size=1, max_size=4), st.integers(1, 65535))
def test_every_path_can_be_said(parts: list[str], port: int) -> None:
    path = "/".join(parts)
    source = f"gluster://host:{port}/v1/{quote(path, safe='/')}"
    assert node(source)["path"] == path
    location = BACKEND.parse(source, {})
    assert BACKEND.parse(location, {}) == location
    assert node(location) == node(source)


@given(st.sampled_from(BACKEND.schemes), st.text())
def test_any_text_is_a_source_or_refused(scheme: str, rest: str) -> None:
    try:
        location = BACKEND.parse(f"{scheme}:{rest}", {})
    except StoragedError:
        assert refused(f"{scheme}:{rest}").code in (ErrorCode.INVALID_SOURCE, ErrorCode.UNSUPPORTED)
    else:
        assert BACKEND.parse(location, {}) == location
        assert location.isascii()
        assert location.isprintable()


def test_a_file_is_the_same_whichever_server_describes_the_volume() -> None:
    sources = ["gluster://a/v1/x/d.img", "gluster+tcp://b:1/v1//x/d.img", "gluster+unix:///v1/x/d.img?socket=/s"]
    locations = [BACKEND.parse(source, {}) for source in sources]
    assert len(set(locations)) == 3
    assert {BACKEND.identity(location, str) for location in locations} == {"gluster:v1/x/d.img"}
    others = ["gluster://a/v2/x/d.img", "gluster://a/v1/d.img", "gluster://a/v1/X/d.img"]
    assert len({BACKEND.identity(BACKEND.parse(source, {}), str) for source in [sources[0], *others]}) == 4


def test_further_servers_are_asked_after_that_of_the_source() -> None:
    found = node("gluster://a/v/p", servers="B,[::1]:5,a:24007")["server"]
    assert found == [inet("a"), inet("b"), inet("::1", "5")]
    found = node("gluster+unix:///v/p?socket=/s", servers="b")["server"]
    assert found == [{"type": "unix", "path": "/s"}, inet("b")]


@pytest.mark.parametrize("value", ["", ",", "a,", "a,a", "A,a:24007", "a b", "a:0", "u@a", "unix:/s"])
def test_what_is_no_list_of_servers_is_refused(value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({"servers": value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize(
    ("cache", "holds"),
    [("none", True), ("writeback", True), ("unsafe", True), ("writethrough", False), ("directsync", False)],
)
def test_write_behind_is_in_qsd_whatever_the_cache_mode(cache: str, holds: bool) -> None:
    spec = VolumeSpec(name="a", source="gluster://h/v/p", options={"cache": cache})
    assert spec.keeps_writes_in_memory is holds


@pytest.mark.parametrize(
    "text", ["Unknown driver 'gluster'", "Parameter 'driver' does not accept value 'gluster'"]
)
def test_a_qsd_without_gluster_is_told_and_what_to_do(text: str) -> None:
    error = explain("blockdev-add", text)
    assert error.code is ErrorCode.UNSUPPORTED
    assert error.hint
