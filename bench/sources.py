"""Two equal disks behind each kind of real server, for storaged and for fio's own engines: tests/backends' servers.

All that they keep is below /dev/shm: what is below a server is not measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.backends.ceph_cluster import POOL, CephCluster
from tests.backends.iscsi_server import IscsiServer
from tests.backends.nfs_server import NfsServer
from tests.backends.servers import NbdServer, network
from tests.harness import mounted, run


@dataclass(frozen=True)
class Disk:
    """One disk of a server."""

    source: str
    """As storaged is told."""
    engine: tuple[str, ...]
    """The words that bring fio to it without a device."""


def rbd(place: Path, mib: int) -> Iterator[list[Disk]]:
    """A monitor and an OSD with bluestore; librbd's cache is on for both sides, as it is by default."""
    cluster = CephCluster(place)
    # fio has no word for it.
    os.environ["CEPH_CONF"] = str(cluster.conf)
    try:
        cluster.start()
        names = [cluster.image(f"bench{n}", size=f"{mib}M") for n in (1, 2)]
        yield [
            Disk(f"rbd:{POOL}/{name}:conf={cluster.conf}",
                 ("--ioengine=rbd", "--clientname=admin", f"--pool={POOL}", f"--rbdname={name}"))
            for name in names
        ]
    finally:
        cluster.stop()
        del os.environ["CEPH_CONF"]


def iscsi(place: Path, mib: int) -> Iterator[list[Disk]]:
    """tgtd over TCP on the loopback interface."""
    server = IscsiServer(place, {n: _image(place, n, mib) for n in (1, 2)})
    try:
        server.start()
        # fio takes a : for the end of a file's name.
        yield [
            Disk(server.source(n), ("--ioengine=libiscsi", "--filename=" + server.source(n).replace(":", r"\:")))
            for n in (1, 2)
        ]
    finally:
        server.kill()


def nbd(
    place: Path, mib: int, filters: tuple[str, ...] = (), words: tuple[str, ...] = ()
) -> Iterator[list[Disk]]:
    """nbdkit over TCP on the loopback interface, one for each disk. (QEMU 7.2's qemu-nbd has no TCP_NODELAY.)"""
    servers = [NbdServer(_image(place, n, mib), at=("127.0.0.1", _free_port())) for n in (1, 2)]
    try:
        found = []
        for server in servers:
            assert server.at is not None
            host, port = server.at
            server.run("nbdkit", "-f", "-i", host, "-p", str(port), *filters, "file", str(server.image), *words)
            uri = f"nbd://{host}:{port}/"
            found.append(Disk(uri, ("--ioengine=nbd", f"--uri={uri}")))
        yield found
    finally:
        for server in servers:
            server.kill()


def far_nbd(place: Path, mib: int) -> Iterator[list[Disk]]:
    """The same, but each request takes 2 ms more: what counts is how many are under way, and not the processors."""
    yield from nbd(place, mib, ("--threads=64", "--filter=delay"), ("rdelay=2ms", "wdelay=2ms"))


def nfs(place: Path, mib: int) -> Iterator[list[Disk]]:
    """nfs-ganesha behind a pair of virtual network cards: its port mapper's port is fixed."""
    name = f"sb{os.getpid()}"
    # Debian 13's exports no tmpfs.
    filesystem = _image(place, 0, 2 * mib + 256)
    run("mkfs.ext4", "-q", "-m0", filesystem)
    with mounted(str(filesystem), place / "exported") as exported:
        yield from _exported(name, exported, place, mib)


def _exported(name: str, exported: Path, place: Path, mib: int) -> Iterator[list[Disk]]:
    images = [_image(exported, n, mib) for n in (1, 2)]
    # Not the addresses of the tests, which may run at the same time.
    with network(name, "198.18.5") as (address, _):
        server = NfsServer(place, exported, netns=name)
        try:
            server.start()
            yield [
                Disk(f"nfs://{address}{path}",
                     ("--ioengine=nfs", f"--nfs_url=nfs://{address}{path.parent}", f"--filename=/{path.name}"))
                for path in images
            ]
        finally:
            server.end()


KINDS = {"rbd": rbd, "iscsi": iscsi, "nbd": nbd, "far-nbd": far_nbd, "nfs": nfs}


@contextlib.contextmanager
def disks(kind: str, mib: int) -> Iterator[list[Disk]]:
    """Start the servers of that kind for two disks of that size, and end them."""
    place = Path(tempfile.mkdtemp(prefix=f"bench-{kind}-", dir="/dev/shm"))
    try:
        with contextlib.contextmanager(KINDS[kind])(place, mib) as found:
            yield found
    finally:
        shutil.rmtree(place)


def _image(place: Path, number: int, mib: int) -> Path:
    path = place / f"disk{number}.raw"
    with open(path, "wb") as file:
        file.truncate(mib << 20)
    return path


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
