"""storaged as a storage provider, asked by a real Varlink client on a real socket: what it lists, gives and refuses."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import uvloop
from asyncvarlink import VarlinkClientProtocol, VarlinkErrorReply, VarlinkTransport

from storaged.api import storageserver as module
from storaged.api.access import Peer
from storaged.api.server import Server
from storaged.api.storageprovider import (
    CreateMode,
    CreateNotSupported,
    NoSuchTemplate,
    NoSuchVolume,
    ReadOnlyVolume,
    StorageProviderInterface,
    SystemFailure,
    TypeNotSupported,
    VolumeType,
)
from storaged.host import disk
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.model.states import State
from storaged.observe.counts import Counts
from storaged.supervisor.manager import Manager

SIZE = 64 << 20


@dataclass(eq=False)
class FakeVolume:
    """What the provider looks at of a volume."""

    spec: VolumeSpec
    device: str | None
    state: State = State.ONLINE
    attachment: SimpleNamespace = field(init=False)

    def __post_init__(self) -> None:
        record = Record(
            spec=self.spec, transport="fuse" if self.spec.transport == "auto" else self.spec.transport,
            transport_reason="", binary="", device=self.device, size=SIZE,
        )
        self.attachment = SimpleNamespace(record=record)

    @property
    def name(self) -> str:
        return self.spec.name


@dataclass
class FakeManager:
    """The volumes of a test."""

    found: list[FakeVolume] = field(default_factory=list)
    environment: SimpleNamespace = field(default_factory=lambda: SimpleNamespace(counts=Counts()))

    def volumes(self) -> list[FakeVolume]:
        return self.found


@dataclass
class Place:
    """A provider whose devices are files."""

    directory: Path
    manager: FakeManager = field(default_factory=FakeManager)

    def volume(self, name: str, state: State = State.ONLINE, **wishes: Any) -> FakeVolume:
        device = self.directory / f"{name}.device"
        device.write_bytes(b"the disk")
        spec = VolumeSpec(name=name, source="/x", **wishes)
        volume = FakeVolume(spec, str(device) if spec.transport != "vhost-user" else None, state)
        self.manager.found.append(volume)
        return volume

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Any]:
        """A client's methods, by the interface."""
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.directory / "socket"))
        sock.setblocking(False)
        protocol = VarlinkClientProtocol()
        VarlinkTransport(asyncio.get_running_loop(), sock, sock, protocol)
        await asyncio.sleep(0)
        try:
            yield protocol.make_proxy(StorageProviderInterface)
        finally:
            protocol.close()


def with_provider(place: Place, work: Callable[[Any], Awaitable[None]]) -> None:
    """Run ``work`` with a client's methods, and look that no descriptor of the daemon is left."""

    async def run() -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(place.directory / "socket"))
            listener.listen()
            manager = cast(Manager, place.manager)
            server = Server(manager, listener, None, service=module.StorageProvider(manager))
            server.start()
            try:
                async with asyncio.timeout(20), place.client() as methods:
                    await work(methods)
            finally:
                await server.close()
        gc.collect()
        async with asyncio.timeout(5):
            while devices_open():  # noqa: ASYNC110 -- a thread closes the last of them
                await asyncio.sleep(0.01)

    uvloop.run(run())


def devices_open() -> list[str]:
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [path for path in found if path.endswith(".device")]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    def opens(path: str, number: int, *, write: bool) -> int:
        return os.open(path, os.O_RDWR if write else os.O_RDONLY)

    monkeypatch.setattr(disk, "open_same", opens)
    return Place(tmp_path)


async def refused(call: Awaitable[Any], error: type[VarlinkErrorReply]) -> Any:
    with pytest.raises(error) as caught:
        await call
    return caught.value


async def listed(methods: Any, **how: Any) -> list[dict[str, Any]]:
    return [entry async for entry in methods.ListVolumes(**how)]


# Listing


def test_it_lists_what_gives_a_device_whatever_its_state(place: Place) -> None:
    place.volume("a")
    place.volume("b", State.STARTING, read_only=True).attachment.record = None
    place.volume("c", State.FAILED)
    place.volume("vm", transport="vhost-user")

    async def work(methods: Any) -> None:
        assert await listed(methods) == [
            {"name": "a", "type": VolumeType.blk, "readOnly": False, "sizeBytes": SIZE},
            {"name": "b", "type": VolumeType.blk, "readOnly": True},
            {"name": "c", "type": VolumeType.blk, "readOnly": False, "sizeBytes": SIZE},
        ]
        await refused(anext(methods.ListVolumes(matchName="vm")), NoSuchVolume)

    with_provider(place, work)


