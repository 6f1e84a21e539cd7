"""Creates what is behind a server, and image formats on it: by a qemu-storage-daemon that lives for it alone.

``qemu-img create`` takes file names only, of which some cannot say all (TLS), and others would hold a secret. QSD's
blockdev-create (qapi/block-core.json in QEMU) takes the nodes that the backends make, and secrets over QMP.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Mapping
from typing import Any

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.unixsock import bind_unix, connect_unix
from storaged.images.child import start
from storaged.images.operand import Operand
from storaged.images.provide import Provided
from storaged.images.timing import trials
from storaged.model.config import Config
from storaged.model.formats import Format
from storaged.model.sizes import parse_size
from storaged.qsd.process import find_binary
from storaged.qsd.session import Session

#: Backends whose server makes a file or image when it is asked.
CREATABLE = frozenset({"rbd", "ssh", "nfs", "gluster"})
#: Members of a node that are of QEMU's and not of the driver's options.
_GENERAL = ("driver", "read-only", "discard", "cache", "node-name")
#: Seconds until QSD answers, and for one thing that it creates: space may be allocated in full.
_GREETING, _LONGEST = 30.0, 86400.0
_COMPAT = {"0.10": "v2", "v2": "v2", "1.1": "v3", "v3": "v3"}
_SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def creation(format: Format, options: Mapping[str, str]) -> dict[str, Any]:
    """Return options of an image's format as blockdev-create takes them, in place of ``qemu-img create -o``."""
    found: dict[str, Any] = {}
    for key, text in options.items():
        if key == "compat" and format is Format.QCOW2:
            found["version"] = _COMPAT.get(text, text)
            continue
        place, names = found, key.replace("_", "-").split(".")
        for name in names[:-1]:
            place = place.setdefault(name, {})
        place[names[-1]] = _value(text)
    return found


def _value(text: str) -> Any:
    if text.lower() in _SWITCHES:
        return _SWITCHES[text.lower()]
    try:
        return int(text) if text.isdecimal() else parse_size(text)
    except StoragedError:
        return text


def steps(
    operand: Operand, node: Mapping[str, Any], size: int, options: Mapping[str, str], *, is_there: bool
) -> list[dict[str, Any]]:
    """Return the arguments of blockdev-create, one after the other; ``node`` is what reaches the bytes."""
    found: list[dict[str, Any]] = []
    format, mine = operand.spec.format, dict(options)
    if not is_there:
        # Of an rbd image the encryption is no part of where it is: there QEMU would leave it out without a word.
        location = {key: value for key, value in node.items() if key not in (*_GENERAL, "encrypt")}
        encrypt = {"encrypt": node["encrypt"]} if "encrypt" in node else {}
        # Of a format's container the size is its own, and grows; an rbd image has to begin with one.
        raw = format is Format.RAW
        length = size if raw or node["driver"] == "rbd" else 0
        own = creation(format, mine) if raw else {}
        found.append({"driver": node["driver"], "location": location, "size": length, **encrypt, **own})
        if raw:
            return found
    if format is not Format.RAW:
        found.append({"driver": format.value, "file": dict(node), "size": size, **creation(format, mine)})
    return found


def create(
    operand: Operand, given: Provided, config: Config, size: int, options: Mapping[str, str], *, is_there: bool
) -> None:
    """Make what is not there, and put the image's format on it. Blocks. Raises what QSD's words amount to."""
    node = given.nodes[operand.spec.name]["file"]
    todo = steps(operand, node, size, options, is_there=is_there)
    binary = find_binary(config.qsd.binary_for(find_backend(operand.spec.source).name))
    path = os.path.join(given.directory, "create.sock")
    with bind_unix(path, mode=0o600) as listener:
        # In the backlog before QSD is there, as with that of a volume (qsd/process.py).
        monitor = connect_unix(path)
        try:
            child = start(
                [binary, "--chardev", f"socket,id=qmp,fd={listener.fileno()},server=on,wait=on",
                 "--monitor", "chardev=qmp", *given.objects],
                given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, keep=[listener.fileno()],
            )
        except BaseException:
            monitor.close()
            raise
    try:
        asyncio.run(_create(operand, monitor, todo))
    finally:
        child.kill()
        child.communicate(timeout=_GREETING)
        os.unlink(path)


async def _create(operand: Operand, monitor: socket.socket, todo: list[dict[str, Any]]) -> None:
    try:
        session = await Session.over(monitor, timeout=_GREETING)
        try:
            for number, options in enumerate(todo):
                for attempt, trial in enumerate(trials()):
                    with trial:
                        job = f"create{number}-{attempt}"
                        await session.run_job(
                            "blockdev-create", {"job-id": job, "options": options}, job, timeout=_LONGEST
                        )
        finally:
            await session.close()
    except StoragedError as error:
        if error.code is ErrorCode.QSD_REFUSED:
            raise StoragedError(
                ErrorCode.IMAGE_FAILED, f"{operand.shown()} cannot be created", cause=error.cause,
                hint="the words are QEMU's; check the options",
            ) from error
        raise
