"""The file that protects an exporter's address by TLS and passwords, as all of Prometheus' exporters have it.

The format is that of github.com/prometheus/exporter-toolkit, docs/web-configuration.md. What cannot be done here as it
is meant there is refused, never left out: who wrote it relies on it.
"""

from __future__ import annotations

import os
import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import yaml

_VERSIONS = {
    "TLS10": ssl.TLSVersion.TLSv1, "TLS11": ssl.TLSVersion.TLSv1_1, "TLS12": ssl.TLSVersion.TLSv1_2,
    "TLS13": ssl.TLSVersion.TLSv1_3,
}
#: Go's names of the ciphers that it offers below TLS 1.3 (crypto/tls, CipherSuites), and OpenSSL's.
_CIPHERS = {
    f"TLS_ECDHE_{key}_WITH_{go}": f"ECDHE-{key}-{openssl}"
    for key in ("ECDSA", "RSA")
    for go, openssl in (
        ("AES_128_GCM_SHA256", "AES128-GCM-SHA256"), ("AES_256_GCM_SHA384", "AES256-GCM-SHA384"),
        ("CHACHA20_POLY1305_SHA256", "CHACHA20-POLY1305"), ("AES_128_CBC_SHA", "AES128-SHA"),
        ("AES_256_CBC_SHA", "AES256-SHA"),
    )
}
#: Go's names of those of TLS 1.3, which neither there nor here can be chosen.
_CIPHERS_13 = frozenset({"TLS_AES_128_GCM_SHA256", "TLS_AES_256_GCM_SHA384", "TLS_CHACHA20_POLY1305_SHA256"})
#: Which may be set, and to what; any value where that is empty.
_HEADERS: dict[str, tuple[str, ...]] = {
    "Strict-Transport-Security": (), "X-Content-Type-Options": ("nosniff",), "X-Frame-Options": ("deny", "sameorigin"),
    "X-XSS-Protection": (), "Content-Security-Policy": (),
}
_BCRYPT = re.compile(rb"\$2[aby]\$(0[4-9]|[12][0-9]|3[01])\$[./A-Za-z0-9]{53}")
_CLIENT_AUTH = {
    "": ssl.CERT_NONE, "NoClientCert": ssl.CERT_NONE, "VerifyClientCertIfGiven": ssl.CERT_OPTIONAL,
    "RequireAndVerifyClientCert": ssl.CERT_REQUIRED,
}


class WebConfigError(Exception):
    """The file, or one that it names, cannot be used; the text says why, and holds no secret."""


class _Tls(msgspec.Struct, forbid_unknown_fields=True):
    cert_file: str = ""
    key_file: str = ""
    client_auth_type: str = ""
    client_ca_file: str = ""
    client_allowed_sans: list[str] = []
    min_version: str = "TLS12"
    max_version: str = "TLS13"
    cipher_suites: list[str] = []
    prefer_server_cipher_suites: bool = True


class _Http(msgspec.Struct, forbid_unknown_fields=True):
    http2: bool = True
    headers: dict[str, str] = {}


class _File(msgspec.Struct, forbid_unknown_fields=True):
    tls_server_config: _Tls | None = None
    http_server_config: _Http | None = None
    basic_auth_users: dict[str, str] | None = None


@dataclass(frozen=True)
class WebConfig:
    """How the address is protected."""

    tls: ssl.SSLContext | None = None
    sans: frozenset[str] = frozenset()
    """A client's certificate must have one of these names; empty: it need not."""
    users: Mapping[str, bytes] = field(default_factory=dict)
    """Name → bcrypt hash; empty: no password is asked for."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Sent with each answer."""
    files: Mapping[str, object] = field(default_factory=dict)
    """What was read, and what it was like just before that."""

    def is_outdated(self) -> bool:
        """Whether one of the files is another one by now."""
        return any(_mark(path) != before for path, before in self.files.items())


def load(path: str) -> WebConfig:
    """Read the file and what it names; relative paths begin at its directory. Raises WebConfigError."""
    files = {path: _mark(path)}
    try:
        with open(path, "rb") as file:
            found = msgspec.convert(yaml.safe_load(file) or {}, _File)
    except OSError as error:
        raise WebConfigError(f"{path}: {error.strerror}") from error
    except (yaml.YAMLError, msgspec.ValidationError, ValueError, RecursionError) as error:
        # A YAML error quotes the line, which may have a hash in it; the place is enough.
        place = getattr(error, "problem_mark", None)
        why = f"line {place.line + 1} is no YAML" if place is not None else _told(error)
        raise WebConfigError(f"{path}: {why}") from None
    tls = found.tls_server_config or _Tls()
    headers = found.http_server_config.headers if found.http_server_config else {}
    users = {name: word.encode() for name, word in (found.basic_auth_users or {}).items()}
    try:
        _check_headers(headers)
        _check_users(users)
        context = _context(tls, os.path.dirname(os.path.abspath(path)), files)
    except WebConfigError as error:
        raise WebConfigError(f"{path}: {error}") from error
    return WebConfig(context, frozenset(tls.client_allowed_sans), users, headers, files)


