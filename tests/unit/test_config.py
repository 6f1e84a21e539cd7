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
        b'log_level = "debug"\n[qsd]\nbinary = "/opt/qsd"\n[metrics]\nlisten = "10.0.0.1:80"\nweb_config = "/w"\n',
        PATH,
    )
    assert (config.attach_timeout, config.detach_timeout) == (5.0, 0.5)
    assert (config.snapshot_dir, config.socket_group, config.log_level) == ("/fast", "disk", "debug")
    assert config.qsd.binary == "/opt/qsd"
    assert (config.metrics.address, config.metrics.web_config) == (("10.0.0.1", 80), "/w")


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


@pytest.mark.parametrize(
    ("listen", "address"),
    [("127.0.0.1:9929", ("127.0.0.1", 9929)), ("127.1.2.3:1", ("127.1.2.3", 1)), ("[::1]:65535", ("::1", 65535))],
)
def test_metrics_are_served_on_localhost_without_more(listen: str, address: tuple[str, int]) -> None:
    config = parse_config(f'[metrics]\nlisten = "{listen}"'.encode(), PATH)
    assert config.metrics.address == address


@pytest.mark.parametrize(
    "listen",
    [
        "", ":9929", "9929", "127.0.0.1", "127.0.0.1:", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:x", "localhost:1",
        "::1:80", "[127.0.0.1]:80", "[::1]", "127.0.0.1:²", "127.0.0.1:-1",
    ],
)
def test_an_address_that_is_none_is_refused(listen: str) -> None:
    assert "listen" in str(refused(f'[metrics]\nlisten = "{listen}"\nweb_config = "/w"'.encode()))


@pytest.mark.parametrize("listen", ["0.0.0.0:9929", "[::]:9929", "192.0.2.1:9929"])
def test_metrics_are_for_all_only_where_somebody_has_said_so(listen: str) -> None:
    assert "web_config" in str(refused(f'[metrics]\nlisten = "{listen}"'.encode()))
    assert "web_config" in str(refused(f'[metrics]\nlisten = "{listen}"\nweb_config = "web.yml"'.encode()))
    assert parse_config(f'[metrics]\nlisten = "{listen}"\nweb_config = "/web.yml"'.encode(), PATH).metrics.listen


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=60).map(str.encode))
def test_any_text_is_a_configuration_or_is_refused(text: bytes) -> None:
    try:
        fine = isinstance(parse_config(text, PATH), Config)
    except StoragedError as error:
        fine = error.code is ErrorCode.INVALID_ARGUMENT
    assert fine
