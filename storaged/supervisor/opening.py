"""From a spec to what QSD must open and which locks it must hold. Reads images' headers: blocks, use a thread.

Of a source on the network nothing is looked at: it may be away, and to be looked at ends some servers. It is locked by
its name, and what is wrong with it QSD says when it opens it.
"""

from __future__ import annotations

import base64
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from storaged.backends import BACKENDS, cache, find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, locks, loop, process
from storaged.host.blocking import BlockingCalls
from storaged.host.chain import ImageFile, inspect_chain
from storaged.host.identity import block_identity, file_identity, identities, own_identity
from storaged.model.blockdev import BASE, DISK, PASSPHRASE, Image, image_tree
from storaged.model.formats import Format
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec, check_spec
from storaged.transports import options_of

#: A passphrase is not a disk image (bytes).
_MAX_KEY = 64 * 1024


@dataclass(frozen=True)
class Opening:
    """What one volume's QSD opens."""

    node: dict[str, Any]
    sources: Mapping[str, bool]
    """The identities to lock, and whether each is written to."""
    files: frozenset[str]
    """The identities of the images themselves: QSD must have opened these, and no others in their place. None on
    the network: there is nothing to compare."""
    fingerprint: list[list[int]]
    """Inode, size and time of the last change of each image: what an overlay belongs to."""
    claims: tuple[str, ...]
    """Block devices that must be claimed against mounts while QSD can write to them."""
    unclaimed: tuple[str, ...]
    """Block devices that are only read, and that nobody else may have claimed."""
    key_file: str | None


def cache_flags(spec: VolumeSpec) -> Mapping[str, bool]:
    """BlockdevCacheOptions for the volume's cache mode."""
    return cache.cache_flags(spec.options)


def inspect(spec: VolumeSpec) -> Opening:
    """Look at the source and everything its headers name; refuse what may not be opened.

    Raises what storaged.host.chain raises, SOURCE_IN_USE where a foreign loop device stands on the file, UNSUPPORTED
    for what is not known to be safe with a source on the network.
    """
    backend = find_backend(spec.source)
    check_spec(spec, backend.options.keys() | options_of(spec.transport).keys())
    backend.check_options(spec.options)
    path = backend.parse(spec.source, spec.options)
    if isinstance(backend, NetworkBackend):
        return _behind_a_server(backend, path, spec)
    chain = inspect_chain(path, spec.format, spec.allowed_backing)
    if backend.name == "host_device" and not chain[0].block_device:
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{path} is no block device", hint="leave the prefix host_device: out"
        )
    for image in chain:
        for file in image.files():
            try:
                file.path.encode()
            except UnicodeEncodeError as error:
                raise StoragedError(
                    ErrorCode.INVALID_SOURCE, f"the path {file.path!a} is no UTF-8",
                    hint="QMP can carry nothing else: rename it",
                ) from error
    writable = spec.writes_source
    images = [
        Image(
            format=image.format,
            protocol=_protocol(image, spec, read_only=not (writable and number == 0)),
            data_file=_protocol(image.data_file, spec, read_only=not (writable and number == 0))
            if image.data_file is not None else None,
        )
        for number, image in enumerate(chain)
    ]
    node = image_tree(
        images, read_only=not writable, node_name=BASE if spec.snapshot else DISK, cache=cache_flags(spec)
    )
    files = [(file, writable and number == 0) for number, image in enumerate(chain) for file in image.files()]
    sources: dict[str, bool] = {}
    for file, exclusive in files:
        for identity, exclusively in identities(file, exclusive=exclusive).items():
            sources[identity] = exclusively or sources.get(identity, False)
        _refuse_foreign_loop(file, exclusive)
    return Opening(
        node=node,
        sources=sources,
        files=frozenset(own_identity(file) for file, _ in files),
        fingerprint=[_fingerprint(file) for file, _ in files] if spec.snapshot else [],
        claims=tuple(file.path for file, exclusive in files if file.block_device and exclusive),
        unclaimed=tuple(file.path for file, exclusive in files if file.block_device and not exclusive),
        key_file=spec.options.get("key-file") if spec.format is Format.LUKS else None,
    )


