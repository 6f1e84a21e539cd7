"""What the fuzzing tests have in common: a server that refuses to do anything real, and input for it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from hypothesis import strategies as st

from storaged.api.server import Server
from storaged.backends import BACKENDS
from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.history import Happening, History
from storaged.model.layout import Layout
from storaged.model.record import ProcessIdentity, Record
from storaged.model.spec import Desired, VolumeSpec
from storaged.supervisor import overlay
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.manager import Manager
from storaged.supervisor.secrets import check_secrets, secrets_apart
from storaged.supervisor.volume import Volume
from tests.contract.memory_store import MemoryStore

#: Seconds within which every input is answered, on a machine that does much else.
PATIENCE = 10.0


class Doorkeeper(Manager):
    """Has the volumes a and b. Checks wishes as the real one does, and goes no further."""

    def __init__(self, environment: Environment, tasks: asyncio.TaskGroup) -> None:
        super().__init__(environment, tasks)
        for name in ("a", "b"):
            self._volumes[name] = Volume(Desired(spec=VolumeSpec(name=name, source="/x")), environment)

    async def attach(self, spec: VolumeSpec, *rest: Any) -> Volume:
        spec, secrets = secrets_apart(spec, rest[1])
        spec = self._checked(spec)
        check_secrets(spec, secrets)
        raise StoragedError(ErrorCode.UNSUPPORTED, "the wishes make sense", volume=spec.name)

    async def detach(self, name: str, **_: object) -> list[str]:
        return [self.get(name).spec.name]

    async def rescue(self, name: str, **_: object) -> list[str]:
        return [self.get(name).spec.name]

    async def resume(self, name: str, *_: object) -> Volume:
        return self.get(name)

    async def upgrade(self, name: str, *_: object) -> Volume:
        return self.get(name)

    async def resize(self, name: str, *_: object) -> Volume:
        return self.get(name)

    async def persist(self, name: str, **_: object) -> Volume:
        return self.get(name)

    async def park(self, *_: object) -> list[str]:
        return []


def with_doorkeeper(directory: Path, work: Callable[[str], None]) -> None:
    """Run ``work`` in a thread, with the path of a server's socket. Nothing may reach the loop's own handler."""
    complaints: list[dict[str, Any]] = []

    async def run() -> None:
        store = MemoryStore()
        environment = Environment(
            layout=Layout.below(str(directory / "root")), config=Config(), persistent=store, volatile=store,
            events=EventHub(), lock_directory=str(directory / "locks"),
        )
        asyncio.get_running_loop().set_exception_handler(lambda _, context: complaints.append(context))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(directory / "s"))
            listener.listen()
            async with asyncio.TaskGroup() as tasks:
                server = Server(Doorkeeper(environment, tasks), listener, 0)
                server.start()
                try:
                    await asyncio.to_thread(work, str(directory / "s"))
                finally:
                    await server.close()

    uvloop.run(run())
    assert not complaints, [(context.get("message"), repr(context.get("exception"))) for context in complaints]


def answers(path: str, data: bytes) -> list[dict[str, Any]]:
    """Send ``data``, say that this was all, and return what comes back until the server ends the connection.

    Raises TimeoutError where it takes longer than PATIENCE.
    """
    end = time.monotonic() + PATIENCE
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PATIENCE)
        sock.connect(path)
        received = b""
        try:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)
            while chunk := sock.recv(1 << 16):
                received += chunk
                if time.monotonic() > end:
                    raise TimeoutError("it goes on answering")
        except (BrokenPipeError, ConnectionResetError):
            pass  # it was closed before all was read
    *messages, rest = received.split(b"\0")
    assert rest == b""
    return [json.loads(message) for message in messages]


def is_clean(reply: dict[str, Any]) -> bool:
    """Whether it is a result, or a refusal that somebody has thought of."""
    error, parameters = reply.get("error"), reply.get("parameters", {})
    if error is None:
        return isinstance(parameters, dict)
    if error.startswith("org.varlink.service.") or error == "invalid.asyncvarlink.ProtocolViolation":
        return True
    known = {code.value for code in ErrorCode} - {ErrorCode.INTERNAL.value}
    return error.startswith("io.storaged.") and parameters["code"] in known and bool(parameters["message"])


def tells_bugs(records: list[logging.LogRecord]) -> list[str]:
    """What the log has of exceptions that nobody foresaw."""
    return [record.getMessage() for record in records if record.exc_info or record.levelno >= logging.ERROR]


_SPEC = VolumeSpec(name="a", source="/a", options={"cache": "none"}, snapshot_dir="/x")
_PROCESS = ProcessIdentity(pid=4, start_time=5, exe_device=6, exe_inode=7)
#: State files as they are written.
RECORD = msgspec.json.encode(Record(
    spec=_SPEC, transport="fuse", transport_reason="x", binary="/usr/bin/q", process=_PROCESS, served_by=_PROCESS,
    sources={"file:1:2": True}, settings={"queues": 1}, size=512, device="/dev/loop3", counted=[1, 2],
))
DESIRED = msgspec.json.encode(Desired(spec=_SPEC))
MARK = msgspec.json.encode(overlay.Mark(path="/x/a.qcow2", inode=3, limit=1 << 30, fingerprint=[[1, 2]]))
_journal = History()
_journal.add(Happening.RECOVERED, "it works", now=1e9, seconds=0.5)
HISTORY = _journal.encode()

TEXT = st.text(max_size=30) | st.sampled_from(
    ["", "a", "b", "../x", "/", "a/../../etc/shadow", "a" * 70, "\0", "\ud800", "\x1b[31m", "ä", "-", "a-part1", "%s"]
)
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from([2**63, -(2**63) - 1, 10**400, 1e308, 0, -1])
)
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4), max_leaves=8
)
_PIECES = st.sampled_from([
    "/", "//", "h", "host", "[", "]", "[::1]", ":", ":1", ":99999999999", "@", "u:p@", "%", "%00", "%2f", "%zz",
    "?", "&", "=", "a=b", "#", ",", "\\", "\\:", "..", "/..", "~", " ", "\n", "\0", "\ud800", "ä", "-1", "0", "1e9",
    "{", "}", '"', "\x1b", "iqn.2026-01.test:t", "image", "pool", "key", "json:", "socket=/s", "etcd_host=",
    "export", "fd:", "+unix", "*", "$(x)",
])
_SCHEMES = sorted({scheme for backend in BACKENDS.values() for scheme in backend.schemes})
#: Sources: schemes that there are, with what no server would ever be asked for.
SOURCES = st.builds(
    lambda scheme, pieces: scheme + "".join(pieces),
    st.sampled_from([*(f"{scheme}{end}" for scheme in _SCHEMES for end in (":", "://")), "", "json:", "x:"]),
    st.lists(_PIECES | st.text(max_size=3), max_size=10),
)
OPTION_NAMES = sorted({option for backend in BACKENDS.values() for option in backend.options})
