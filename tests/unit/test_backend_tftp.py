"""TFTP sources."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.backends import find_backend
from storaged.backends.fetched import COPY, FetchedBackend, size_of
from storaged.backends.tftp import BACKEND
from storaged.errors import ErrorCode, StoragedError

#: What a path can be made of.
NAMES = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=60).filter(
    lambda text: not text.endswith("/") and not {".", ".."} & set(text.split("/"))
)


def refused(source: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, {})
    assert caught.value.hint
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    return caught.value


@pytest.mark.parametrize(
    ("source", "location"),
    [
        ("tftp://HOST/a", "tftp://host/a"),
        ("tftp://host:69/a/b", "tftp://host/a/b"),
        ("tftp://[::1]:6969//a", "tftp://[::1]:6969//a"),
        ("tftp://host/a b%3b%20%C3%a4", "tftp://host/a%20b%3B%20%C3%A4"),
    ],
)
def test_a_source_is_a_file_of_a_server(source: str, location: str) -> None:
    assert find_backend(source) is BACKEND
    assert BACKEND.parse(source, {}) == location == BACKEND.identity(location, str)


@pytest.mark.parametrize(
    "source",
    [
        "tftp:", "tftp:host/a", "tftp://", "tftp://host", "tftp://host/", "tftp://host/a/", "tftp://u@host/a",
        "tftp://host:0/a", "tftp://host/a;mode=netascii", "tftp://host/a?b", "tftp://host/a#b", "tftp://host/%00",
        "tftp://host/a%0ab", "tftp://host/../a", "tftp://host/a/%2e%2e/b", "tftp://host/%zz", "tftp://host/%ff",
        f"tftp://host/{'x' * 401}", "tftp:///a",
    ],
)
def test_what_is_none_is_refused(source: str) -> None:
    refused(source)


@given(NAMES)
def test_every_name_of_a_file_can_be_said(name: str) -> None:
    location = BACKEND.parse(f"tftp://host/{quote(name, safe='')}", {})
    assert BACKEND.parse(location, {}) == location
    assert location.isascii()
    assert location.isprintable()


@given(st.text())
def test_any_text_is_a_source_or_refused(rest: str) -> None:
    try:
        location = BACKEND.parse(f"tftp:{rest}", {})
    except StoragedError:
        refused(f"tftp:{rest}")
    else:
        assert BACKEND.parse(location, {}) == location


def test_the_node_is_the_copy() -> None:
    found = BACKEND.node("tftp://host/a", read_only=True, options={})
    assert (found["driver"], found["filename"]) == ("file", COPY)
    assert BACKEND.read_only
    assert isinstance(BACKEND, FetchedBackend)
    assert BACKEND.is_fetched({})
    assert BACKEND.fetch_options("tftp://host/a", {}, {}) == {}


@pytest.mark.parametrize(
    "options", [{"size": "0"}, {"size": "x"}, {"request-timeout": "0"}, {"request-timeout": "3601"}], ids=str
)
def test_what_an_option_cannot_be_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options(options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


def test_options() -> None:
    BACKEND.check_options({"size": "4M", "request-timeout": "3600"})
    assert size_of({"size": "4M"}) == 4 << 20
    assert size_of({}) is None
