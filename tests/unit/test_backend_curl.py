"""URLs of HTTP and FTP: what libcurl would read in another way than it is written is refused, the rest is untouched."""

from __future__ import annotations

import string
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import Secret
from storaged.backends.curl import BACKENDS as ALL
from storaged.backends.curl import FTP, FTPS, HTTP, HTTPS, CurlBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.refusals import explain
from storaged.qsd.version import QsdVersion, curl_loses_requests

PUBLIC = {"query": "public"}
#: A password that must be in nothing that is shown.
SECRET = "Tr0ub4dor"
TEXT = st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1, max_size=30)
#: What stands for itself in a path.
PLAIN = st.text(string.ascii_letters + string.digits + "-._~!$&'()*+,=:@", min_size=1).filter(
    lambda text: text not in (".", "..")
)
each = pytest.mark.parametrize("backend", ALL, ids=lambda backend: backend.name)


def node(backend: CurlBackend, source: str, **said: str) -> dict[str, Any]:
    options = {key.replace("_", "-"): value for key, value in said.items()}
    return backend.node(backend.parse(source, options), read_only=True, options=options)


def refused(backend: CurlBackend, source: str, options: dict[str, str] | None = None) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        backend.parse(source, options or {})
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    ("source", "url"),
    [
        ("http://host", "http://host/"),
        ("http://HOST.Example:80/A", "http://host.example/A"),
        ("http://host:0443/a", "http://host:443/a"),
        ("https://host:443/a", "https://host/a"),
        ("http://[2001:DB8::0:1]:8080/a", "http://[2001:db8::1]:8080/a"),
        ("http://host//a//b/", "http://host//a//b/"),
        ("http://host/%7e%2F%c3%a4:@;x=1,b=2", "http://host/%7e%2F%c3%a4:@;x=1,b=2"),
        ("ftp://host:21/a%20b", "ftp://host/a%20b"),
        ("ftp://host//etc/%3F%3b", "ftp://host//etc/%3F%3b"),
        ("ftps://host:990/a", "ftps://host/a"),
        ("ftps://host:21/a", "ftps://host:21/a"),
    ],
)
def test_a_url_is_handed_on_as_it_is(source: str, url: str) -> None:
    backend = find_backend(source)
    assert isinstance(backend, CurlBackend)
    assert node(backend, source)["url"] == url == backend.parse(source, {})


@pytest.mark.parametrize(
    "rest",
    [
        "host/a", "//", "///a", "//:80/a", "//host:/a", "//host:0/a", "//host:65536/a", "//host:ftp/a", "//127.1/a",
        "//h ost/a", "//[::1/a", "//host/a b", "//host/a\n", "//host/\u00e4", "//host/%", "//host/%4", "//host/%zz",
        "//host/a[1]", "//host/{a}", "//host/a#b", "//host/a\\b", "//host/./a", "//host/a/../b", "//host/a/%2e%2E",
        "//host/a?b", "//host/%00", "//@host/a", "//a@b@host/a", "//us er@host/a", "//%ff@host/a", "//\udcff/a",
    ],
)
@each
def test_what_libcurl_would_read_in_another_way_is_refused(backend: CurlBackend, rest: str) -> None:
    code = refused(backend, f"{backend.name}:{rest}").code
    assert code is (ErrorCode.INVALID_ARGUMENT if rest.startswith("//@") else ErrorCode.INVALID_SOURCE)


@pytest.mark.parametrize("rest", ["", "/", "/a/", "/a?b", "/a;type=a", "/a;type=i", "/a%0Ab", "/a%7f", "/a%00"])
@pytest.mark.parametrize("backend", [FTP, FTPS], ids=["ftp", "ftps"])
def test_what_ftp_cannot_say_is_refused(backend: CurlBackend, rest: str) -> None:
    assert refused(backend, f"{backend.name}://host{rest}", PUBLIC).code is ErrorCode.INVALID_SOURCE


@given(st.sampled_from(ALL), st.lists(PLAIN, min_size=1, max_size=4), st.booleans())
def test_a_location_is_a_source_and_names_the_same(backend: CurlBackend, path: list[str], user: bool) -> None:
    source = f"{backend.name}://{'me@' if user else ''}host/{'/'.join(path)}"
    location = backend.parse(source, {})
    assert location == source
    assert node(backend, location)["url"] == source.replace("//me@", "//")


