"""A failure says what, where, why and what to do."""

from __future__ import annotations

import re

import pytest

from storaged.errors import ErrorCode, StoragedError


@pytest.mark.parametrize("code", ErrorCode)
def test_a_code_is_short_lower_case_text_that_follows_its_name(code: ErrorCode) -> None:
    assert re.fullmatch("[a-z]+(-[a-z]+)*", code)
    assert code.value == code.name.lower().replace("_", "-")


@pytest.mark.parametrize(
    ("details", "text"),
    [
        ({}, "no"),
        ({"volume": "web1"}, "volume web1: no"),
        ({"volume": "web1", "step": "open"}, "volume web1: no (at step open)"),
        ({"cause": "EIO"}, "no: EIO"),
        ({"volume": "web1", "step": "open", "cause": "EIO", "hint": "h"}, "volume web1: no (at step open): EIO"),
    ],
)
def test_it_reads_as_one_line(details: dict[str, str], text: str) -> None:
    code = ErrorCode.INTERNAL
    assert str(StoragedError(code, "no", **details)) == text


def test_what_is_not_known_where_it_happened_is_filled_in_later_and_never_overwritten() -> None:
    error = StoragedError(ErrorCode.TIMEOUT, "no", step="open")
    assert error.at(volume="web1", step="export") is error
    assert (error.volume, error.step) == ("web1", "open")
    error.at(volume="other", step="other")
    assert (error.volume, error.step) == ("web1", "open")


def test_it_names_the_users_in_order() -> None:
    assert StoragedError(ErrorCode.DEVICE_IN_USE, "no", users=["b", "a"]).users == ("b", "a")
    assert StoragedError(ErrorCode.DEVICE_IN_USE, "no").users == ()
