"""Vitastor's QEMU driver: an image, or an inode of a pool, in a Vitastor cluster.

Not in QEMU itself: src/client/qemu_driver.c (the filename syntax) and patches/qemu-*-vitastor.patch
(BlockdevOptionsVitastor) in github.com/vitalif/vitastor; read at release 3.0.8.
"""

from __future__ import annotations

import ipaddress
import posixpath
import re
from collections.abc import Callable, Mapping
from typing import NoReturn

from storaged.backends.base import NetworkDefaults, Node
from storaged.backends.uri import port_of, refuse
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers
from storaged.model.sizes import MAX_SIZE, parse_size

#: Bytes; the driver's request_alignment.
BLOCK = 4096
#: The upper bits of an inode's number are its pool's (POOL_ID_BITS in src/client/object_id.h).
_POOL_BITS = 16
_INODE_BITS = 64 - _POOL_BITS
#: As QEMU reads numbers: hexadecimal behind 0x. Behind a plain 0 it would read octal; nobody means that.
_NUMBER = re.compile(r"0[xX][0-9A-Fa-f]{1,16}|0|[1-9][0-9]{0,19}")
_SIZE = re.compile(r"[1-9][0-9]*[KMGTP]?", re.IGNORECASE | re.ASCII)
_PATH_OF_API = re.compile(r"(/[A-Za-z0-9._~-]+)+")
_DEFAULT_API = "/v3"
_DEFAULT_CONFIGURATION = "/etc/vitastor/vitastor.conf"
#: What is said with these is the same as nothing.
_DEFAULTS = {"config-path": _DEFAULT_CONFIGURATION, "skip-parents": "0"}

_FORMS = "write vitastor:image=NAME, or vitastor:pool=NUMBER:inode=NUMBER:size=SIZE"
_URI = "//?"
_TO_ESCAPE = re.compile(r"[:\\]")
_ESCAPED = r"\\\g<0>"
#: In this order they stand in a location.
_KEYS = (
    "image", "pool", "inode", "size", "etcd-host", "etcd-prefix", "config-path", "cluster", "skip-parents", "use-rdma",
    "rdma-device", "rdma-port-num", "rdma-gid-index", "rdma-mtu",
)
#: Its name in the configuration of Vitastor.
_SYNONYMS = {"etcd-address": "etcd-host"}
#: Option → key in a source, where it is another one.
_OPTION_KEYS = {"disk-size": "size"}
#: Those that are numbers to the driver.
_NUMBERS = frozenset(_KEYS) - {"image", "etcd-host", "etcd-prefix", "config-path", "cluster", "rdma-device"}
#: What QEMU's filename syntax has and BlockdevOptionsVitastor has not.
_RDMA = tuple(key for key in _KEYS if "rdma" in key)


class _Unusable(Exception):
    """A value that cannot be used: the cause, and a hint."""


