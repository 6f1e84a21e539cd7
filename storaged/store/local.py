"""The desired state as one JSON file per volume in a directory of this host."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time

import msgspec

from storaged.errors import StoragedError
from storaged.host.atomic import remove_file, sync_directory, write_atomic
from storaged.model.names import check_name
from storaged.model.spec import Desired
from storaged.store.base import Damaged, Loaded

_SUFFIX = ".json"


class LocalStore:
    """A directory of NAME.json, readable by root only: options may name key files."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._lock = threading.Lock()
        self._begun = itertools.count(1)
        self._done: dict[str, int] = {}

    def load(self) -> Loaded:
        """Read all; a file that is truncated, garbled or misnamed is renamed to NAME.json.damaged-TIME."""
        os.makedirs(self._directory, mode=0o700, exist_ok=True)
        volumes: dict[str, Desired] = {}
        damaged: list[Damaged] = []
        for entry in sorted(os.listdir(self._directory)):
            path = os.path.join(self._directory, entry)
            if entry.startswith(".") and entry.endswith(".tmp"):
                with contextlib.suppress(OSError):  # half written by a crash, never renamed: it never counted
                    os.unlink(path)
                continue
            if not entry.endswith(_SUFFIX):
                continue
            name = entry.removesuffix(_SUFFIX)
            try:
                with open(path, "rb") as file:
                    desired = msgspec.json.decode(file.read(), type=Desired)
                check_name(name)
                if desired.spec.name != name:
                    raise ValueError(f"the file speaks of volume {desired.spec.name!r}")
            except OSError as error:
                # It may be whole: a disk or a limit failed, not the file.
                damaged.append(Damaged(name, f"it cannot be read: {error.strerror}", path))
            except (ValueError, StoragedError) as error:
                damaged.append(self._set_aside(name, path, str(error)))
            else:
                volumes[name] = desired
        return Loaded(volumes, tuple(damaged))

    def put(self, desired: Desired) -> None:
        """Write NAME.json atomically. A put that hung is dropped when a later put or delete came before it."""
        name, turn = desired.spec.name, next(self._begun)
        data = msgspec.json.format(msgspec.json.encode(desired))
        write_atomic(self._path(name), data, still_wanted=lambda: self._is_next(name, turn))

    def delete(self, name: str) -> None:
        """Remove NAME.json."""
        self._is_next(name, next(self._begun))
        remove_file(self._path(name))

    def _is_next(self, name: str, turn: int) -> bool:
        with self._lock:
            if self._done.get(name, 0) > turn:
                return False
            self._done[name] = turn
            return True

    def _path(self, name: str) -> str:
        return os.path.join(self._directory, check_name(name) + _SUFFIX)

    def _set_aside(self, name: str, path: str, cause: str) -> Damaged:
        aside = f"{path}.damaged-{time.strftime('%Y%m%dT%H%M%S')}-{time.monotonic_ns() % 1_000_000}"
        try:
            os.rename(path, aside)
            sync_directory(self._directory)
        except OSError as error:
            return Damaged(name, f"{cause}; it could not be set aside: {error.strerror}", path)
        return Damaged(name, cause, aside)
