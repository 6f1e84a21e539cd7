"""What every backend promises, and whether the qemu-storage-daemon of this host agrees."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import Backend, NetworkBackend
from storaged.backends.cache import CACHE_FLAGS
from storaged.backends.local import LocalBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.process import kill, reap
from storaged.host.unixsock import bind_unix
from storaged.model.blockdev import DISK, Image, image_tree
from storaged.model.formats import Format
from storaged.model.spec import COMMON_OPTIONS
from storaged.qsd.process import find_binary, qmp_socket, spawn
from storaged.qsd.session import Session

MIB = 1 << 20
needs_qsd = pytest.mark.skipif(
    shutil.which("qemu-storage-daemon") is None, reason="qemu-storage-daemon is not installed"
)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="losetup needs root")


#: A source of each backend, and the location that it names.
EXAMPLES = {
    "file": ("file:/dev/some where:1,x=y", "/dev/some where:1,x=y"),
    "gluster": ("gluster+tcp://Server//v1/some where:1,x=y", "gluster://server:24007/v1/some%20where%3A1%2Cx%3Dy"),
    "host_device": ("host_device:/dev/some where:1,x=y", "/dev/some where:1,x=y"),
    "iscsi": ("iscsi://Host/iqn.2026-01.test:T1/01", "iscsi://host:3260/iqn.2026-01.test:T1/1"),
    "rbd": (r"rbd:some where/a\:1,x=y:id=admin", r"rbd:some where/a\:1,x\=y"),
    "nfs": ("nfs://Host//dir/some where:1,x=y", "nfs://host/dir/some%20where%3A1%2Cx%3Dy"),
    "http": ("http://User@Host:80/%7Ea%2fb:1,x=y", "http://User@host/%7Ea%2fb:1,x=y"),
    "https": ("https://Host:443", "https://host/"),
    "ftp": ("ftp://Host:2121/%7Ea%2fb", "ftp://host:2121/%7Ea%2fb"),
    "ftps": ("ftps://Host//some%20where", "ftps://host//some%20where"),
    "tftp": ("tftp://Host:69//some where", "tftp://host//some%20where"),
    "ssh": ("ssh://Host//dir/some where:1,x=y", "ssh://root@host:22/dir/some%20where%3A1%2Cx%3Dy"),
    "vitastor": (
        r"vitastor:etcd_host=http\://192.0.2.1\:2379:image=some where\:1,x=y",
        r"vitastor:image=some where\:1,x=y:etcd_host=192.0.2.1\:2379/v3",
    ),
    "nbd": ("nbd:Server:1:exportname=some where:1,x=y", "nbd://server:1/some%20where%3A1%2Cx%3Dy"),
}
LOCAL = [backend for backend in BACKENDS.values() if isinstance(backend, LocalBackend)]
REMOTE = [backend for backend in BACKENDS.values() if isinstance(backend, NetworkBackend)]


def test_each_is_of_this_host_or_behind_a_server() -> None:
    assert len(LOCAL) + len(REMOTE) == len(BACKENDS) == len(EXAMPLES)


@pytest.fixture(params=list(BACKENDS.values()), ids=list(BACKENDS))
def backend(request: pytest.FixtureRequest) -> Backend:
    found: Backend = request.param
    return found


def test_it_is_found_by_its_schemes_and_takes_what_it_parses(backend: Backend) -> None:
    source, location = EXAMPLES[backend.name]
    assert find_backend(source) is backend
    assert backend.parse(source, {}) == location
    assert BACKENDS[backend.name] is backend
    assert all(find_backend(f"{scheme}:x") is backend for scheme in backend.schemes)


def test_its_example_says_one_of_its_schemes(backend: Backend) -> None:
    assert backend.example.partition(":")[0] in backend.schemes


@pytest.mark.parametrize("backend", REMOTE, ids=lambda backend: backend.name)
def test_the_location_of_what_is_behind_a_server_is_a_source_and_an_identity(backend: NetworkBackend) -> None:
    source, location = EXAMPLES[backend.name]
    assert find_backend(location) is backend
    assert backend.parse(location, {}) == location
    assert backend.identity(location, str) == backend.identity(backend.parse(source, {}), str)


@pytest.mark.parametrize("backend", LOCAL, ids=lambda backend: backend.name)
@pytest.mark.parametrize("location", ["", "a", "./a", "../a", " /a", "~/a", "fd:/a"])
def test_a_relative_path_is_refused(backend: LocalBackend, location: str) -> None:
    with pytest.raises(StoragedError) as caught:
        backend.parse(f"{backend.name}:{location}", {})
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    assert caught.value.hint


def test_its_options_are_explained_and_are_not_those_of_every_volume(backend: Backend) -> None:
    assert all(backend.options.values())
    assert not backend.options.keys() & COMMON_OPTIONS.keys()


def test_no_options_are_good_options(backend: Backend) -> None:
    backend.check_options({})


@pytest.mark.parametrize("read_only", [True, False])
def test_a_node_is_of_its_driver_and_reads_or_writes_as_said(backend: Backend, read_only: bool) -> None:
    node = backend.node(EXAMPLES[backend.name][1], read_only=read_only, options={})
    # QEMU has no driver for tftp: it is fetched, and the copy is a file.
    assert node["driver"] == {"tftp": "file"}.get(backend.name, backend.name)
    assert node["read-only"] is read_only
    assert "node-name" not in node


# With a real QSD


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "with space,comma=1 ä.img"
    path.write_bytes(b"")
    os.truncate(path, MIB)
    return path


@pytest.fixture
def loop(image: Path) -> Iterator[str]:
    command = ["losetup", "--find", "--show", str(image)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=30)
    device = done.stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True, timeout=30)


def with_qsd(directory: Path, talk: Callable[[Session], Awaitable[None]]) -> None:
    """Run ``talk`` with a QSD of its own, which is gone afterwards."""
    directory = directory / "qsd"
    (directory / "tmp").mkdir(parents=True)

    async def run() -> None:
        session = await Session.connect(qmp_socket(str(directory)), timeout=10)
        try:
            await talk(session)
        finally:
            await session.close()

    with bind_unix(qmp_socket(str(directory)), mode=0o600) as listener:
        _, pidfd = spawn(find_binary("qemu-storage-daemon"), str(directory), listener, [])
    try:
        asyncio.run(run())
    finally:
        kill(pidfd)
        os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
        reap(pidfd)
        os.close(pidfd)


def accepts(directory: Path, node: dict[str, Any]) -> None:
    """QSD opens the node, and takes each of its options as it was meant."""

    async def talk(session: Session) -> None:
        await session.execute("blockdev-add", {**node, "node-name": "x"})
        assert await session.node_names() == {"x": MIB}
        (seen,) = await session.execute("query-named-block-nodes", {"flat": True})
        assert seen["ro"] is node["read-only"]
        assert seen["drv"] == node["driver"]
        assert seen["cache"]["no-flush"] is node["cache"]["no-flush"]
        assert seen["cache"]["direct"] is node["cache"]["direct"]

    with_qsd(directory, talk)


@needs_qsd
@pytest.mark.parametrize("cache", sorted(CACHE_FLAGS))
@pytest.mark.parametrize("read_only", [True, False])
def test_qsd_opens_a_file(tmp_path: Path, image: Path, cache: str, read_only: bool) -> None:
    node = BACKENDS["file"].node(str(image), read_only=read_only, options={"cache": cache})
    accepts(tmp_path, node)


@needs_qsd
@needs_root
@pytest.mark.parametrize("read_only", [True, False])
def test_qsd_opens_a_block_device(tmp_path: Path, loop: str, read_only: bool) -> None:
    accepts(tmp_path, BACKENDS["host_device"].node(loop, read_only=read_only, options={}))


@needs_qsd
@pytest.mark.parametrize(
    "options",
    [{"aio": "threads"}, {"aio": "native", "cache": "none"}, {"aio": "native", "cache": "directsync"}],
    ids=str,
)
def test_qsd_takes_every_aio_mode_that_is_not_refused(tmp_path: Path, image: Path, options: dict[str, str]) -> None:
    BACKENDS["file"].check_options(options)
    accepts(tmp_path, BACKENDS["file"].node(str(image), read_only=False, options=options))


@needs_qsd
def test_what_qsd_refuses_is_explained(tmp_path: Path, image: Path) -> None:
    file = BACKENDS["file"]

    async def refused(session: Session, node: dict[str, Any]) -> ErrorCode:
        with pytest.raises(StoragedError) as caught:
            await session.execute("blockdev-add", node)
        return caught.value.code

    async def talk(session: Session) -> None:
        missing = file.node(str(tmp_path / "missing"), read_only=True, options={})
        assert await refused(session, {**missing, "node-name": "a"}) is ErrorCode.SOURCE_MISSING
        plain = file.node(str(image), read_only=True, options={})
        qcow2 = {"driver": "qcow2", "node-name": "b", "read-only": True, "file": plain}
        assert await refused(session, qcow2) is ErrorCode.WRONG_FORMAT
        assert await refused(session, {"driver": "nosuch", "node-name": "c"}) is ErrorCode.UNSUPPORTED

    with_qsd(tmp_path, talk)


@needs_qsd
def test_a_second_qsd_is_told_that_the_image_is_in_use(tmp_path: Path, image: Path) -> None:
    # A raw node is locked once it is exported, a qcow2 image as soon as it is opened for writing.
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"], check=True, timeout=30)
    file = BACKENDS["file"].node(str(image), read_only=False, options={})
    node = {"driver": "qcow2", "node-name": "x", "file": file}
    (tmp_path / "other").mkdir()

    async def second(session: Session) -> None:
        with pytest.raises(StoragedError) as caught:
            await session.execute("blockdev-add", node)
        assert caught.value.code is ErrorCode.SOURCE_IN_USE

    async def first(session: Session) -> None:
        await session.execute("blockdev-add", node)
        await asyncio.to_thread(with_qsd, tmp_path / "other", second)

    with_qsd(tmp_path, first)


@needs_qsd
@pytest.mark.parametrize("length", [1, 2, 4, 5, 16])
def test_qsd_opens_a_chain_and_follows_nothing_by_itself(tmp_path: Path, length: int) -> None:
    """The headers name a backing file that is not there: only what the tree says is opened."""
    images = []
    for number in range(length):
        path = tmp_path / f"{number}.qcow2"
        command = ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-F", "raw", "-b", "/nosuch", str(path), "1M"]
        subprocess.run(command, check=True, timeout=30)
        images.append(Image(Format.QCOW2, BACKENDS["file"].node(str(path), read_only=number > 0, options={})))
    tree = image_tree(images, read_only=False, node_name=DISK, cache={"direct": False, "no-flush": False})

    async def talk(session: Session) -> None:
        await session.execute("blockdev-add", tree)
        assert (await session.node_names())[DISK] == MIB

    with_qsd(tmp_path, talk)