@given(st.sampled_from(ALL), TEXT)
def test_every_name_of_a_file_can_be_said(backend: CurlBackend, name: str) -> None:
    source = f"{backend.name}://host/x{quote(name, safe='')}"
    assert node(backend, source)["url"] == source


@given(st.sampled_from(ALL), st.text())
@example(HTTP, "//h/?")
@example(FTP, "//%41@h/a")
def test_any_text_is_a_source_or_refused(backend: CurlBackend, rest: str) -> None:
    try:
        location = backend.parse(f"{backend.name}:{rest}", PUBLIC if backend.name[0] == "h" else {})
    except StoragedError:
        code = refused(backend, f"{backend.name}:{rest}", PUBLIC if backend.name[0] == "h" else {}).code
        assert code in (ErrorCode.INVALID_SOURCE, ErrorCode.INVALID_ARGUMENT)
    else:
        assert backend.parse(location, PUBLIC) == location
        assert location.isascii()
        assert location.isprintable()


def test_escapes_and_case_make_no_other_disk() -> None:
    def identity(source: str) -> str:
        return HTTP.identity(HTTP.parse(source, {}), str)

    assert identity("http://HOST:80/%7ea%2fb%2F%41") == identity("http://host/~a%2Fb%2fA")
    assert identity("http://host/a") != identity("http://host/A")
    assert identity("http://host/a/b") != identity("http://host/a%2Fb")
    assert identity("http://host/a") != identity("http://host:8080/a")
    assert FTP.identity(FTP.parse("ftp://a@h/d", {}), str) != FTP.identity(FTP.parse("ftp://b@h/d", {}), str)


# Users and secrets


@each
def test_a_user_is_in_the_url_or_an_option(backend: CurlBackend) -> None:
    source = f"{backend.name}://host/a"
    inside = source.replace("//", "//b%20%C3%A4@")
    assert backend.parse(source, {"user": "b ä"}) == backend.parse(inside, {}) == inside
    assert backend.parse(inside, {"user": "b ä"}) == inside
    assert refused(backend, inside, {"user": "c"}).code is ErrorCode.INVALID_ARGUMENT
    assert node(backend, inside)["username"] == "b ä"
    assert node(backend, inside)["url"] == source
    assert "username" not in node(backend, source)


@pytest.mark.parametrize("user", ["", "a\r\nDELE b", "a\0", "a\x7f"])
@each
def test_what_would_be_another_command_is_no_user(backend: CurlBackend, user: str) -> None:
    assert refused(backend, f"{backend.name}://host/a", {"user": user}).code is ErrorCode.INVALID_ARGUMENT
    assert refused(backend, f"{backend.name}://{quote(user)}@host/a").code is ErrorCode.INVALID_ARGUMENT


def test_a_colon_ends_a_user_of_http_alone() -> None:
    assert refused(HTTP, "http://host/a", {"user": "a:b"}).code is ErrorCode.INVALID_ARGUMENT
    assert FTP.parse("ftp://host/a", {"user": "a:b"}) == "ftp://a%3Ab@host/a"


@given(st.sampled_from(ALL), TEXT.filter(lambda text: ":" not in text), TEXT)
def test_a_password_is_taken_out_of_the_url(backend: CurlBackend, user: str, password: str) -> None:
    source = f"{backend.name}://{quote(user, safe='')}:{quote(password, safe='')}@host/a"
    rest, secrets = backend.without_secrets(source)
    assert secrets == {"password-file": password}
    assert backend.parse(rest, {"password-file": "-"}) == f"{backend.name}://{quote(user, safe='')}@host/a"
    assert backend.without_secrets(rest) == (rest, {})


@pytest.mark.parametrize(
    ("source", "rest", "secrets"),
    [
        ("http://a:@h/x", "http://a@h/x", {}),
        ("http://a:b@c@h/x", "http://a@h/x", {"password-file": "b@c"}),
        ("http://a:b:c@h/x", "http://a@h/x", {"password-file": "b:c"}),
        ("http://h/x:y@z", "http://h/x:y@z", {}),
        ("http://h:80/x", "http://h:80/x", {}),
        ("http:", "http:", {}),
        ("http://a:%4\udcff@h", "http://a@h", {"password-file": "%4\udcff"}),
    ],
)
def test_what_is_a_password_and_what_is_not(source: str, rest: str, secrets: dict[str, str]) -> None:
    assert HTTP.without_secrets(source) == (rest, secrets)


