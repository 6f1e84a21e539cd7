"""``json:{…}``: a tree of block nodes as QEMU's users write it, read into an ordinary source and its options. Pure.

QEMU's pseudo-protocol json: (parse_json_filename in block.c) takes objects within objects and flat keys with dots
("file.server.host") for the same (qdict_flatten), numbers and switches as text, too. Of the tree's values none but
the names of drivers is said in an error: any may be a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NoReturn

from storaged.backends import find_backend, sheepdog
from storaged.backends.base import Backend, NetworkBackend
from storaged.backends.jsondrivers import DRIVERS
from storaged.backends.jsonmembers import Members, Value, is_switched_on, refuse, refuse_secret
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import COPY_ON_WRITE, Format

PREFIX = "json:"
#: Objects within objects; a tree that can be expressed has no more than five.
_DEEPEST = 12
_FORM = 'write json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"inet","host":"…","port":"…"}}}'
#: Cache modes that differ in what a node is told (storaged/backends/cache.py).
_MODES = ("writeback", "none", "unsafe")
_FLAGS = ("direct", "no-flush")
_FORMATS = frozenset(format.value for format in Format)

#: Drivers that QEMU has and that are refused, and what there is in their place.
_OTHERS = {
    **dict.fromkeys(("throttle",), "leave the filter out: limits are the business of who uses the device (cgroups: "
                    "io.max)"),
    **dict.fromkeys(("copy-on-read", "compress", "preallocate", "blkdebug", "blklogwrites", "blkverify", "blkreplay",
                     "copy-before-write", "snapshot-access", "replication"), "leave the filter out"),
    "quorum": "one volume has one source: md (mdadm) mirrors devices",
    **dict.fromkeys(("null-co", "null-aio"), "it holds no data"),
    "vvfat": "make an image with a filesystem (mkfs.vfat), and attach that",
    "host_cdrom": "use host_device",
    "nvme": "attach the device of the kernel's own driver, /dev/nvme…",
    **dict.fromkeys(("io_uring", "nvme-io_uring", "virtio-blk-vfio-pci", "virtio-blk-vhost-user",
                     "virtio-blk-vhost-vdpa"), "attach the device of the kernel's own driver"),
    **dict.fromkeys(("bochs", "cloop", "dmg"), "convert it: qemu-img convert -O qcow2"),
    "tftp": "write the source as tftp://HOST/PATH",
}


@dataclass(frozen=True)
class Tree:
    """What a tree says, in the words of a volume's wishes."""

    source: str
    """In the spelling of its backend."""
    format: Format | None
    """None where the tree has a protocol's node only, and says of a format nothing."""
    options: Mapping[str, str] = field(default_factory=dict)
    read_only: bool | None = None
    """None where it is not said."""


def is_tree(source: str) -> bool:
    """Whether a source is a tree."""
    return source.startswith(PREFIX)


def read_tree(source: str, options: Mapping[str, str]) -> Tree:
    """Read a tree; ``options`` are those that the user says beside it.

    Raises INVALID_SOURCE for what is no tree or holds a secret, UNSUPPORTED for what a volume cannot be, and
    INVALID_ARGUMENT where tree and options contradict.
    """
    top = Members(_nested(source))
    name = top.text("driver")
    if name is None:
        refuse("the tree names no driver", "formats are never guessed: say driver, raw where it is no image")
    nodes = [top]
    format = None
    found: dict[str, str] = {}
    if name in _FORMATS:
        format = Format(name)
        found |= _of_format(top, format, options)
        protocol = top.child("file")
        if protocol is None:
            refuse(f"the node of the driver {name} has no file", _FORM)
        nodes.append(protocol)
        name = protocol.text("driver")
        if name is None:
            # As QEMU has it: what is named by a filename alone is a file of this host (bdrv_find_protocol).
            if "filename" not in protocol:
                refuse(f"the node at {protocol.path} names no driver", _FORM)
            name = "file"
    else:
        protocol = top
    if name in _FORMATS:
        refuse(
            f"there is an image of the format {name} within an image",
            "one format stands on one source: leave one of them out", ErrorCode.UNSUPPORTED,
        )
    reader = DRIVERS.get(name)
    if reader is None:
        _refuse_driver(name)
    behaviour = _behaviour(nodes)
    # Before the members of the driver: what it does not know is refused at its end.
    flags = _cache_of(nodes)
    read_only = _read_only(nodes)
    text, further = reader(protocol, options)
    for node in nodes:
        node.end()
    found |= {**further, **behaviour}
    _refuse_contradictions(found, options)
    backend = find_backend(text)
    if isinstance(backend, NetworkBackend) and backend.without_secrets(text) != (text, {}):
        refuse(
            f"{protocol.path or 'the node'} holds a password",
            "leave it out: secrets are said by options that name their place, such as -o password-file=PATH",
        )
    if flags:
        found["cache"] = _cache_mode(flags, backend, text, {**found, **options})
    return Tree(text, format, found, read_only)


