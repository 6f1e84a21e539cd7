"""What QEMU's own texts (of 7.2.22 where nothing else is said) become for a user."""

from __future__ import annotations

import pytest

from storaged.errors import ErrorCode
from storaged.qsd.refusals import explain

C = ErrorCode


OPENING = [
    ('Failed to get "write" lock', C.SOURCE_IN_USE),
    ('Failed to get shared "write" lock', C.SOURCE_IN_USE),
    ('Failed to get "consistent read" lock', C.SOURCE_IN_USE),
    ('Could not open backing file: Failed to get shared "write" lock', C.SOURCE_IN_USE),
    ("Image is not in qcow2 format", C.WRONG_FORMAT),
    ("Image not in QED format", C.WRONG_FORMAT),
    ("Image not in qcow format", C.WRONG_FORMAT),
    ("Image not in Parallels format", C.WRONG_FORMAT),
    ("invalid VMDK image descriptor", C.WRONG_FORMAT),
    ("invalid VPC image", C.WRONG_FORMAT),
    ("Could not open '/nosuch': No such file or directory", C.SOURCE_MISSING),
    ("Could not open '/passwords.img': No such file or directory", C.SOURCE_MISSING),
    ("Unknown driver 'rbd'", C.UNSUPPORTED),
    ("Parameter 'driver' does not accept value 'vitastor'", C.UNSUPPORTED),
    ("Parameter 'driver' does not accept value 'nosuch'", C.UNSUPPORTED),
    ("Parameter 'aio' does not accept value 'io_uring'", C.UNSUPPORTED),
    ("Invalid password, cannot unlock any keyslot", C.OPEN_FAILED),
    ("Could not open '/images/a': Permission denied", C.OPEN_FAILED),
    ("Could not open '/images/a': Read-only file system", C.OPEN_FAILED),
    ("Could not open '/images': Is a directory", C.OPEN_FAILED),
    ("Parameter 'key-secret' is required for cipher", C.OPEN_FAILED),
]


@pytest.mark.parametrize(("text", "code"), OPENING)
def test_a_refusal_to_open_has_a_code_and_keeps_the_words_of_qemu(text: str, code: ErrorCode) -> None:
    error = explain("blockdev-add", text)
    assert error.code is code
    assert error.cause == text
    assert error.message


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("Image format driver does not support resize", C.UNSUPPORTED),
        ("No space left on device", C.NO_SPACE),
        ("Block export id 'export' is already in use", C.QSD_REFUSED),
        ("The new size must be a multiple of 512", C.QSD_REFUSED),
    ],
)
def test_so_has_a_refusal_of_another_command(text: str, code: ErrorCode) -> None:
    error = explain("block_resize", text)
    assert error.code is code
    assert error.cause == text


def test_what_nobody_knows_names_the_command() -> None:
    assert "block-export-add" in explain("block-export-add", "something new").message
    assert explain("blockdev-add", "something new").code is C.OPEN_FAILED
    assert explain("blockdev-add", "").code is C.OPEN_FAILED


@pytest.mark.parametrize("name", ["image", "password.img"])
def test_the_name_of_a_file_does_not_count(name: str) -> None:
    error = explain("blockdev-add", f"Could not open '/images/{name}': Permission denied")
    assert "passphrase" not in error.message
    assert "permissions" in error.hint
