"""NBD sources: every spelling means what QEMU and the NBD project say, and nothing else gets through."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import NO_REQUIREMENTS
from storaged.backends.nbd import BACKEND, LONGEST_DELAY
from storaged.errors import ErrorCode, StoragedError

#: What can be in a name of an export, or in a path.
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
PATHS = TEXT.map(lambda text: f"/{text}").filter(lambda text: len(text.encode()) <= 107)


CERTIFICATES = {"tls-certificates": "/pki"}
UNDERSCORED = {"tls_certificates": "/pki"}
KEY = {"tls-psk-file": "/run/key"}


def node(source: str, **options: str) -> dict[str, Any]:
    said = {key.replace("_", "-"): value for key, value in options.items()}
    BACKEND.check_options(said)
    return BACKEND.node(BACKEND.parse(source, said), read_only=False, options=said)


def refused(source: str, options: Mapping[str, str] | None = None) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, options or {})
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


def inet(host: str, port: str = "10809") -> dict[str, Any]:
    return {"type": "inet", "host": host, "port": port, "keep-alive": True}


@pytest.mark.parametrize(
    ("source", "server", "export"),
    [
        ("nbd://host", inet("host"), ""),
        ("nbd://host/", inet("host"), ""),
        ("nbd+tcp://host:1/x", inet("host", "1"), "x"),
        ("nbd://HOST.Example:010809/X", inet("host.example"), "X"),
        ("nbd://192.0.2.1:2/a/b", inet("192.0.2.1", "2"), "a/b"),
        ("nbd://host//x", inet("host"), "/x"),
        ("nbd://[2001:DB8::0:1]/x", inet("2001:db8::1"), "x"),
        ("nbd://[fe80::1%25eth0]:3/x", inet("fe80::1%eth0", "3"), "x"),
        ("nbd://host/%C3%A4%20%3F%23%25:@", inet("host"), "ä ?#%:@"),
        ("nbd://host/a+b", inet("host"), "a+b"),
        ("nbd+unix:///?socket=/s", {"type": "unix", "path": "/s"}, ""),
        ("nbd+unix:///x%2Fy?socket=/a%26b%3Fc", {"type": "unix", "path": "/a&b?c"}, "x/y"),
        ("nbd+unix:///x?socket=/a b=c?d", {"type": "unix", "path": "/a b=c?d"}, "x"),
        ("nbd:host:1", inet("host", "1"), ""),
        ("nbd:host:1:exportname=x", inet("host", "1"), "x"),
        ("nbd:host:1:exportname=:exportname=%41 y", inet("host", "1"), ":exportname=%41 y"),
        ("nbd:[::1]:1:exportname=x", inet("::1", "1"), "x"),
        ("nbd:unix:/a:b?c", {"type": "unix", "path": "/a:b?c"}, ""),
        ("nbd:unix:/a:exportname=x", {"type": "unix", "path": "/a"}, "x"),
    ],
)
def test_a_spelling_is_a_server_and_an_export(source: str, server: dict[str, Any], export: str) -> None:
    assert find_backend(source) is BACKENDS["nbd"]
    found = node(source)
    assert found["server"] == server
    assert found["export"] == export


@pytest.mark.parametrize(
    "source",
    [
        "nbd:", "nbd:host", "nbd:host:", "nbd::1", "nbd:host:0", "nbd:host:65536", "nbd:host:http",
        "nbd:host:1,ipv4=on",
        "nbd:host:1:exportname=", "nbd:host:1:2", "nbd:unix:", "nbd:unix:rel", "nbd:[::1]", "nbd:ho st:1",
        "nbd:unix:/a\0b", "nbd:unix:/\udcff", "nbd:/x", "nbd:///x", "nbd://", "nbd://:1/x", "nbd://host:/x",
        "nbd://host:+1/x", "nbd://host:\u0661/x", "nbd://u@host/x", "nbd://host/x?socket=/s",
        "nbd://host/x?", "nbd://host/x#y",
        "nbd://host/%", "nbd://host/%4", "nbd://host/%zz", "nbd://host/%00", "nbd://host/%ff", "nbd://host/\udcff",
        "nbd://[::1/x", "nbd://::1/x", "nbd://[::g]/x", "nbd://[::1]x/y", "nbd://[fe80::1%25]/x",
        "nbd://[fe80::1%25a b]/x",
        "nbd://127.1/x", "nbd://0x7f000001/x", "nbd://010.0.0.1/x", "nbd://1/x", "nbd://host\n/x", "nbd://-host/x",
        "nbd://h..h/x", f"nbd://{'h.' * 130}h/x", "nbd+unix://host/x?socket=/s",
        "nbd+unix:/x?socket=/s", "nbd+unix:///x",
        "nbd+unix:///x?socket=", "nbd+unix:///x?socket=s", "nbd+unix:///x?path=/s", "nbd+unix:///x?socket=/s&socket=/t",
        "nbd+unix:///x?socket=/s;x=y", "nbd+unix:///x?socket=/%00", f"nbd:unix:/{'x' * 107}", f"nbd://h/{'x' * 4097}",
        "nbd+tcp:host:1",
    ],
)
def test_what_is_no_server_is_refused(source: str) -> None:
    assert refused(source).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(
    ("source", "location", "server"),
    [
        ("nbds://Host/x", "nbds://host:10809/x", inet("host")),
        ("nbds+tcp://host:1/x", "nbds://host:1/x", inet("host", "1")),
        ("nbds+unix:///x?socket=/s", "nbds+unix:///x?socket=/s", {"type": "unix", "path": "/s"}),
    ],
)
@pytest.mark.parametrize("options", [{**CERTIFICATES, "tls-hostname": "Other.Example"}, KEY], ids=str)
def test_with_tls_it_is_the_same_disk_and_another_way_to_it(
    source: str, location: str, server: dict[str, Any], options: dict[str, str]
) -> None:
    assert find_backend(source) is BACKENDS["nbd"]
    BACKEND.check_options(options)
    assert BACKEND.parse(source, options) == location == BACKEND.parse(location, options)
    found = BACKEND.node(location, read_only=False, options=options)
    assert (found["server"], found["export"], found["tls-creds"]) == (server, "x", "tls")
    plain = BACKEND.parse(source.replace("nbds", "nbd"), {})
    assert "tls-creds" not in BACKEND.node(plain, read_only=False, options={})
    assert plain != location
    assert BACKEND.identity(plain, str) == BACKEND.identity(location, str)


@pytest.mark.parametrize("source", ["nbds://host/x", "nbds+unix:///x?socket=/s", "nbds+tcp://host"])
def test_tls_needs_a_certificate_or_a_key(source: str) -> None:
    error = refused(source)
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "tls-certificates" in error.hint
    assert refused(source, {"tls-user": "u"}).code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize("source", ["nbd://host/x", "nbd:host:1", "nbd+unix:///x?socket=/s", "nbd:unix:/s"])
@pytest.mark.parametrize(
    "options", [CERTIFICATES, KEY, {"tls-verify": "on"}, {"tls-hostname": "h"}, {"tls-user": "u"}], ids=str
)
def test_who_says_something_of_tls_does_not_get_a_connection_without(source: str, options: dict[str, str]) -> None:
    error = refused(source, options)
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert "nbds" in error.hint


def test_certificates_are_compared_with_the_name_that_was_said_or_with_the_host() -> None:
    assert "tls-hostname" not in node("nbds://host", **UNDERSCORED)  # then QEMU takes the host
    assert node("nbds://host", tls_hostname="Other.Example", **UNDERSCORED)["tls-hostname"] == "other.example"
    assert node("nbds://host", tls_hostname="2001:DB8::0:1", **UNDERSCORED)["tls-hostname"] == "2001:db8::1"
    socket = "nbds+unix:///x?socket=/s"
    error = refused(socket, CERTIFICATES)
    assert "tls-hostname" in error.hint
    assert node(socket, tls_hostname="h", **UNDERSCORED)["tls-hostname"] == "h"
    assert "tls-hostname" not in node(socket, tls_verify="off", **UNDERSCORED)


def test_qsd_gets_an_object_that_reads_the_certificates() -> None:
    expected = {"qom-type": "tls-creds-x509", "id": "tls", "endpoint": "client", "dir": "/pki", "verify-peer": True}
    found = BACKEND.requirements("nbds://h:1/x", CERTIFICATES)
    assert (found.objects, found.secret_files, found.secrets) == ((expected,), {}, ())
    found = BACKEND.requirements("nbds://h:1/x", {**CERTIFICATES, "tls-verify": "off"})
    assert found.objects == ({**expected, "verify-peer": False},)
    assert BACKEND.requirements("nbd://h:1/x", {}) == NO_REQUIREMENTS


@pytest.mark.parametrize(("options", "user"), [(KEY, "qemu"), ({**KEY, "tls-user": "ä b"}, "ä b")])
def test_qsd_finds_the_key_in_its_own_directory(options: dict[str, str], user: str) -> None:
    BACKEND.check_options(options)
    found = BACKEND.requirements("nbds://h:1/x", options)
    assert found.objects == (
        {"qom-type": "tls-creds-psk", "id": "tls", "endpoint": "client", "dir": ".", "username": user},
    )
    assert found.secret_files == {"keys.psk": "tls-psk-file"}
    assert set(BACKEND.secret_options) == set(found.secret_files.values())


@pytest.mark.parametrize(
    "options",
    [
        {"tls-certificates": "pki"}, {"tls-certificates": ""}, {"tls-verify": "no"}, {"tls-verify": ""},
        {"tls-hostname": ""}, {"tls-hostname": "a b"}, {"tls-hostname": "*.example"}, {"tls-hostname": "h:1"},
        {"tls-user": ""}, {"tls-user": "a:b"}, {"tls-user": "a\nb"}, {"tls-user": "x" * 129},
        {**CERTIFICATES, **KEY}, {**KEY, "tls-verify": "off"}, {**KEY, "tls-hostname": "h"},
        {**CERTIFICATES, "tls-user": "u"}, {**CERTIFICATES, "tls-verify": "off", "tls-hostname": "h"},
    ],
    ids=str,
)
def test_options_of_tls_that_mean_nothing_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options(options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize(
    "source",
    [
        "nbds:host:1", "nbds:unix:/s", "nbds://", "nbds://user@host/x", "nbds+unix://user@/x?socket=/s",
        "nbds://host/x?tls-psk-file=/k", "nbds://host/x?tls-certificates=/pki",
        "nbds+unix:///x?socket=/s&tls-certificates=/pki", "nbds+unix:///x?tls-verify-peer=false&socket=/s",
        "nbds+unix:///x",
    ],
)
def test_what_other_clients_write_into_a_source_is_said_as_an_option(source: str) -> None:
    error = refused(source, CERTIFICATES)
    assert error.code is ErrorCode.INVALID_SOURCE
    if "@" in source or "tls-" in source:
        assert "-o tls-" in error.hint


@given(TEXT, PATHS)
@example("/", "//")
def test_every_name_and_path_can_be_said(export: str, path: str) -> None:
    source = f"nbd+unix:///{quote(export, safe='')}?socket={quote(path, safe='')}"
    found = node(source)
    assert (found["export"], found["server"]["path"]) == (export, path)
    location = BACKEND.parse(source, {})
    assert BACKEND.parse(location, {}) == location
    assert node(location) == found


@given(PATHS.filter(lambda path: ":exportname=" not in path), TEXT.filter(bool))
def test_the_older_spelling_takes_everything_as_it_is(path: str, export: str) -> None:
    found = node(f"nbd:unix:{path}:exportname={export}")
    assert (found["export"], found["server"]["path"]) == (export, path)


@given(TEXT, st.integers(1, 65535), st.ip_addresses(v=6))
@example("", 1, ipaddress.IPv6Address("::ffff:192.0.2.1"))
def test_addresses_have_one_location_however_they_are_written(export: str, port: int, address: Any) -> None:
    location = BACKEND.parse(f"nbd://[{address.exploded.upper()}]:{port}/{quote(export)}", {})
    assert location == BACKEND.parse(f"nbd://[{address.compressed}]:{port}/{quote(export)}", {})
    assert location == BACKEND.parse(location, {})
    # ::ffff:192.0.2.1 is 192.0.2.1 (RFC 4291, 2.5.5.2).
    assert node(location)["server"] == inet(str(address.ipv4_mapped or address), str(port))


@given(st.sampled_from(BACKEND.schemes), st.text())
def test_any_text_is_a_source_or_refused(scheme: str, rest: str) -> None:
    options = KEY if scheme.startswith("nbds") else {}
    try:
        location = BACKEND.parse(f"{scheme}:{rest}", options)
    except StoragedError:
        assert refused(f"{scheme}:{rest}", options).code is ErrorCode.INVALID_SOURCE
    else:
        assert BACKEND.parse(location, options) == location
        assert location.isascii()
        assert location.isprintable()


def test_a_socket_is_compared_by_its_real_path_and_a_host_by_its_name() -> None:
    def real(path: str) -> str:
        return f"/real{path}"

    assert BACKEND.identity(BACKEND.parse("nbd:unix:/s:exportname=x", {}), real) == "nbd+unix:///x?socket=/real/s"
    assert BACKEND.identity(BACKEND.parse("nbd:H:10809:exportname=x", {}), real) == "nbd://h:10809/x"


def test_requests_wait_as_long_as_qemu_can_unless_something_else_is_said() -> None:
    assert node("nbd://h")["reconnect-delay"] == LONGEST_DELAY == 2**32 - 1
    assert node("nbd://h")["open-timeout"] == 5
    found = node("nbd://h", reconnect_delay="0", open_timeout="7")
    assert (found["reconnect-delay"], found["open-timeout"]) == (0, 7)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reconnect-delay", "-1"), ("reconnect-delay", "4294967296"), ("reconnect-delay", ""),
        ("reconnect-delay", "1s"),
        ("open-timeout", "0"), ("open-timeout", "61"), ("open-timeout", "1.5"), ("open-timeout", "\u0663"),
    ],
)
def test_what_is_no_number_of_seconds_is_refused(key: str, value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({key: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize("value", ["0", "1", str(LONGEST_DELAY)])
def test_every_delay_that_qemu_takes_is_taken(value: str) -> None:
    BACKEND.check_options({"reconnect-delay": value})


def test_an_ipv4_address_in_ipv6_is_the_ipv4_address() -> None:
    assert BACKEND.parse("nbd://[::ffff:127.0.0.1]/x", {}) == BACKEND.parse("nbd://127.0.0.1/x", {})


def test_a_port_of_thousands_of_digits_is_none() -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(f"nbd://h:{'0' * 5000}1/x", {})
    assert caught.value.code is ErrorCode.INVALID_SOURCE


def test_a_password_where_none_can_be_is_not_said_again() -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse("nbd://user:hunter2@h/x", {})
    assert "hunter2" not in f"{caught.value} {caught.value.cause} {caught.value.hint}"