def _nested(source: str) -> dict[str, Value]:
    """Parse the text, and put flat keys at their places; a list becomes an object with the keys 0, 1, …"""

    def once(pairs: list[tuple[str, Value]]) -> dict[str, Value]:
        found = dict(pairs)
        if len(found) < len(pairs):
            refuse("a key is said twice", "leave one of them out")
        return found

    def refuse_constant(_text: str) -> NoReturn:
        refuse("there is a number in it that is none", _FORM)

    try:
        value = json.loads(
            source.removeprefix(PREFIX), object_pairs_hook=once, parse_constant=refuse_constant
        )
    except json.JSONDecodeError as error:
        refuse(f"it is no JSON: {error.msg} (character {len(PREFIX) + error.pos})", f"{_FORM}, with double quotes")
    except (RecursionError, ValueError):
        refuse("it is nested too deeply, or has a number with too many digits", _FORM)
    if not isinstance(value, dict):
        refuse("it is no object", _FORM)
    tree: dict[str, Value] = {}
    _place(tree, value, 0)
    return tree


def _place(into: dict[str, Value], value: dict[str, Value], depth: int) -> None:
    if depth > _DEEPEST:
        refuse("it is nested too deeply", _FORM)
    for key, member in value.items():
        *above, last = key.split(".")
        place = into
        if not last or not all(above) or len(above) > _DEEPEST:
            refuse("it has an empty key, or one with too many dots", _FORM)
        for part in above:
            found = place.setdefault(part, {})
            if not isinstance(found, dict):
                refuse(f"{part} is said twice, once with a dot behind it", "leave one of them out")
            place = found
        if isinstance(member, list):
            member = {str(number): entry for number, entry in enumerate(member)}
        if not isinstance(member, dict):
            if last in place:
                refuse(f"{last} is said twice", "leave one of them out")
            place[last] = member
            continue
        below = place.setdefault(last, {})
        if not isinstance(below, dict):
            refuse(f"{last} is said twice", "leave one of them out")
        _place(below, member, depth + 1)


def _refuse_driver(name: str) -> NoReturn:
    if name == "sheepdog":
        raise sheepdog.refusal()
    known = f"known are {', '.join(sorted(DRIVERS))}; and the formats {', '.join(Format)}"
    shown = name if re.fullmatch(r"[A-Za-z0-9_+-]{1,40}", name) else "of that name"
    refuse(f"the driver {shown} cannot be used", _OTHERS.get(name, known), ErrorCode.UNSUPPORTED)


def _of_format(node: Members, format: Format, options: Mapping[str, str]) -> dict[str, str]:
    """Take what the node of an image format has beside its file."""
    found: dict[str, str] = {}
    if format in COPY_ON_WRITE and "backing" in node:
        if not node.null("backing"):
            refuse(
                f"{node.path_of('backing')} says another backing file than the image's header may do",
                "leave it out: what the header names is opened, where -o backing=allow:PATH or "
                "-o backing-sources=SOURCE allows it (qemu-img rebase -u changes the header)", ErrorCode.UNSUPPORTED,
            )
        for option in ("backing", "backing-sources"):
            if option in options:
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, f'"backing": null in the tree and the option {option} contradict',
                    hint="leave one of them out",
                )
    if "data-file" in node:
        refuse(
            "data-file is not taken from a tree",
            "leave it out: what the image's header names is opened, where -o backing=allow:PATH allows it",
            ErrorCode.UNSUPPORTED,
        )
    if format is Format.QCOW2 and (encrypt := node.child("encrypt")) is not None:
        if encrypt.text("format") != "luks":
            refuse("encrypt.format is not luks", "QEMU reads no other any more (qcow2's aes): convert the image")
        found["encrypt"] = "luks"
        refuse_secret(encrypt, {"key-secret": "key-file"})
        encrypt.end()
    if format is Format.LUKS:
        refuse_secret(node, {"key-secret": "key-file"})
    if format is Format.RAW and ("offset" in node or "size" in node):
        refuse(
            "a part of a disk (offset, size of raw) cannot be a volume", "attach the whole, and use its partitions "
            "(NAME-partN), or a loop device or dm-linear over the device", ErrorCode.UNSUPPORTED,
        )
    return found