def _behind_a_server(backend: NetworkBackend, location: str, spec: VolumeSpec) -> Opening:
    """What QSD opens of a source on the network: the bytes as they are."""
    if spec.format is not Format.RAW:
        # Its header may name files of this host, and nobody has looked at it.
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"a {spec.format} image behind {backend.name} is not supported yet",
            cause="what its header names cannot be checked before QEMU opens it",
            hint="let the server do the format (qemu-nbd -f FORMAT), or copy the image to a file of this host",
        )
    if spec.snapshot:
        # Only its size could tell that the source is another by now, and that is not compared yet.
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"--snapshot of a source behind {backend.name} is not supported yet",
            cause="a source that changed below the overlay would not be noticed",
            hint="attach it with --read-only, or copy it to a file of this host",
        )
    image = Image(
        Format.RAW, backend.node(location, read_only=not spec.writes_source, options=spec.options)
    )
    return Opening(
        node=image_tree([image], read_only=not spec.writes_source, node_name=DISK, cache=cache_flags(spec)),
        sources={backend.identity(location, os.path.realpath): spec.writes_source},
        files=frozenset(), fingerprint=[], claims=(), unclaimed=(), key_file=None,
    )


def _fingerprint(file: ImageFile) -> list[int]:
    # The node of a block device tells nothing about the device's content.
    return [0, file.size, 0] if file.block_device else [file.inode, file.size, os.stat(file.path).st_mtime_ns]


def opened_as_wanted(opening: Opening, pid: int) -> bool:
    """Whether QSD has opened the very files that were looked at and locked, and nothing swapped in for them."""
    opened = {
        block_identity(number) if number else file_identity(device, inode)
        for device, inode, number in process.open_files(pid)
    }
    return opening.files <= opened


def take(opening: Opening, directory: str, owner: str) -> list[int]:
    """Take all locks and claims and return their descriptors. Raises SOURCE_IN_USE, holding nothing."""
    held: list[int] = []
    try:
        # Sorted: two that want the same sources meet at the same lock first.
        for identity, exclusive in sorted(opening.sources.items()):
            held.append(locks.take_lock(directory, identity, exclusive=exclusive, owner=owner))
        for device in opening.claims:
            held.append(locks.claim_block_device(device))
        for device in opening.unclaimed:
            locks.refuse_claimed(device)
    except BaseException:
        for fd in held:
            os.close(fd)
        raise
    return held


def read_passphrase(path: str) -> dict[str, str]:
    """Return the arguments of object-add for the secret in a key file, every byte of it as it is."""
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_KEY + 1)
    except OSError as error:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"cannot read the key file {path}", cause=error.strerror or "",
            hint="check the path given with -o key-file",
        ) from error
    if not 0 < len(data) <= _MAX_KEY:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"the key file {path} holds no usable passphrase",
            cause="it is empty" if not data else f"it is larger than {_MAX_KEY} bytes",
            hint="check the path given with -o key-file",
        )
    return {
        "qom-type": "secret", "id": PASSPHRASE, "format": "base64", "data": base64.b64encode(data).decode(),
    }


def _protocol(file: ImageFile, spec: VolumeSpec, *, read_only: bool) -> dict[str, Any]:
    backend = BACKENDS["host_device" if file.block_device else "file"]
    return backend.node(file.path, read_only=read_only, options=spec.options)


def _refuse_foreign_loop(file: ImageFile, exclusive: bool) -> None:
    """A loop device that somebody set up over the file writes to it past our locks, or reads what we write."""
    # Compared by path, not by stat: the backing file of somebody's loop device may hang.
    for device in loop.find_by_backing(file.path):
        if exclusive or not disk.is_read_only(device.path):
            raise StoragedError(
                ErrorCode.SOURCE_IN_USE, "the source is in use", cause=f"{device.path} is set up over {file.path}",
                hint=f"losetup -d {device.path}, or attach that device instead", users=[device.path],
            )


def same_source(one: VolumeSpec, other: VolumeSpec) -> bool:
    """Whether the sources of two specs are the same file or device of this host, or the same disk behind a server.

    Raises OSError where a file cannot be looked at.
    """
    specs = one, other
    backends = [find_backend(spec.source) for spec in specs]
    locations = [backend.parse(spec.source, spec.options) for backend, spec in zip(backends, specs, strict=True)]
    identities_found = {
        backend.identity(location, os.path.realpath)
        for backend, location in zip(backends, locations, strict=True) if isinstance(backend, NetworkBackend)
    }
    if identities_found:
        return backends[0] is backends[1] and len(identities_found) == 1
    return os.path.samefile(*locations)


async def same_wish(wanted: VolumeSpec, present: VolumeSpec, record: Record | None, blocking: BlockingCalls) -> bool:
    """Whether another spelling of the source, or the transport that ``auto`` took, is all that differs."""
    if record is not None and wanted.transport == record.transport:
        wanted = msgspec.structs.replace(wanted, transport=present.transport)
    if wanted == present:
        return True
    if msgspec.structs.replace(wanted, source=present.source) != present:
        return False
    try:
        return await blocking("compare the sources", 5.0, same_source, wanted, present)
    except (OSError, StoragedError):
        return False
