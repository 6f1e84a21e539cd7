"""From a spec to what QSD must open and which locks it must hold. Reads images' headers: blocks, use a thread.

Of a source on the network nothing is looked at: it may be away, and to be looked at ends some servers. It is locked by
its name, and what is wrong with it QSD says when it opens it.
"""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from storaged.backends import BACKENDS, cache, find_backend
from storaged.backends.base import NO_REQUIREMENTS, NetworkBackend, Requirements, Secret
from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, locks, loop, process, secrets
from storaged.host.atomic import write_atomic
from storaged.host.blocking import BlockingCalls
from storaged.host.chain import ImageFile, Reference, inspect_images
from storaged.host.identity import block_identity, file_identity, identities, own_identity
from storaged.model import backingsources
from storaged.model.blockdev import BASE, DISK, PASSPHRASE, SOURCE, Image, image_nodes, image_tree
from storaged.model.formats import Format
from storaged.model.record import Layer, Record
from storaged.model.spec import VolumeSpec, check_spec
from storaged.transports import options_of


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
    """Inode, size and time of the last change of each image: what an overlay belongs to. Empty behind a server."""
    claims: tuple[str, ...]
    """Block devices that must be claimed against mounts while QSD can write to them."""
    unclaimed: tuple[str, ...]
    """Block devices that are only read, and that nobody else may have claimed."""
    requirements: Requirements = NO_REQUIREMENTS
    """What QSD must be given before the node; the passphrase of the image is among its secrets."""
    source: dict[str, Any] | None = None
    """A node that must be there before ``node``, which stands on it: the bytes behind a server, of which nobody has
    looked at the header of the image."""
    images: tuple[Image, ...] = ()
    """Those of the chain, as far as it is known before QSD runs."""
    layers: tuple[Layer, ...] = ()
    """What is told of each of ``images``; their sizes are not known yet."""
    rest: Reference | None = None
    """What names the next image, where the chain goes on behind a server."""
    paths: tuple[tuple[str, bool], ...] = ()
    """The files and block devices of this host that QSD opens, and whether each is written to."""
    extents: int = 0
    """How many nodes QEMU makes by itself beyond those that it is told: the extents of vmdk."""

    size: int | None = None
    """Bytes of a raw disk of this host; of others QSD tells when it has opened them."""
    remote: bool = False
    """Behind a server: its size is all that tells whether it changed, and is known once it is open."""
    safe_when_acknowledged: bool = False
    """What a dead QSD had acknowledged needs no flush by its successor."""

    @property
    def is_open_ended(self) -> bool:
        """Whether the chain goes on, or may go on, in images whose headers only QSD can read."""
        return self.source is not None or self.rest is not None

    @property
    def most_nodes(self) -> int:
        """How many nodes QSD has when it has opened all that was found."""
        return sum(2 + (image.data_file is not None) for image in self.images) + self.extents

    @property
    def secrets(self) -> tuple[Secret, ...]:
        """All that QSD must be given."""
        return self.requirements.secrets


@dataclass(frozen=True)
class Manner:
    """What an image is opened for."""

    device: bool = True
    """To become a device. Else by a program that works on images, of which some know more of a source than QSD."""
    alone: bool = False
    """Without its backing files: they are neither looked at nor opened."""
    commits: bool = False
    """What is written goes to the image's backing file, too."""


AS_A_DEVICE = Manner()


def cache_flags(spec: VolumeSpec) -> Mapping[str, bool]:
    """BlockdevCacheOptions for the volume's cache mode."""
    return cache.cache_flags(spec.options)


def behaviour(spec: VolumeSpec) -> Mapping[str, str]:
    """What the disk does with discards and zeroes (BlockdevOptions), where that is not the default."""
    wishes = {"discard": "unmap", "detect-zeroes": "off"}
    return {key: spec.options[key] for key in wishes if spec.options.get(key, wishes[key]) != wishes[key]}


def inspect(spec: VolumeSpec, manner: Manner = AS_A_DEVICE) -> Opening:
    """Look at the source and everything its headers name; refuse what may not be opened.

    Raises what storaged.host.chain raises, SOURCE_IN_USE where a foreign loop device stands on the file, UNSUPPORTED
    for what is not known to be safe with a source on the network.
    """
    backend = find_backend(spec.source)
    check_spec(spec, backend.options.keys() | options_of(spec.transport).keys())
    backingsources.check(spec)
    backend.check_options(spec.options)
    path = backend.parse(spec.source, spec.options)
    if isinstance(backend, NetworkBackend):
        return _behind_a_server(backend, path, spec, manner)
    chain, rest = inspect_images(
        path, spec.format, spec.allowed_backing, alone=manner.alone, device=manner.device,
        # Programs that work on images follow no chain behind servers.
        elsewhere=lambda name: manner.device and backingsources.find(name, spec) is not None,
    )
    if backend.name == "host_device" and not chain[0].block_device:
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{path} is no block device", hint="leave the prefix host_device: out"
        )
    found = of_this_host(chain, spec, written=(2 if manner.commits else 1) if spec.writes_source else 0)
    return replace(
        found, node=tree(found.images, spec), rest=rest,
        requirements=backingsources.requirements(spec, requirements_of_image(spec)),
    )


