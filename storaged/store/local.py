"""The desired state as one JSON file per volume in a directory of this host."""

from __future__ import annotations

import contextlib
import itertools
import os
import threading
import time
from collections.abc import Iterator

import msgspec

from storaged.errors import StoragedError
from storaged.host.atomic import commit, discard, remove_file, sync_directory, write_aside
from storaged.model.names import check_name
from storaged.model.spec import DESIRES, Desired
from storaged.store.base import Damaged, Loaded

_SUFFIX = ".json"


class LocalStore:
    """A directory of NAME.json, readable by root only: options may name key files."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._guard = threading.Lock()
        self._locks: dict[str, threading.Lock] = {}
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
                    desired = DESIRES.decode(file.read())
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
        path, turn = self._path(desired.spec.name), next(self._begun)
        temporary = write_aside(path, msgspec.json.format(msgspec.json.encode(desired)))
        with self._in_turn(desired.spec.name, turn) as wanted:
            if wanted:
                commit(temporary, path)
            else:
                discard(temporary)

    def delete(self, name: str) -> None:
        """Remove NAME.json, unless a later put or delete came before this one."""
        path, turn = self._path(name), next(self._begun)
        with self._in_turn(name, turn) as wanted:
            if wanted:
                remove_file(path)

    @contextlib.contextmanager
    def _in_turn(self, name: str, turn: int) -> Iterator[bool]:
        """Hold the lock of one entry, and say whether nothing later was done to it."""
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            wanted = self._done.get(name, 0) < turn
            yield wanted
            if wanted:
                self._done[name] = turn

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
