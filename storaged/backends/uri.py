"""Parts of a URI (RFC 3986) as sources on the network use them, read strictly.

urllib.parse would drop line ends, lower-case names and replace what is no UTF-8: then the disk that is opened is
another one than was named.
"""

from __future__ import annotations

import ipaddress
import re
from typing import NoReturn
from urllib.parse import quote, unquote_to_bytes

from storaged.errors import ErrorCode, StoragedError

#: Of a host name; underscores are common in private networks.
_LABEL = r"[A-Za-z0-9_]([A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_NAME = re.compile(rf"{_LABEL}(\.{_LABEL})*\.?")
_LONGEST_NAME = 253
#: What getaddrinfo(3) takes for an address in one of the older notations: 127.1, 0x7f.1, 010.0.0.1.
_OLD_ADDRESS = re.compile(r"(.*\.)?([0-9]+|0[xX][0-9A-Fa-f]*)")
_PASSWORD = re.compile(r"(//[^/?#@:]*):[^/?#@]*@")
_ZONE = re.compile(r"[A-Za-z0-9._-]+")
_BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")


def refuse(source: str, cause: str, hint: str) -> NoReturn:
    """Raise INVALID_SOURCE for a source. What looks like a password in it is not said again."""
    shown = _PASSWORD.sub(r"\1:…@", source)
    raise StoragedError(
        ErrorCode.INVALID_SOURCE, f"the source {shown!r} cannot be understood",
        cause=_PASSWORD.sub(r"\1:…@", cause), hint=hint,
    )


def unescaped(part: str, source: str) -> str:
    """Return a part of a URI without its %XX. Raises INVALID_SOURCE for what is no UTF-8, or holds a NUL."""
    if _BAD_ESCAPE.search(part):
        refuse(source, f"{part!r} has a % without two hexadecimal digits", "a plain % is written %25")
    try:
        text = unquote_to_bytes(part).decode()
    except UnicodeError:
        refuse(source, f"{part!r} is no UTF-8", "QMP can carry nothing else: rename it")
    if "\0" in text:
        refuse(source, f"{part!r} holds a NUL character", "leave it out")
    return text


def escaped(text: str, *, safe: str = "/") -> str:
    """Return a text as a part of a URI: only letters, digits, ``-._~`` and ``safe`` stand for themselves."""
    return quote(text, safe=safe)


def host_of(text: str, source: str) -> str:
    """Return a host as all its spellings are compared: a name in small letters, an address in its short form.

    An IPv6 address stands in brackets, in ``text`` and in what is returned. Raises INVALID_SOURCE.
    """
    if text.startswith("[") and text.endswith("]"):
        address, percent, zone = text[1:-1].partition("%")
        zone = zone.removeprefix("25")
        try:
            parsed = ipaddress.IPv6Address(address)
            if parsed.ipv4_mapped is not None and not percent:
                # The kernel connects to the IPv4 address: one server, one spelling.
                return str(parsed.ipv4_mapped)
            short = str(parsed)
        except ValueError:
            refuse(source, f"{text} is no IPv6 address", "write [ADDRESS]:PORT")
        if percent and not _ZONE.fullmatch(zone):
            refuse(source, f"{text} has no usable zone", "write [ADDRESS%25INTERFACE]")
        return f"[{short}%25{zone}]" if percent else f"[{short}]"
    try:
        return str(ipaddress.IPv4Address(text))
    except ValueError:
        pass
    if not _NAME.fullmatch(text) or len(text) > _LONGEST_NAME or _OLD_ADDRESS.fullmatch(text):
        refuse(source, f"{text!r} is no host", "write a name, an IPv4 address, or an IPv6 address in [ ]")
    return text.lower()


def same_host(host: str) -> str:
    """Return what a host of ``host_of`` is compared by: the dot at the end of a name only ends the search for others.

    (resolv.conf(5), search.) To connect, the name is used as it was written.
    """
    return host if host.startswith("[") else host.removesuffix(".")


def bare_host(host: str) -> str:
    """Return a host of ``host_of`` as getaddrinfo(3) takes it: without brackets and escapes."""
    return host.removeprefix("[").removesuffix("]").replace("%25", "%", 1) if host.startswith("[") else host


def port_of(text: str, source: str) -> int:
    """Return a TCP port. Raises INVALID_SOURCE; names of services are none, because hosts differ in them."""
    if not re.fullmatch(r"0{0,9}[1-9][0-9]{0,4}", text) or int(text) > 65535:
        refuse(source, f"{text!r} is no port", "a port is a number from 1 to 65535")
    return int(text)


def authority_of(text: str, source: str, default_port: int) -> tuple[str, int]:
    """Split ``HOST[:PORT]``. Raises INVALID_SOURCE."""
    if "@" in text:
        refuse(source, "there is no user in this source", "leave out what stands before the @")
    found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*)(?::(.*))?", text, re.DOTALL)
    if found is None or not found[1]:
        refuse(source, f"{text!r} is no host", "write HOST or HOST:PORT, an IPv6 address in [ ]")
    return host_of(found[1], source), port_of(found[2], source) if found[2] is not None else default_port