def _behaviour(nodes: list[Members]) -> dict[str, str]:
    """Take what each node may have, BlockdevOptions, and is an option of the volume, or nothing."""
    found: dict[str, str] = {}
    for number, node in enumerate(nodes):
        node.text("node-name")  # nodes have names of our own
        for key, meaning in (
            ("auto-read-only", "whether it is written to is said by --read-only"),
            ("force-share", "nobody else may write to a source"),
        ):
            if is_switched_on(node, key):
                refuse(f"{node.path_of(key)} cannot be", f"leave it out: {meaning}", ErrorCode.UNSUPPORTED)
        discard = node.choice("discard", {"ignore": "ignore", "off": "ignore", "unmap": "unmap", "on": "unmap"})
        if discard is not None and found.setdefault("discard", discard) != discard:
            refuse("the nodes say two things about discard", "say it once", ErrorCode.UNSUPPORTED)
        zeroes = node.choice("detect-zeroes", {key: key for key in ("off", "on", "unmap")})
        if zeroes is not None and number and zeroes != "off":
            refuse(
                f"{node.path_of('detect-zeroes')} is not at the top", "say it at the image's node",
                ErrorCode.UNSUPPORTED,
            )
        if zeroes is not None and not number:
            found["detect-zeroes"] = zeroes
    return found


def _read_only(nodes: list[Members]) -> bool | None:
    said = [flag for node in nodes if (flag := node.switch("read-only")) is not None]
    if len(said) == 2 and said == [False, True]:
        refuse("an image is to be written to whose file is read-only", "leave one of them out", ErrorCode.UNSUPPORTED)
    return any(said) if said else None


def _cache_of(nodes: list[Members]) -> dict[str, bool]:
    """What the nodes say of the cache; a node that says nothing inherits (bdrv_inherited_options in block.c)."""
    found: dict[str, bool] = {}
    for node in nodes:
        cache = node.child("cache")
        if cache is None:
            continue
        for key in _FLAGS:
            flag = cache.switch(key)
            if flag is not None and found.setdefault(key, flag) != flag:
                refuse(f"the nodes say two things about cache.{key}", "say it once", ErrorCode.UNSUPPORTED)
        cache.end()
    return {key: found.get(key, False) for key in _FLAGS} if found else {}


def _cache_mode(flags: Mapping[str, bool], backend: Backend, source: str, options: Mapping[str, str]) -> str:
    """Return the cache mode by which the backend tells its node just these flags."""
    def told(mode: str) -> object:
        wanted = {**options, "cache": mode}
        try:
            # What is written here is not opened: whether it may be written to does not matter.
            location = backend.parse(source, wanted)
            return backend.node(location, read_only=True, options=wanted)["cache"]
        except StoragedError as error:
            if error.code is ErrorCode.INVALID_ARGUMENT and mode != said:
                return None  # this one does not go with another option
            raise

    said = options.get("cache")
    if said is not None:
        if said in (*_MODES, "writethrough", "directsync") and told(said) != flags:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the tree and cache={said} contradict",
                cause="cache.direct or cache.no-flush of the tree is another than this cache mode has",
                hint="leave one of them out",
            )
        return said
    for mode in _MODES:
        if told(mode) == flags:
            return mode
    refuse(
        "there is no cache mode with these cache.direct and cache.no-flush",
        "leave them out, and say --cache none, writeback, writethrough, directsync or unsafe", ErrorCode.UNSUPPORTED,
    )


def _refuse_contradictions(found: Mapping[str, str], options: Mapping[str, str]) -> None:
    for key in sorted(found.keys() & options.keys()):
        if found[key] != options[key]:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the tree and the option {key} contradict", hint="leave one of them out"
            )
