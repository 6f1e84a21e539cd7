"""QEMU's ``nfs`` driver: a file on an NFS server, by libnfs, without a mount on this host. block/nfs.c in QEMU.

The URI is QEMU's, with its names in the query: ``nfs://HOST/PATH[?uid=N&gid=N&tcp-syncnt=N&readahead=N&pagecache=N
&debug=N]``. What the query says, options may say instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import NoReturn

from storaged.backends.base import NetworkDefaults, Node
from storaged.backends.cache import cache_flags
from storaged.backends.uri import bare_host, escaped, host_of, refuse, same_host, unescaped
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers

#: MNTPATHLEN in RFC 1813: of a path that a server is asked to mount, in bytes.
_LONGEST_PATH = 1024
#: An int in libnfs.
_LAST_ID = 2**31 - 1
#: Option → (least, most). QEMU cuts larger ones down, with no more than a line in its log (block/nfs.c); the kernel
#: takes 1 to 127 SYNs (MAX_TCP_SYNCNT).
_LIMITS = {
    "uid": (0, _LAST_ID),
    "gid": (0, _LAST_ID),
    "tcp-syn-count": (1, 127),
    "readahead-size": (1, 1 << 20),
    "page-cache-size": (1, 2048),
    "debug": (0, 2),
}
#: What QEMU calls them in a URI, and in BlockdevOptionsNfs.
_QUERY = {
    "uid": "uid", "gid": "gid", "tcp-syncnt": "tcp-syn-count", "readahead": "readahead-size",
    "pagecache": "page-cache-size", "debug": "debug",
}
_IN_QUERY = {option: key for key, option in _QUERY.items()}
_MEMBERS = {"uid": "user", "gid": "group"}
#: QSD's monitor stands still while it opens: with the kernel's own 6, for two minutes.
SYN_COUNT = 2
#: What libnfs reads ahead, or keeps, QEMU refuses with cache.direct.
_CACHES = ("readahead-size", "page-cache-size")

_FORMS = "write nfs://HOST/PATH"


@dataclass(frozen=True)
class _File:
    """A file of a server, and what else the source says: option → value."""

    host: str
    path: str
    said: Mapping[str, str] = field(default_factory=dict)

    @property
    def place(self) -> str:
        """Server and path."""
        return f"nfs://{self.host}{escaped(self.path)}"

    def __str__(self) -> str:
        query = "&".join(f"{_IN_QUERY[key]}={self.said[key]}" for key in _LIMITS if key in self.said)
        return f"{self.place}?{query}" if query else self.place


class NfsBackend(NetworkDefaults):
    """A file on an NFS server."""

    name = "nfs"
    schemes = ("nfs",)
    example = "nfs://HOST/PATH"
    options: Mapping[str, str] = {
        "uid": "the user's number that the server is told; default 0, which is root",
        "gid": "the group's number that the server is told; default 0",
        "tcp-syn-count": "how often the kernel tries again to connect, after 1, 2, 4, … seconds, until a host without "
        "an answer is given up, 1 to 127; default 2 (7 seconds)",
        "readahead-size": "bytes that are read ahead, up to 1048576; not with cache=none or directsync; default: none",
        "page-cache-size": "blocks of 4096 bytes that are kept in memory, up to 2048; not with cache=none or "
        "directsync; default: none",
        "debug": "how much libnfs writes into QSD's log, 0 to 2; default 0",
    }
    defaults: Mapping[str, str] = {
        "uid": "0", "gid": "0", "tcp-syn-count": str(SYN_COUNT), "debug": "0",
    }

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the file as a URI with its numbers in the query. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
        file = _read(source)
        options = {key: options[key] for key in (*_LIMITS, "cache") if key in options}
        self.check_options(options)
        for key, value in file.said.items():
            if options.setdefault(key, value) != value:
                _refuse_option(
                    f"option {key}={options[key]!r} says another number than the source", "leave one of them out"
                )
        self.check_options(options)
        return str(_File(file.host, file.path, {
            key: value for key, value in options.items() if key in _LIMITS and (key not in _MEMBERS or value != "0")
        }))

    def check_options(self, options: Mapping[str, str]) -> None:
        """They are numbers, and libnfs keeps nothing where QEMU shall keep nothing."""
        for key in _LIMITS:
            if key in options and not _is_number(key, options[key]):
                least, most = _LIMITS[key]
                _refuse_option(
                    f"option {key}={options[key]!r} is no number that it can have",
                    f"use a whole number from {least} to {most}, without zeroes before it",
                )
        if not cache_flags({"cache": "writeback", **options})["direct"]:
            return
        for key in _CACHES:
            if key in options:
                _refuse_option(
                    f"{key} and cache={options['cache']} exclude each other", "leave one of them out"
                )

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsNfs."""
        file = _read(location)
        return {
            "driver": "nfs",
            "server": {"type": "inet", "host": bare_host(file.host)},
            "path": file.path,
            "tcp-syn-count": SYN_COUNT,
            # Else libnfs would say who QSD is, which is nobody that a server knows.
            "user": 0,
            "group": 0,
            **{_MEMBERS.get(key, key): int(value) for key, value in file.said.items()},
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """Some servers insist on a low port."""
        return Powers(capabilities=frozenset({"NET_BIND_SERVICE"}))

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Server and path; who asks, and how, does not matter."""
        file = _read(location)
        return replace(file, host=same_host(file.host)).place


def _refuse_option(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)


def _is_number(key: str, text: str) -> bool:
    """Whether an option can have that value. QEMU reads 010 as 8 (parse_uint_full with base 0)."""
    least, most = _LIMITS[key]
    return re.fullmatch(r"0|[1-9][0-9]{0,9}", text) is not None and least <= int(text) <= most


def _read(source: str) -> _File:
    rest = source.partition(":")[2]
    if not rest.startswith("//"):
        refuse(source, "there is no // after the scheme", _FORMS)
    if "#" in rest:
        refuse(source, "there is a # in it", "a source of NFS has no fragment; a plain # is written %23")
    before, question, query = rest[2:].partition("?")
    authority, slash, path = before.partition("/")
    if "@" in authority:
        refuse(source, "there is no user in this source", "say who asks with ?uid=NUMBER&gid=NUMBER")
    if ":" in authority.rpartition("]")[2]:
        refuse(source, "there is no port in this source", "leave it out: QEMU asks the server's port mapper (rpcbind)")
    host = host_of(authority, source)
    if not slash:
        refuse(source, "it does not say which file", _FORMS)
    return _File(host, _path_of(unescaped(path, source), source), _query_of(query, source) if question else {})


def _path_of(text: str, source: str) -> str:
    """Return the path with one slash between two names, as the server sees it."""
    names = [name for name in text.split("/") if name]
    if not names or text.endswith("/"):
        refuse(source, "it does not say which file", "the path is that of a file, not of a directory")
    if {".", ".."} & set(names):
        refuse(source, "there is a . or .. in the path", "write the path without")
    path = "/" + "/".join(names)
    if len(path.encode()) > _LONGEST_PATH:
        refuse(source, f"the path has more than {_LONGEST_PATH} bytes", "NFS has no longer ones")
    return path


def _query_of(query: str, source: str) -> dict[str, str]:
    said: dict[str, str] = {}
    for part in query.split("&"):
        key, _, value = part.partition("=")
        option = _QUERY.get(key)
        if option is None:
            refuse(source, f"{part!r} means nothing here", f"known: {', '.join(_QUERY)}; a plain ? is written %3F")
        if option in said:
            refuse(source, f"it says {key} twice", "leave one of them out")
        if not _is_number(option, value):
            least, most = _LIMITS[option]
            refuse(
                source, f"{part!r} is no number that it can have",
                f"use a whole number from {least} to {most}, without zeroes before it",
            )
        said[option] = value
    return said


BACKEND = NfsBackend()
