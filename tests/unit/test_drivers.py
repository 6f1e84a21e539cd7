"""What a qemu-storage-daemon says of its block drivers, and what that becomes for a user."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest

from storaged.backends import BACKENDS
from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.drivers import drivers_of, lack_of, read_answers
from storaged.qsd.refusals import explain

GOOD = "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap"
ASKED = BACKENDS.keys() - {"tftp"}


def answers(**texts: str) -> str:
    """What QSD writes to its monitor, where of some drivers it says other things."""
    lines = [{"QMP": {"version": {}}}, {"return": {}}]
    lines += [{"id": name, "error": {"class": "GenericError", "desc": texts.get(name, GOOD)}} for name in ASKED]
    return "".join(f"{json.dumps(line)}\n" for line in [*lines, {"return": {}}])


def test_a_driver_that_is_there_lacks_nothing() -> None:
    assert read_answers(answers()) == dict.fromkeys(ASKED)


@pytest.mark.parametrize("name", sorted(ASKED))
@pytest.mark.parametrize("text", ["Unknown driver '{}'", "Parameter 'driver' does not accept value '{}'"])
def test_one_that_lacks_is_the_same_failure_here_and_at_an_attach(name: str, text: str) -> None:
    found = read_answers(answers(**{name: text.format(name)}))
    lack = found.pop(name)
    assert lack is not None
    assert lack.code is ErrorCode.UNSUPPORTED
    assert name in lack.message
    assert lack.hint
    assert set(found.values()) == {None}
    attach = explain("blockdev-add", text.format(name))
    assert (attach.code, attach.message, attach.hint) == (lack.code, lack.message, lack.hint)


@pytest.mark.parametrize("name", sorted(ASKED - {"file", "host_device", "nbd"}))
def test_the_package_that_brings_a_module_is_named(name: str) -> None:
    lack = lack_of(f"Unknown driver '{name}'")
    assert lack is not None
    assert "qemu-block-extra" in lack.hint


def test_what_is_refused_for_another_reason_is_not_a_driver_that_lacks() -> None:
    assert lack_of("Parameter 'driver' does not accept value 'qcow'") is None
    assert lack_of("Parameter 'aio' does not accept value 'io_uring'") is None


def program(place: Path, text: str) -> str:
    """A script."""
    path = place / "qsd"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


@pytest.mark.parametrize("text", ["exit 1", "echo no json", "echo '{}'; cat >/dev/null"])
def test_a_program_that_does_not_answer_is_no_qsd(tmp_path: Path, text: str) -> None:
    with pytest.raises(StoragedError) as caught:
        drivers_of(program(tmp_path, text))
    assert caught.value.code is ErrorCode.QSD_MISSING
    assert caught.value.hint


def test_a_program_is_asked_once_and_another_in_its_place_again(tmp_path: Path) -> None:
    (tmp_path / "good").write_text(answers())
    asked = f"echo x >>{tmp_path}/asked; cat >/dev/null; cat {tmp_path}/good"
    first = program(tmp_path, asked)
    assert drivers_of(first)["rbd"] is None
    (tmp_path / "good").write_text(answers(rbd="Unknown driver 'rbd'"))
    assert drivers_of(first)["rbd"] is None
    assert (tmp_path / "asked").read_text() == "x\n"
    assert drivers_of(program(tmp_path, asked + "; # another"))["rbd"] is not None
