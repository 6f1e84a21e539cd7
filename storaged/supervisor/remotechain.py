"""Follows a chain of images that are behind servers: QSD reads each header, and what it names is opened where allowed.

The headers are not known before QSD runs, and so neither are the images below. Each is locked before it is opened, and
QSD gets the lock after it was started: it has inherited one end of a pair of sockets, and the descriptor of the lock
waits in it for ever. So the kernel lets go of the lock when QSD is gone, as of those that it has inherited.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks
from storaged.host.chain import MAX_CHAIN, ImageFile, Reference, inspect_images
from storaged.model import backingsources
from storaged.model.backingsources import BackingSource
from storaged.model.blockdev import SOURCE, Image
from storaged.model.formats import Format
from storaged.model.record import Layer
from storaged.qsd.session import Session
from storaged.supervisor import launch, opening, remoteheader
from storaged.supervisor.holding import Holding
from storaged.supervisor.opening import Opening

_REBASE = "an image must not stand on itself: qemu-img rebase -u changes what it names"


async def complete(held: Holding, session: Session, wanted: Opening, timeout: float) -> Opening:
    """Open what stands behind servers, down to the end of the chain, and all images below the disk's own.

    Returns the whole of it, whose ``node`` is still to be opened.

    Raises BACKING_NOT_ALLOWED for what was not allowed, WRONG_FORMAT, UNSUPPORTED, SOURCE_IN_USE, SOURCE_CHANGED for a
    chain that is another one than that of the record, QSD_SILENT, and what inspect_images raises.
    """
    follower = _Follower(held, session, wanted, timeout)
    try:
        return await follower.run()
    finally:
        held.end_of_locks()


class _Follower:
    def __init__(self, held: Holding, session: Session, wanted: Opening, timeout: float) -> None:
        self._held, self._session, self._timeout = held, session, timeout
        self._spec = held.spec
        self._wanted = wanted
        behind = wanted.source is not None
        self._images: list[Image] = [] if behind else list(wanted.images)
        self._layers: list[Layer] = [] if behind else list(wanted.layers)
        self._found = dict(wanted.sources)
        # A QSD that was here before has opened all that its record names, and this one has the locks.
        self._known = dict(held.known().sources) if held.known().size else None
        self._nodes = 0

    async def run(self) -> Opening:
        """Go down to the end."""
        wanted = self._wanted
        reference = wanted.rest
        if wanted.source is not None:
            reference = await self._open(wanted.source, wanted.layers[0].source, self._spec.format)
        while reference is not None:
            if len(self._images) >= MAX_CHAIN:
                reference.fail(ErrorCode.WRONG_FORMAT, f"the chain has more than {MAX_CHAIN} images", _REBASE)
            reference = await self._go_on(reference)
        if self._known is not None and self._known != self._found:
            raise _changed()
        *below, top = opening.nodes(self._images, self._spec)
        for node in below:
            await self._session.add_node(node, timeout=self._timeout)
        return replace(
            self._wanted, node=top, sources=self._found,
            images=tuple(self._images), layers=tuple(self._layers),
        )

    async def _go_on(self, reference: Reference) -> Reference | None:
        """Open the image that is named; return what it names in its turn."""
        target = self._target(reference)
        format = reference.backing_format()
        if isinstance(target, str):
            return await self._open_here(target, format, reference)
        node = await self._locked(target, reference, writable=False)
        if format is Format.RAW:
            self._images.append(Image(format, node))
            self._layers.append(Layer(source=target.location, format=format, virtual_size=0))
            return None
        return await self._open(node, target.location, format)

    async def _open(self, node: dict[str, Any], location: str, format: Format) -> Reference | None:
        """Open the bytes behind a server, and read the header that they begin with."""
        name = f"{SOURCE}-{self._nodes}" if self._nodes else SOURCE
        self._nodes += 1
        await self._session.execute("blockdev-add", {**node, "node-name": name}, timeout=self._timeout)
        header = await remoteheader.read(self._held, self._session, name, format, self._timeout)
        data_file, data_source = None, None
        for other in header.others:
            reference = Reference(location, format, other)
            if other.kind != "data-file":
                reference.fail(
                    ErrorCode.BACKING_NOT_ALLOWED, "an image behind a server may not have extents in other files",
                    "convert it to qcow2: qemu-img convert",
                )
            data_file, data_source = await self._data_file(reference)
        top = not self._images
        self._images.append(Image(format, name, data_file, encrypted=top and "encrypt" in self._spec.options))
        self._layers.append(Layer(source=location, format=format, virtual_size=0, data_file=data_source))
        return Reference(location, format, header.backing) if header.backing is not None else None

    async def _data_file(self, reference: Reference) -> tuple[dict[str, Any], str]:
        """Return the node of an external data file, and its source."""
        target = self._target(reference)
        writable = self._spec.writes_source and not self._images
        if not isinstance(target, str):
            return await self._locked(target, reference, writable=writable), target.location
        found = await self._look_here(target, Format.RAW, reference, writable=writable)
        node = opening.protocol_of(found.chain[0], self._spec, read_only=not writable)
        return node, found.chain[0].path

    def _target(self, reference: Reference) -> str | BackingSource:
        """What a name means: a path of this host, or a source that is allowed. Raises BACKING_NOT_ALLOWED."""
        name = reference.name.path
        if name.startswith("/"):
            return name
        beside = None if not name or ":" in name else backingsources.beside(reference.image, name)
        found = backingsources.find(beside or name, self._spec)
        if found is not None:
            return found
        if not name:
            reference.fail(
                ErrorCode.BACKING_MISSING, "the image does not say where its data is",
                "qemu-img amend -f qcow2 -o data_file=NAME writes the name into the header",
            )
        if beside is None and ":" not in name:
            reference.fail(
                ErrorCode.BACKING_NOT_ALLOWED, "the name is relative, and means nothing beside that source",
                f"write the whole name into the header: qemu-img rebase -u -f {reference.image_format} -b BACKING -F "
                "FORMAT SOURCE",
            )
        reference.fail(
            ErrorCode.BACKING_NOT_ALLOWED, "an image can name any server, so each source needs leave",
            f"if you trust the image, allow it: -o {backingsources.OPTION}={beside or name}",
        )

    async def _open_here(self, path: str, format: Format, reference: Reference) -> Reference | None:
        """Take in the images of this host that a name leads to; return what names the next one behind a server."""
        found = await self._look_here(path, format, reference, writable=False)
        self._images += found.opening.images
        self._layers += found.opening.layers
        self._wanted = replace(self._wanted, extents=self._wanted.extents + found.opening.extents)
        return found.rest

    async def _look_here(self, path: str, format: Format, reference: Reference, *, writable: bool) -> _Here:
        spec = self._spec

        def look() -> _Here:
            chain, rest = inspect_images(
                path, format, spec.allowed_backing, named_by=reference,
                elsewhere=lambda name: backingsources.find(name, spec) is not None,
            )
            return _Here(chain, rest, opening.of_this_host(chain, spec, written=int(writable), top=False))

        here = await self._held.source_calls("look at a backing file", self._timeout, look)
        await self._lock(here.opening)
        self._wanted = replace(
            self._wanted, files=self._wanted.files | here.opening.files,
            paths=self._wanted.paths + here.opening.paths,
            fingerprint=self._wanted.fingerprint + here.opening.fingerprint,
        )
        return here

    async def _locked(self, target: BackingSource, reference: Reference, *, writable: bool) -> dict[str, Any]:
        """Lock a source on the network, and return its node."""
        backend: NetworkBackend = target.backend
        if writable and backend.read_only:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"a source behind {backend.name} can only be read",
                hint="attach the volume with --read-only, or with --snapshot",
            )
        identity = await self._held.source_calls(
            "name the lock of a backing file", self._timeout, backend.identity, target.location, os.path.realpath
        )
        if identity in self._found:
            reference.fail(ErrorCode.WRONG_FORMAT, "it is in this chain already: a loop", _REBASE)
        await self._lock(Opening(
            node={}, sources={identity: writable}, files=frozenset(), fingerprint=[], claims=(), unclaimed=()
        ))
        return backend.node(target.location, read_only=not writable, options=target.options)

    async def _lock(self, below: Opening) -> None:
        """Have QSD hold the locks of what is opened next. Raises SOURCE_IN_USE, SOURCE_CHANGED."""
        held = self._held
        for identity, exclusive in below.sources.items():
            if identity in self._found and (exclusive or self._found[identity]):
                raise _twice(identity)
            self._found[identity] = exclusive
        if self._known is not None:
            if not below.sources.items() <= self._known.items():
                raise _changed()
            return
        held.environment.claims.hold(self._spec.name, self._found)
        held.hand_locks_over(await held.source_calls.with_late_result(
            "lock a backing file", self._timeout,
            lambda: opening.take(below, held.environment.lock_directory, launch.owner_of(held.site)), locks.let_go,
        ))


@dataclass(frozen=True)
class _Here:
    """Images of this host, what names the next one, and what is locked for them."""

    chain: tuple[ImageFile, ...]
    rest: Reference | None
    opening: Opening


def _changed() -> StoragedError:
    return StoragedError(
        ErrorCode.SOURCE_CHANGED, "the images below the source are not those that were attached",
        cause="a header names another file than before",
        hint="find out who changed it; or detach the volume and attach it again",
    )


def _twice(identity: str) -> StoragedError:
    return StoragedError(
        ErrorCode.WRONG_FORMAT, "the chain needs a source twice, once to write to it", cause=identity,
        hint=_REBASE,
    )