def of_this_host(chain: Sequence[ImageFile], spec: VolumeSpec, *, written: int, top: bool = True) -> Opening:
    """Return what is locked and claimed of a chain's images on this host, and their nodes; no tree yet.

    So many of the first are ``written`` to. ``top``: the first is the disk's own image. Raises INVALID_SOURCE, and
    SOURCE_IN_USE where a foreign loop device stands on one.
    """
    for image in chain:
        for file in image.files():
            try:
                file.path.encode()
            except UnicodeEncodeError as error:
                raise StoragedError(
                    ErrorCode.INVALID_SOURCE, f"the path {file.path!a} is no UTF-8",
                    hint="QMP can carry nothing else: rename it",
                ) from error
    images = tuple(
        Image(
            format=image.format,
            protocol=protocol_of(image, spec, read_only=number >= written),
            data_file=protocol_of(image.data_file, spec, read_only=number >= written)
            if image.data_file is not None else None,
            encrypted=top and number == 0 and "encrypt" in spec.options,
        )
        for number, image in enumerate(chain)
    )
    files = [(file, number < written) for number, image in enumerate(chain) for file in image.files()]
    sources: dict[str, bool] = {}
    for file, exclusive in files:
        for identity, exclusively in identities(file, exclusive=exclusive).items():
            sources[identity] = exclusively or sources.get(identity, False)
        _refuse_foreign_loop(file, exclusive)
    return Opening(
        node={},
        sources=sources,
        files=frozenset(own_identity(file) for file, _ in files),
        fingerprint=[_fingerprint(file) for file, _ in files] if spec.snapshot else [],
        claims=tuple(file.path for file, exclusive in files if file.block_device and exclusive),
        unclaimed=tuple(file.path for file, exclusive in files if file.block_device and not exclusive),
        images=images,
        layers=tuple(
            Layer(
                source=image.path, format=image.format, virtual_size=0,
                data_file=image.data_file.path if image.data_file is not None else None,
            )
            for image in chain
        ),
        paths=tuple((file.path, exclusive) for file, exclusive in files),
        extents=sum(len(image.extents) for image in chain),
        size=chain[0].virtual_size if spec.format is Format.RAW else None,
    )


def tree(images: Sequence[Image], spec: VolumeSpec) -> dict[str, Any]:
    """Return the node of a chain of this host, or of one image."""
    return image_tree(images, **_how(spec))


def nodes(images: Sequence[Image], spec: VolumeSpec) -> list[dict[str, Any]]:
    """Return the nodes of a chain that is not all of this host, the last image first."""
    return image_nodes(images, **_how(spec))


def _how(spec: VolumeSpec) -> Any:
    cache = cache_flags(spec)
    if spec.snapshot:
        return {"read_only": True, "node_name": BASE, "cache": cache}
    return {
        "read_only": not spec.writes_source, "node_name": DISK, "cache": cache, "behaviour": behaviour(spec),
    }


def requirements_of_image(spec: VolumeSpec) -> Requirements:
    """What QSD must be given for the format, whatever the source needs."""
    return Requirements(secrets=(Secret(PASSPHRASE, "key-file", exact=True),)) if "key-file" in spec.options \
        else NO_REQUIREMENTS


def _behind_a_server(backend: NetworkBackend, location: str, spec: VolumeSpec, manner: Manner) -> Opening:
    """What QSD opens of a source on the network: the bytes as they are, or an image in them that stands alone."""
    if backend.read_only and spec.writes_source:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"a source behind {backend.name} can only be read",
            hint="attach it with --read-only, or with --snapshot: what is written is then kept here until the detach",
        )
    node_of = backend.node if manner.device else backend.image_node
    protocol: dict[str, Any] | str = node_of(location, read_only=not spec.writes_source, options=spec.options)
    source = None
    if spec.format is not Format.RAW:
        # Its header may name files of this host, and nobody has looked at it.
        assert isinstance(protocol, dict)
        source, protocol = {**protocol, "node-name": SOURCE}, SOURCE
    needed = backend.requirements(location, spec.options)
    images = (Image(spec.format, protocol, encrypted="encrypt" in spec.options),)
    return Opening(
        node=tree(images, spec), images=images,
        layers=(Layer(source=location, format=spec.format, virtual_size=0),),
        sources={backend.identity(location, os.path.realpath): spec.writes_source},
        files=frozenset(), fingerprint=[], claims=(), unclaimed=(), source=source, remote=True,
        safe_when_acknowledged=backend.safe_when_acknowledged,
        requirements=backingsources.requirements(
            spec, replace(needed, secrets=(*needed.secrets, *requirements_of_image(spec).secrets))
        ),
    )


