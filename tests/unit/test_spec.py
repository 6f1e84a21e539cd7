"""Wishes that make no sense together are refused before anything is touched."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import COMMON_OPTIONS, DEFAULTS, VolumeSpec, check_spec, without_defaults

KNOWN = frozenset({"aio", "open-timeout", "reconnect-delay"})


def spec(**wishes: Any) -> VolumeSpec:
    options = wishes.pop("options", {})
    return VolumeSpec(**{"name": "web1", "source": "/images/web1", "options": options, **wishes})


@pytest.mark.parametrize(
    "wishes",
    [
        {},
        {"format": Format.QCOW2, "options": {"backing": "allow:/images:/base.img"}},
        {"format": Format.LUKS, "options": {"key-file": "/etc/key"}},
        {"read_only": True, "options": {"cache": "none", "aio": "native"}},
        {"snapshot": True, "snapshot_dir": "/fast", "options": {"snapshot-size": "4G"}},
        {"options": {"logical-block-size": "4096"}},
        *({"options": {"cache": mode}} for mode in ("none", "writeback", "writethrough", "directsync", "unsafe")),
    ],
    ids=str,
)
def test_what_makes_sense_is_accepted(wishes: dict[str, Any]) -> None:
    check_spec(spec(**wishes), KNOWN)


@pytest.mark.parametrize(
    "wishes",
    [
        {"options": {"no-such": "1"}},
        {"options": {"Cache": "none"}},
        {"options": {"backing": "/images"}},
        {"options": {"backing": "allow:"}},
        {"options": {"backing": "allow:::"}},
        {"options": {"backing": ""}},
        {"options": {"backing": "allow:images"}},
        {"options": {"backing": "allow:/images:other"}},
        {"options": {"cache": "fast"}},
        {"options": {"cache": ""}},
        {"options": {"logical-block-size": "1024"}},
        {"options": {"logical-block-size": "512 "}},
        {"format": Format.LUKS},
        {"format": Format.QCOW2, "options": {"encrypt": "luks"}},
        {"format": Format.QCOW2, "options": {"encrypt": "aes", "key-file": "/k"}},
        {"format": Format.RAW, "options": {"encrypt": "luks", "key-file": "/k"}},
        {"format": Format.QCOW2, "options": {"key-file": "/k"}},
        {"options": {"discard": "on"}},
        {"options": {"detect-zeroes": "yes"}},
        {"options": {"detect-zeroes": "unmap", "discard": "ignore"}},
        {"options": {"key-file": "/etc/key"}},
        {"snapshot": True, "read_only": True},
        {"snapshot_dir": "/fast"},
        {"options": {"snapshot-size": "4G"}},
        {"snapshot": True, "snapshot_dir": "fast"},
        {"source": "/images/a\0b"},
        {"options": {"aio": "thr\0eads"}},
        {"snapshot": True, "snapshot_dir": "/fast\0"},
        {"format": Format.LUKS, "options": {"key-file": "/etc/key\0"}},
        {"source": "/images/\udcff"},
        {"options": {"aio": "\udcff"}},
        {"options": {"\udcff": "1"}},
        {"options": {"backing": "allow:/\udcff"}},
        {"options": {"backing": "allow:\udcff"}},
        {"options": {"cache": "\udcff"}},
        {"snapshot": True, "snapshot_dir": "/\ud800"},
        {"snapshot": True, "snapshot_dir": "\ud800"},
        {"format": Format.LUKS, "options": {"key-file": "/etc/\udcff"}},
    ],
    ids=str,
)
def test_what_makes_none_is_refused_with_the_volume_and_a_hint(wishes: dict[str, Any]) -> None:
    with pytest.raises(StoragedError) as caught:
        check_spec(spec(**wishes), KNOWN)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.volume == "web1"
    assert caught.value.hint
    assert f"{caught.value} {caught.value.hint}".encode()  # it can be logged, and sent to the client


def test_the_name_is_checked_too() -> None:
    with pytest.raises(StoragedError) as caught:
        check_spec(spec(name="../web1"), KNOWN)
    assert caught.value.code is ErrorCode.INVALID_NAME


@pytest.mark.parametrize("option", sorted({*COMMON_OPTIONS, "aio"}))
def test_a_refusal_of_an_option_names_those_there_are(option: str) -> None:
    with pytest.raises(StoragedError) as caught:
        check_spec(spec(options={"no-such": "1"}), KNOWN)
    assert option in caught.value.hint


def test_an_option_of_another_backend_is_unknown() -> None:
    with pytest.raises(StoragedError):
        check_spec(spec(options={"aio": "threads"}), frozenset())


def test_backing_is_a_list_of_places() -> None:
    assert spec().allowed_backing == []
    assert spec(options={"backing": "allow:/a:/b c:"}).allowed_backing == ["/a", "/b c"]


def test_the_logical_block_size_is_512_unless_said() -> None:
    assert spec().logical_block_size == 512
    assert spec(options={"logical-block-size": "4096"}).logical_block_size == 4096


@pytest.mark.parametrize(
    ("wishes", "writes"),
    [({}, True), ({"read_only": True}, False), ({"snapshot": True}, False)],
)
def test_a_snapshot_or_read_only_volume_does_not_write_to_its_source(wishes: dict[str, Any], writes: bool) -> None:
    assert spec(**wishes).writes_source is writes


def test_the_format_is_raw_when_nothing_was_said() -> None:
    assert spec().format is Format.RAW


def test_two_requests_mean_the_same_when_nothing_differs() -> None:
    assert spec(options={"cache": "none", "aio": "threads"}) == spec(options={"aio": "threads", "cache": "none"})
    for change in ({"source": "/b"}, {"read_only": True}, {"persist": True}, {"options": {"cache": "none"}}):
        assert msgspec.structs.replace(spec(), **change) != spec()


def test_letters_of_all_kinds_are_welcome() -> None:
    check_spec(spec(source="/images/ä \U0001f4be", snapshot=True, snapshot_dir="/schnell/größer"), KNOWN)


def test_a_default_that_is_said_means_the_same_as_one_that_is_not() -> None:
    assert without_defaults(spec(options=dict(DEFAULTS)), {}) == spec()
    for key, value in DEFAULTS.items():
        assert without_defaults(spec(options={key: value, "snapshot-size": "1G"}), {}) == spec(
            options={"snapshot-size": "1G"}
        )
        check_spec(spec(options={key: value}), KNOWN)


@pytest.mark.parametrize(
    "options",
    [
        {}, {"cache": "none"}, {"cache": ""}, {"aio": "native", "cache": "none"}, {"logical-block-size": "4096"},
        {"no-such": "writeback"}, {"cache": "threads"},
    ],
    ids=str,
)
def test_what_is_no_default_stays(options: dict[str, str]) -> None:
    wanted = spec(options=options, persist=True, read_only=True)
    assert without_defaults(wanted, {}) == wanted


def test_leaving_defaults_out_changes_nothing_in_what_was_given() -> None:
    wanted = spec(options=dict(DEFAULTS))
    without_defaults(wanted, {})
    assert wanted.options == DEFAULTS


@pytest.mark.parametrize(
    ("wishes", "holds"),
    [
        ({"format": "raw"}, False),
        ({"format": "luks", "options": {"key-file": "/k"}}, False),
        ({"format": "qcow2"}, True),
        ({"format": "raw", "snapshot": True}, True),
        ({"format": "qcow2", "read_only": True}, False),
        ({"format": "qcow2", "options": {"cache": "writethrough"}}, False),
        ({"format": "qcow2", "options": {"cache": "unsafe"}}, True),
    ],
)
def test_qsd_may_hold_acknowledged_writes_in_memory_where_it_keeps_tables_of_the_image(
    wishes: dict[str, object], holds: bool
) -> None:
    spec = msgspec.convert({"name": "a", "source": "/a", **wishes}, VolumeSpec)
    assert spec.keeps_writes_in_memory is holds


class OlderSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a daemon without profiles reads."""

    name: str
    source: str
    format: Format = Format.RAW
    transport: str = "auto"
    read_only: bool = False
    snapshot: bool = False
    snapshot_dir: str | None = None
    options: dict[str, str] = {}
    persist: bool = False


@pytest.mark.parametrize("wishes", [
    {}, {"format": Format.QCOW2, "read_only": True, "persist": True, "transport": "nbd", "options": {"cache": "none"}},
    {"snapshot": True, "snapshot_dir": "/fast"},
])
def test_an_older_daemon_reads_what_has_no_profile(wishes: dict[str, Any]) -> None:
    stored = msgspec.json.encode(spec(**wishes))
    older = msgspec.json.decode(stored, type=OlderSpec)
    assert {key: getattr(older, key) for key in OlderSpec.__struct_fields__} == {
        key: getattr(spec(**wishes), key) for key in OlderSpec.__struct_fields__
    }
    assert msgspec.json.decode(stored, type=VolumeSpec) == spec(**wishes)
