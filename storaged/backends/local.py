"""What the drivers for things of this host (file, host_device) have in common: block/file-posix.c in QEMU."""

from __future__ import annotations

from collections.abc import Mapping

from storaged.backends.base import Node
from storaged.backends.cache import CACHE_FLAGS, cache_flags
from storaged.errors import ErrorCode, StoragedError

AIO_MODES = ("threads", "native", "io_uring")


class LocalBackend:
    """A file-posix driver: it takes a path."""

    name: str
    options: Mapping[str, str] = {
        "aio": "threads, native (needs cache=none or directsync) or io_uring; default threads",
    }
    defaults: Mapping[str, str] = {"aio": "threads"}

    def __init__(self, name: str) -> None:
        self.name = name
        self.schemes = (name,)
        self.example = f"{name}:PATH"

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the absolute path: the location of a thing of this host."""
        path = source.removeprefix(f"{self.name}:")
        if not path.startswith("/"):
            raise StoragedError(
                ErrorCode.INVALID_SOURCE,
                f"the source {source!r} is not an absolute path",
                hint="write the whole path, or a known prefix such as file: or host_device:",
            )
        return path

    def check_options(self, options: Mapping[str, str]) -> None:
        """``aio`` must be a mode that QEMU has, and native needs a cache mode that bypasses the page cache."""
        aio = options.get("aio", "threads")
        if aio not in AIO_MODES:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option aio={aio!r} is unknown", hint=f"use one of {AIO_MODES}"
            )
        if aio == "native" and not CACHE_FLAGS[options.get("cache", "writeback")][0]:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, "option aio=native needs cache=none or directsync",
                hint="add -o cache=none, or use aio=io_uring",
            )

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsFile: locking stays on auto, so that QEMU's own image locks hold as well."""
        return {
            "driver": self.name,
            "filename": location,
            "aio": options.get("aio", "threads"),
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }
