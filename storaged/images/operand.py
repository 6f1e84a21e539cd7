"""An image that a command works on: its source, what qemu-img is to open, and what must be locked for that."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.backends.host_device import BACKEND as HOST_DEVICE
from storaged.backends.jsontree import is_tree, read_tree
from storaged.errors import ErrorCode, StoragedError
from storaged.images.arguments import format_of_name, split_options
from storaged.model.formats import Format
from storaged.model.spec import COMMON_OPTIONS, VolumeSpec, caches_writes, check_spec
from storaged.supervisor import opening as openings
from storaged.supervisor.secrets import check_secrets, secrets_apart


@dataclass(frozen=True)
class Wish:
    """An image as it was named."""

    source: str
    format: Format | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    """Of the source (as for attach), and of the image's format."""
    given: Mapping[str, bytes] = field(default_factory=dict)
    """Secrets from standard input, by the option that says ``-``."""
    name: str = "image"
    """Which of a command's images it is."""


@dataclass(frozen=True)
class Operand:
    """An image that was looked at, and not opened yet."""

    wish: Wish
    spec: VolumeSpec
    given: Mapping[str, bytes]
    creation: Mapping[str, str]
    """Options that the source does not know: those of the image's format."""
    opening: openings.Opening | None
    """None for one that is not there yet."""

    @property
    def prefix(self) -> str:
        """What the names of its objects begin with."""
        return f"{self.wish.name}-"

    @property
    def local_path(self) -> str | None:
        """The path of a file or device of this host, None on the network."""
        backend = find_backend(self.spec.source)
        if isinstance(backend, NetworkBackend):
            return None
        return backend.parse(self.spec.source, self.spec.options)

    @property
    def opened(self) -> openings.Opening:
        """What qemu-img opens."""
        assert self.opening is not None
        return self.opening

    def shown(self) -> str:
        """The source without secrets, for people."""
        return self.spec.source


def known_options(source: str) -> list[str]:
    """The options that the source itself takes; all others are of the image's format."""
    return [*COMMON_OPTIONS, *find_backend(source).options]


def _spelled_out(wish: Wish, *, writable: bool) -> Wish:
    """Return the wish with a json: tree taken apart, as an attach does. Raises what ``read_tree`` raises."""
    if not is_tree(wish.source):
        return wish
    tree = read_tree(wish.source, wish.options)
    for contradicts, what in (
        (tree.format is not None and wish.format not in (None, tree.format), "its format"),
        (tree.read_only is True and writable, "whether it is written to"),
    ):
        if contradicts:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the tree and the command contradict in {what}",
                hint="leave one of them out",
            )
    return replace(
        wish, source=tree.source, format=tree.format or wish.format, options={**tree.options, **wish.options}
    )


def named(wish: Wish, *, writable: bool) -> Operand:
    """Understand what was named, and look at nothing. Raises INVALID_SOURCE, INVALID_ARGUMENT, UNSUPPORTED."""
    wish = _spelled_out(wish, writable=writable)
    source, apart = wish.source, wish.given
    options, creation = split_options(wish.options, known_options(source))
    spec, apart = secrets_apart(
        VolumeSpec(name=wish.name, source=source, options=options, read_only=not writable), apart
    )
    backend = find_backend(spec.source)
    backend.check_options(spec.options)
    location = backend.parse(spec.source, spec.options)
    format = wish.format
    if format is None:
        # Of an address on the network the end says nothing: it may be a name, a query, an option.
        format = Format.RAW if isinstance(backend, NetworkBackend) else format_of_name(location)
    if writable and caches_writes(spec.source, direct=False) and "cache" not in spec.options:
        # qemu-img does not tell when its last flush fails: nothing may be in its memory then.
        options = {**spec.options, "cache": "none"}
        spec = _with(spec, options=options)
    spec = _with(spec, format=format)
    check_spec(spec, backend.options.keys())
    check_secrets(spec, apart)
    return Operand(wish, spec, apart, creation, None)


def look(wish: Wish, *, writable: bool, alone: bool = False, commits: bool = False) -> Operand:
    """Look at an image and all that its headers name; refuse what may not be opened. Blocks.

    ``alone``: without its backing files. Raises what ``inspect`` of supervisor/opening.py raises.
    """
    operand = named(wish, writable=writable)
    return looked_at(operand, alone=alone, commits=commits)


def looked_at(operand: Operand, *, alone: bool = False, commits: bool = False) -> Operand:
    """The same for an image that was named before."""
    manner = openings.Manner(device=False, alone=alone, commits=commits)
    try:
        return replace(operand, opening=openings.inspect(operand.spec, manner))
    except StoragedError as error:
        error.volume = ""
        if error.code is ErrorCode.WRONG_FORMAT and operand.wish.format is None:
            error.hint = f"no --format was said, and by its name it would be {operand.spec.format}; " + (
                error.hint or "say --format"
            )
        raise


def refuse_creation_options(operand: Operand) -> None:
    """Raise INVALID_ARGUMENT where an option is neither the source's nor of any use here."""
    for key in operand.creation:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"unknown option {key!r}",
            hint=f"known here: {', '.join(sorted(known_options(operand.spec.source)))}",
        )


def together(operands: list[Operand]) -> openings.Opening:
    """Return what has to be locked for all of them. Raises INVALID_ARGUMENT where two are one disk, and one is written.
    """
    first = operands[0].opened
    sources: dict[str, bool] = {}
    for operand in operands:
        for identity, exclusive in operand.opened.sources.items():
            if identity in sources and (exclusive or sources[identity]):
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT, "both are the same disk, or stand on the same",
                    cause=f"{operands[0].shown()} and {operand.shown()}", hint="name another target",
                )
            sources[identity] = exclusive or sources.get(identity, False)
    return replace(
        first, sources=sources,
        claims=tuple(device for operand in operands for device in operand.opened.claims),
        unclaimed=tuple(device for operand in operands for device in operand.opened.unclaimed),
    )


def is_block_device(operand: Operand) -> bool:
    """Whether it is a block device of this host, which is never created."""
    path = operand.local_path
    return path is not None and (
        find_backend(operand.spec.source).name == HOST_DEVICE.name
        or (os.path.exists(path) and not os.path.isfile(path))
    )


def _with(spec: VolumeSpec, **changes: Any) -> VolumeSpec:
    return msgspec.structs.replace(spec, **changes)
