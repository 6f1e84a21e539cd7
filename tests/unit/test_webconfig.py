"""The common web configuration: what cannot be done as it is meant is refused, and no secret is repeated."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.observe.webconfig import WebConfigError, load

#: Of exporter-toolkit's documentation.
HASH = "$2y$10$mDwo.lAisC94iLAyP81MCesa29IzH37oigHC/42V2pdJlUprsJPze"


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}", "basic_auth_users:\n", "tls_server_config: {}\n"])
def test_an_empty_file_protects_nothing(tmp_path: Path, text: str) -> None:
    path = tmp_path / "web.yml"
    path.write_text(text)
    config = load(str(path))
    assert (config.tls, dict(config.users)) == (None, {})


def test_users_and_headers_are_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "web.yml"
    path.write_text(
        f"basic_auth_users:\n  alice: {HASH}\nhttp_server_config:\n  http2: false\n  headers:\n"
        "    X-Content-Type-Options: nosniff\n    Strict-Transport-Security: max-age=1\n"
    )
    config = load(str(path))
    assert config.users == {"alice": HASH.encode()}
    assert config.headers == {"X-Content-Type-Options": "nosniff", "Strict-Transport-Security": "max-age=1"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("basic_auth_user: {}", "basic_auth_user"),
        ("rate_limit: {interval: 1s}", "rate_limit"),
        ("- a", "object"),
        ("basic_auth_users: {alice: secret}", "alice"),
        ("basic_auth_users: {alice: 5}", "str"),
        (f"basic_auth_users: {{alice: {HASH[:-1]}}}", "alice"),
        (f"basic_auth_users: {{alice: {HASH}", "line"),
        ("http_server_config: {headers: {Set-Cookie: a}}", "Set-Cookie"),
        ("http_server_config: {headers: {X-Frame-Options: maybe}}", "X-Frame-Options"),
        ('http_server_config: {headers: {X-XSS-Protection: "0\\r\\nX: y"}}', "X-XSS-Protection"),
        ("tls_server_config: {cert_file: a}", "key_file"),
        ("tls_server_config: {key_file: a}", "cert_file"),
        ("tls_server_config: {client_ca_file: a}", "cert_file"),
        ("tls_server_config: {client_auth_type: RequireAndVerifyClientCert}", "cert_file"),
        ("tls_server_config: {client_allowed_sans: [a]}", "client_allowed_sans"),
        ("tls_server_config: {cert: PEM}", "cert"),
        ("tls_server_config: {curve_preferences: [X25519]}", "curve_preferences"),
        ("tls_server_config: {cert_file: a, key_file: b}", "a"),
        ("tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequireAnyClientCert}", "RequireAny"),
        ("tls_server_config: {cert_file: a, key_file: b, client_ca_file: c}", "client_auth_type"),
        ("tls_server_config: {cert_file: a, key_file: b, client_auth_type: RequireAndVerifyClientCert}", "client_ca"),
        ("tls_server_config: {cert_file: a, key_file: b, min_version: TLS9}", "TLS9"),
        ("tls_server_config: {cert_file: a, key_file: b, cipher_suites: [ROT13]}", "ROT13"),
    ],
)
def test_what_is_wrong_or_not_known_here_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "web.yml"
    path.write_text(text)
    with pytest.raises(WebConfigError) as caught:
        load(str(path))
    assert what in str(caught.value)
    assert str(path) in str(caught.value)
    assert "secret" not in str(caught.value)
    assert HASH[:-1] not in str(caught.value)


def test_a_file_that_is_missing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WebConfigError, match="No such file"):
        load(str(tmp_path / "web.yml"))


@given(st.binary(max_size=60) | st.text(st.sampled_from("abc:{}[]&*!|>-'\"#%@` \n\t"), max_size=40).map(str.encode))
def test_whatever_is_in_the_file_it_is_understood_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "web.yml"
    path.write_bytes(content)
    try:
        load(str(path))
    except WebConfigError as error:
        assert str(path) in str(error)  # noqa: PT017  # most are refused, some are empty
