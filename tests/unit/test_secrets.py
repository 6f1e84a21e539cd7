"""Where secrets come from, and what a request must bring."""

from __future__ import annotations

from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import secrets
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec
from storaged.supervisor.secrets import check_secrets, secrets_apart


def spec(key_file: str, *, persist: bool = False) -> VolumeSpec:
    return VolumeSpec(
        name="a", source="/a", format=Format.LUKS, options={"key-file": key_file}, persist=persist
    )


@pytest.mark.parametrize("value", ["/k", "credential:a", "credential:a.b-c", "-"])
def test_a_place_is_a_path_a_credential_or_what_was_given(value: str) -> None:
    secrets.check_reference("key-file", value)


@pytest.mark.parametrize("value", ["", "k", "./k", "credential:", "credential:..", "credential:a/b", "credential:a\n"])
def test_anything_else_may_be_the_secret_itself_and_is_not_said_again(value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        check_secrets(spec(value), {})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert not value or repr(value) not in str(caught.value)
    assert caught.value.volume == "a"


@pytest.mark.parametrize(
    ("wanted", "given"),
    [
        (spec("-"), {}), (spec("-"), {"key-file": b""}), (spec("-"), {"key-file": bytes(secrets.LONGEST + 1)}),
        (spec("/k"), {"key-file": b"x"}), (spec("-"), {"key-file": b"x", "password-file": b"x"}),
        (spec("-", persist=True), {"key-file": b"x"}),
    ],
)
def test_what_is_said_and_what_is_given_must_fit(wanted: VolumeSpec, given: dict[str, bytes]) -> None:
    with pytest.raises(StoragedError) as caught:
        check_secrets(wanted, given)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


def test_a_source_of_this_host_holds_no_secret() -> None:
    assert secrets_apart(spec("-"), {"key-file": b"x"}) == (spec("-"), {"key-file": b"x"})


def test_what_was_given_is_kept_for_root_alone_and_read_again(tmp_path: Path) -> None:
    secrets.keep(str(tmp_path / "volume"), {"key-file": b"\0x\n"})
    assert secrets.read("key-file", "-", str(tmp_path / "volume")) == b"\0x\n"
    kept = Path(secrets.place_of("key-file", "-", str(tmp_path / "volume")))
    assert kept.stat().st_mode & 0o777 == 0o600
    assert kept.parent.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("content", [b"", bytes(secrets.LONGEST + 1), None])
def test_what_is_no_secret_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "k").write_bytes(content)
    with pytest.raises(StoragedError) as caught:
        secrets.read("key-file", str(tmp_path / "k"), "/nosuch")
    assert caught.value.code is ErrorCode.OPEN_FAILED
    assert "key-file" in caught.value.message
    assert caught.value.hint


def test_a_credential_is_in_the_directory_that_systemd_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CREDENTIALS_DIRECTORY", raising=False)
    with pytest.raises(StoragedError) as caught:
        secrets.read("key-file", "credential:k", "/nosuch")
    assert "LoadCredential=k" in caught.value.hint
    (tmp_path / "k").write_bytes(b"x")
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    assert secrets.read("key-file", "credential:k", "/nosuch") == b"x"
