"""storaged.toml is understood or refused with a place, never half read."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.configcheck import parse_config

PATH = "/etc/storaged/storaged.toml"


def refused(text: bytes) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        parse_config(text, PATH)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert PATH in str(caught.value)
    return caught.value


def test_an_empty_file_is_the_defaults() -> None:
    assert parse_config(b"", PATH) == Config()
    assert parse_config(b"# nothing\n[qsd]\n", PATH) == Config()


def test_every_key_is_taken_over() -> None:
    config = parse_config(
        b'attach_timeout = 5\ndetach_timeout = 0.5\nsnapshot_dir = "/fast"\nsocket_group = "disk"\n'
        b'log_level = "debug"\n[qsd]\nbinary = "/opt/qsd"\n',
        PATH,
    )
    assert (config.attach_timeout, config.detach_timeout) == (5.0, 0.5)
    assert (config.snapshot_dir, config.socket_group, config.log_level) == ("/fast", "disk", "debug")
    assert config.qsd.binary == "/opt/qsd"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (b"attach_timeuot = 5", "attach_timeuot"),
        (b"[qsd]\npath = '/x'", "path"),
        (b"attach_timeout = '5'", "attach_timeout"),
        (b"log_level = 3", "log_level"),
        (b"qsd = 'x'", "qsd"),
        (b"a = = b", f"{PATH}:1: "),
        (b"log_level = 'info'\nlog_level = 'debug'", "overwrite"),
    ],
)
def test_what_is_wrong_is_named(text: bytes, what: str) -> None:
    assert what in str(refused(text))


@pytest.mark.parametrize("value", ["0", "0.0", "-1", "nan", "inf", "-inf", "86400.5", "1e300"])
@pytest.mark.parametrize("key", ["attach_timeout", "detach_timeout"])
def test_a_timeout_is_above_0_and_at_most_a_day(key: str, value: str) -> None:
    assert key in str(refused(f"{key} = {value}".encode()))


@pytest.mark.parametrize("level", ["", "INFO", "trace"])
def test_a_log_level_is_a_known_one(level: str) -> None:
    assert "log_level" in str(refused(f'log_level = "{level}"'.encode()))


def test_text_that_is_not_utf_8_is_refused() -> None:
    refused(b'log_level = "\xff"')


def test_a_relative_snapshot_dir_is_refused() -> None:
    refused(b'snapshot_dir = "fast"')


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode))
def test_any_text_is_a_configuration_or_is_refused(text: bytes) -> None:
    try:
        fine = isinstance(parse_config(text, PATH), Config)
    except StoragedError as error:
        fine = error.code is ErrorCode.INVALID_ARGUMENT
    assert fine
