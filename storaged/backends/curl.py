"""``http``, ``https``, ``ftp`` and ``ftps``: a file of a server, only to be read. block/curl.c in QEMU.

QEMU's drivers hand the URL to libcurl as it is. What libcurl would read in another way than the user, or leave out
without a word (``#…``, the ``?…`` of FTP, ``/../``), is refused; what is left is handed on byte for byte.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn
from urllib.parse import unquote, unquote_to_bytes

from storaged.backends.base import NO_REQUIREMENTS, NetworkDefaults, Node, Requirements, Secret
from storaged.backends.cache import cache_flags
from storaged.backends.fetched import SIZE_HELP, copy_node, size_of
from storaged.backends.uri import authority_of, escaped, refuse
from storaged.backends.values import check_choices, check_numbers
from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import parse_size

_PORTS = {"http": 80, "https": 443, "ftp": 21, "ftps": 990}
#: CURL_TIMEOUT_MAX. 0 would mean never, and QSD's monitor stands still while it opens.
_LONGEST_TIMEOUT = 10_000
#: Of each of eight buffers.
_LARGEST_READ_AHEAD = 64 << 20

_OPTIONS = {
    "user": "the user's name, where it is not in the URL",
    "password-file": "where the user's password comes from: a file, credential:NAME, or - (standard input)",
    "request-timeout": "seconds until a request that is not done fails, and until opening is given up, "
    f"1 to {_LONGEST_TIMEOUT}; default 20",
    "fetch": "parts: as they are read; whole: the file is fetched first, and served from the copy; default parts",
    "size": f"with fetch=whole: {SIZE_HELP}",
    "read-ahead": "with fetch=parts: how much is fetched with each request beyond what was asked for, 0 to 64M, a "
    "multiple of 512; default 256K",
}
_OF_HTTP = {
    "cookie-file": "where the value of the header Cookie comes from: a file, credential:NAME, or - (standard input)",
    "query": "secret, or public: what stands behind the ? of the URL may be stored and shown; default secret",
    "proxy": "the HTTP proxy to go through, http://HOST:PORT",
    "proxy-user": "the user's name there",
    "proxy-password-file": "where the password there comes from: a file, credential:NAME, or - (standard input)",
}
_OF_TLS = {"tls-verify": "on, or off: whoever answers is taken for the server; default on"}
_DEFAULTS = {"request-timeout": "20", "read-ahead": "256K", "query": "secret", "tls-verify": "on", "fetch": "parts"}
_CHOICES = {"query": ("secret", "public"), "tls-verify": ("on", "off"), "fetch": ("parts", "whole")}
#: Option -> member of the node, id of the secret.
_SECRETS = {
    "password-file": ("password-secret", "password"),
    "proxy-password-file": ("proxy-password-secret", "proxy-password"),
    "cookie-file": ("cookie-secret", "cookie"),
}

#: What RFC 3986 lets stand in a path or a query; anything else is written %XX.
_PLAIN = re.compile(r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/?-]|%[0-9A-Fa-f]{2})*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_UNRESERVED = re.compile(r"[A-Za-z0-9._~-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class _Url:
    """A file of a server. ``rest`` begins with a slash: path and query as the user wrote them."""

    scheme: str
    user: str
    host: str
    port: int
    rest: str

    @property
    def plain(self) -> str:
        """Without the user."""
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{self.host}{port}{self.rest}"

    def __str__(self) -> str:
        start = f"{self.scheme}://"
        return start + (f"{escaped(self.user, safe='')}@" if self.user else "") + self.plain.removeprefix(start)


class CurlBackend(NetworkDefaults):
    """A file behind one of the schemes that QEMU gives to libcurl."""

    read_only = True
    identity_is_whole = True

    def __init__(self, scheme: str) -> None:
        self.name = scheme
        self.schemes = (scheme,)
        self.example = f"{scheme}://HOST[:PORT]/PATH"
        self.options: Mapping[str, str] = {
            **_OPTIONS, **(_OF_HTTP if scheme.startswith("http") else {}), **(_OF_TLS if scheme[-1] == "s" else {}),
        }
        self.defaults: Mapping[str, str] = {key: _DEFAULTS[key] for key in self.options if key in _DEFAULTS}
        self.secret_options = tuple(key for key in self.options if key in _SECRETS)

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the URL: with the user, host in small letters, and no default port; path and query as they are.

        Raises INVALID_SOURCE, INVALID_ARGUMENT for a user that is said twice or a password of nobody.
        """
        url = self._read(source, options)
        if "password-file" in options and not url.user:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "option password-file says the password of nobody",
                hint=f"say whose it is: -o user=USER, or {self.name}://USER@HOST/…",
            )
        return str(url)

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT where one has a value that QEMU would refuse or read in another way."""
        check_choices(options, _CHOICES)
        check_numbers(options, {"request-timeout": (1, _LONGEST_TIMEOUT)})
        _check_proxy(options)
        size_of(options)
        if "size" in options and not self.is_fetched(options):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "option size means nothing without fetch=whole", hint="leave it out"
            )
        text = options.get("read-ahead", "0")
        try:
            size = parse_size(text) if text != "0" else 0
        except StoragedError:
            size = -1
        if not 0 <= size <= _LARGEST_READ_AHEAD or size % 512:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option read-ahead={text!r} cannot be",
                hint="use a size from 0 to 64M that is a multiple of 512, such as 4M",
            )

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsCurlBase, and what the scheme has beyond. QEMU refuses one that is not read-only."""
        if self.is_fetched(options):
            return copy_node(read_only=read_only, options=options)
        url = self._read(location, options)
        said = {**self.defaults, **options}
        node: Node = {
            "driver": self.name,
            "url": url.plain,
            "timeout": int(said["request-timeout"]),
            "readahead": parse_size(said["read-ahead"]) if said["read-ahead"] != "0" else 0,
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }
        if url.user:
            node["username"] = url.user
        if "proxy-user" in options:
            node["proxy-username"] = options["proxy-user"]
        if "tls-verify" in said:
            node["sslverify"] = said["tls-verify"] == "on"
        return node | {_SECRETS[secret.option][0]: secret.id for secret in self._secrets(options)}

    def without_secrets(self, source: str) -> tuple[str, dict[str, str]]:
        """Take the password out of ``scheme://USER:PASSWORD@HOST/…``; an empty one is none."""
        start, rest = f"{self.name}://", source.removeprefix(f"{self.name}://")
        found = re.match(r"([^/?#:]*):([^/?#]*)@", rest, re.DOTALL)
        if not source.startswith(start) or found is None:
            return source, {}
        user, password = found.groups()
        shown = f"{start}{user}@{rest[found.end():]}"
        try:
            return shown, {"password-file": _unquoted(password)} if password else {}
        except UnicodeError:
            return f"{start}{user}:…@{rest[found.end():]}", {}

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """Passwords and the cookie. Of a proxy libcurl knows by its environment alone; QSD's names none by itself."""
        if self.is_fetched(options):
            return NO_REQUIREMENTS
        # Of FTP nothing goes through: there a proxy that ignores ranges would not be noticed.
        environment = {f"{scheme}_proxy": options["proxy"] for scheme in ("http", "https") if "proxy" in options}
        return Requirements(secrets=self._secrets(options), environment=environment)

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """The location, its escapes in the normal form of RFC 3986 (6.2.2).

        With the user: whose it is decides which file an FTP server shows.
        """
        return _ESCAPE.sub(_normal_escape, location)

    def is_fetched(self, options: Mapping[str, str]) -> bool:
        """Whether the user wants it."""
        return options.get("fetch") == "whole"

    def fetch_options(self, location: str, options: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
        """Return what libcurl would be told by QEMU."""
        for option, secret in secrets.items():
            if _CONTROL.search(secret) or (option == "cookie-file" and "=" not in secret):
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, f"the secret of option {option} cannot be sent",
                    cause="it holds a control character, or it is a cookie without a =", hint="check what it says",
                )
        url = self._read(location, options)
        user, password = escaped(url.user, safe=""), escaped(secrets.get("password-file", ""), safe="")
        start = f"{self.name}://"
        found = {"url": url.plain.replace(start, f"{start}{user}:{password}@", 1) if user else url.plain}
        if "cookie-file" in secrets:
            found["cookie"] = secrets["cookie-file"]
        found |= {"proxy": options["proxy"]} if "proxy" in options else {"noproxy": "*"}
        if "proxy-user" in options:
            found["proxy-user"] = f"{options['proxy-user']}:{secrets.get('proxy-password-file', '')}"
        if options.get("tls-verify") == "off":
            found["insecure"] = ""
        return found

    def _secrets(self, options: Mapping[str, str]) -> tuple[Secret, ...]:
        return tuple(Secret(_SECRETS[key][1], key) for key in self.secret_options if key in options)

    def _read(self, source: str, options: Mapping[str, str]) -> _Url:
        start = f"{self.name}://"
        if not source.startswith(start):
            self._refuse(source, "there is no // after the scheme", f"write {self.example}")
        if "#" in source:
            self._refuse(source, "there is a # in it", "a fragment names no file; a plain # is written %23")
        found = re.fullmatch(r"([^/?]*)(/[^?]*)?(\?.*)?", source.removeprefix(start), re.DOTALL)
        assert found is not None  # any text is
        authority, path, query = found[1], found[2] or "/", found[3] or ""
        user, at, server = authority.rpartition("@")
        if ":" in user:
            self._refuse(source, "there is a password in it", "leave it out and say -o password-file=PATH")
        try:
            host, port = authority_of(server, source, _PORTS[self.name])
        except StoragedError:
            # Its words may repeat a piece of a password that holds a slash.
            self._refuse(source, "what stands before the path is no host", f"write {self.example}")
        if not _PLAIN.fullmatch(path + query):
            self._refuse(
                source, "there are characters in it that a URL cannot have",
                "write them %XX: a space %20, a plain % %25, others by the bytes of their UTF-8",
            )
        if any(unquote(segment) in (".", "..") for segment in path.split("/")):
            self._refuse(source, "there is a . or .. in its path", "write the path without")
        self._check_scheme(source, path, query, options)
        return _Url(self.name, self._user(source, user if at else None, options), host, port, path + query)

    def _check_scheme(self, source: str, path: str, query: str, options: Mapping[str, str]) -> None:
        if self.name.startswith("ftp"):
            if query:
                self._refuse(source, "there is a ? in it", "libcurl would leave out the rest; write it %3F")
            if ";" in path:
                self._refuse(source, "there is a ; in it", "it may change how data is sent (;type=); write it %3B")
            if path.endswith("/"):
                self._refuse(source, "it names a directory", f"write {self.example}")
            if _CONTROL.search(unquote(path, "latin-1")):
                self._refuse(source, "there is a control character in its path", "FTP cannot say it: rename the file")
        elif "%00" in path + query:
            self._refuse(source, "there is a %00 in it", "leave it out")
        if query and options.get("query") != "public":
            self._refuse(
                source, "what stands behind its ? may be a secret (a signature, a token), and a source is shown",
                "say -o query=public if it is none; a signed URL would expire while it is in use: let the server ask "
                "for a user and password, or a cookie (-o cookie-file=PATH)",
            )

    def _user(self, source: str, written: str | None, options: Mapping[str, str]) -> str:
        """The user of the URL (``written``, as it stands there) or of the option."""
        said = options.get("user")
        user = said
        if written is not None:
            if not _PLAIN.fullmatch(written) or "@" in written:
                self._refuse(source, "the user's name has characters that a URL cannot have", "write them %XX")
            try:
                user = unquote_to_bytes(written).decode()
            except UnicodeError:
                self._refuse(source, "the user's name is no UTF-8", "QMP can carry nothing else")
            if said is not None and said != user:
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, "the source and the option user name two users",
                    cause=f"{user!r} and {said!r}", hint="leave out one",
                )
        if user is None:
            return ""
        if not user or _CONTROL.search(user) or (":" in user and self.name.startswith("http")):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{user!r} is no user's name",
                hint="it has at least a character, and no control characters; with HTTP it has no colon (RFC 7617)",
            )
        return user

    def _refuse(self, source: str, cause: str, hint: str) -> NoReturn:
        refuse(_without_what_may_be_secret(source), cause, hint)


