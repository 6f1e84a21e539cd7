"""From a spec to what QSD must open and which locks it must hold. Reads images' headers: blocks, use a thread."""

from __future__ import annotations

import base64
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from storaged.backends import BACKENDS, find_backend
from storaged.backends.local import CACHE_FLAGS
from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks, loop
from storaged.host.chain import ImageFile, inspect_chain
from storaged.model.blockdev import BASE, DISK, PASSPHRASE, Image, image_tree
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec, check_spec

#: A passphrase is not a disk image (bytes).
_MAX_KEY = 64 * 1024


@dataclass(frozen=True)
class Opening:
    """What one volume's QSD opens."""

    node: dict[str, Any]
    sources: Mapping[str, bool]
    """The source identities, and whether each is written to."""
    claims: tuple[str, ...]
    """Block devices that must be claimed against mounts while QSD can write to them."""
    key_file: str | None


def cache_flags(spec: VolumeSpec) -> Mapping[str, bool]:
    """BlockdevCacheOptions for the volume's cache mode."""
    direct, no_flush = CACHE_FLAGS[spec.options.get("cache", "writeback")]
    return {"direct": direct, "no-flush": no_flush}


def inspect(spec: VolumeSpec) -> Opening:
    """Look at the source and everything its headers name; refuse what may not be opened.

    Raises what storaged.host.chain raises, and SOURCE_IN_USE where a foreign loop device stands on the file.
    """
    backend = find_backend(spec.source)
    check_spec(spec, frozenset(backend.options))
    backend.check_options(spec.options)
    path = backend.parse(spec.source)
    chain = inspect_chain(path, spec.format, spec.allowed_backing)
    if backend.name == "host_device" and not chain[0].block_device:
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{path} is no block device", hint="leave the prefix host_device: out"
        )
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
    wishes: dict[str, bool] = {}
    claims = []
    for number, image in enumerate(chain):
        for file in image.files():
            exclusive = writable and number == 0
            wishes[identity_of(file)] = exclusive or wishes.get(identity_of(file), False)
            if exclusive:
                if file.block_device:
                    claims.append(file.path)
                _refuse_foreign_loop(file)
            below = _backing_of_loop(file)
            if below is not None:
                wishes[below] = exclusive or wishes.get(below, False)
    return Opening(
        node=node,
        sources=wishes,
        claims=tuple(claims),
        key_file=spec.options.get("key-file") if spec.format is Format.LUKS else None,
    )


def identity_of(file: ImageFile) -> str:
    """Return what tells this source from any other, however it is spelled."""
    if file.block_device:
        return f"block:{os.major(file.block_device)}:{os.minor(file.block_device)}"
    return f"file:{file.device}:{file.inode}"


def take(opening: Opening, directory: str, owner: str) -> list[int]:
    """Take all locks and claims and return their descriptors. Raises SOURCE_IN_USE, holding nothing."""
    held: list[int] = []
    try:
        # Sorted: two that want the same sources meet at the same lock first.
        for identity, exclusive in sorted(opening.sources.items()):
            held.append(locks.take_lock(directory, identity, exclusive=exclusive, owner=owner))
        for device in opening.claims:
            held.append(locks.claim_block_device(device))
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


def _refuse_foreign_loop(file: ImageFile) -> None:
    """A loop device that somebody set up over the file writes to it past our locks."""
    # Compared by path, not by stat: the backing file of somebody's loop device may hang.
    for device in loop.find_by_backing(file.path):
        raise StoragedError(
            ErrorCode.SOURCE_IN_USE, "the source is in use", cause=f"{device.path} is set up over {file.path}",
            hint=f"losetup -d {device.path}, or attach that device instead", users=[device.path],
        )


def _backing_of_loop(file: ImageFile) -> str | None:
    """The identity of the file behind a loop device: to write to one is to write to the other."""
    if not file.block_device or os.major(file.block_device) != 7:
        return None
    backing = loop.backing_file(f"/dev/loop{os.minor(file.block_device)}")
    if backing is None:
        return None
    with contextlib.suppress(OSError):
        status = os.stat(backing)
        return f"file:{status.st_dev}:{status.st_ino}"
    return None
