"""The direct way: fio's own engine for a source, which goes past QSD and the kernel's device. Pure.

What fio is told is made of the node that QSD would open (backends/base.py), so that both reach the same disk. What
fio's engine has no word for, or only one that all could read on its command line, makes that there is no direct way.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from storaged.backends.uri import escaped

Node = Mapping[str, Any]

#: Members of every node that say nothing of where the data is; and what a client does when its server is away.
_OF_ALL = frozenset({
    "driver", "node-name", "read-only", "discard", "detect-zeroes", "cache", "auto-read-only", "aio", "locking",
})
#: fio's engines for a file or device of this host, the best first.
LOCAL_ENGINES = ("io_uring", "libaio")
VITASTOR = "libfio_vitastor.so"
#: Where fio has no engine for a source: by it fio is what a virtual machine is, at QSD's vhost-user-blk export.
BLKIO = "libblkio"


@dataclass(frozen=True)
class Direct:
    """How fio reaches a disk by itself."""

    engine: str
    words: tuple[str, ...]
    environment: Mapping[str, str] = field(default_factory=dict)


class NoDirect(Exception):
    """There is no direct way; the text says why."""


def direct(format: str, node: Node, engines: Collection[str]) -> Direct:
    """Return how fio reaches the disk in a node of the protocol layer (of a raw image). Raises NoDirect.

    ``engines`` are those that this fio has. The words for a file of this host name the node's ``filename``.
    """
    if format != "raw":
        raise NoDirect(f"fio reads no {format}")
    driver = str(node["driver"])
    if driver in ("file", "host_device"):
        _refuse_unknown(node, frozenset({"filename"}), "for files")
        return _local(node, engines)
    if driver not in _REMOTE:
        raise NoDirect(f"fio has no engine for {driver}")
    engine, known, make = _REMOTE[driver]
    _refuse_unknown(node, known, engine)
    found = make(node)
    if engine not in engines:
        raise NoDirect(f"this fio has no engine {engine}")
    return found


def through_vhost_user(socket: str) -> tuple[str, ...]:
    """Return fio's words for the disk that is served on a socket (engines/libblkio.c in fio; libblkio's drivers)."""
    return (f"--ioengine={BLKIO}", "--libblkio_driver=virtio-blk-vhost-user", f"--libblkio_path={socket}")


def _refuse_unknown(node: Node, known: frozenset[str], engine: str) -> None:
    """What would be left out in silence could be what tells this disk from another."""
    for member in node:
        if member not in known and member not in _OF_ALL:
            raise NoDirect(f"fio's engine {engine} cannot be told {member}")


def _local(node: Node, engines: Collection[str]) -> Direct:
    for engine in LOCAL_ENGINES:
        if engine in engines:
            past_the_cache = bool(node.get("cache", {}).get("direct"))
            return Direct(
                engine,
                (f"--ioengine={engine}", f"--direct={int(past_the_cache)}", f"--filename={name_of(node['filename'])}"),
            )
    raise NoDirect(f"this fio has neither of {', '.join(LOCAL_ENGINES)}")


def name_of(path: str) -> str:
    """Return a path as fio takes it: a : ends a name (get_next_str in options.c of fio)."""
    return path.replace("\\", "\\\\").replace(":", "\\:")


def _nbd(node: Node) -> Direct:
    server, name = node["server"], escaped(node["export"])
    if server["type"] == "unix":
        uri = f"nbd+unix:///{name}?socket={escaped(server['path'])}"
    else:
        host = f"[{server['host']}]" if ":" in server["host"] else server["host"]
        uri = f"nbd://{host}:{server['port']}/{name}"
    return Direct("nbd", ("--ioengine=nbd", f"--uri={uri}"))


def _rbd(node: Node) -> Direct:
    environment = {"CEPH_CONF": node["conf"]} if "conf" in node else {}
    return Direct(
        "rbd",
        (
            "--ioengine=rbd", f"--clientname={node.get('user', 'admin')}", f"--pool={node['pool']}",
            f"--rbdname={node['image']}",
        ),
        environment,
    )


def _iscsi(node: Node) -> Direct:
    if node["transport"] != "tcp":
        raise NoDirect(f"fio's engine libiscsi does not go by {node['transport']}")
    uri = f"iscsi://{node['portal']}/{node['target']}/{node['lun']}"
    return Direct(
        "libiscsi", ("--ioengine=libiscsi", f"--initiator={node['initiator-name']}", f"--filename={name_of(uri)}")
    )


def _nfs(node: Node) -> Direct:
    host = node["server"]["host"]
    directory, _, name = str(node["path"]).rpartition("/")
    ids = "&".join(f"{key}={node[member]}" for key, member in (("uid", "user"), ("gid", "group")) if member in node)
    uri = f"nfs://{f'[{host}]' if ':' in host else host}{escaped(directory) or '/'}{f'?{ids}' if ids else ''}"
    return Direct("nfs", ("--ioengine=nfs", f"--nfs_url={uri}", f"--filename={name_of(f'/{name}')}"))


def _gluster(node: Node) -> Direct:
    server = node["server"][0]
    if server["type"] != "inet" or str(server["port"]) != "24007":
        raise NoDirect("fio's engine gfapi_async finds glusterd at its usual port only")
    return Direct(
        "gfapi_async",
        (
            "--ioengine=gfapi_async", f"--volume={node['volume']}", f"--brick={server['host']}",
            f"--filename={name_of(node['path'])}",
        ),
    )


def _vitastor(node: Node) -> Direct:
    names = {"image": "image", "pool": "pool", "inode": "inode", "etcd-host": "etcd", "etcd-prefix": "etcd_prefix",
             "config-path": "conf", "size": "size"}
    words = tuple(f"--{word}={node[member]}" for member, word in names.items() if member in node)
    # direct: without it, its client may keep writes in memory (fio_cluster.cpp in Vitastor).
    return Direct(VITASTOR, (f"--ioengine={VITASTOR}", "--direct=1", *words))


#: Driver → fio's engine, the members of the node that it can be told or that do not matter to a measurement, the words.
_REMOTE: Mapping[str, tuple[str, frozenset[str], Callable[[Node], Direct]]] = {
    "nbd": ("nbd", frozenset({"server", "export", "reconnect-delay", "open-timeout"}), _nbd),
    "rbd": ("rbd", frozenset({"pool", "image", "conf", "user"}), _rbd),
    "iscsi": (
        "libiscsi",
        frozenset({"transport", "portal", "target", "lun", "initiator-name", "header-digest", "timeout"}), _iscsi,
    ),
    "nfs": ("nfs", frozenset({"server", "path", "tcp-syn-count", "user", "group", "debug"}), _nfs),
    "gluster": ("gfapi_async", frozenset({"volume", "path", "server"}), _gluster),
    "vitastor": (
        VITASTOR, frozenset({"image", "pool", "inode", "size", "etcd-host", "etcd-prefix", "config-path"}), _vitastor,
    ),
}