class VitastorBackend(NetworkDefaults):
    """A Vitastor image."""

    name = "vitastor"
    schemes = ("vitastor",)
    example = "vitastor:image=NAME"
    #: With client_enable_writeback, which nobody here sees.
    caches_writes = True
    options: Mapping[str, str] = {
        "image": "the image's name, where the source does not say it; image@snapshot can only be read",
        "pool": "the number of the pool, where no image is named",
        "inode": "the number of the inode in its pool, where no image is named",
        "disk-size": "the size of the disk (10G), where no image is named: an inode has none",
        "etcd-host": "ADDRESS:PORT[/PATH] of the cluster's etcd, several with commas between them; "
        "without it, what the configuration of Vitastor says",
        "etcd-prefix": "what the cluster's keys in etcd begin with; without it, what the configuration says",
        "config-path": f"the configuration of Vitastor; default {_DEFAULT_CONFIGURATION}",
        "cluster": "a name that you give to the cluster, where volumes come from several that have images of one name",
    }

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the disk as QEMU's filename syntax says it. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
        return _written(_read(source, options))

    def check_options(self, options: Mapping[str, str]) -> None:
        """Those that the source could say, too."""
        _of_options(options)

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsVitastor. Raises INVALID_ARGUMENT, UNSUPPORTED."""
        values = _read(location, {})
        if "skip-parents" in values:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, "the layer of a Vitastor image without its parents cannot be attached",
                cause="blockdev-add does not take skip-parents: it is for qemu-img alone",
                hint="leave it out; or export the layer with Vitastor's qemu-img (docs/backends/vitastor.md)",
            )
        for key in _RDMA:
            if key in values:
                raise StoragedError(
                    ErrorCode.UNSUPPORTED, f"{key} cannot be said for one volume",
                    cause="blockdev-add does not take it: it is for qemu-img alone",
                    hint=f'write "{_underscored(key)}" into a configuration of Vitastor, and say -o config-path=FILE',
                )
        return self.image_node(location, read_only=read_only, options=options)

    def image_node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """With skip-parents and RDMA, which blockdev-add does not take, and the driver itself does."""
        values, cache = _read(location, {}), options.get("cache", "none")
        # vitastor-cli makes a name with an @ for a snapshot, and for nothing else (src/cmd/cli_create.cpp). Opened for
        # writing, it would end every write with EPERM.
        if "@" in values.get("image", "") and not read_only:
            _refuse_option(
                f"{values['image']!r} is a snapshot, and can only be read",
                "attach it with --read-only; or with --snapshot: what is written is then kept here until the detach",
            )
        said = {key: values[key] for key in _KEYS if key in values and key != "cluster"}
        return {
            "driver": "vitastor",
            **{key: int(value) if key in _NUMBERS else value for key, value in said.items()},
            "read-only": read_only,
            "discard": "unmap",
            # To the driver "direct" says one thing: that no acknowledged writes may wait in QSD's memory for a flush,
            # which they do otherwise where the cluster has client_enable_writeback.
            "cache": {"direct": cache != "writeback", "no-flush": cache == "unsafe"},
        }

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """Its configuration, and memory and devices for RDMA."""
        return Powers(
            capabilities=frozenset({"IPC_LOCK"}), root="devices for RDMA are root's", uses=("/dev/infiniband",),
            reads=(posixpath.dirname(options.get("config-path", _DEFAULT_CONFIGURATION)),),
        )

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """The image by its name, else pool and inode; not by where etcd is.

        A snapshot gives the image another inode, and leaves it its name. One cluster has many spellings: each of its
        etcds, all of them, a file that names them. So it counts only where the user has named it.
        """
        values = _read(location, {})
        keys = ("image",) if "image" in values else ("pool", "inode")
        return _written({key: values[key] for key in (*keys, "cluster") if key in values})


def filename(location: str) -> str:
    """Return what qemu-img takes for a location: all of it, skip-parents and RDMA, too."""
    return _written({key: value for key, value in _read(location, {}).items() if key != "cluster"})


def _refuse_option(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)


def _underscored(key: str) -> str:
    return key.replace("-", "_")


def _written(values: Mapping[str, str]) -> str:
    said = {_underscored(key): values[key] for key in _KEYS if key in values}
    return "vitastor:" + ":".join(f"{key}={_TO_ESCAPE.sub(_ESCAPED, value)}" for key, value in said.items())


def _read(source: str, options: Mapping[str, str]) -> dict[str, str]:
    """Return key → value, each in its one spelling; what is not said is not in it."""
    values = _of_source(source)
    for option, (key, value) in _of_options(options).items():
        if values.setdefault(key, value) != value:
            _refuse_option(
                f"option {option}={options[option]!r} says something else than the source", "leave one of them out"
            )
    try:
        return _whole(values)
    except _Unusable as error:
        refuse(source, *error.args)


def _of_options(options: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Return option → key and value."""
    found = {}
    for option in VitastorBackend.options:
        if option in options:
            key = _OPTION_KEYS.get(option, option)
            try:
                found[option] = key, _value(key, options[option])
            except _Unusable as error:
                cause, hint = error.args
                _refuse_option(f"option {option}={options[option]!r}: {cause}", hint)
    return found


def _of_source(source: str) -> dict[str, str]:
    """Take it apart as vitastor_parse_filename does: KEY=VALUE[:KEY=VALUE…], a backslash before a plain : or \\."""
    _, _, rest = source.partition(":")
    separator = ":"
    if rest.startswith(_URI):
        rest, separator = rest.removeprefix(_URI), "&"
    values: dict[str, str] = {}
    for part in _split(rest, separator) if rest else []:
        key, equals, text = part.partition("=")
        key = key.replace("_", "-")
        key = _SYNONYMS.get(key, key)
        if not equals or key not in _KEYS:
            refuse(
                source, f"{part!r} means nothing here",
                f"{_FORMS}; known are {', '.join(_underscored(key) for key in _KEYS)}; a plain : in a value is \\:",
            )
        if key in values:
            refuse(source, f"{_underscored(key)} is said twice", "leave one of them out")
        try:
            values[key] = _value(key, re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL))
        except _Unusable as error:
            refuse(source, *error.args)
    return values


def _split(text: str, separator: str) -> list[str]:
    """Cut at each separator without a backslash before it. A backslash at the very end stands for itself."""
    parts = [""]
    for token in re.findall(r"\\.|.", text, re.DOTALL):
        if token == separator:
            parts.append("")
        else:
            parts[-1] += token
    return parts


