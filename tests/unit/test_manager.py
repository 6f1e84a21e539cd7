"""A volume that cannot be stored, or whose actor ends by a bug: everybody gets an answer, and the name is free."""

from __future__ import annotations

import asyncio
import gc
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.formats import Format
from storaged.model.layout import Layout
from storaged.model.plan import Observed, Step
from storaged.model.record import Record
from storaged.model.spec import DEFAULTS, Desired, VolumeSpec
from storaged.model.states import State
from storaged.store.base import Loaded, Store
from storaged.store.local import LocalStore
from storaged.supervisor import watchdog
from storaged.supervisor.attachment import Attachment
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume
from tests.contract.memory_store import MemoryStore
from tests.unit import world as model


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
        assert "a has ended" in watchdog.illness(manager, time.monotonic())
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


# With a world that does what it is told


class World(Attachment):
    """A null attachment: each step does what it does in the model, and waits at its gate; those of the first one
    that was made fail as they are told."""

    made: ClassVar[list[World]] = []
    gates: ClassVar[dict[Step, asyncio.Event]] = {}
    failing: ClassVar[dict[Step, StoragedError]] = {}

    def __init__(self, spec: VolumeSpec, environment: Environment, wake: Callable[[], None]) -> None:
        super().__init__(spec, environment, wake)
        self.steps: list[Step] = []
        self._wake_actor = wake
        self._world = model.World(model.Kind.FUSE)
        World.made.append(self)

    async def observe(self) -> Observed:
        return self._world.seen

    def looks_well(self) -> bool:
        return True

    async def perform(self, step: Step, *, timeout: float, force: bool) -> None:
        self.steps.append(step)
        if step in World.gates and not force:
            await World.gates[step].wait()
        if step in World.failing and self is World.made[0]:
            raise World.failing[step]
        if step is Step.START:
            self.record = Record(spec=self.spec, transport="fuse", transport_reason="auto", binary="")
        self._world = model.do(step, self._world, force=force)

    def dies(self) -> None:
        self._world = model.qsd_dies(self._world)
        self.qsd.last_death = StoragedError(ErrorCode.QSD_DIED, "it died")
        self._wake_actor()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> type[World]:
    for attribute in (World.made, World.gates, World.failing):
        attribute.clear()
    monkeypatch.setattr("storaged.supervisor.convergence.Attachment", World)
    return World


async def reaches(world: type[World], step: Step, number: int = -1) -> None:
    async with asyncio.timeout(3):
        while not world.made or step not in world.made[number].steps:  # noqa: ASYNC110 -- set from no coroutine of ours
            await asyncio.sleep(0.001)


async def settled() -> None:
    """Everything that can go on without us has."""
    await asyncio.sleep(0.05)


def other_wishes(spec: VolumeSpec) -> VolumeSpec:
    return msgspec.structs.replace(spec, read_only=True)


def same_wishes(spec: VolumeSpec) -> VolumeSpec:
    return spec


@pytest.mark.parametrize("wishes", [same_wishes, other_wishes])
@pytest.mark.parametrize("step", [Step.DISCONNECT, Step.STOP, Step.REMOVE])
def test_an_attach_that_meets_a_detach_becomes_a_new_attach(
    tmp_path: Path, spec: VolumeSpec, world: type[World], wishes: Callable[[VolumeSpec], VolumeSpec], step: Step
) -> None:
    store = MemoryStore()

    async def work(manager: Manager) -> None:
        old = await manager.attach(spec, None)
        gate = world.gates[step] = asyncio.Event()
        detach = asyncio.create_task(manager.detach("a", force=False, timeout=None))
        await reaches(world, step)
        attaches = [asyncio.create_task(manager.attach(wishes(spec), None)) for _ in range(3)]
        await settled()
        assert not any(task.done() for task in (detach, *attaches))
        gate.set()
        assert await detach == []
        volumes = await asyncio.gather(*attaches)
        assert manager.volumes() == [volumes[0]]
        assert set(volumes) == {volumes[0]} != {old}
        assert (volumes[0].state, volumes[0].spec) == (State.ONLINE, wishes(spec))
        assert store.load().volumes == {"a": Desired(spec=wishes(spec))}
        assert len(world.made) == 2

    with_manager(tmp_path, store, work)


