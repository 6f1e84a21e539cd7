"""Sizes as people write them, and as they are shown."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import MAX_SIZE, format_size, parse_size

UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40, "P": 1 << 50}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1), ("1048576", 1 << 20), ("512M", 512 << 20), ("10G", 10 << 30), ("10g", 10 << 30), ("3GiB", 3 << 30),
        ("3GB", 3 << 30), ("2T", 2 << 40), ("1P", 1 << 50), (" 4k ", 4096), ("512B", 512), (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_a_size_is_understood(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "G", "0", "0G", "-1", "+1", "1.5G", "1,5G", "1e3", "0x10", "1 G", "1GG", "1E", "10Gb/s", "1\0", "nan",
        "٣", "²", str(MAX_SIZE + 1), "8192P", "99999999999999999999P",
        pytest.param("9" * 5000, id="9…"), pytest.param("1\u212a", id="KELVIN SIGN"),
    ],
)
def test_what_is_no_usable_size_is_refused(text: str) -> None:
    with pytest.raises(StoragedError) as caught:
        parse_size(text)
    assert caught.value.code is ErrorCode.INVALID_SIZE
    assert caught.value.hint


@given(st.text(st.sampled_from("0123456789KMGTPEkgib .-+_")))
def test_any_text_is_a_size_or_is_refused(text: str) -> None:
    try:
        fine = 0 < parse_size(text) <= MAX_SIZE
    except StoragedError as error:
        fine = error.code is ErrorCode.INVALID_SIZE
    assert fine


@given(st.integers(1, 1 << 40), st.sampled_from(sorted(UNITS)))
def test_a_unit_is_a_power_of_1024(number: int, unit: str) -> None:
    if number * UNITS[unit] <= MAX_SIZE:
        assert parse_size(f"{number}{unit}") == number * UNITS[unit]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0B"), (1, "1B"), (1023, "1023B"), (1024, "1K"), (1536, "1.5K"), (1610612736, "1.5G"), (10 << 30, "10G"),
        (1 << 40, "1T"), (5 << 50, "5P"), (1 << 63, "8192P"),
    ],
)
def test_a_size_is_shown_with_a_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1023), st.sampled_from(sorted(UNITS)))
def test_a_round_size_is_shown_as_it_was_written(number: int, unit: str) -> None:
    assert parse_size(format_size(number * UNITS[unit])) == number * UNITS[unit]


@given(st.integers(0, MAX_SIZE))
def test_a_size_is_shown_shortly_and_nearly(size: int) -> None:
    shown = format_size(size)
    assert len(shown) <= 6
    number = float(shown[:-1]) * UNITS[shown[-1].removesuffix("B")]
    assert abs(number - size) <= size / 1000
