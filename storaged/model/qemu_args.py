"""The arguments with which a virtual machine's QEMU uses the disk of a volume. Pure.

Directly: QEMU opens the source itself, as QSD does (``-blockdev``, or the older ``-drive``). Through a socket: QSD
keeps it open and QEMU is its client (vhost-user).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from storaged.model.blockdev import Node
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec

#: QEMU allows 31 characters in a node's name, and the deepest backing file adds some.
_LONGEST_ID = 26
#: A virtio disk's serial number has no more bytes.
_SERIAL = 20
#: The memory of the machine in the vhost-user form.
_MEMORY = "1G"


@dataclass(frozen=True)
class QemuArguments:
    """Lists of words for a command line of qemu-system-*, and what one must know to use them."""

    blockdev: list[str]
    drive: list[str]
    vhost_user: list[str] | None
    """None: the volume is on no socket."""
    notes: list[str]


def qemu_arguments(
    node: Node, spec: VolumeSpec, record: Record | None, objects: Sequence[Node] = ()
) -> QemuArguments:
    """Return the arguments for the source of a volume.

    ``node`` is the tree that QSD opens (storaged.model.blockdev.image_tree); ``record`` what is attached, if anything;
    ``objects`` what has to be there before it, as for object-add, a secret by the file that holds it.
    """
    name = _identifier(spec.name)
    secret = _objects(name, objects)
    device = f"virtio-blk-pci,{_device(spec)}"
    blockdev = [*secret, "-blockdev", json.dumps(_renamed(node, name)), "-device", f"{device},drive={name}"]
    options = ["if=none", f"id={name}", *(["snapshot=on"] if spec.snapshot else [])]
    tree = {key: value for key, value in node.items() if not (spec.snapshot and key == "read-only")}
    options += [f"{key}={_escaped(value)}" for key, value in _dotted(_unnamed(tree, name))]
    drive = [*secret, "-drive", ",".join(options), "-device", f"{device},drive={name}"]
    return QemuArguments(blockdev, drive, _vhost_user(name, spec, record), _notes(spec, record, objects))


def _vhost_user(name: str, spec: VolumeSpec, record: Record | None) -> list[str] | None:
    if record is None or record.socket is None:
        return None
    return [
        "-m", _MEMORY, "-object", f"memory-backend-memfd,id=mem,size={_MEMORY},share=on",
        "-machine", "memory-backend=mem",
        "-chardev", f"socket,id={name},path={_escaped(record.socket)}",
        "-device", f"vhost-user-blk-pci,chardev={name},num-queues={record.settings.get('queues', 1)}",
    ]


def _notes(spec: VolumeSpec, record: Record | None, objects: Sequence[Node]) -> list[str]:
    notes = []
    if spec.snapshot:
        notes.append(
            "the volume is a snapshot: its changes are not in the source and go at the detach. With -drive, QEMU makes "
            "a snapshot of its own (snapshot=on, in TMPDIR); with -blockdev the disk is read-only"
        )
    if record is not None and spec.writes_source:
        notes.append(
            f"the source is locked while the volume is attached: before -blockdev and -drive, storaged detach "
            f"{spec.name}"
        )
    elif record is not None:
        notes.append("the source is only read: -blockdev and -drive can use it while the volume is attached")
    if objects:
        notes.append(
            "QEMU reads passwords and keys from their files, which its user must be able to read; a newline at the end "
            "of one counts there"
        )
    if record is not None and record.socket is not None:
        notes.append(f"vhost-user: the size of memory-backend-memfd must be that of -m ({_MEMORY} is an example)")
        notes.append(
            "vhost-user: when qemu-storage-daemon dies, the disk stands still until the machine is restarted; "
            "reconnect=1 at the chardev lets it go on, and can break the guest (README.md, Virtual machines)"
        )
        notes.append(
            "vhost-user: QEMU's user must be able to write to the socket (-o socket-owner); one virtual machine at a "
            "time; there is no form with -drive"
        )
    return notes


def _device(spec: VolumeSpec) -> str:
    size = spec.logical_block_size
    options = [f"serial={spec.name[:_SERIAL]}", f"logical_block_size={size}", f"physical_block_size={size}"]
    if spec.options.get("cache") in ("writethrough", "directsync"):
        options.append("write-cache=off")
    return ",".join(options)


def _objects(name: str, objects: Sequence[Node]) -> list[str]:
    words = []
    for node in objects:
        kind, renamed = node["qom-type"], {**node, "id": f"{name}-{node['id']}"}
        options = [f"{key}={_escaped(value)}" for key, value in _dotted(renamed) if key != "qom-type"]
        words += ["-object", ",".join([kind, *options])]
    return words


def _identifier(name: str) -> str:
    """Names in QEMU begin with a letter, and have to be unique in a machine."""
    text = f"sd-{name}"
    if len(text) <= _LONGEST_ID:
        return text
    return f"{text[:_LONGEST_ID - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _renamed(node: Node, name: str) -> Node:
    """The tree with names that tell the volumes of one machine apart."""
    changed: Node = {}
    for key, value in node.items():
        if key == "node-name":
            _, dash, depth = value.partition("-")
            changed[key] = f"{name}{dash}{depth}"
        elif key.endswith("-secret") or key == "tls-creds":
            changed[key] = f"{name}-{value}"
        else:
            changed[key] = _renamed(value, name) if isinstance(value, dict) else value
    return changed


def _unnamed(node: Node, name: str) -> Node:
    """The tree without names, and without the null at the end of the chain, which no option can say.

    It is not needed: there is no backing file in the header of an image that has a null there.
    """
    return {
        key: _unnamed(value, name) if isinstance(value, dict) else value
        for key, value in _renamed(node, name).items()
        if key != "node-name" and value is not None
    }


def _dotted(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Each leaf of a tree with its path, as QEMU's options name it: file.filename, server.0.host."""
    if isinstance(value, dict | list):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _dotted(child, f"{path}.{key}" if path else str(key))
    else:
        yield path, _plain(value)


def _plain(value: Any) -> str:
    return ("on" if value else "off") if isinstance(value, bool) else str(value)


def _escaped(value: str) -> str:
    """A comma ends a value; two of them are one that does not."""
    return value.replace(",", ",,")
