"""``tftp``: a file of a TFTP server (RFC 1350), fetched whole and served from the copy.

QEMU has no driver of that name any more: TFTP cannot read in the middle of a file. The node is QEMU's ``file``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from storaged.backends.base import NetworkDefaults, Node
from storaged.backends.fetched import SIZE_HELP, copy_node, size_of
from storaged.backends.uri import authority_of, escaped, refuse, unescaped
from storaged.backends.values import check_numbers

DEFAULT_PORT = 69
_LONGEST_STALL = 3600
DEFAULT_STALL = 20
#: A request is one packet of 512 bytes at most, and has more in it than the name (RFC 1350, 2347).
_LONGEST_PATH = 400
_FORM = "write tftp://HOST[:PORT]/PATH"


class TftpBackend(NetworkDefaults):
    """A file of a TFTP server."""

    name = "tftp"
    schemes = ("tftp",)
    example = "tftp://HOST[:PORT]/PATH"
    read_only = True
    options: Mapping[str, str] = {
        "request-timeout": "seconds without an answer until the server is given up, "
        f"1 to {_LONGEST_STALL}; default {DEFAULT_STALL}",
        "size": SIZE_HELP,
    }
    defaults: Mapping[str, str] = {"request-timeout": str(DEFAULT_STALL)}

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the file as a URL with host and path, and a port that is not the usual one. Raises INVALID_SOURCE."""
        if not source.startswith("tftp://"):
            refuse(source, "there is no // after the scheme", _FORM)
        if "#" in source or "?" in source:
            refuse(source, "there is a # or a ? in it", "a plain # is written %23, a plain ? %3F")
        authority, _, path = source.removeprefix("tftp://").partition("/")
        if ";" in path:
            refuse(source, "there is a ; in it", "binary is all that is sent here, leave ;mode= out; write it %3B")
        host, port = authority_of(authority, source, DEFAULT_PORT)
        name = unescaped(path, source)
        if not name or name.endswith("/"):
            refuse(source, "it names no file", _FORM)
        if re.search(r"[\x00-\x1f\x7f]", name):
            refuse(source, "there is a control character in its path", "rename the file")
        if any(segment in (".", "..") for segment in name.split("/")):
            refuse(source, "there is a . or .. in its path", "write the path without")
        if len(name.encode()) > _LONGEST_PATH:
            refuse(source, f"the path has more than {_LONGEST_PATH} bytes", "give the file a shorter name there")
        return f"tftp://{host}{f':{port}' if port != DEFAULT_PORT else ''}/{escaped(name)}"

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT where one has a value that it cannot have."""
        check_numbers(options, {"request-timeout": (1, _LONGEST_STALL)})
        size_of(options)

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """The copy's."""
        return copy_node(read_only=read_only, options=options)

    def is_fetched(self, options: Mapping[str, str]) -> bool:
        """Always."""
        return True

    def fetch_options(self, location: str, options: Mapping[str, str], secrets: Mapping[str, str]) -> dict[str, str]:
        """None beyond the URL."""
        return {}

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """The location."""
        return location


BACKEND = TftpBackend()
