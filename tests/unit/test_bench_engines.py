"""The direct way: fio's words reach the disk that the backend's node reaches, or there is none and it is said why."""

from __future__ import annotations

from typing import Any

import pytest

from storaged.backends import BACKENDS, find_backend
from storaged.bench.engines import VITASTOR, Direct, NoDirect, direct, name_of

ENGINES = frozenset({"io_uring", "libaio", "nbd", "rbd", "libiscsi", "nfs", "gfapi_async", VITASTOR})


def words(
    source: str, options: dict[str, str] | None = None, engines: frozenset[str] = ENGINES, format: str = "raw"
) -> Direct:
    """The direct way to a source."""
    said, backend = options or {}, find_backend(source)
    node = backend.node(backend.parse(source, said), read_only=True, options=said)
    return direct(format, node, engines)


@pytest.mark.parametrize(("source", "options", "expected"), [
    ("/srv/a:b.raw", {"cache": "none"}, ["--ioengine=io_uring", "--direct=1", "--filename=/srv/a\\:b.raw"]),
    ("/srv/a.raw", {}, ["--ioengine=io_uring", "--direct=0", "--filename=/srv/a.raw"]),
    ("host_device:/dev/sdx", {"cache": "directsync"}, ["--ioengine=io_uring", "--direct=1", "--filename=/dev/sdx"]),
    ("nbd://h:10810/a%20b", {}, ["--ioengine=nbd", "--uri=nbd://h:10810/a%20b"]),
    ("nbd://[::1]/x", {}, ["--ioengine=nbd", "--uri=nbd://[::1]:10809/x"]),
    ("nbd+unix:///x?socket=/run/a", {}, ["--ioengine=nbd", "--uri=nbd+unix:///x?socket=/run/a"]),
    ("rbd:p/i:id=me", {}, ["--ioengine=rbd", "--clientname=me", "--pool=p", "--rbdname=i"]),
    (
        "iscsi://h/iqn.2000-01.a:b/1", {},
        ["--ioengine=libiscsi", "--initiator=iqn.2008-11.org.linux-kvm",
         "--filename=iscsi\\://h\\:3260/iqn.2000-01.a\\:b/1"],
    ),
    ("nfs://h/srv/x/d.raw", {}, ["--ioengine=nfs", "--nfs_url=nfs://h/srv/x?uid=0&gid=0", "--filename=/d.raw"]),
    (
        "nfs://h/d.raw?uid=7&gid=8", {},
        ["--ioengine=nfs", "--nfs_url=nfs://h/?uid=7&gid=8", "--filename=/d.raw"],
    ),
    (
        "gluster://h/vol/a/b.raw", {},
        ["--ioengine=gfapi_async", "--volume=vol", "--brick=h", "--filename=a/b.raw"],
    ),
    (
        "vitastor:image=t:etcd_host=10.0.0.1\\:2379/v3", {},
        [f"--ioengine={VITASTOR}", "--direct=1", "--image=t", "--etcd=10.0.0.1:2379/v3"],
    ),
])
def test_fio_is_told_where_the_disk_is(source: str, options: dict[str, str], expected: list[str]) -> None:
    assert list(words(source, options).words) == expected


def test_cephs_configuration_goes_by_the_environment() -> None:
    assert words("rbd:p/i:conf=/etc/ceph/b.conf").environment == {"CEPH_CONF": "/etc/ceph/b.conf"}


def test_a_host_without_io_uring_has_libaio() -> None:
    assert words("/srv/a.raw", {"cache": "none"}, frozenset({"libaio"})).engine == "libaio"


@pytest.mark.parametrize(("source", "options", "says"), [
    ("http://h/a.raw", {}, "no engine for http"),
    ("ssh://me@h/a.raw", {}, "no engine for ssh"),
    ("nbds://h/x", {"tls-certificates": "/etc/tls"}, "tls-creds"),
    ("rbd:p/n/i", {}, "namespace"),
    ("rbd:p/i@s", {}, "snapshot"),
    ("rbd:p/i", {"cephx-key-file": "/k"}, "key-secret"),
    ("rbd:p/i", {"rbd-encrypt": "luks", "rbd-key-file": "/k"}, "encrypt"),
    ("rbd:p/i", {"mon-host": "h"}, "server"),
    ("iscsi://me@h/iqn.2000-01.a:b/1", {"password-file": "/k"}, "user"),
    ("gluster+unix:///vol/a?socket=/run/g", {}, "glusterd"),
])
def test_what_fio_cannot_be_told_means_no_direct_way(source: str, options: dict[str, str], says: str) -> None:
    with pytest.raises(NoDirect, match=says):
        words(source, options)


@pytest.mark.parametrize("format", ["qcow2", "luks", "vmdk"])
def test_fio_reads_no_image_format(format: str) -> None:
    with pytest.raises(NoDirect, match=f"fio reads no {format}"):
        words("/srv/a.img", format=format)


@pytest.mark.parametrize(("source", "engine"), [
    ("nbd://h/x", "nbd"), ("iscsi://h/iqn.2000-01.a:b/1", "libiscsi"), ("nfs://h/a/b", "nfs"), ("/srv/a", "io_uring"),
    ("vitastor:image=t", "libfio_vitastor"),
])
def test_an_engine_that_fio_was_built_without_means_no_direct_way(source: str, engine: str) -> None:
    with pytest.raises(NoDirect, match=engine):
        words(source, {}, frozenset({"sync"}))


#: A source of each backend with all its options that say where the data is or who asks.
SOURCES = {
    "file": "/srv/a", "host_device": "host_device:/dev/sdx", "nbd": "nbd://h/x", "rbd": "rbd:p/i",
    "iscsi": "iscsi://h/iqn.2000-01.a:b/1", "nfs": "nfs://h/a/b", "gluster": "gluster://h/v/f",
    "vitastor": "vitastor:image=t",
}


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_a_member_that_nobody_has_thought_of_means_no_direct_way(name: str) -> None:
    """A new option of a backend must not be dropped in silence: fio might then write to another disk."""
    backend = BACKENDS[name]
    node: dict[str, Any] = {**backend.node(backend.parse(SOURCES[name], {}), read_only=True, options={}), "novel": 1}
    with pytest.raises(NoDirect, match="novel"):
        direct("raw", node, ENGINES)


def test_a_colon_does_not_end_a_name() -> None:
    assert name_of("/a:b\\c") == "/a\\:b\\\\c"