def _check_proxy(options: Mapping[str, str]) -> None:
    """Raise INVALID_ARGUMENT where a proxy, its user or its password is said, and cannot be used."""
    proxy, user = options.get("proxy"), options.get("proxy-user")
    good = proxy is None
    if proxy is not None and (found := re.fullmatch(r"http://([^/?#@]+:[0-9]+)", proxy)):
        with contextlib.suppress(StoragedError):
            authority_of(found[1], proxy, 0)
            good = True
    if not good:
        # Not with the value: it may hold a password.
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "option proxy names no proxy",
            hint="write http://HOST:PORT; its user and password are -o proxy-user and -o proxy-password-file",
        )
    if user is not None and (not user or ":" in user or _CONTROL.search(user)):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"option proxy-user={user!r} is no user's name",
            hint="it has at least a character, no colon and no control characters (RFC 7617)",
        )
    for option, needed in (("proxy-user", "proxy"), ("proxy-password-file", "proxy-user")):
        if option in options and needed not in options:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {option} means nothing without {needed}",
                hint=f"add -o {needed}=…, or leave it out",
            )


def _without_what_may_be_secret(source: str) -> str:
    """Return a source as it may stand in an error: without a password, and without a query."""
    scheme, colon, rest = source.partition(":")
    user, at, after = rest.rpartition("@")
    if at and ":" in user:
        rest = f"{user.partition(':')[0]}:…@{after}"
    before, question, _ = rest.partition("?")
    return f"{scheme}{colon}{before}{question}{'…' if question else ''}"


def _unquoted(text: str) -> str:
    """Unescape what the client hands over as bytes: what is no UTF-8 is kept (PEP 383)."""
    return unquote_to_bytes(text.encode(errors="surrogateescape")).decode(errors="surrogateescape")


def _normal_escape(found: re.Match[str]) -> str:
    character = chr(int(found[1], 16))
    return character if _UNRESERVED.fullmatch(character) else found[0].upper()


HTTP, HTTPS, FTP, FTPS = (CurlBackend(scheme) for scheme in _PORTS)
BACKENDS = (HTTP, HTTPS, FTP, FTPS)