@pytest.mark.parametrize(
    ("glob", "names"), [("web*", ["web1", "web2"]), ("web?", ["web1", "web2"]), ("db", ["db"]), ("*", None)]
)
def test_a_glob_chooses_among_them(place: Place, glob: str, names: list[str] | None) -> None:
    everything = ["db", "web1", "web2"]
    for name in everything:
        place.volume(name)

    async def work(methods: Any) -> None:
        assert [entry["name"] for entry in await listed(methods, matchName=glob)] == (names or everything)

    with_provider(place, work)


def test_where_there_is_nothing_to_list_it_says_so_as_systemds_own_providers_do(place: Place) -> None:
    async def work(methods: Any) -> None:
        await refused(anext(methods.ListVolumes()), NoSuchVolume)
        await refused(anext(methods.ListTemplates()), NoSuchTemplate)

    with_provider(place, work)


# Acquiring


@pytest.mark.parametrize(
    ("volume", "asked", "read_only"),
    [(False, None, False), (False, False, False), (False, True, True), (True, None, True), (True, True, True)],
)
def test_the_descriptor_reads_and_writes_as_asked_and_as_the_volume_allows(
    place: Place, volume: bool, asked: bool | None, read_only: bool
) -> None:
    device = place.volume("a", read_only=volume).device
    assert device is not None

    async def work(methods: Any) -> None:
        with await methods.Acquire(name="a", readOnly=asked) as reply:
            assert reply["type"] is VolumeType.blk
            assert reply["readOnly"] is read_only
            fd = reply["fileDescriptorIndex"].fileno()
            assert os.path.samestat(os.fstat(fd), os.stat(device))
            assert os.pread(fd, 100, 0) == b"the disk"
            if read_only:
                with pytest.raises(OSError, match="Bad file descriptor"):
                    os.write(fd, b"x")
            else:
                os.pwrite(fd, b"THE", 0)

    with_provider(place, work)
    assert Path(device).read_bytes() == (b"the disk" if read_only else b"THE disk")