def _told(error: Exception) -> str:
    if isinstance(error, msgspec.ValidationError):
        return f"{error}; storaged knows less than Prometheus' exporters: docs/metrics.md says what"
    return "it cannot be understood"


def _check_headers(headers: Mapping[str, str]) -> None:
    for name, value in headers.items():
        allowed = _HEADERS.get(name)
        if allowed is None:
            raise WebConfigError(f"the header {name!r} cannot be set")
        if (allowed and value not in allowed) or not value.isprintable() or not value.isascii():
            raise WebConfigError(f"the header {name!r} cannot have this value")


def _check_users(users: Mapping[str, bytes]) -> None:
    for name, word in users.items():
        if not _BCRYPT.fullmatch(word):
            raise WebConfigError(f"the password of {name!r} is no bcrypt hash (htpasswd -nBC 10 makes one)")


def _mark(path: str) -> object:
    """What is another one when the file is."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino, found.st_dev


def _context(tls: _Tls, directory: str, files: dict[str, object]) -> ssl.SSLContext | None:
    """Return the TLS context, None where nothing asks for TLS; note the files that it is made of."""
    given = [tls.cert_file, tls.key_file, tls.client_ca_file]
    if not any(given) and not tls.client_auth_type:
        if tls.client_allowed_sans:
            raise WebConfigError("client_allowed_sans without cert_file and key_file")
        return None
    if not (tls.cert_file and tls.key_file):
        raise WebConfigError("TLS needs cert_file and key_file")
    verify = _CLIENT_AUTH.get(tls.client_auth_type)
    if verify is None:
        raise WebConfigError(
            f"client_auth_type {tls.client_auth_type!r}: use {', '.join(name for name in _CLIENT_AUTH if name)}"
        )
    if (verify is ssl.CERT_NONE) != (not tls.client_ca_file):
        raise WebConfigError("client_ca_file and a client_auth_type that asks for certificates need each other")
    if tls.client_allowed_sans and verify is not ssl.CERT_REQUIRED:
        raise WebConfigError("client_allowed_sans needs client_auth_type RequireAndVerifyClientCert")
    unknown = [version for version in (tls.min_version, tls.max_version) if version not in _VERSIONS]
    unknown += [cipher for cipher in tls.cipher_suites if cipher not in _CIPHERS and cipher not in _CIPHERS_13]
    if unknown:
        raise WebConfigError(f"{unknown[0]!r} is not known")
    cert, key, authority = (os.path.join(directory, name) if name else "" for name in given)
    files.update({name: _mark(name) for name in (cert, key, authority) if name})
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    path = cert
    try:
        context.minimum_version, context.maximum_version = _VERSIONS[tls.min_version], _VERSIONS[tls.max_version]
        if not tls.prefer_server_cipher_suites:
            context.options &= ~ssl.OP_CIPHER_SERVER_PREFERENCE
        chosen = [_CIPHERS[name] for name in tls.cipher_suites if name in _CIPHERS]
        if chosen:
            context.set_ciphers(":".join(chosen))
        # Never a question for a passphrase on a terminal.
        context.load_cert_chain(cert, key, password=_no_passphrase)
        if authority:
            path = authority
            context.load_verify_locations(authority)
            context.verify_mode = verify
    except ssl.SSLError as error:
        raise WebConfigError(f"{path} cannot be used for TLS: {error.reason or 'it is no PEM'}") from error
    except (OSError, ValueError) as error:
        raise WebConfigError(f"{path} or its key: {getattr(error, 'strerror', None) or error}") from error
    return context


def _no_passphrase() -> str:
    raise ValueError("the key has a passphrase")


def names_of(certificate: Mapping[str, Any] | None) -> set[str]:
    """Return the subject alternative names of a peer's certificate, as ``ssl.SSLSocket.getpeercert`` tells it."""
    return {str(value) for _kind, value in (certificate or {}).get("subjectAltName", ())}
