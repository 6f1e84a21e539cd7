"""Who may call what: all, only the methods that look, or nothing."""

from __future__ import annotations

import array
import asyncio
import os
import socket
from pathlib import Path

import pytest

from storaged.api import access
from storaged.api.access import NOBODY, Access, Gate, Peer, Readers
from storaged.api.interface import READING, StoragedInterface
from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import StoragedError
from storaged.model.spec import VolumeSpec
from storaged.supervisor.secrets import secrets_apart
from tests.unit.test_server import Client, Place, eventually, request, with_server

OWNERS, MONITOR, OTHERS = 990, 991, 992
USER = 65534
METHODS = sorted(name for name in vars(StoragedInterface) if name[0].isupper())


@pytest.mark.parametrize(
    ("uid", "groups", "readers", "may"),
    [
        (0, {OTHERS}, NOBODY, Access.ALL),
        (USER, {OWNERS}, NOBODY, Access.ALL),
        (USER, {OTHERS, OWNERS}, Readers(everybody=True), Access.ALL),
        (USER, {MONITOR, OWNERS}, Readers(groups=frozenset({MONITOR})), Access.ALL),
        (USER, {MONITOR}, Readers(groups=frozenset({MONITOR})), Access.LOOK),
        (USER, {OTHERS}, Readers(groups=frozenset({MONITOR})), Access.NOTHING),
        (USER, {OTHERS}, Readers(everybody=True), Access.LOOK),
        (USER, {OTHERS}, NOBODY, Access.NOTHING),
        (USER, {0}, NOBODY, Access.NOTHING),
    ],
)
def test_the_table(uid: int, groups: set[int], readers: Readers, may: Access) -> None:
    assert Gate(OWNERS, readers).access_of(Peer(uid, frozenset(groups))) is may


def test_the_socket_is_open_to_all_only_where_somebody_may_look() -> None:
    assert NOBODY.socket_mode == Readers().socket_mode == 0o660
    assert Readers(everybody=True).socket_mode == Readers(groups=frozenset({MONITOR})).socket_mode == 0o666


def as_one_who(may: Access, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gate, "access_of", lambda *_: may)


@pytest.mark.parametrize("method", METHODS)
def test_who_may_look_calls_the_methods_that_look_and_is_told_so_by_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    async def work(place: Place) -> None:
        async with place.client() as client:
            reply = await client.call(f"io.storaged.{method}", more=True, parameters={})
            assert reply is not None
            error, parameters = reply.get("error"), reply["parameters"]
            if method in READING:
                # Without a name, Show is refused for that alone.
                assert error in (None, "org.varlink.service.InvalidParameter")
            else:
                assert error == "io.storaged.PermissionDenied"
                assert parameters["code"] == "permission-denied"
                assert method in parameters["message"]
                assert parameters["hint"]

    as_one_who(Access.LOOK, monkeypatch)
    with_server(tmp_path, work)


def test_the_methods_that_look_are_methods() -> None:
    assert set(METHODS) > READING


@pytest.mark.parametrize(
    ("may", "method", "error"),
    [
        (Access.LOOK, "org.varlink.service.GetInfo", None),
        # A method, or an interface, that is not known to look only.
        (Access.LOOK, "io.storaged.Newer", "io.storaged.PermissionDenied"),
        (Access.LOOK, "io.systemd.StorageProvider.Acquire", "io.storaged.PermissionDenied"),
        (Access.LOOK, "io.storaged.x.List", "io.storaged.PermissionDenied"),
        (Access.NOTHING, "io.storaged.List", "org.varlink.service.PermissionDenied"),
        (Access.NOTHING, "org.varlink.service.GetInfo", "org.varlink.service.PermissionDenied"),
        (Access.NOTHING, "io.storaged.Attach", "org.varlink.service.PermissionDenied"),
    ],
)
def test_what_is_not_on_the_table_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may: Access, method: str, error: str | None
) -> None:
    async def work(place: Place) -> None:
        async with place.client() as client:
            reply = await client.call(method)
            assert reply is not None
            assert reply.get("error") == error

    as_one_who(may, monkeypatch)
    with_server(tmp_path, work)


