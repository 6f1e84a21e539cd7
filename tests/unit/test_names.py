"""Names reach paths and the kernel, so nothing but the agreed characters gets through."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.names import check_name


def accepted(name: str) -> bool:
    try:
        return check_name(name) == name
    except StoragedError as error:
        if error.code is not ErrorCode.INVALID_NAME:
            raise
        return False


@pytest.mark.parametrize("name", ["a", "Z9", "0", "web1.data_2-b", "a" * 63, "part1", "a-part", "a-part1b", "a-partx"])
def test_an_ordinary_name_is_accepted(name: str) -> None:
    assert accepted(name)


@pytest.mark.parametrize(
    "name",
    [
        "", ".", "..", ".hidden", "-f", "_a", "a/b", "../a", "a b", "a\n", "a\0", "ä", "aé", "a\u0661", "a" * 64,
        "a-part1", "a-part007", "a.b-part12", "a\n-part1",
    ],
)
def test_what_could_mean_something_else_is_refused(name: str) -> None:
    assert not accepted(name)


@given(st.text(max_size=70))
def test_whatever_is_accepted_is_one_plain_path_component(name: str) -> None:
    if accepted(name):
        assert re.fullmatch("[ -~]{1,63}", name)
        assert not set(name) & set("/\\ :\"'$")
        assert name not in (".", "..")


@given(st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", fullmatch=True), st.integers(0, 300))
def test_no_volume_can_be_named_like_a_partition_of_another(name: str, number: int) -> None:
    assert not accepted(f"{name}-part{number}")


def test_a_refusal_of_an_endless_name_is_short() -> None:
    with pytest.raises(StoragedError) as caught:
        check_name("a" * 1_000_000)
    assert len(str(caught.value)) < 200
    assert caught.value.hint