def test_the_memory_of_a_volume_that_is_gone_is_freed(tmp_path: Path, spec: VolumeSpec, world: type[World]) -> None:
    async def work(manager: Manager) -> None:
        volume = weakref.ref(await manager.attach(spec, None))
        await manager.detach("a", force=False, timeout=None)
        world.made.clear()
        while volume() is not None:  # noqa: ASYNC110 -- the collector tells nobody
            await asyncio.sleep(0.01)

    gc.disable()  # it would come to it some time, or much later
    try:
        with_manager(tmp_path, MemoryStore(), work)
    finally:
        gc.enable()


def test_an_attach_right_after_a_detach_was_answered_or_in_its_last_moment_is_a_new_one(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        for pauses in range(30):
            await manager.attach(spec, None)
            detach = asyncio.create_task(manager.detach("a", force=False, timeout=None))
            await reaches(world, Step.REMOVE)
            for _ in range(pauses):
                await asyncio.sleep(0)
            assert (await manager.attach(spec, None)).state is State.ONLINE
            await detach
            await manager.detach("a", force=False, timeout=None)
            assert (manager.volumes(), manager.actors()) == ([], [])

    with_manager(tmp_path, MemoryStore(), work)


def test_an_attach_that_meets_a_detach_does_not_get_a_failure_of_the_past(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        await manager.attach(spec, None)
        world.failing[Step.STOP] = StoragedError(ErrorCode.QSD_SILENT, "it does not die")
        assert (await refused(manager.detach("a", force=False, timeout=None))).code is ErrorCode.QSD_SILENT
        world.failing.clear()
        gate = world.gates[Step.REMOVE] = asyncio.Event()
        detach = asyncio.create_task(manager.detach("a", force=False, timeout=None))
        await reaches(world, Step.REMOVE)
        attach = asyncio.create_task(manager.attach(spec, None))
        await settled()
        gate.set()
        assert await detach == []
        assert (await attach).state is State.ONLINE

    with_manager(tmp_path, MemoryStore(), work)


def test_who_waits_with_other_wishes_does_not_get_the_failure_of_those_that_came_first(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        gate = world.gates[Step.OPEN] = asyncio.Event()
        world.failing[Step.OPEN] = StoragedError(ErrorCode.WRONG_FORMAT, "that source is no good")
        first = asyncio.create_task(refused(manager.attach(spec, None)))
        await reaches(world, Step.OPEN)
        other = asyncio.create_task(manager.attach(other_wishes(spec), None))
        same = asyncio.create_task(refused(manager.attach(spec, None)))
        await settled()
        gate.set()
        assert (await first).code is ErrorCode.WRONG_FORMAT
        await asyncio.wait({other, same})
        assert (await same).code is ErrorCode.WRONG_FORMAT
        assert (await other).state is State.ONLINE

    with_manager(tmp_path, MemoryStore(), work)


def test_an_attach_meets_a_detach_that_failed_and_is_told_so(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        await manager.attach(spec, None)
        world.failing[Step.STOP] = StoragedError(ErrorCode.QSD_SILENT, "it does not die")
        await refused(manager.detach("a", force=False, timeout=None))
        error = await refused(manager.attach(spec, None))
        assert (error.code, bool(error.hint)) == (ErrorCode.VOLUME_BUSY, True)
        world.failing.clear()

    with_manager(tmp_path, MemoryStore(), work)


def test_an_attach_after_a_refused_detach_finds_the_volume_as_it_was(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    store = MemoryStore()

    async def work(manager: Manager) -> None:
        volume = await manager.attach(spec, None)
        world.failing[Step.DISCONNECT] = StoragedError(ErrorCode.DEVICE_IN_USE, "it is mounted")
        gate = world.gates[Step.DISCONNECT] = asyncio.Event()
        detach = asyncio.create_task(refused(manager.detach("a", force=False, timeout=None)))
        await reaches(world, Step.DISCONNECT)
        attach = asyncio.create_task(manager.attach(spec, None))
        await settled()
        gate.set()
        assert (await detach).code is ErrorCode.DEVICE_IN_USE
        assert await attach is volume
        assert store.load().volumes == {"a": Desired(spec=spec)}

    with_manager(tmp_path, store, work)


# The same wish, and others


def test_other_wishes_are_refused_with_what_differs_and_change_nothing(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    store = MemoryStore()

    async def work(manager: Manager) -> None:
        volume = await manager.attach(spec, None)
        steps = list(world.made[0].steps)
        for change in (
            {"read_only": True}, {"persist": True}, {"options": {"cache": "none"}}, {"source": "/nosuch"},
            {"snapshot": True}, {"format": Format.QCOW2},
        ):
            error = await refused(manager.attach(msgspec.structs.replace(spec, **change), None))
            assert (error.code, bool(error.hint)) == (ErrorCode.VOLUME_EXISTS, True)
            assert next(iter(change)) in error.cause
        assert (volume.state, volume.failure, volume.spec) == (State.ONLINE, None, spec)
        assert world.made[0].steps == steps
        assert store.load().volumes == {"a": Desired(spec=spec)}

    with_manager(tmp_path, store, work)


def test_what_the_file_of_a_volume_says_against_its_profile_is_kept_when_it_is_attached_again(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    layout = Layout.below(str(tmp_path / "root"))
    for directory in (layout.profiles, layout.volume_files):
        os.makedirs(directory)
    Path(layout.profiles, "fast.toml").write_text("[options]\ncache = 'unsafe'\n")
    Path(layout.volume_files, "a.toml").write_text(
        f"source = '{spec.source}'\nprofile = 'fast'\noptions = {{ cache = 'writeback' }}\n"
    )

    async def work(manager: Manager) -> None:
        await manager.reload()
        (volume,) = manager.volumes()
        first = volume.spec
        await manager.detach("a", force=False, timeout=None)
        again = await manager.persist("a", on=True)
        assert again.spec == first
        assert again.spec.options.get("cache", DEFAULTS["cache"]) == "writeback"

    with_manager(tmp_path, MemoryStore(), work)


def test_other_wishes_for_a_volume_in_trouble_do_not_cover_what_its_trouble_is(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        volume = await manager.attach(spec, None)
        world.failing[Step.START] = StoragedError(ErrorCode.SOURCE_MISSING, "the source is gone")
        world.made[0].dies()
        assert (await refused(manager.attach(spec, None))).code is ErrorCode.SOURCE_MISSING
        before = (volume.state, volume.failure)
        assert (await refused(manager.attach(other_wishes(spec), None))).code is ErrorCode.VOLUME_EXISTS
        assert (volume.state, volume.failure) == before

    with_manager(tmp_path, MemoryStore(), work)


def test_the_same_wish_in_other_words_is_the_same(tmp_path: Path, spec: VolumeSpec, world: type[World]) -> None:
    (tmp_path / "link").symlink_to(spec.source)

    async def work(manager: Manager) -> None:
        volume = await manager.attach(spec, None)
        for change in (
            {"source": f"file:{spec.source}"}, {"source": str(tmp_path / "link")}, {"options": dict(DEFAULTS)},
            {"transport": "fuse"}, {"transport": "fuse", "source": str(tmp_path / "link")},
        ):
            assert await manager.attach(msgspec.structs.replace(spec, **change), None) is volume
        assert volume.spec == spec

    with_manager(tmp_path, MemoryStore(), work)


# By force


def test_a_detach_by_force_comes_before_all_that_is_under_way_or_waits(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    async def work(manager: Manager) -> None:
        await manager.attach(spec, None)
        world.gates[Step.DISCONNECT] = asyncio.Event()
        waiting = [asyncio.create_task(refused(manager.detach("a", force=False, timeout=None)))]
        await reaches(world, Step.DISCONNECT)
        waiting += [
            asyncio.create_task(refused(call))
            for call in (
                manager.attach(spec, None), manager.resize("a", 1 << 21, None),
                manager.detach("a", force=False, timeout=None), manager.attach(other_wishes(spec), None),
            )
        ]
        await settled()
        assert await manager.detach("a", force=True, timeout=None) == []
        for task in waiting:
            error = await task
            assert (error.code, bool(error.hint)) == (ErrorCode.VOLUME_BUSY, True)
        await is_free(manager)

    with_manager(tmp_path, MemoryStore(), work)


def test_a_detach_by_force_ends_a_first_attach_and_leaves_nothing(
    tmp_path: Path, spec: VolumeSpec, world: type[World]
) -> None:
    store = MemoryStore()

    async def work(manager: Manager) -> None:
        world.gates[Step.OPEN] = asyncio.Event()
        attaches = [asyncio.create_task(refused(manager.attach(spec, None))) for _ in range(2)]
        await reaches(world, Step.OPEN)
        assert await manager.detach("a", force=True, timeout=None) == []
        assert [(await attach).code for attach in attaches] == [ErrorCode.VOLUME_BUSY] * 2
        await is_free(manager)
        assert store.load().volumes == {}
        world.gates.clear()
        assert (await manager.attach(spec, None)).state is State.ONLINE

    with_manager(tmp_path, store, work)


# What a first attach ends with ---------------------------------------------------------------------------------------


def test_a_qsd_that_dies_before_there_is_a_disk_is_not_started_again_and_again(
    tmp_path: Path, spec: VolumeSpec, world: type[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    perform = world.perform

    async def dies_with_its_export(self: World, step: Step, *, timeout: float, force: bool) -> None:
        await perform(self, step, timeout=timeout, force=force)
        if step is Step.EXPORT:
            self.dies()

    monkeypatch.setattr(world, "perform", dies_with_its_export)

    async def work(manager: Manager) -> None:
        error = await refused(manager.attach(spec, None))
        assert (error.code, error.message) == (ErrorCode.QSD_DIED, "it died")
        assert world.made[0].steps.count(Step.START) == 1
        await is_free(manager)

    with_manager(tmp_path, MemoryStore(), work)


def test_what_an_attach_failed_of_is_told_although_taking_it_back_outlasts_its_time(
    tmp_path: Path, spec: VolumeSpec, world: type[World], monkeypatch: pytest.MonkeyPatch
) -> None:
    world.failing[Step.CONNECT] = StoragedError(ErrorCode.DEVICE_FAILED, "no disk")
    perform = world.perform

    async def slowly_by_force(self: World, step: Step, *, timeout: float, force: bool) -> None:
        await asyncio.sleep(0.3 if force else 0)
        await perform(self, step, timeout=timeout, force=force)

    monkeypatch.setattr(world, "perform", slowly_by_force)

    async def work(manager: Manager) -> None:
        error = await refused(manager.attach(spec, 0.2))
        assert (error.code, error.message) == (ErrorCode.DEVICE_FAILED, "no disk")
        await is_free(manager)

    with_manager(tmp_path, MemoryStore(), work)


@pytest.mark.parametrize("wanted", ["failing", "released"])
def test_what_was_rescued_before_a_reboot_is_attached_after_it_and_from_then_on(
    tmp_path: Path, spec: VolumeSpec, world: type[World], wanted: Any
) -> None:
    store = MemoryStore()
    store.put(Desired(spec=spec, wanted=wanted, boot="another boot"))

    async def work(manager: Manager) -> None:
        os.makedirs(manager.environment.layout.run_dir)
        await manager.start()
        assert store.load().volumes == {"a": Desired(spec=spec)}, "not at each later start either"

    with_manager(tmp_path, store, work)