def test_a_volume_that_can_only_be_read_is_not_given_for_writing(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.volume("a", read_only=True)
    place.volume("b")
    monkeypatch.setattr(disk, "is_read_only", lambda path: path.endswith("b.device"))

    async def work(methods: Any) -> None:
        for name in "ab":
            await refused(methods.Acquire(name=name, readOnly=False), ReadOnlyVolume)
        with await methods.Acquire(name="b") as reply:
            assert reply["readOnly"]

    with_provider(place, work)


def test_a_kernel_that_refuses_to_write_counts_as_a_volume_that_can_only_be_read(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.volume("a")
    opens = disk.open_same

    def refuses(path: str, number: int, *, write: bool) -> int:
        if write:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        return opens(path, number, write=write)

    monkeypatch.setattr(disk, "open_same", refuses)

    async def work(methods: Any) -> None:
        await refused(methods.Acquire(name="a", readOnly=False), ReadOnlyVolume)
        with await methods.Acquire(name="a") as reply:
            assert reply["readOnly"]

    with_provider(place, work)


@pytest.mark.parametrize("state", set(State) - {State.ONLINE})
def test_a_volume_that_is_not_online_is_refused_for_now(place: Place, state: State) -> None:
    place.volume("a", state)

    async def work(methods: Any) -> None:
        error = await refused(methods.Acquire(name="a"), SystemFailure)
        assert error.parameters == {"origin": "linux", "errno": errno.EAGAIN, "errnoName": "EAGAIN"}

    with_provider(place, work)


def test_nothing_is_created_and_there_are_no_files_and_directories(place: Place) -> None:
    place.volume("a")
    place.volume("vm", transport="vhost-user")

    async def work(methods: Any) -> None:
        for name in ("a", "nosuch"):
            await refused(methods.Acquire(name=name, createMode=CreateMode.new), CreateNotSupported)
            await refused(methods.Acquire(name=name, template="sparse-file"), NoSuchTemplate)
        for mode in (CreateMode.any, CreateMode.open, None):
            await refused(methods.Acquire(name="nosuch", createMode=mode, createSizeBytes=1 << 20), NoSuchVolume)
        await refused(methods.Acquire(name="vm"), NoSuchVolume)
        for kind in (VolumeType.reg, VolumeType.dir):
            await refused(methods.Acquire(name="a", requestAs=kind), TypeNotSupported)

    with_provider(place, work)


def test_mount_storage_which_asks_for_a_file_first_learns_what_is_really_wrong(place: Place) -> None:
    """Of the two refusals it shows only the first, and asks again for a block device only after TypeNotSupported."""
    place.volume("a", read_only=True)
    place.volume("b", State.RECOVERING)

    async def work(methods: Any) -> None:
        await refused(methods.Acquire(name="nosuch", requestAs=VolumeType.reg), NoSuchVolume)
        await refused(methods.Acquire(name="a", requestAs=VolumeType.reg, readOnly=False), ReadOnlyVolume)
        await refused(methods.Acquire(name="b", requestAs=VolumeType.reg), SystemFailure)
        with await methods.Acquire(name="a", requestAs=VolumeType.blk):
            pass

    with_provider(place, work)


def test_a_device_that_is_gone_or_another_one_is_an_errno(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.volume("a")

    def gone(path: str, number: int, *, write: bool) -> int:
        raise OSError(errno.ENXIO, os.strerror(errno.ENXIO))

    monkeypatch.setattr(disk, "open_same", gone)

    async def work(methods: Any) -> None:
        assert (await refused(methods.Acquire(name="a"), SystemFailure)).parameters["errnoName"] == "ENXIO"

    with_provider(place, work)


def test_an_open_that_hangs_holds_up_nobody_and_its_late_descriptor_is_closed(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    place.volume("a")
    place.volume("b")
    goes_on, opens = threading.Event(), disk.open_same

    def hangs(path: str, number: int, *, write: bool) -> int:
        if path.endswith("a.device"):
            assert goes_on.wait(20)
        return opens(path, number, write=write)

    monkeypatch.setattr(disk, "open_same", hangs)
    monkeypatch.setattr(module, "_OPEN_PATIENCE", 0.3)

    async def work(methods: Any) -> None:
        hanging = asyncio.ensure_future(methods.Acquire(name="a"))
        await asyncio.sleep(0)
        async with place.client() as others:
            with await others.Acquire(name="b"):
                assert not hanging.done()
        assert (await refused(hanging, SystemFailure)).parameters["errnoName"] == "ETIMEDOUT"
        goes_on.set()

    with_provider(place, work)


def test_who_goes_away_before_the_answer_leaves_no_descriptor(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.volume("a")
    asked, goes_on, opens = threading.Event(), threading.Event(), disk.open_same

    def waits(path: str, number: int, *, write: bool) -> int:
        asked.set()
        assert goes_on.wait(20)
        return opens(path, number, write=write)

    monkeypatch.setattr(disk, "open_same", waits)

    async def work(methods: Any) -> None:
        async with place.client() as others:
            waiting = asyncio.ensure_future(others.Acquire(name="a"))
            assert await asyncio.to_thread(asked.wait, 10)
        await asyncio.wait({waiting})
        assert isinstance(waiting.exception(), ConnectionError)
        goes_on.set()

    with_provider(place, work)


def test_who_is_not_root_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    place.volume("a")
    monkeypatch.setattr(os, "geteuid", lambda: 4711)
    monkeypatch.setattr(Peer, "of", lambda _: Peer(1000, frozenset({os.getgid()})))

    async def work(methods: Any) -> None:
        for call in (methods.Acquire(name="a"), anext(methods.ListVolumes()), anext(methods.ListTemplates())):
            assert (await refused(call, VarlinkErrorReply)).name == "org.varlink.service.PermissionDenied"

    with_provider(place, work)


# The interface

#: Of systemd's, what storaged answers with; names and types as there.
INTERFACE = (
    "type VolumeType (blk, reg, dir)",
    "type CreateMode (any, new, open)",
    "method Acquire(name: string, createMode: ?CreateMode, template: ?string, readOnly: ?bool, "
    "requestAs: ?VolumeType, createSizeBytes: ?int, allowInteractiveAuthentication: ?bool) -> "
    "(fileDescriptorIndex: int, type: VolumeType, readOnly: bool)",
    "method ListVolumes(matchName: ?string) -> "
    "(name: string, type: VolumeType, readOnly: ?bool, sizeBytes: ?int)",
    "method ListTemplates(matchName: ?string) -> (name: string, type: VolumeType)",
    "error NoSuchVolume ()", "error NoSuchTemplate ()", "error TypeNotSupported ()", "error CreateNotSupported ()",
    "error ReadOnlyVolume ()",
)


def test_the_interface_is_systemds() -> None:
    described = StorageProviderInterface.render_interface_description(comments=False).splitlines()
    assert described[0] == "interface io.systemd.StorageProvider"
    assert sorted(line for line in described[1:] if line) == sorted(INTERFACE)


# The device


def test_what_is_no_disk_or_no_longer_the_same_is_not_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("file")
    for name, number in (("file", errno.ENXIO), ("link", errno.ELOOP), ("missing", errno.ENOENT)):
        with pytest.raises(OSError, match=os.strerror(number)):
            disk.open_same(str(tmp_path / name), 0, write=False)