@pytest.mark.parametrize(
    "rest",
    [
        f"//u:{SECRET}@host/a", f"//u:{SECRET}/x@host/a", f"//u:{SECRET}?x@host/a", f"//u:x#{SECRET}@host/a",
        f"//host/a?sig={SECRET}", f"//host/a b?{SECRET}", f"//u:{SECRET}@ho st/a?{SECRET}", f"u:{SECRET}@host/a",
    ],
)
@each
def test_no_refusal_repeats_a_secret(backend: CurlBackend, rest: str) -> None:
    error = refused(backend, f"{backend.name}:{rest}")
    assert SECRET not in f"{error}{error.hint}"
    assert error.code is ErrorCode.INVALID_SOURCE


def test_a_query_is_a_secret_until_the_user_says_that_it_is_none() -> None:
    source = "https://host/a?X-Sig=1%2f&b"
    error = refused(HTTPS, source)
    assert "query=public" in error.hint
    assert HTTPS.parse(source, PUBLIC) == source
    assert HTTPS.node(source, read_only=True, options=PUBLIC)["url"] == source


@each
def test_a_password_belongs_to_somebody(backend: CurlBackend) -> None:
    source = f"{backend.name}://host/a"
    assert refused(backend, source, {"password-file": "/p"}).code is ErrorCode.INVALID_ARGUMENT
    options = {"user": "u", "password-file": "/p"}
    assert backend.requirements(source, options).secrets == (Secret("password", "password-file"),)
    found = backend.node(backend.parse(source, options), read_only=True, options=options)
    assert (found["username"], found["password-secret"]) == ("u", "password")


def test_a_cookie_and_a_proxy_are_of_http() -> None:
    options = {
        "cookie-file": "/c", "proxy": "http://[::1]:3128", "proxy-user": "u", "proxy-password-file": "/p",
    }
    HTTP.check_options(options)
    needed = HTTP.requirements("http://host/a", options)
    assert {secret.id: secret.option for secret in needed.secrets} == {
        "cookie": "cookie-file", "proxy-password": "proxy-password-file",
    }
    assert needed.environment == {"http_proxy": "http://[::1]:3128", "https_proxy": "http://[::1]:3128"}
    found = HTTP.node("http://host/a", read_only=True, options=options)
    assert (found["cookie-secret"], found["proxy-username"], found["proxy-password-secret"]) == (
        "cookie", "u", "proxy-password",
    )
    assert not {"cookie-file", "proxy", "query"} & (FTP.options.keys() | FTPS.options.keys())
    assert HTTP.requirements("http://host/a", {}).environment == {}