def _whole(values: Mapping[str, str]) -> dict[str, str]:
    """Return what source and options say together, with nothing missing and nothing said twice."""
    numbered = [key for key in ("pool", "inode", "size") if key in values]
    if "image" in values:
        if numbered:
            raise _Unusable(f"it says {' and '.join(numbered)} beside an image", "an image has these by itself")
        found = dict(values)
    else:
        if "inode" not in values:
            raise _Unusable("it does not say which image", f"{_FORMS}, or say -o image=NAME")
        inode = int(values["inode"])
        pool = int(values.get("pool", "0")) or inode >> _INODE_BITS
        inside = inode & ((1 << _INODE_BITS) - 1)
        if not pool:
            raise _Unusable("it does not say which pool", f"{_FORMS}, or say -o pool=NUMBER")
        if inode >> _INODE_BITS not in (0, pool):
            raise _Unusable(f"inode {inode} is of pool {inode >> _INODE_BITS}, not {pool}", "leave the pool out")
        if not inside:
            raise _Unusable("inode 0 is none", _FORMS)
        if "size" not in values:
            raise _Unusable("it does not say the size", "an inode has none: say :size=SIZE, or -o disk-size=SIZE")
        found = {**values, "pool": str(pool), "inode": str(inside)}
    return {key: value for key, value in found.items() if _DEFAULTS.get(key) != value}


def _value(key: str, text: str) -> str:
    """Return a value in its one spelling. Raises _Unusable."""
    if not text or not text.isprintable():
        raise _Unusable(f"{_underscored(key)} is empty or holds control characters", "write what it shall be")
    if key == "etcd-host":
        return ",".join(sorted({_etcd(address) for address in text.split(",")}))
    if key == "etcd-prefix":
        # The client puts the slash there itself (parse_config in src/client/etcd_state_client.cpp).
        return text if text.startswith("/") else f"/{text}"
    if key == "size":
        return str(_size(text))
    if key == "config-path":
        if not text.startswith("/"):
            raise _Unusable(f"the path {text!r} is not absolute", "write the whole path of the file")
        return text
    if key in ("image", "cluster", "rdma-device"):
        return text
    number = _number(text)
    if key == "pool" and not 0 < number < 1 << _POOL_BITS:
        raise _Unusable(f"{text} is no pool", f"a pool is a number from 1 to {(1 << _POOL_BITS) - 1}")
    if key in ("skip-parents", "use-rdma") and number > 1:
        raise _Unusable(f"{_underscored(key)}={text} is neither yes nor no", "write 1 or 0")
    return str(number)


def _number(text: str) -> int:
    if not _NUMBER.fullmatch(text) or int(text, 0) >= 1 << 64:
        raise _Unusable(f"{text!r} is no number", "write it in decimal without leading zeroes, or as 0x…")
    return int(text, 0)


def _size(text: str) -> int:
    try:
        size = parse_size(text) if _SIZE.fullmatch(text) else _number(text)
    except StoragedError as error:
        raise _Unusable(error.message, error.hint) from None
    if not 0 < size <= MAX_SIZE or size % BLOCK:
        raise _Unusable(f"{text} is no size of a disk", f"it must be a multiple of {BLOCK} bytes: 10G, 512M, 4096")
    return size


def _etcd(text: str) -> str:
    """Return ADDRESS:PORT/PATH as add_etcd_url in src/client/etcd_state_client.cpp reads it, and its defaults."""
    if text.lower().startswith("https://"):
        raise _Unusable("Vitastor does not speak TLS to etcd", "use http, through a proxy on this host if need be")
    without = text[len("http://"):] if text.lower().startswith("http://") else text
    authority, slash, path = without.partition("/")
    path = f"/{path}" if slash else _DEFAULT_API
    found = re.fullmatch(r"(\[[^\]]*\]|[^:\[\]]*):(.*)", authority, re.DOTALL)
    if found is None or not _PATH_OF_API.fullmatch(path):
        raise _Unusable(f"{text!r} is no etcd", "write ADDRESS:PORT, such as 192.0.2.1:2379 or [2001:db8::1]:2379")
    try:
        bare = found[1][1:-1] if found[1].startswith("[") else found[1]
        address = ipaddress.IPv6Address(bare) if found[1].startswith("[") else ipaddress.IPv4Address(bare)
    except ValueError:
        raise _Unusable(
            f"{found[1]!r} is no address", "Vitastor's client resolves no names: write the address (getent ahosts NAME)"
        ) from None
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise _Unusable(f"{found[1]} has a zone", "Vitastor's client takes none: use an address that is not link-local")
    port = port_of(found[2], text)
    return f"[{address}]:{port}{path}" if address.version == 6 else f"{address}:{port}{path}"


BACKEND = VitastorBackend()
