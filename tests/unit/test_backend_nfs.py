"""NFS sources: a URI means what QEMU reads in it, and two spellings of one file are one file."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.nfs import BACKEND
from storaged.errors import ErrorCode, StoragedError

#: Names in a path.
NAMES = st.text(
    st.characters(exclude_characters="\0/", exclude_categories=["Cs"]), min_size=1, max_size=20
).filter(lambda name: name not in (".", ".."))
PATHS = st.lists(NAMES, min_size=1, max_size=5).map(lambda names: "/" + "/".join(names))


def node(source: str, **options: str) -> dict[str, Any]:
    said = {key.replace("_", "-"): value for key, value in options.items()}
    return BACKEND.node(BACKEND.parse(source, said), read_only=False, options=said)


def refused(source: str, **options: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, {key.replace("_", "-"): value for key, value in options.items()})
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    ("source", "host", "path"),
    [
        ("nfs://host/d.img", "host", "/d.img"),
        ("nfs://Host.Example/srv/d.img", "host.example", "/srv/d.img"),
        ("nfs://192.0.2.1/srv//a///d.img", "192.0.2.1", "/srv/a/d.img"),
        ("nfs://[2001:DB8::0:1]/srv/d.img", "2001:db8::1", "/srv/d.img"),
        ("nfs://[fe80::1%25eth0]/d", "fe80::1%eth0", "/d"),
        ("nfs://host/%C3%A4%20%3F%23%25:@", "host", "/ä ?#%:@"),
        ("nfs://host/a+b&c=d", "host", "/a+b&c=d"),
        ("nfs://host/..a/b./...", "host", "/..a/b./..."),
        ("nfs://host/a%2Fb", "host", "/a/b"),
    ],
)
def test_a_spelling_is_a_server_and_a_file(source: str, host: str, path: str) -> None:
    assert find_backend(source) is BACKENDS["nfs"]
    found = node(source)
    assert found["server"] == {"type": "inet", "host": host}
    assert found["path"] == path
    # Whoever QSD is.
    assert (found["user"], found["group"]) == (0, 0)
    assert not found.keys() & {"readahead-size", "page-cache-size"}


@pytest.mark.parametrize(
    "source",
    [
        "nfs:", "nfs:/x", "nfs://", "nfs:///x", "nfs://host", "nfs://host/", "nfs://host//", "nfs://host/a/",
        "nfs://host/a/../b", "nfs://host/./a", "nfs://host/a/%2e%2E", "nfs://host:2049/a", "nfs://[::1]:1/a",
        "nfs://user@host/a", "nfs://host/a#b", "nfs://host/%", "nfs://host/%zz", "nfs://host/%00", "nfs://host/%ff",
        "nfs://host/\udcff", "nfs://127.1/a", "nfs://-h/a", "nfs://[::1/a", "nfs://ho st/a", "nfs://host\n/a",
        f"nfs://host/{'x' * 1024}", "nfs://host/a?", "nfs://host/a?uid", "nfs://host/a?uid=", "nfs://host/a?uid=root",
        "nfs://host/a?uid=010", "nfs://host/a?uid=0x10", "nfs://host/a?uid=-1", "nfs://host/a?uid=+1",
        "nfs://host/a?uid=2147483648", "nfs://host/a?uid=\u0661", "nfs://host/a?uid=1&uid=1",
        "nfs://host/a?uid=1&", "nfs://host/a?uid=1;gid=1", "nfs://host/a?version=4", "nfs://host/a?readahead=0",
        "nfs://host/a?readahead=1048577", "nfs://host/a?pagecache=2049", "nfs://host/a?tcp-syncnt=128",
        "nfs://host/a?debug=3", "nfs://host/a?user=1",
    ],
)
def test_what_is_no_file_of_a_server_is_refused(source: str) -> None:
    assert refused(source).code is ErrorCode.INVALID_SOURCE


@given(PATHS)
@example("/?#%&")
def test_every_path_can_be_said(path: str) -> None:
    location = BACKEND.parse(f"nfs://host{quote(path)}", {})
    assert BACKEND.parse(location, {}) == location
    assert node(location)["path"] == path
    assert location.isascii()


@given(st.lists(NAMES, min_size=1, max_size=4), st.lists(st.integers(1, 3), min_size=4, max_size=4))
def test_slashes_do_not_tell_files_apart(names: list[str], slashes: list[int]) -> None:
    text = "".join("/" * count + quote(name, safe="") for name, count in zip(names, slashes, strict=False))
    assert BACKEND.parse(f"nfs://HOST{text}", {}) == BACKEND.parse(f"nfs://host{quote('/' + '/'.join(names))}", {})


@given(st.text())
def test_any_text_is_a_source_or_refused(rest: str) -> None:
    try:
        location = BACKEND.parse(f"nfs:{rest}", {})
    except StoragedError:
        assert refused(f"nfs:{rest}").code is ErrorCode.INVALID_SOURCE
    else:
        assert BACKEND.parse(location, {}) == location
        assert location.isprintable()


QUERY = "uid=1&gid=2&tcp-syncnt=3&readahead=4096&pagecache=5&debug=1"
OPTIONS = {
    "uid": "1", "gid": "2", "tcp_syn_count": "3", "readahead_size": "4096", "page_cache_size": "5", "debug": "1",
}
MEMBERS = {
    "user": 1, "group": 2, "tcp-syn-count": 3, "readahead-size": 4096, "page-cache-size": 5, "debug": 1,
}


def test_the_query_and_the_options_say_the_same() -> None:
    by_query, by_options = node(f"nfs://host/a?{QUERY}"), node("nfs://host/a", **OPTIONS)
    assert by_query == by_options == node(f"nfs://host/a?{QUERY}", **OPTIONS)
    assert by_query.items() >= MEMBERS.items()
    said = {key.replace("_", "-"): value for key, value in OPTIONS.items()}
    location = BACKEND.parse("nfs://host/a?debug=1&uid=1", said)
    assert location == f"nfs://host/a?{QUERY}" == BACKEND.parse(location, said)


def test_what_they_say_differently_is_refused() -> None:
    assert refused("nfs://host/a?uid=1", uid="2").code is ErrorCode.INVALID_ARGUMENT


def test_who_asks_does_not_tell_files_apart() -> None:
    locations = [BACKEND.parse(source, {}) for source in ("nfs://host/a", "nfs://Host//a?uid=1&readahead=4096")]
    assert {BACKEND.identity(location, str) for location in locations} == {"nfs://host/a"}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("uid", "root"), ("uid", "-1"), ("gid", "2147483648"), ("gid", "01"), ("tcp-syn-count", "0"),
        ("tcp-syn-count", "128"), ("readahead-size", "0"), ("readahead-size", "1M"), ("page-cache-size", "2049"),
        ("debug", "3"), ("debug", ""),
    ],
)
def test_what_is_no_number_is_refused(key: str, value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({key: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize("cache", ["none", "directsync"])
@pytest.mark.parametrize(("key", "name"), [("readahead-size", "readahead"), ("page-cache-size", "pagecache")])
def test_nothing_is_read_ahead_or_kept_without_a_cache(cache: str, key: str, name: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({"cache": cache, key: "16"})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert refused(f"nfs://host/a?{name}=16", cache=cache).code is ErrorCode.INVALID_ARGUMENT
    BACKEND.check_options({"cache": "writeback", key: "16"})


def test_a_connection_is_given_up_in_seconds_unless_something_else_is_said() -> None:
    assert node("nfs://host/a")["tcp-syn-count"] == 2
    assert node("nfs://host/a", tcp_syn_count="5")["tcp-syn-count"] == 5
    assert node("nfs://host/a?tcp-syncnt=6")["tcp-syn-count"] == 6