@pytest.mark.parametrize(
    "options",
    [
        {"proxy": ""}, {"proxy": "host:1"}, {"proxy": "http://host"}, {"proxy": f"http://u:{SECRET}@host:1"},
        {"proxy": "http://host:1/x"}, {"proxy": "https://host:1"}, {"proxy": "http://host:0"},
        {"proxy-user": "u"}, {"proxy": "http://h:1", "proxy-password-file": "/p"},
        {"proxy": "http://h:1", "proxy-user": "a:b"}, {"proxy": "http://h:1", "proxy-user": ""},
        {"request-timeout": "0"}, {"request-timeout": "10001"}, {"request-timeout": "1.5"}, {"request-timeout": ""},
        {"read-ahead": "1"}, {"read-ahead": "1000"}, {"read-ahead": "65M"}, {"read-ahead": "-1"}, {"read-ahead": ""},
        {"tls-verify": "no"}, {"query": "yes"}, {"fetch": "all"}, {"size": "4M"}, {"fetch": "whole", "size": "x"},
    ],
    ids=str,
)
def test_what_an_option_cannot_be_is_refused(options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        HTTPS.check_options(options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint
    assert SECRET not in f"{caught.value}{caught.value.hint}"


@pytest.mark.parametrize(("said", "size"), [("0", 0), ("512", 512), ("4M", 4 << 20), ("64M", 64 << 20)])
def test_read_ahead_is_a_size(said: str, size: int) -> None:
    HTTP.check_options({"read-ahead": said})
    assert node(HTTP, "http://host/a", read_ahead=said)["readahead"] == size


def test_what_is_fetched_whole_is_a_file_and_curl_is_told_what_qemu_would_be() -> None:
    options = {
        "fetch": "whole", "size": "4M", "user": "b ä", "password-file": "/p", "cookie-file": "/c", "tls-verify": "off",
        "proxy": "http://h:1", "proxy-user": "u", "proxy-password-file": "/q",
    }
    secrets = {"password-file": 'a:b@c/"\\', "cookie-file": "x=y z", "proxy-password-file": "p:q"}
    HTTPS.check_options(options)
    location = HTTPS.parse("https://host/a", options)
    assert HTTPS.requirements(location, options).secrets == ()
    assert HTTPS.node(location, read_only=True, options=options)["driver"] == "file"
    assert HTTPS.fetch_options(location, options, secrets) == {
        "url": "https://b%20%C3%A4:a%3Ab%40c%2F%22%5C@host/a", "cookie": "x=y z", "proxy": "http://h:1",
        "proxy-user": "u:p:q", "insecure": "",
    }
    assert FTP.fetch_options("ftp://host/a", {"fetch": "whole"}, {}) == {"url": "ftp://host/a", "noproxy": "*"}
    assert not HTTP.is_fetched({})


@pytest.mark.parametrize(
    ("option", "secret"),
    [("password-file", f"{SECRET}\r\nx"), ("cookie-file", SECRET), ("cookie-file", f"a={SECRET}\nurl = x")],
)
def test_a_secret_that_would_be_another_option_is_refused(option: str, secret: str) -> None:
    with pytest.raises(StoragedError) as caught:
        HTTP.fetch_options("http://u@host/a", {"fetch": "whole"}, {option: secret})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert SECRET not in f"{caught.value}{caught.value.cause}{caught.value.hint}"


def test_defaults() -> None:
    found = node(HTTPS, "https://host/a")
    assert (found["timeout"], found["readahead"], found["sslverify"]) == (20, 256 << 10, True)
    assert node(FTPS, "ftps://host/a", tls_verify="off")["sslverify"] is False
    assert "sslverify" not in node(HTTP, "http://host/a")
    assert "sslverify" not in node(FTP, "ftp://host/a")


def test_all_are_read_only_and_known() -> None:
    assert [backend.name for backend in ALL] == ["http", "https", "ftp", "ftps"]
    assert all(BACKENDS[backend.name] is backend and backend.read_only for backend in ALL)


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("The requested URL returned error: 404", ErrorCode.SOURCE_MISSING, "no such file"),
        ("The file does not exist", ErrorCode.SOURCE_MISSING, "no such file"),
        ("The requested URL returned error: 401", ErrorCode.OPEN_FAILED, "refuses us"),
        ("The requested URL returned error: 407", ErrorCode.OPEN_FAILED, "proxy"),
        ("The requested URL returned error: 500", ErrorCode.OPEN_FAILED, "with an error"),
        ("Access denied: 530", ErrorCode.OPEN_FAILED, "refuses us"),
        ("Server does not support 'range' (byte ranges).", ErrorCode.UNSUPPORTED, "parts"),
        ("Server didn't report file size.", ErrorCode.UNSUPPORTED, "how large"),
        ("server certificate verification failed. CAfile: none", ErrorCode.OPEN_FAILED, "certificate"),
        ("gnutls_handshake() failed: An unexpected TLS packet was received.", ErrorCode.OPEN_FAILED, "no TLS"),
        ("Could not resolve host: nobody.invalid", ErrorCode.OPEN_FAILED, "name"),
        ("Operation timed out after 3000 milliseconds with 0 bytes received", ErrorCode.OPEN_FAILED, "in time"),
        ("Failed to connect to h port 1 after 0 ms: Couldn't connect to server", ErrorCode.OPEN_FAILED, "nobody"),
        ('Protocol "file" not supported or disabled in libcurl', ErrorCode.OPEN_FAILED, "understand"),
    ],
)
def test_what_libcurl_says_is_explained(text: str, code: ErrorCode, message: str) -> None:
    """Texts of libcurl 7.88.1 with GnuTLS, in QSD 7.2.22."""
    error = explain("blockdev-add", f"CURL: Error opening file: {text}")
    assert error.code is code
    assert message in error.message
    assert text in error.cause
    assert error.hint


@pytest.mark.parametrize(
    ("version", "loses"),
    [((7, 2, 22), True), ((10, 0, 8), True), ((10, 0, 9), False), ((10, 1, 3), True), ((11, 0, 0), False)],
)
def test_which_qsd_loses_requests(version: tuple[int, int, int], loses: bool) -> None:
    assert curl_loses_requests(QsdVersion(*version)) is loses
