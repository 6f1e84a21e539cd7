"""The words of qemu-img's command line. Pure.

An image is given to qemu-img as a tree of nodes, the same that QSD opens, in the form of a file name: ``json:{…}``
(parse_json_protocol in block.c of QEMU). Nothing is left to be probed, and nothing that a header says is followed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.sizes import parse_size

Node = dict[str, Any]

#: Members of a node that name an object (object-add).
_NAMES_OBJECT = ("key-secret", "password-secret", "cookie-secret", "proxy-password-secret", "tls-creds")
#: Endings of names that say a format. (A name is what the user says; the content never counts.)
_ENDINGS = {
    "qcow2": Format.QCOW2, "qed": Format.QED, "vmdk": Format.VMDK, "vdi": Format.VDI, "vhdx": Format.VHDX,
    "vhd": Format.VPC, "vpc": Format.VPC, "luks": Format.LUKS,
}
#: What an option of qemu-img's would make it open, past all that is looked at here.
_FILES = {
    "backing_file": "say -b", "backing_fmt": "say -F", "data_file": "make the image without one",
    "data_file_raw": "make the image without one",
}


def format_of_name(path: str) -> Format:
    """Return the format that the ending of a file's name says; raw where it says none."""
    name = path.rpartition("/")[2]
    stem, dot, ending = name.rpartition(".")
    return _ENDINGS.get(ending.lower(), Format.RAW) if stem and dot else Format.RAW


def filename(node: Node) -> str:
    """Return a tree of nodes as qemu-img takes it in the place of a file name."""
    return "json:" + json.dumps(_without_names(node), ensure_ascii=True, separators=(",", ":"))


def _without_names(node: Node) -> Node:
    """Two images of one command would bear the same names; qemu-img needs none."""
    return {
        key: _without_names(value) if isinstance(value, dict) else value
        for key, value in node.items() if key != "node-name"
    }


def renamed(node: Node, prefix: str) -> Node:
    """Return a tree whose objects have names of their own, so that two images of one command do not share them."""
    return {
        key: renamed(value, prefix) if isinstance(value, dict)
        else f"{prefix}{value}" if key in _NAMES_OBJECT or key.endswith("-secret") else value
        for key, value in node.items()
    }


def committable(node: Node) -> Node:
    """Return the tree of an image whose backing file qemu-img shall be able to make writable.

    It cannot where the node says ``read-only`` itself (bdrv_can_set_read_only in block.c of QEMU). Not saying it means
    read-only, too, until the commit needs more.
    """
    backing = node["backing"]
    open_ended = {
        key: {name: part for name, part in value.items() if name != "read-only"}
        if key in ("file", "data-file") and isinstance(value, dict) else value
        for key, value in backing.items() if key != "read-only"
    }
    return {**node, "backing": open_ended}


def object_words(objects: Sequence[Node]) -> list[str]:
    """Return --object for each. Everybody can read them: a secret is named by the file that holds it."""
    return [word for one in objects for word in ("--object", json.dumps(one, separators=(",", ":")))]


def split_options(options: Mapping[str, str], known: Sequence[str]) -> tuple[dict[str, str], dict[str, str]]:
    """Return the options that the source knows, and the rest: those are the image format's."""
    mine = {key: value for key, value in options.items() if key in known}
    return mine, {key: value for key, value in options.items() if key not in known}


def creation_words(creation: Mapping[str, str]) -> list[str]:
    """Return -o for each option of an image's format, as ``qemu-img create -o help`` lists them.

    Raises INVALID_ARGUMENT for those that name further files.
    """
    words = []
    for key, value in creation.items():
        if key in _FILES:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the option {key} is not taken",
                cause="it names a file that would be opened without a look at it", hint=_FILES[key],
            )
        # A comma ends a value; two of them are one that does not (parse_option in util/qemu-option.c).
        words += ["-o", f"{key}={value.replace(',', ',,')}"]
    return words


def encryption(format: Format, options: Mapping[str, str], prefix: str) -> dict[str, str]:
    """Return the creation options that make an image encrypted, where the wishes say so."""
    if format is Format.LUKS:
        return {"key-secret": f"{prefix}passphrase"}
    if "encrypt" in options:
        return {"encrypt.format": "luks", "encrypt.key-secret": f"{prefix}passphrase"}
    return {}


def new_size(text: str) -> str:
    """Return what ``qemu-img resize`` takes for SIZE, +SIZE or -SIZE. Raises INVALID_SIZE."""
    sign = text[:1] if text[:1] in ("+", "-") else ""
    return f"{sign}{parse_size(text.removeprefix(sign))}"


def progress_of(text: str) -> float | None:
    """Return the percentage in a piece of what ``qemu-img -p`` prints (util/qemu-progress.c), None where is none."""
    _, opened, rest = text.rpartition("(")
    number, slash, _ = rest.partition("/100%)")
    try:
        return min(100.0, max(0.0, float(number))) if opened and slash else None
    except ValueError:
        return None
