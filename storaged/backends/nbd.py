"""QEMU's ``nbd`` driver: an export of an NBD server, by TCP or a unix socket, with TLS or without. block/nbd.c in QEMU.

URIs are those of the NBD project (doc/uri.md); ``nbd:HOST:PORT`` and ``nbd:unix:PATH`` are QEMU's own, older ones.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from storaged.backends import tls
from storaged.backends.base import NO_REQUIREMENTS, NetworkDefaults, Node, Requirements
from storaged.backends.cache import cache_flags
from storaged.backends.uri import authority_of, bare_host, escaped, refuse, same_host, unescaped
from storaged.backends.values import check_numbers
from storaged.model.powers import NO_POWERS, Powers

DEFAULT_PORT = 10809
#: The protocol's limit for a string (NBD_MAX_STRING_SIZE in QEMU), in bytes.
_LONGEST_EXPORT = 4096
#: sun_path, less the byte that ends it.
_LONGEST_SOCKET = 107
#: uint32 in BlockdevOptionsNbd: 136 years.
LONGEST_DELAY = 2**32 - 1
#: QSD's monitor stands still while it opens: not for longer than a user would wait.
_LONGEST_OPEN = 60
DEFAULTS = {"reconnect-delay": LONGEST_DELAY, "open-timeout": 5}
_LIMITS = {"reconnect-delay": (0, LONGEST_DELAY), "open-timeout": (1, _LONGEST_OPEN)}

_FORMS = "write nbd://HOST[:PORT][/EXPORT] or nbd+unix:///[EXPORT]?socket=/PATH, with TLS nbds:// or nbds+unix:///"
_EXPORT_NAME = ":exportname="


@dataclass(frozen=True)
class _Export:
    """An export of a server: ``host`` and ``port``, or the path ``socket``."""

    name: str
    host: str = ""
    port: int = 0
    socket: str = ""
    tls: bool = False

    def __str__(self) -> str:
        scheme = "nbds" if self.tls else "nbd"
        if self.socket:
            return f"{scheme}+unix:///{escaped(self.name)}?socket={escaped(self.socket)}"
        return f"{scheme}://{self.host}:{self.port}/{escaped(self.name)}"


class NbdBackend(NetworkDefaults):
    """An export of an NBD server."""

    name = "nbd"
    identity_is_whole = True
    schemes = ("nbd", "nbd+tcp", "nbd+unix", "nbds", "nbds+tcp", "nbds+unix")
    example = "nbd://HOST[:PORT][/EXPORT]"
    options: Mapping[str, str] = {
        "reconnect-delay": "seconds that requests wait for a lost server before they fail, 0: they fail at once; "
        f"default {LONGEST_DELAY} (136 years)",
        "open-timeout": f"seconds until a server that cannot be reached is given up, 1 to {_LONGEST_OPEN}; default 5",
        **tls.OPTIONS,
    }
    defaults: Mapping[str, str] = {**{key: str(value) for key, value in DEFAULTS.items()}, **tls.DEFAULTS}
    secret_options = tls.SECRET_OPTIONS

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the export as a URI with host, port and name.

        Raises INVALID_SOURCE; INVALID_ARGUMENT where options of TLS are missing, or there is no TLS.
        """
        export = _read(source)
        tls.check_use(
            options, tls=export.tls, host=bool(export.host),
            spelling="nbds+unix:///" if export.socket else "nbds://",
        )
        return str(export)

    def check_options(self, options: Mapping[str, str]) -> None:
        """Times are whole seconds."""
        check_numbers(options, _LIMITS)
        tls.check(options)

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsNbd. Requests are done again on each new connection, so none is lost or done by halves."""
        export = _read(location)
        server: Node = {"type": "unix", "path": export.socket}
        if not export.socket:
            # keep-alive: a server that vanished without a word while a request waits for its reply is noticed, after
            # the time that the host's net.ipv4.tcp_keepalive_* say.
            server = {"type": "inet", "host": bare_host(export.host), "port": str(export.port), "keep-alive": True}
        return {
            "driver": "nbd",
            "server": server,
            "export": export.name,
            **{key: int(options.get(key, default)) for key, default in DEFAULTS.items()},
            **(tls.members(options) if export.tls else {}),
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """What TLS needs."""
        return tls.requirements(options) if _read(location).tls else NO_REQUIREMENTS

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """The socket, or the files that TLS needs."""
        export = _read(location)
        of_tls = tls.powers(options) if export.tls else NO_POWERS
        return of_tls.and_of(Powers(files=((export.socket, True),), connects_unix=True)) if export.socket else of_tls

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """The location as it is without TLS (many servers take clients with and without), a unix socket's real path.

        Not by the socket's inode: a server that is restarted makes another one, and is the same server.
        """
        export = _read(location)
        export = replace(export, tls=False, host=same_host(export.host))
        if export.socket:
            export = replace(export, socket=real_path(export.socket))
        return str(export)


def _read(source: str) -> _Export:
    scheme, _, rest = source.partition(":")
    if scheme == "nbd" and not rest.startswith("//"):
        export = _read_legacy(rest, source)
    elif not rest.startswith("//"):
        refuse(source, "there is no // after the scheme", _FORMS)
    else:
        export = _read_uri(scheme, rest.removeprefix("//"), source)
    export = replace(export, tls=scheme.startswith("nbds"))
    if len(export.name.encode()) > _LONGEST_EXPORT:
        refuse(source, f"the name of the export has more than {_LONGEST_EXPORT} bytes", _FORMS)
    if export.socket and not export.socket.startswith("/"):
        refuse(source, f"the path {export.socket!r} is not absolute", "write the whole path of the socket")
    if len(export.socket.encode()) > _LONGEST_SOCKET:
        refuse(
            source, f"the path of the socket has more than {_LONGEST_SOCKET} bytes, all that the kernel takes",
            "reach it by a shorter path, such as a symbolic link to its directory",
        )
    return export


def _read_uri(scheme: str, rest: str, source: str) -> _Export:
    if "#" in rest:
        refuse(source, "there is a # in it", "an NBD URI has no fragment; a plain # is written %23")
    before, question, query = rest.partition("?")
    authority, _, path = before.partition("/")
    name = unescaped(path, source)
    if scheme.startswith("nbds"):
        _refuse_tls_parameters(authority, query, source)
    if not scheme.endswith("+unix"):
        if question:
            refuse(source, f"{query!r} means nothing here", "leave out the ?; a plain one is written %3F")
        host, port = authority_of(authority, source, DEFAULT_PORT)
        return _Export(name, host=host, port=port)
    if authority:
        refuse(source, f"{authority!r} stands where no host can be", "three slashes: " + _FORMS)
    key, equals, socket = query.partition("=")
    if key != "socket" or not equals or not socket:
        refuse(source, "it does not say which socket", _FORMS)
    if "&" in socket or ";" in socket:
        refuse(source, "there is more than the socket behind the ?", "a plain & is written %26, a plain ; %3B")
    return _Export(name, socket=unescaped(socket, source))


def _refuse_tls_parameters(authority: str, query: str, source: str) -> None:
    """A source that ends up in lists and in the log names neither the user nor the file of the key."""
    if "@" in authority:
        refuse(source, f"{authority!r} names a user", f"leave it out and say -o {tls.USER}=USER")
    if re.search(r"(^|[&;])tls-[a-z-]+=", query):
        refuse(source, "options of TLS are no part of the source", "say each of them with -o, such as "
               f"-o {tls.CERTIFICATES}=DIRECTORY")


def _read_legacy(rest: str, source: str) -> _Export:
    """``HOST:PORT`` or ``unix:PATH``, and then the name as it is, to the end (nbd_parse_filename in block/nbd.c)."""
    server, said, name = rest.partition(_EXPORT_NAME)
    if said and not name:
        refuse(source, "the name of the export is empty", f"leave {_EXPORT_NAME} out for the default export")
    try:
        source.encode()
    except UnicodeEncodeError:
        refuse(source, "it is no UTF-8", "QMP can carry nothing else: rename it")
    if "\0" in source:
        refuse(source, "it holds a NUL character", "leave it out")
    if server.startswith("unix:"):
        socket = server.removeprefix("unix:")
        if not socket:
            refuse(source, "it does not say which socket", "write nbd:unix:/PATH")
        return _Export(name, socket=socket)
    if server.endswith("]") or ":" not in server:
        refuse(source, "there is no port", "write nbd:HOST:PORT, or nbd://HOST for the default port")
    host, port = authority_of(server, source, DEFAULT_PORT)
    return _Export(name, host=host, port=port)


BACKEND = NbdBackend()
