"""Sources that are fetched whole before QSD opens them (storaged/backends/fetched.py). Blocks, use a thread.

The copy of a volume is NAME.raw in a directory of the daemon's state, which is no memory and outlives daemon and QSD.
It is there until the volume is detached: an overlay of --snapshot belongs to just what was fetched, and a successor
of QSD serves the same disk, whatever the server has by then.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from storaged.backends import find_backend
from storaged.backends.curl import CurlBackend
from storaged.backends.fetched import COPY, FetchedBackend, size_of
from storaged.errors import ErrorCode, StoragedError
from storaged.host import download
from storaged.host import secrets as host_secrets
from storaged.host.identity import file_identity
from storaged.model import backingsources
from storaged.model.layout import Layout
from storaged.model.sizes import format_size
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import QsdVersion, curl_loses_requests
from storaged.supervisor.opening import Opening

_SUFFIX = ".raw"
_MARK = ".raw.json"
_PART = ".raw.part"


def is_fetched(spec: VolumeSpec) -> bool:
    """Whether the source of a volume is fetched before it is opened."""
    backend = find_backend(spec.source)
    return isinstance(backend, FetchedBackend) and backend.is_fetched(spec.options)


def check_program(spec: VolumeSpec, version: QsdVersion) -> None:
    """Raise UNSUPPORTED where QSD would lose requests to the source, which then wait for ever."""
    own = find_backend(spec.source)
    opened = [*([] if is_fetched(spec) else [own]), *backingsources.backends(spec)]
    for backend in opened:
        if isinstance(backend, CurlBackend) and curl_loses_requests(version):
            raise StoragedError(
                ErrorCode.UNSUPPORTED, f"qemu-storage-daemon {version} cannot read from {backend.name} reliably",
                cause="of requests that end at the same time it forgets all but one, and whoever reads waits for ever",
                hint=("say -o fetch=whole: the file is fetched first; or " if backend is own else "")
                + "use QEMU 10.0.9 or newer (Debian 13), for this backend alone by binaries in storaged.toml",
            )


def directory(layout: Layout) -> str:
    """Where the copies are."""
    return os.path.join(layout.state_dir, "copies")


def path_of(layout: Layout, name: str) -> str:
    """The copy of a volume's source."""
    return os.path.join(directory(layout), name + _SUFFIX)


def located(node: dict[str, Any], path: str) -> dict[str, Any]:
    """Return a tree of nodes with the path of the copy in it."""
    return {
        key: located(value, path) if isinstance(value, dict)
        else path if (key, value) == ("filename", COPY) and node.get("driver") == "file"
        else value
        for key, value in node.items()
    }


def refuse_lost_copy(spec: VolumeSpec, layout: Layout) -> None:
    """Raise SOURCE_CHANGED where a volume that was attached has lost its copy: the server may have another file now."""
    if is_fetched(spec) and not os.path.lexists(path_of(layout, spec.name)):
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, f"the copy of the source is gone: {path_of(layout, spec.name)}",
            cause="fetched again, it might be another disk",
            hint="bring it back; or detach the volume and attach it again",
        )


def fetch(
    spec: VolumeSpec, wanted: Opening, layout: Layout, *, deadline: float, stop: threading.Event,
    progress: Callable[[int, int | None], None],
) -> Opening:
    """Fetch the source, if it is one that has to be and there is no copy yet; return what QSD opens then.

    ``deadline`` is of time.monotonic(). Raises what ``download.fetch`` raises, and OPEN_FAILED for a secret that
    cannot be read.
    """
    backend = find_backend(spec.source)
    if not isinstance(backend, FetchedBackend) or not backend.is_fetched(spec.options):
        return wanted
    location = backend.parse(spec.source, spec.options)
    path = path_of(layout, spec.name)
    secrets = {
        option: read_secret(option, spec.options[option], layout.volume_dir(spec.name))
        for option in backend.secret_options if option in spec.options
    }
    request = download.Request(
        location, backend.fetch_options(location, spec.options, secrets),
        stall=float(spec.options.get("request-timeout", backend.defaults["request-timeout"])),
        size=size_of(spec.options),
    )
    download.fetch(request, path, deadline=deadline, stop=stop, progress=progress)
    seen = os.stat(path)
    return replace(
        wanted, node=located(wanted.node, path),
        source=None if wanted.source is None else located(wanted.source, path),
        files=frozenset({file_identity(seen.st_dev, seen.st_ino)}), paths=((path, False),),
    )


def told(done: int, total: int | None) -> str:
    """Return what is said of a fetch that goes on, of bytes."""
    return f"fetching the source: {format_size(done)}{f' of {format_size(total)}' if total else ''}"


def read_secret(option: str, value: str, directory: str) -> str:
    """Return a password without the newline at the end of its file. Raises OPEN_FAILED."""
    try:
        return host_secrets.read(option, value, directory).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"the secret of option {option} is no UTF-8", hint=f"check what -o {option} says"
        ) from None


def remove(layout: Layout, name: str) -> None:
    """Remove the copy of a volume's source, and all that was begun; no error where there is none."""
    if exists(layout, name):
        download.remove(path_of(layout, name))


def exists(layout: Layout, name: str) -> bool:
    """Whether there is anything to remove."""
    return any(os.path.lexists(os.path.join(directory(layout), name + end)) for end in (_SUFFIX, _MARK, _PART))


def all_names(layout: Layout) -> list[str]:
    """Return the volumes of which there is something to remove."""
    try:
        entries = os.listdir(directory(layout))
    except FileNotFoundError:
        return []
    ends = (_MARK, _PART, _SUFFIX)
    return sorted({entry.removesuffix(end) for entry in entries for end in ends if entry.endswith(end)})
