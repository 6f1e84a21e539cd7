"""A volume that cannot be stored, or whose actor ends by a bug: everybody gets an answer, and the name is free."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.model.spec import Desired, VolumeSpec
from storaged.store.base import Loaded, Store
from storaged.store.local import LocalStore
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume


class FailingStore:
    """A store that fails to put, once it is let go."""

    def __init__(self, failure: Exception) -> None:
        self._failure = failure
        self.begun, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()

    def load(self) -> Loaded:
        return Loaded()

    def put(self, desired: Desired) -> None:
        self.begun.set()
        assert self.goes_on.wait(10)
        raise self._failure

    def delete(self, name: str) -> None:
        pass


def full() -> FailingStore:
    return FailingStore(StoragedError(ErrorCode.NO_SPACE, "cannot write a.json", hint="make room"))


def broken() -> FailingStore:
    return FailingStore(RuntimeError("a bug"))


def missing(place: Path) -> LocalStore:
    return LocalStore(str(place / "missing" / "volumes"))


def no_directory(place: Path) -> LocalStore:
    (place / "file").touch()
    return LocalStore(str(place / "file"))


def read_only(_: Path) -> LocalStore:
    return LocalStore("/proc/self/fdinfo")  # as a directory on a disk that became read-only, for root too


STORES: list[tuple[Callable[[Path], Store], ErrorCode]] = [
    (missing, ErrorCode.INTERNAL),
    (no_directory, ErrorCode.INTERNAL),
    (read_only, ErrorCode.INTERNAL),
    (lambda _: full(), ErrorCode.NO_SPACE),
    (lambda _: broken(), ErrorCode.INTERNAL),
]
every_store = pytest.mark.parametrize(
    ("make", "code"), STORES, ids=["missing", "no directory", "read-only", "full", "bug"]
)


@pytest.fixture
def spec(tmp_path: Path) -> VolumeSpec:
    source = tmp_path / "a.raw"
    source.write_bytes(bytes(1 << 20))
    return VolumeSpec(name="a", source=str(source))


def with_manager(
    place: Path, store: Store, work: Callable[[Manager], Awaitable[None]], *, seconds: float = 5
) -> None:
    """Run ``work`` with a manager whose volumes are kept in ``store``. Nothing may hang."""
    root = Layout.below(str(place / "root"))

    async def run() -> None:
        environment = Environment(
            layout=root, config=Config(attach_timeout=seconds, detach_timeout=seconds), persistent=store,
            volatile=store, events=EventHub(), lock_directory=str(place / "locks"),
        )
        async with asyncio.timeout(2 * seconds), asyncio.TaskGroup() as tasks:
            manager = Manager(environment, tasks)
            try:
                await work(manager)
            finally:
                for actor in manager.actors():
                    actor.cancel()

    asyncio.run(run())


async def refused(call: Awaitable[object]) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        async with asyncio.timeout(3):
            await call
    assert caught.value.volume == "a"
    return caught.value


async def is_free(manager: Manager) -> None:
    async with asyncio.timeout(3):
        while manager.volumes() or manager.actors():  # noqa: ASYNC110 -- it is set from no coroutine of ours
            await asyncio.sleep(0.001)
    with pytest.raises(StoragedError) as caught:
        manager.get("a")
    assert caught.value.code is ErrorCode.NO_SUCH_VOLUME


@every_store
def test_an_attach_that_cannot_be_stored_fails_and_leaves_nothing(
    tmp_path: Path, spec: VolumeSpec, make: Callable[[Path], Store], code: ErrorCode
) -> None:
    async def work(manager: Manager) -> None:
        for _ in range(2):  # the name is free each time, even for other wishes
            assert (await refused(manager.attach(spec, None))).code is code
            await is_free(manager)
        other = VolumeSpec(name="a", source=spec.source, read_only=True)
        assert (await refused(manager.attach(other, None))).code is code
        await is_free(manager)

    with_manager(tmp_path, make(tmp_path), work)
    assert not (tmp_path / "root").exists()


@pytest.mark.parametrize(
    ("store", "code"), [(full(), ErrorCode.NO_SPACE), (broken(), ErrorCode.INTERNAL)], ids=["full", "bug"]
)
def test_whoever_waits_for_the_same_attach_fails_with_it(
    tmp_path: Path, spec: VolumeSpec, store: FailingStore, code: ErrorCode
) -> None:
    async def work(manager: Manager) -> None:
        store.goes_on.clear()
        attaches = [asyncio.create_task(refused(manager.attach(spec, None))) for _ in range(3)]
        await asyncio.to_thread(store.begun.wait, 5)
        attaches.append(asyncio.create_task(refused(manager.attach(spec, None))))
        await asyncio.sleep(0)
        store.goes_on.set()
        assert [(await attach).code for attach in attaches] == [code] * 4
        await is_free(manager)

    with_manager(tmp_path, store, work)


def test_a_detach_of_what_fails_to_attach_finds_it_gone(tmp_path: Path, spec: VolumeSpec) -> None:
    store = full()

    async def work(manager: Manager) -> None:
        store.goes_on.clear()
        attach = asyncio.create_task(refused(manager.attach(spec, None)))
        await asyncio.to_thread(store.begun.wait, 5)
        detach = asyncio.create_task(manager.detach("a", force=False, timeout=None))
        await asyncio.sleep(0)
        store.goes_on.set()
        assert (await attach).code is ErrorCode.NO_SPACE
        assert await detach == []
        await is_free(manager)

    with_manager(tmp_path, store, work)


# An actor that ends by a bug


@contextmanager
def bug_in(monkeypatch: pytest.MonkeyPatch, function: str) -> Iterator[None]:
    def fails(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    with monkeypatch.context() as patch:
        patch.setattr(Volume, function, fails)
        yield


async def actor_ends(manager: Manager) -> None:
    (actor,) = manager.actors()
    await asyncio.wait({actor}, timeout=3)
    assert actor.done()


#: Where an actor waits for requests, where it runs one, and where it says how it ended.
PLACES = ["_next", "_serve", "_fail"]


@pytest.mark.parametrize("function", PLACES)
def test_a_volume_whose_actor_ended_by_a_bug_answers_and_does_not_hang(
    tmp_path: Path, spec: VolumeSpec, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
    async def work(manager: Manager) -> None:
        with bug_in(monkeypatch, function):
            under_way = asyncio.create_task(refused(manager.attach(spec, None)))
            waiting = asyncio.create_task(refused(manager.attach(spec, None)))
            await asyncio.sleep(0)
            await actor_ends(manager)
        assert [volume.spec.name for volume in manager.volumes()] == ["a"]
        for late in (
            manager.attach(spec, None), manager.resize("a", 1 << 21, None),
            manager.detach("a", force=False, timeout=None), manager.detach("a", force=True, timeout=None),
        ):
            error = await refused(late)
            assert (error.code, bool(error.hint)) == (ErrorCode.INTERNAL, True)
        assert (await waiting).code is ErrorCode.INTERNAL
        assert (await under_way).code in (ErrorCode.INTERNAL, ErrorCode.NO_SPACE)

    with_manager(tmp_path, full(), work)


def test_a_detach_that_waits_for_an_actor_that_ends_by_a_bug_is_not_told_that_the_volume_is_gone(
    tmp_path: Path, spec: VolumeSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def work(manager: Manager) -> None:
        with bug_in(monkeypatch, "_next"):
            attach = asyncio.create_task(refused(manager.attach(spec, None)))
            detach = asyncio.create_task(refused(manager.detach("a", force=False, timeout=None)))
            await asyncio.sleep(0)
            await actor_ends(manager)
        assert (await attach).code is ErrorCode.INTERNAL
        assert (await detach).code is ErrorCode.INTERNAL

    with_manager(tmp_path, full(), work)
