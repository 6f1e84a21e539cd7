"""Which sources on the network an image may stand on: those that the option backing-sources allows. Pure.

A name in a header is hostile: it is compared with what is allowed as the backends spell it, and the rest of the name
below an allowed place is plain, so that it says nothing of how the server is reached.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NoReturn

from storaged.backends import find_backend
from storaged.backends.base import NO_REQUIREMENTS, NetworkBackend, Requirements
from storaged.backends.fetched import FetchedBackend
from storaged.backends.jsontree import is_tree, read_tree
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers
from storaged.model.spec import VolumeSpec

OPTION = "backing-sources"
#: Options that name the disk, or belong to it alone: of an image below it they say nothing.
_OF_THE_DISK = frozenset({
    "pool", "namespace", "image", "rbd-snapshot", "rbd-encrypt", "rbd-key-file", "portal", "target", "lun", "inode",
    "disk-size", "size", "fetch",
})
#: Backends whose sources are paths, so that a name may be relative to the image that holds it, as QEMU reads it.
_WITH_PATHS = frozenset({"ssh", "nfs", "http", "https", "ftp", "ftps", "gluster"})
_PLAIN = re.compile(r"[A-Za-z0-9._~%+/-]*")
_RELATIVE = re.compile(r"(?!/)[A-Za-z0-9._~+/-]+")


@dataclass(frozen=True)
class BackingSource:
    """A source on the network below an image, and how it is reached."""

    backend: NetworkBackend
    location: str
    options: dict[str, str]


def places(spec: VolumeSpec) -> list[str]:
    """The sources that are allowed, as the user wrote them."""
    return spec.options.get(OPTION, "").split()


def find(name: str, spec: VolumeSpec) -> BackingSource | None:
    """Return the source that a header names, None where it is none of the network or is not allowed."""
    try:
        found = _read(_without_tree(name), spec)
    except StoragedError:
        return None
    for place, above in _allowed(spec):
        if place.backend is not found.backend:
            continue
        if above is None and place.location == found.location:
            return found
        if above is not None and found.location.startswith(above) and _PLAIN.fullmatch(found.location[len(above):]):
            return found
    return None


def beside(location: str, name: str) -> str | None:
    """Return the source that a relative name in the image at ``location`` means, None where it means none."""
    if find_backend(location).name not in _WITH_PATHS or not _RELATIVE.fullmatch(name) or "+unix" in location:
        return None
    path, question, query = location.partition("?")
    return f"{path.rpartition('/')[0]}/{name}{question}{query}"


def check(spec: VolumeSpec) -> None:
    """Raise INVALID_ARGUMENT where the option says what no image can stand on."""
    if OPTION in spec.options:
        if not places(spec):
            _refuse("it names no source", f"write {OPTION}=SOURCE[ SOURCE…], such as nbd://HOST/EXPORT")
        requirements(spec, NO_REQUIREMENTS)


def backends(spec: VolumeSpec) -> list[NetworkBackend]:
    """The backends of what is allowed."""
    return [place.backend for place, _ in _allowed(spec)]


def powers(spec: VolumeSpec, own: Powers) -> Powers:
    """Return what QSD needs of the host for the source, which needs ``own``, and for all that may be below it."""
    for place, _ in _allowed(spec):
        own = own.and_of(place.backend.powers(place.location, place.options))
    return own


def requirements(spec: VolumeSpec, own: Requirements) -> Requirements:
    """Return what QSD must be given for the source, which needs ``own``, and for all that may be below it.

    Raises INVALID_ARGUMENT where they need different things of one name.
    """
    whole = own
    for place, _ in _allowed(spec):
        needed = place.backend.requirements(place.location, place.options)
        agents = {whole.agent_key, needed.agent_key} - {""}
        objects = {one["id"]: one for one in (*whole.objects, *needed.objects)}
        secrets = {one.id: one for one in (*whole.secrets, *needed.secrets)}
        merged = replace(
            whole, secrets=tuple(secrets.values()), objects=tuple(objects.values()),
            files={**whole.files, **needed.files}, environment={**whole.environment, **needed.environment},
            agent_key=min(agents, default=""), secret_files={**whole.secret_files, **needed.secret_files},
        )
        kept = all(
            mine.get(key) == value
            for mine, others in (
                (objects, {one["id"]: one for one in whole.objects}), (secrets, {one.id: one for one in whole.secrets}),
                (merged.files, whole.files), (merged.environment, whole.environment),
                (merged.secret_files, whole.secret_files),
            ) for key, value in others.items()
        )
        if len(agents) > 1 or not kept:
            _refuse(
                f"{place.location} needs to be reached in another way than the others",
                "one qemu-storage-daemon opens all of them: give them the same settings",
            )
        whole = merged
    return whole


def _allowed(spec: VolumeSpec) -> Iterator[tuple[BackingSource, str | None]]:
    """What is allowed: a source each, and what the locations begin with that it is an example of; None for it alone."""
    for place in places(spec):
        is_prefix = place.endswith("/")
        try:
            found = _read(f"{place}x" if is_prefix else place, spec)
        except StoragedError as error:
            _refuse(error.cause or error.message, error.hint)
        if isinstance(found.backend, FetchedBackend) and found.backend.is_fetched(found.options):
            _refuse(f"a source of {found.backend.name} is fetched whole", "fetch it, and allow the file")
        above = None
        if is_prefix:
            # Of a parameter (the path of a socket, a configuration) not all below it is meant.
            if not found.location.endswith("x") or {"=", "?"} & set(found.location):
                _refuse("what stands before the / is no place of sources", "name each source as a whole")
            above = found.location[:-1]
        yield found, above


def _read(name: str, spec: VolumeSpec) -> BackingSource:
    backend = find_backend(name)
    if not isinstance(backend, NetworkBackend):
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{name} is of this host", hint="files are allowed by -o backing=allow:PATH"
        )
    options = {"cache": spec.options["cache"]} if "cache" in spec.options else {}
    if backend is find_backend(spec.source):
        # The server is reached as that of the volume's own source is.
        options |= {
            key: value for key, value in spec.options.items()
            if key in backend.options and key not in _OF_THE_DISK
            and (not key.startswith("tls-") or not name.startswith("nbd") or name.startswith("nbds"))
        }
    return BackingSource(backend, backend.parse(name, options), options)


def _without_tree(name: str) -> str:
    """A header may hold a json: tree; one that says more than where the data is means no source."""
    if not is_tree(name):
        return name
    tree = read_tree(name, {})
    if tree.format is not None or tree.options:
        raise StoragedError(ErrorCode.UNSUPPORTED, "the tree says more than where the data is")
    return tree.source


def _refuse(cause: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, f"option {OPTION} cannot be used", cause=cause, hint=hint)
