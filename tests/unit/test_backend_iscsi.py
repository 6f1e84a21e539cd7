"""iSCSI sources: what libiscsi's users write, no secret left in it, and no LUN that would be another one."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.iscsi import BACKEND, DEFAULT_INITIATOR, PASSWORD
from storaged.errors import ErrorCode, StoragedError

IQN = "iqn.2026-01.test:t1"
FILE = {"password-file": "/secret"}
USERS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=60)
#: What libiscsi can read in a URI.
SECRETS = st.text(
    st.characters(exclude_characters="\0@?", exclude_categories=["Cs"]), min_size=1, max_size=40
)


def node(source: str, **options: str) -> dict[str, Any]:
    said = {key.replace("_", "-"): value for key, value in options.items()}
    return BACKEND.node(BACKEND.parse(source, said), read_only=False, options=said)


def refused(source: str, options: dict[str, str] | None = None) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, options or {})
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    ("source", "transport", "portal", "target", "lun"),
    [
        (f"iscsi://host/{IQN}/1", "tcp", "host:3260", IQN, 1),
        (f"iscsi://HOST.Example:03261/{IQN}/01", "tcp", "host.example:3261", IQN, 1),
        (f"iscsi://192.0.2.1:2/{IQN}/0", "tcp", "192.0.2.1:2", IQN, 0),
        (f"iscsi://[2001:DB8::0:1]/{IQN}/255", "tcp", "[2001:db8::1]:3260", IQN, 255),
        (f"iscsi://[fe80::1%25eth0]:3/{IQN}/1", "tcp", "[fe80::1%eth0]:3", IQN, 1),
        (f"iser://host/{IQN}/1", "iser", "host:3260", IQN, 1),
        ("iscsi://host/iqn.2026-01.test%3AT1/1", "tcp", "host:3260", "iqn.2026-01.test:T1", 1),
        ("iscsi://host/eui.02004567A425678D/1", "tcp", "host:3260", "eui.02004567A425678D", 1),
        ("iscsi://host/naa.52004567BA64678D/16684", "tcp", "host:3260", "naa.52004567BA64678D", 16684),
    ],
)
def test_a_spelling_is_a_portal_a_target_and_a_lun(
    source: str, transport: str, portal: str, target: str, lun: int
) -> None:
    assert find_backend(source) is BACKENDS["iscsi"]
    found = node(source)
    assert (found["transport"], found["portal"], found["target"], found["lun"]) == (transport, portal, target, lun)
    assert not found.keys() & {"user", "password-secret", "password"}
    assert BACKEND.requirements(BACKEND.parse(source, {}), {}).secrets == ()


@pytest.mark.parametrize(
    "source",
    [
        "iscsi:", "iscsi:x", "iscsi:/x", "iscsi://", "iscsi:///", "iscsi://host", f"iscsi://host/{IQN}",
        f"iscsi://host/{IQN}/", f"iscsi://host//{IQN}/1", f"iscsi://host/{IQN}/1/", f"iscsi://host/{IQN}/1/2",
        f"iscsi:///{IQN}/1", f"iscsi://:3260/{IQN}/1", f"iscsi://host:/{IQN}/1", f"iscsi://host:0/{IQN}/1",
        f"iscsi://host:65536/{IQN}/1", f"iscsi://host:3260,1/{IQN}/1", f"iscsi://127.1/{IQN}/1",
        f"iscsi://[::1/{IQN}/1", f"iscsi://ho st/{IQN}/1", f"iscsi://host\n/{IQN}/1", f"iscsi://host/{IQN}/1#x",
        f"iscsi://host/{IQN}/x", f"iscsi://host/{IQN}/-1", f"iscsi://host/{IQN}/+1", f"iscsi://host/{IQN}/0x1",
        f"iscsi://host/{IQN}/\u0661", f"iscsi://host/{IQN}/1 ", "iscsi://host/target/1", "iscsi://host/iqn./1",
        "iscsi://host/iqn.a b/1", "iscsi://host/iqn.a%2Fb/1", "iscsi://host/iqn.%00/1", "iscsi://host/iqn.%ff/1",
        "iscsi://host/iqn.%/1", "iscsi://host/eui.1/1", "iscsi://host/naa.1/1", f"iscsi://host/iqn.{'x' * 220}/1",
        "iscsi://host/\udcff/1", f"iscsi://host/{IQN}/1?", f"iscsi://host/{IQN}/1?x=y", f"iscsi://host/{IQN}/1?user=",
        f"iscsi://host/{IQN}/1?user=a&user=b", f"iscsi://host/{IQN}/1?iser", f"iscsi://host/{IQN}/1?header_digest=none",
        f"iscsi://a@host/{IQN}/1?user=a", f"iscsi://@host/{IQN}/1", f"iscsi://a b@host/{IQN}/1",
        f"iscsi://host/{IQN}/1?user={'x' * 256}",
    ],
)
def test_what_is_no_lun_is_refused(source: str) -> None:
    assert refused(source, FILE).code in (ErrorCode.INVALID_SOURCE, ErrorCode.INVALID_ARGUMENT)


@pytest.mark.parametrize("lun", [256, 300, 16383, 16384, 16385, 16639, 32768, 65535, 65537])
def test_a_number_that_would_be_another_lun_is_refused(lun: int) -> None:
    """tgtd takes 257 for LUN 1: libiscsi sends the number as it is, and its upper bits are no part of the LUN."""
    assert refused(f"iscsi://host/{IQN}/{lun}").code is ErrorCode.INVALID_SOURCE


@given(st.text(max_size=40))
def test_any_text_is_a_source_or_refused(rest: str) -> None:
    for source in (f"iscsi:{rest}", f"iser://{rest}/{IQN}/1"):
        try:
            location = BACKEND.parse(source, {})
        except StoragedError:
            refused(source)
        else:
            assert BACKEND.parse(location, {}) == location
            assert location.isascii()
            assert location.isprintable()


# Options


def test_what_the_source_leaves_out_options_say() -> None:
    whole = f"iscsi://host:3261/{IQN}/1"
    portal, target, lun = {"portal": "Host:3261"}, {"target": IQN}, {"lun": "01"}
    for source, said in (
        ("iscsi:", portal | target | lun),
        ("iscsi://host:3261", target | lun),
        ("iscsi://host:3261/", target | lun),
        (f"iscsi://host:3261/{IQN}", lun),
        (f"iscsi://host:3261/{IQN}/1", {}),
        (f"iscsi://host:3261/{IQN}/1", portal | target | lun),
    ):
        assert BACKEND.parse(source, said) == whole == BACKEND.parse(whole, said)
    assert BACKEND.parse("iser:", portal | target | lun) == whole.replace("iscsi:", "iser:")


@pytest.mark.parametrize(
    "option", [{"portal": "host"}, {"target": "iqn.2026-01.test:t2"}, {"lun": "2"}, {"user": "b", **FILE}]
)
def test_what_options_say_differently_is_refused(option: dict[str, str]) -> None:
    error = refused(f"iscsi://a@host:3261/{IQN}/1", {**FILE, **option})
    assert error.code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    "option", [{"portal": "a@b"}, {"portal": "h:1,1"}, {"target": "x"}, {"lun": "x"}, {"lun": ""}, {"user": ""}]
)
def test_what_options_say_wrongly_is_refused(option: dict[str, str]) -> None:
    said = {"portal": "host", "target": IQN, "lun": "1", **FILE, **option}
    assert refused("iscsi:", said).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("header-digest", "CRC32C"), ("header-digest", ""), ("request-timeout", "-1"), ("request-timeout", "86401"),
        ("request-timeout", "1.5"), ("initiator-name", ""), ("initiator-name", "host1"),
        ("initiator-name", "iqn.2026-01.test:a b"), ("initiator-name", f"iqn.{'x' * 220}"),
    ],
)
def test_a_value_that_an_option_cannot_have_is_refused(key: str, value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({key: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


def test_options_reach_qemu_by_its_names() -> None:
    found = node(f"iscsi://host/{IQN}/1")
    assert (found["initiator-name"], found["header-digest"], found["timeout"]) == (DEFAULT_INITIATOR, "none-crc32c", 0)
    found = node(
        f"iscsi://host/{IQN}/1", initiator_name="iqn.2026-01.test:me", header_digest="crc32c", request_timeout="7"
    )
    assert (found["initiator-name"], found["header-digest"], found["timeout"]) == ("iqn.2026-01.test:me", "crc32c", 7)


# Identity


def test_one_lun_is_one_disk_by_whatever_portal() -> None:
    sources = [
        f"iscsi://host/{IQN}/1", f"iscsi://192.0.2.1:3261/{IQN.upper().replace('IQN', 'iqn')}/001",
        f"iser://host/{IQN}/1", f"iscsi://bob@host/{IQN}/1",
    ]
    found = {
        BACKEND.identity(BACKEND.parse(source, FILE if "@" in source else {}), str)
        for source in sources
    }
    assert found == {f"iscsi:{IQN}/1"}
    assert BACKEND.identity(BACKEND.parse(f"iscsi://host/{IQN}/2", {}), str) not in found


# Users and secrets


@given(USERS)
@example("iqn.1993-08.org.debian:01:abc")
@example("a%41@b/c?d&e#f")
def test_every_user_can_be_said(user: str) -> None:
    said = {"user": user, **FILE}
    location = BACKEND.parse(f"iscsi://host/{IQN}/1", said)
    assert BACKEND.parse(location, FILE) == location == BACKEND.parse(location, said)
    assert BACKEND.without_secrets(location) == (location, {})
    found = BACKEND.node(location, read_only=False, options=said)
    assert (found["user"], found["password-secret"]) == (user, PASSWORD)
    (secret,) = BACKEND.requirements(location, said).secrets
    assert (secret.id, secret.option, secret.encoded) == (PASSWORD, "password-file", False)
    assert secret.option in BACKEND.secret_options


def test_a_user_needs_a_secret_and_a_secret_a_user() -> None:
    assert refused(f"iscsi://bob@host/{IQN}/1").code is ErrorCode.INVALID_ARGUMENT
    assert refused(f"iscsi://host/{IQN}/1", {"user": "bob"}).code is ErrorCode.INVALID_ARGUMENT
    assert refused(f"iscsi://host/{IQN}/1", FILE).code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("source", "clean", "user", "secret"),
    [
        ("bob%secret", "bob@host", "bob", "secret"),
        ("bob:secret", "bob@host", "bob", "secret"),
        ("bob%se:c%r/et", "bob@host", "bob", "se:c%r/et"),
        ("bob:%70", "host", "bob:", "70"),
        ("iqn.1993-08.test:01:bob%secret", "host", "iqn.1993-08.test:01:bob", "secret"),
    ],
)
def test_a_secret_in_the_source_is_what_libiscsi_reads(source: str, clean: str, user: str, secret: str) -> None:
    without, taken = BACKEND.without_secrets(f"iscsi://{source}@host/{IQN}/1")
    assert taken == {"password-file": secret}
    assert without.startswith(f"iscsi://{clean}/{IQN}/1")
    assert BACKEND.without_secrets(without) == (without, {})
    assert node(without, password_file="-")["user"] == user


@given(USERS.filter(lambda user: not set("%@?") & set(user)), SECRETS)
def test_every_secret_is_taken_out(user: str, secret: str) -> None:
    without, taken = BACKEND.without_secrets(f"iscsi://{user}%{secret}@host/{IQN}/1")
    assert taken == {"password-file": secret}
    assert node(without, password_file="-")["user"] == user


SHOWN = "Hush"


@pytest.mark.parametrize(
    "source",
    [
        f"iscsi://bob%{SHOWN}@host/{IQN}/1", f"iser://bob:{SHOWN}@host/{IQN}/1", f"iscsi://bob%a@{SHOWN}@host/{IQN}/1",
        f"iscsi://bob%{SHOWN}?x@host/{IQN}/1", f"iscsi://bob%a/b?{SHOWN}@host/{IQN}/1", f"iscsi://%{SHOWN}@host/{IQN}/1",
        f"iscsi://bob%{SHOWN}\udcff@host/{IQN}/1", f"iscsi:bob%{SHOWN}@host/{IQN}/1", f"iscsi:/bob%{SHOWN}@host/{IQN}",
        f"iscsi://bob%{SHOWN}@", f"iscsi://bob%{SHOWN}@host#", f"iscsi://bob%{SHOWN}@host/{IQN}/x",
        f"iscsi://host/{IQN}/1?target_user=a&target_password={SHOWN}", f"iscsi://host/{IQN}/1?target_password={SHOWN}",
        f"iscsi://host/{IQN}/1?target_password=a@{SHOWN}", f"iscsi://host/{IQN}/1?target_password=a?{SHOWN}",
        f"iscsi://bob%a@host/{IQN}/1?target_user=a&target_password={SHOWN}&x=y",
    ],
)
def test_no_secret_is_in_a_refusal_nor_left_in_the_source(source: str) -> None:
    error = refused(source, FILE)
    assert SHOWN not in f"{error} {error.cause} {error.hint}"
    without, _ = BACKEND.without_secrets(source)
    assert SHOWN not in without
    assert BACKEND.without_secrets(without) == (without, {})


@pytest.mark.parametrize(
    "source", [f"iscsi://bob%@host/{IQN}/1", f"iscsi://%a@host/{IQN}/1", f"iscsi://bob%a@b@host/{IQN}/1"]
)
def test_what_libiscsi_would_read_in_another_way_stays_refused(source: str) -> None:
    """With an empty name or secret it would log in without."""
    without, taken = BACKEND.without_secrets(source)
    assert taken == {}
    assert refused(without, FILE).code is ErrorCode.INVALID_SOURCE


def test_a_target_cannot_be_asked_for_a_secret_of_its_own() -> None:
    without, _ = BACKEND.without_secrets(f"iscsi://a%b@host/{IQN}/1?target_user=t&target_password=p")
    assert refused(without, FILE).code is ErrorCode.UNSUPPORTED


@given(st.text(max_size=60))
def test_taking_secrets_out_never_fails_and_is_done_at_once(text: str) -> None:
    for source in (text, f"iscsi:{text}", f"iscsi://{text}"):
        without, _ = BACKEND.without_secrets(source)
        assert BACKEND.without_secrets(without) == (without, {})