def _fingerprint(file: ImageFile) -> list[int]:
    # The node of a block device tells nothing about the device's content.
    return [0, file.size, 0] if file.block_device else [file.inode, file.size, os.stat(file.path).st_mtime_ns]


def is_same(opening: Opening, sources: Mapping[str, bool]) -> bool:
    """Whether what was looked at is what was attached, as far as it is known before QSD runs."""
    if opening.is_open_ended:
        return opening.sources.items() <= sources.items()
    return dict(opening.sources) == dict(sources)


def opened_as_wanted(opening: Opening, pid: int, own: tuple[str, ...] = ()) -> bool:
    """Whether QSD has opened the very files that were looked at and locked, and nothing swapped in for them.

    What is in the directories ``own`` is storaged's: such a file may have got the inode of an image that was removed
    after the look, and would stand for it.
    """
    opened = {
        block_identity(number) if number else file_identity(device, inode)
        for device, inode, number in process.open_files(pid, own)
    }
    return opening.files <= opened


def was_replaced(opening: Opening) -> bool:
    """Whether another file than the one that was looked at is in a place: QSD is refused such a file."""
    now = set()
    for path, _ in opening.paths:
        try:
            seen = os.stat(path)
        except (FileNotFoundError, NotADirectoryError):
            return True
        except OSError:
            return False  # of a storage that does not answer nobody knows, and QSD says what is the matter
        is_block = stat.S_ISBLK(seen.st_mode)
        now.add(block_identity(seen.st_rdev) if is_block else file_identity(seen.st_dev, seen.st_ino))
    return not opening.files <= now


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


def put_files(needed: Requirements, spec: VolumeSpec, directory: str) -> None:
    """Put the files that a client library reads into a volume's directory. Raises OPEN_FAILED."""
    for name, text in needed.files.items():
        write_atomic(os.path.join(directory, name), text.encode())
    for name, option in needed.secret_files.items():
        write_atomic(os.path.join(directory, name), secrets.read(option, spec.options[option], directory))


def secret_object(secret: Secret, spec: VolumeSpec, directory: str) -> dict[str, str]:
    """Return the arguments of object-add for a secret of a volume whose directory that is. Raises OPEN_FAILED."""
    data = secrets.read(secret.option, spec.options[secret.option], directory)
    if not secret.exact:
        data = data.removesuffix(b"\n").removesuffix(b"\r")
    data = data.strip() if secret.encoded else base64.b64encode(data)
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"the secret of option {secret.option} is no base64",
            hint=f"check what -o {secret.option} says",
        ) from None
    return {"qom-type": "secret", "id": secret.id, "format": "base64", "data": text}


def protocol_of(file: ImageFile, spec: VolumeSpec, *, read_only: bool) -> dict[str, Any]:
    """The node of a file or block device of this host."""
    backend = BACKENDS["host_device" if file.block_device else "file"]
    return backend.node(file.path, read_only=read_only, options=spec.options)


def outside(opening: Opening, spec: VolumeSpec, directory: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the node, and the objects before it, for a QEMU that does not run in the volume's directory."""
    needed = opening.requirements
    names = {*needed.files, *needed.secret_files}

    def placed(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: placed(member) for key, member in value.items()}
        return os.path.join(directory, value) if isinstance(value, str) and value in names else value

    node = dict(opening.node)
    if opening.source is not None:
        node["file"] = {key: value for key, value in opening.source.items() if key != "node-name"}
    objects: list[dict[str, Any]] = []
    for secret in needed.secrets:
        place = secrets.place_of(secret.option, spec.options[secret.option], directory)
        encoding = {"format": "base64"} if secret.encoded else {}
        objects.append({"qom-type": "secret", "id": secret.id, "file": place, **encoding})
    for other in needed.objects:
        objects.append({key: directory if (key, value) == ("dir", ".") else value for key, value in other.items()})
    return placed(node), objects


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
        if backends[0] is not backends[1] or len(identities_found) > 1:
            return False
        # The identity is what the lock needs: of some backends it leaves out which server or cluster.
        schemes = {location.partition(":")[0] for location in locations}
        whole = isinstance(backends[0], NetworkBackend) and backends[0].identity_is_whole and len(schemes) == 1
        return whole or locations[0] == locations[1]
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
