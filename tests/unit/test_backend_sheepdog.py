"""Sheepdog is refused with what can be done instead."""

from __future__ import annotations

import pytest

from storaged.backends import BACKENDS, find_backend
from storaged.errors import ErrorCode, StoragedError


@pytest.mark.parametrize(
    "source", ["sheepdog:vdi", "sheepdog://host:7000/vdi", "sheepdog+tcp://host/vdi", "sheepdog+unix:///vdi?socket=/s"]
)
def test_the_refusal_says_since_when_and_the_ways_out(source: str) -> None:
    with pytest.raises(StoragedError) as caught:
        find_backend(source)
    assert caught.value.code is ErrorCode.UNSUPPORTED
    assert "6.1" in caught.value.cause
    assert "iscsi://" in caught.value.hint
    assert "nbd://" in caught.value.hint


def test_no_backend_is_offered_for_it() -> None:
    assert not [name for name in BACKENDS if "sheepdog" in name]