async def is_served(client: Client) -> bool:
    """Whether the server keeps this connection."""
    try:
        return await client.call("org.varlink.service.GetInfo") is not None
    except (BrokenPipeError, ConnectionResetError):
        return False


@pytest.mark.parametrize("may", [Access.LOOK, Access.NOTHING])
def test_guests_have_a_bounded_number_of_connections_and_take_none_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, may: Access
) -> None:
    monkeypatch.setattr(access, "MOST_OF_ONE_USER", 3)

    async def work(place: Place) -> None:
        with monkeypatch.context() as patch:
            as_one_who(may, patch)
            async with place.client() as one, place.client() as two:
                async with place.client() as three, place.client() as four:
                    assert [await is_served(client) for client in (one, two, three, four)] == [True, True, True, False]
                    patch.undo()
                    await place.serves()
                    as_one_who(may, patch)
                await eventually(lambda: len(place.server._clients) == 2)
                async with place.client() as five:
                    assert await is_served(five)

    with_server(tmp_path, work)


def test_all_guests_together_have_a_bound_too() -> None:
    gate = Gate(OWNERS, NOBODY)
    assert [gate.enter(uid) for uid in range(access.MOST_OF_ALL)] == [True] * access.MOST_OF_ALL
    assert not gate.enter(access.MOST_OF_ALL)
    gate.leave(7)
    assert gate.enter(8)
    assert not gate.enter(7)


def test_who_sends_descriptors_leaves_none_with_the_daemon(tmp_path: Path) -> None:
    async def work(place: Place) -> None:
        async with place.client() as client:
            assert await client.call("io.storaged.List")
            before = len(os.listdir("/proc/self/fd"))
            read, write = os.pipe()
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [write] * 50))]
            try:
                client.sock.sendmsg([request("io.storaged.List")], ancillary)
            except PermissionError:
                # Linux 6.16 and later: the kernel keeps them away.
                await client.send(request("io.storaged.List"))
            assert await client.receive() == {"parameters": {"volumes": []}}
            os.close(write)
            # Nobody else has the other end any more.
            async with asyncio.timeout(5):
                assert await asyncio.to_thread(os.read, read, 1) == b""
            os.close(read)
            assert len(os.listdir("/proc/self/fd")) == before

    with_server(tmp_path, work)


#: Spellings that hold a secret: sources are stored, and shown to readers.
SPELLINGS = [
    "iscsi://user%geheim@host/iqn.2026-01.test:t/1", "http://user:geheim@host/x", "https://user:geheim@host/x",
    "ftp://user:geheim@host/x", "rbd:pool/image:key=geheim", "nbd://user:geheim@host/x", "ssh://user:geheim@host/x",
    "nfs://user:geheim@host/x", "https://host/x?signature=geheim", "gluster://user:geheim@host/v/x",
    "tftp://user:geheim@host/x",
]


def test_every_backend_with_secrets_is_among_the_spellings() -> None:
    wanted = {name for name, found in BACKENDS.items() if isinstance(found, NetworkBackend) and found.secret_options}
    assert wanted - {source.partition(":")[0] for source in SPELLINGS} <= {"ftps"}


@pytest.mark.parametrize("source", SPELLINGS)
def test_no_source_that_is_taken_shows_its_secret_and_no_refusal_says_it(tmp_path: Path, source: str) -> None:
    try:
        spec, _ = secrets_apart(VolumeSpec(name="a", source=source), {})
        find_backend(spec.source).parse(spec.source, spec.options)
        shown = repr(spec)
    except StoragedError as error:
        shown = f"{error} {error.hint}"
    assert "geheim" not in shown
