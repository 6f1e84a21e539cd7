"""QEMU's ``gluster`` driver: a file in a volume of GlusterFS, by libgfapi, without a mount. block/gluster.c in QEMU.

Deprecated since QEMU 10.0. The URI is QEMU's: ``gluster[+tcp]://HOST[:PORT]/VOLUME/PATH``, and
``gluster+unix:///VOLUME/PATH?socket=/PATH`` for a glusterd of this host.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from storaged.backends.base import NetworkDefaults, Node
from storaged.backends.cache import cache_flags
from storaged.backends.uri import authority_of, bare_host, escaped, refuse, unescaped
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers

#: Of glusterd.
DEFAULT_PORT = 24007
#: Gluster's own rule, and its limit (GD_VOLUME_NAME_MAX).
_VOLUME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,254}")
#: PATH_MAX, less the byte that ends it.
_LONGEST_PATH = 4095
#: sun_path, less the byte that ends it.
_LONGEST_SOCKET = 107

_FORMS = "write gluster://HOST[:PORT]/VOLUME/PATH or gluster+unix:///VOLUME/PATH?socket=/PATH"


@dataclass(frozen=True)
class _File:
    """A file of a volume, and who describes the volume: ``host`` and ``port``, or the path ``socket``."""

    volume: str
    path: str
    host: str = ""
    port: int = 0
    socket: str = ""

    @property
    def place(self) -> str:
        """What it is in its cluster."""
        return f"{self.volume}/{escaped(self.path)}"

    def __str__(self) -> str:
        if self.socket:
            return f"gluster+unix:///{self.place}?socket={escaped(self.socket)}"
        return f"gluster://{self.host}:{self.port}/{self.place}"


class GlusterBackend(NetworkDefaults):
    """A file in a volume of GlusterFS."""

    name = "gluster"
    schemes = ("gluster", "gluster+tcp", "gluster+unix", "gluster+rdma")
    example = "gluster://HOST[:PORT]/VOLUME/PATH"
    options: Mapping[str, str] = {
        "servers": "HOST[:PORT][,…]: who is asked for the volume's description when the source's own server is away",
    }
    #: When a flush fails QEMU closes the volume for good (qemu_gluster_co_flush_to_disk).
    recovers = False
    #: write-behind is in libgfapi, and takes no notice of O_DIRECT unless the volume has performance.strict-o-direct.
    caches_direct = True

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the file as a URI with server, volume and path. Raises INVALID_SOURCE, UNSUPPORTED."""
        return str(_read(source))

    def check_options(self, options: Mapping[str, str]) -> None:
        """Servers are hosts with ports."""
        _further_servers(options)

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsGluster. What libgfapi has to say it writes to QSD's log."""
        file = _read(location)
        servers = [{"type": "unix", "path": file.socket}] if file.socket else [_inet(file.host, file.port)]
        servers += [server for server in _further_servers(options) if server not in servers]
        return {
            "driver": "gluster",
            "volume": file.volume,
            "path": file.path,
            "server": servers,
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """libgfapi tells the server its user, as the one whose files these are, and likes a low port.

        It crashes where it cannot write to /proc/self/task/N/comm (gf_thread_set_vname), and Landlock could only let it
        write to all of /proc.
        """
        return Powers(
            capabilities=frozenset({"NET_BIND_SERVICE"}), root="Gluster's servers look at the user of their client",
            all_files="Gluster's library crashes under Landlock", connects_unix=bool(_read(location).socket),
        )

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Volume and path, whoever describes the volume: each server of a cluster does.

        So two clusters with a volume of one name, and a file of one name in it, count as one.
        """
        return f"gluster:{_read(location).place}"


def _read(source: str) -> _File:
    scheme, _, rest = source.partition(":")
    if scheme == "gluster+rdma":
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "QEMU does not speak RDMA with Gluster",
            cause="it would use TCP in its place", hint="write gluster+tcp://HOST[:PORT]/VOLUME/PATH",
        )
    if not rest.startswith("//"):
        refuse(source, "there is no // after the scheme", _FORMS)
    if "#" in rest:
        refuse(source, "there is a # in it", "a plain # is written %23")
    before, question, query = rest.removeprefix("//").partition("?")
    authority, _, text = before.partition("/")
    # As QEMU and Gluster do, which see no difference.
    volume, *path = [part for part in unescaped(text, source).split("/") if part] or [""]
    if not _VOLUME.fullmatch(volume):
        refuse(source, f"{volume!r} is no volume" if volume else "it names no volume", _FORMS)
    if not path:
        refuse(source, f"it names no file in the volume {volume}", _FORMS)
    if "." in path or ".." in path:
        refuse(source, "there is a . or .. in the path", "write the path as it is without")
    name = "/".join(path)
    if len(name.encode()) > _LONGEST_PATH:
        refuse(source, f"the path has more than {_LONGEST_PATH} bytes", _FORMS)
    if scheme == "gluster+unix":
        if authority:
            refuse(source, f"{authority!r} stands where no host can be", "three slashes: " + _FORMS)
        return _File(volume, name, socket=_socket(query, source))
    if question:
        refuse(source, f"{query!r} means nothing here", "leave out the ?; a plain one is written %3F")
    host, port = authority_of(authority, source, DEFAULT_PORT)
    return _File(volume, name, host=host, port=port)


def _socket(query: str, source: str) -> str:
    key, equals, text = query.partition("=")
    if key != "socket" or not equals or not text:
        refuse(source, "it does not say which socket", _FORMS)
    if "&" in text or ";" in text:
        refuse(source, "there is more than the socket behind the ?", "a plain & is written %26, a plain ; %3B")
    path = unescaped(text, source)
    if not path.startswith("/"):
        refuse(source, f"the path {path!r} is not absolute", "write the whole path of the socket")
    if len(path.encode()) > _LONGEST_SOCKET:
        refuse(
            source, f"the path of the socket has more than {_LONGEST_SOCKET} bytes, all that the kernel takes",
            "reach it by a shorter path, such as a symbolic link to its directory",
        )
    return path


def _inet(host: str, port: int) -> Node:
    return {"type": "inet", "host": bare_host(host), "port": str(port)}


def _further_servers(options: Mapping[str, str]) -> list[Node]:
    if "servers" not in options:
        return []
    found: list[Node] = []
    for text in options["servers"].split(","):
        try:
            server = _inet(*authority_of(text, text, DEFAULT_PORT))
        except StoragedError as error:
            _refuse_servers(options["servers"], error.cause)
        if server in found:
            _refuse_servers(options["servers"], f"{text} is said twice")
        found.append(server)
    return found


def _refuse_servers(value: str, cause: str) -> NoReturn:
    raise StoragedError(
        ErrorCode.INVALID_ARGUMENT, f"option servers={value!r} names no servers", cause=cause,
        hint="write servers=HOST[:PORT][,HOST[:PORT]…]",
    )


BACKEND = GlusterBackend()
