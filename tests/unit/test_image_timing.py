"""Making an encrypted image does not fail because QEMU's trial of the key derivation was too short to be timed."""

from __future__ import annotations

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.images.process import failure
from storaged.images.timing import trials

NOT_TIMED = failure("create", "qemu-img: /x/a.luks: Unable to get accurate CPU usage\n", 1)


def tried(failures: list[StoragedError | None]) -> int:
    """How often something is done that fails so."""
    number = 0
    for trial in trials():
        with trial:
            error = failures[min(number, len(failures) - 1)]
            number += 1
            if error is not None:
                raise error
    return number


def test_what_works_is_done_once() -> None:
    assert tried([None]) == 1


def test_what_could_not_be_timed_is_done_again() -> None:
    assert tried([NOT_TIMED, NOT_TIMED, None]) == 3


def test_qsd_says_the_same_words() -> None:
    assert tried([StoragedError(ErrorCode.QSD_REFUSED, "x", cause="Unable to get accurate CPU usage"), None]) == 2


@pytest.mark.parametrize("error", [
    failure("create", "qemu-img: /x/a.luks: Invalid parameter 'foo'", 1),
    StoragedError(ErrorCode.HOST_STUCK, "x", cause="Unable to get accurate CPU usage"),
])
def test_another_failure_is_told_at_once(error: StoragedError) -> None:
    with pytest.raises(StoragedError) as found:
        tried([error, None])
    assert found.value is error


def test_it_is_not_tried_for_ever() -> None:
    with pytest.raises(StoragedError) as found:
        tried([NOT_TIMED])
    assert found.value is NOT_TIMED
