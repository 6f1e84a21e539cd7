"""The Varlink server: types in, types out; who may ask what is decided in api/access.py."""

import asyncio
import base64
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from asyncvarlink import (
    TypedVarlinkErrorReply,
    VarlinkInterface,
    VarlinkInterfaceRegistry,
    VarlinkInterfaceServerProtocol,
    VarlinkMethodCall,
    VarlinkMethodReply,
    VarlinkTransport,
    varlinkmethod,
)
from asyncvarlink.serviceerrors import PermissionDenied
from asyncvarlink.serviceinterface import VarlinkServiceInterface
from asyncvarlink.types import FileDescriptorArray, JSONObject

from storaged import __version__
from storaged.api import interface
from storaged.api.access import NOBODY, Access, Gate, Peer, Readers, permits, refuse_descriptors
from storaged.errors import ErrorCode, StoragedError, bug
from storaged.model.formats import Format
from storaged.model.history import Happening
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.model.treespec import spelled_out
from storaged.supervisor.manager import Manager
from storaged.supervisor.reloading import reload
from storaged.supervisor.volume import Volume

log = logging.getLogger("storaged.api")

P = ParamSpec("P")
R = TypeVar("R")

#: Seconds without accepting after an accept that failed.
_ACCEPT_PAUSE = 1.0
#: Bytes that a request may have.
_LONGEST_MESSAGE = 1 << 20
#: Streams that one connection may have.
_MOST_STREAMS = 16
#: Replies that may wait for one client before its next request is read.
_MOST_REPLIES = 16
_ERRORS: dict[ErrorCode, type[TypedVarlinkErrorReply]] = {
    ErrorCode.NO_SUCH_VOLUME: interface.NoSuchVolume,
    ErrorCode.VOLUME_EXISTS: interface.VolumeExists,
    ErrorCode.DEVICE_IN_USE: interface.InUse,
    ErrorCode.SOURCE_IN_USE: interface.InUse,
    ErrorCode.INVALID_NAME: interface.InvalidArgument,
    ErrorCode.INVALID_ARGUMENT: interface.InvalidArgument,
    ErrorCode.INVALID_SOURCE: interface.InvalidArgument,
    ErrorCode.INVALID_SIZE: interface.InvalidArgument,
}


def _reply_of(error: StoragedError, kind: type[TypedVarlinkErrorReply] | None = None) -> TypedVarlinkErrorReply:
    """Return the Varlink error of a failure: of that kind, or of the one that its code has."""
    return (kind or _ERRORS.get(error.code, interface.Failed))(
        code=error.code.value, message=error.message, volume=error.volume, step=error.step, cause=error.cause,
        hint=error.hint, users=list(error.users),
    )


def _translated(method: Callable[P, Coroutine[Any, Any, R]]) -> Callable[P, Coroutine[Any, Any, R]]:
    async def translate(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await method(*args, **kwargs)
        except Exception as error:
            if isinstance(error, StoragedError):
                failure = error
            else:
                log.exception("a bug in a method of the API")
                failure = bug(error)
            if isinstance(service := args[0], Service):
                service.count(failure.code)
            raise _reply_of(failure) from error

    translate.__name__, translate.__doc__ = method.__name__, method.__doc__
    translate.__wrapped__ = method  # type: ignore[attr-defined]  # asyncvarlink reads the signature through it
    return translate


class Service(interface.StoragedInterface):
    """Attach disk images and network disks as block devices of this host, and take them away again."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Attach(
        self,
        *,
        name: str,
        source: str,
        format: str | None = None,
        transport: str | None = None,
        read_only: bool | None = None,
        snapshot: bool | None = None,
        snapshot_dir: str | None = None,
        options: dict[str, str] | None = None,
        persist: bool | None = None,
        timeout: float | None = None,
        secrets: dict[str, str] | None = None,
        profile: str | None = None,
    ) -> interface.Volume:
        """Attach a volume and wait until its device can be used, at most timeout seconds."""
        try:
            known = Format(format or "raw")
        except ValueError:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"there is no format {format!r}", volume=name,
                hint=f"use one of {', '.join(Format)}",
            ) from None
        spec = VolumeSpec(
            name=name, source=source, format=known, transport=transport or "auto", read_only=bool(read_only),
            snapshot=bool(snapshot), snapshot_dir=snapshot_dir, options=options or {}, persist=bool(persist),
            profile=profile,
        )
        spec = await self._manager.with_profile(spelled_out(spec, known if format else None))
        return self._describe(await self._manager.attach(spec, _deadline(timeout), _decoded(name, secrets or {})))

    @varlinkmethod(return_parameter="notes")
    @_translated
    async def Detach(
        self, *, name: str, force: bool | None = None, timeout: float | None = None
    ) -> list[str]:
        """Take a volume away. Refuses while its device is in use, unless forced; notes say what is left."""
        return await self._manager.detach(name, force=bool(force), timeout=_deadline(timeout))

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Resize(
        self, *, name: str, size: int | None = None, timeout: float | None = None
    ) -> interface.Volume:
        """Grow a volume and its device to size bytes; without a size, to what its source has by now."""
        return self._describe(await self._manager.resize(name, size, _deadline(timeout)))

    @varlinkmethod(return_parameter="notes")
    @_translated
    async def Rescue(
        self, *, name: str, keep: bool | None = None, timeout: float | None = None
    ) -> list[str]:
        """End all I/O in flight with errors, whatever QSD does; the volume stays, in the state rescued.

        Its device goes away, or with keep stays and fails all I/O, until Resume or Detach.
        """
        return await self._manager.rescue(name, keep=bool(keep), timeout=_deadline(timeout))

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Resume(self, *, name: str, timeout: float | None = None) -> interface.Volume:
        """Put the source of a rescued volume back."""
        return self._describe(await self._manager.resume(name, _deadline(timeout)))

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Upgrade(self, *, name: str, timeout: float | None = None) -> interface.Volume:
        """Replace the QSD of a volume by the binary that is installed now, while the device is in use."""
        return self._describe(await self._manager.upgrade(name, _deadline(timeout)))

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Persist(self, *, name: str, on: bool) -> interface.Volume:
        """Attach a volume again after each boot, or do not."""
        return self._describe(await self._manager.persist(name, on=on))

    @varlinkmethod(return_parameter="notes")
    @_translated
    async def Park(self, *, timeout: float | None = None) -> list[str]:
        """The host goes down: flush and end what nobody uses, and keep the wishes; notes say what goes on, and why."""
        return await self._manager.park(_deadline(timeout))

    @varlinkmethod(return_parameter="volumes")
    @_translated
    async def List(self) -> list[interface.Volume]:
        """All volumes, sorted by name, without their history."""
        return [self._describe(volume) for volume in self._manager.volumes()]

    @varlinkmethod(return_parameter="volume")
    @_translated
    async def Show(self, *, name: str) -> interface.Volume:
        """One volume, with its history."""
        return self._describe(self._manager.get(name), with_history=True)

    @varlinkmethod(return_parameter="arguments")
    @_translated
    async def QemuArguments(self, *, name: str) -> interface.QemuArguments:
        """How a virtual machine uses a volume: the source directly (blockdev, or drive), or through the socket."""
        found = await self._manager.qemu_arguments(name)
        return interface.QemuArguments(found.blockdev, found.drive, found.vhost_user, found.notes)

    @varlinkmethod(return_parameter="reloaded")
    @_translated
    async def Reload(self) -> interface.Reloaded:
        """Read the configuration and the files of volumes again, as at SIGHUP. With a wrong one nothing is changed."""
        changed = await reload(self._manager)
        files = changed.files
        return interface.Reloaded(
            changed.applied, changed.needs_restart, files.attaching, files.differing,
            [
                interface.FileFailure(error.volume, error.code.value, error.message, error.cause, error.hint)
                for error in files.failures
            ],
        )

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Watch(self, *, name: str | None = None) -> AsyncIterator[interface.Event]:
        """Events as they happen, of one volume or of all; the first has the kind ready."""
        async with contextlib.aclosing(self._manager.environment.events.watch(name)) as events:
            async for event in events:
                yield interface.Event(event.time, event.volume, event.kind, event.state, event.message)

    def count(self, code: ErrorCode) -> None:
        """A caller is answered with an error."""
        self._manager.environment.counts.request_failed(code)

    def _describe(self, volume: Volume, *, with_history: bool = False) -> interface.Volume:
        spec, record, layout = volume.spec, volume.attachment.record, self._manager.environment.layout
        condition, history = volume.condition, volume.history
        return interface.Volume(
            name=spec.name, source=spec.source, format=spec.format.value,
            transport=record.transport if record else spec.transport,
            transport_reason=record.transport_reason if record else "",
            read_only=spec.read_only, snapshot=spec.snapshot, persist=spec.persist, options=dict(spec.options),
            profile=spec.profile, state=volume.state.value, since=volume.since,
            device=record.device if record else None,
            socket=record.socket if record else None,
            link=layout.link(spec.name) if volume.seen.linked and record and record.device else None,
            size=(record.size or None) if record else None,
            source_size=(record.source_size or None) if record else None,
            logical_block_size=spec.logical_block_size if record else None,
            qsd_pid=record.process.pid if record and record.process and volume.attachment.qsd.alive else None,
            qsd_version=(record.qsd_version or None) if record else None,
            qsd_confinement=_confinement(record) if record and record.process else None,
            overlay=record.overlay if record else None,
            failure=None if volume.failure is None else interface.Failure(
                volume.failure.code.value, volume.failure.message, volume.failure.step, volume.failure.cause,
                volume.failure.hint,
            ),
            condition=None if condition is None else interface.Condition(
                condition.trouble.value, condition.since, condition.detail, str(condition.policy), condition.acts_at
            ),
            deaths=history.counts().get(Happening.DEATH, 0), paused=history.paused,
            history=[
                interface.HistoryEntry(entry.time, entry.kind, entry.message, entry.seconds, entry.times, entry.last)
                for entry in history.entries
            ] if with_history else None,
            file=self._manager.file_of(spec.name),
            layers=_layers(record),
        )


def _confinement(record: Record) -> str:
    found = record.confinement
    return str(found) if found is not None else "none: it may do all that the daemon which started it may"


def _layers(record: Record | None) -> list[interface.Layer]:
    """The images of a volume; the disk has grown, perhaps, since it was opened."""
    found = [
        interface.Layer(layer.source, layer.format, layer.virtual_size, layer.backing, layer.data_file)
        for layer in (record.layers if record is not None else [])
    ]
    if found and record is not None and record.size:
        found[0].virtual_size = record.source_size or record.size
    return found


def _decoded(name: str, secrets: dict[str, str]) -> dict[str, bytes]:
    try:
        return {option: base64.b64decode(text, validate=True) for option, text in secrets.items()}
    except ValueError:
        # Nothing of it is said again.
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "a secret is no base64", volume=name, hint="encode its bytes in base64"
        ) from None


def _deadline(timeout: float | None) -> float | None:
    if timeout is not None and not 0 < timeout <= 86400:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"a timeout of {timeout:g} seconds",
            hint="it must be above 0 and at most 86400",
        )
    return timeout


class _Protocol(VarlinkInterfaceServerProtocol):
    """One client. A stream (Watch) ends as soon as its client is gone, and not only at the next event."""

    def __init__(self, registry: VarlinkInterfaceRegistry, *, access: Access) -> None:
        super().__init__(registry)
        self._interfaces = registry
        self._access = access
        # Guests do not fill the log.
        self._level = logging.WARNING if access is Access.ALL else logging.DEBUG
        self._streams: set[asyncio.Future[None]] = set()
        self._replies = 0
        self._drained = asyncio.Event()
        self._unfinished = 0

    def message_received(self, data: bytes, fds: FileDescriptorArray | None) -> None:
        self._unfinished = 0 if b"\0" in data else self._unfinished + len(data)
        if self._unfinished > _LONGEST_MESSAGE:
            log.log(self._level, "a client sends a message without an end: its connection is closed")
            self.close()
            return
        try:
            super().message_received(data, fds)
        except (RecursionError, ValueError) as error:
            log.log(self._level, "a client sends what is no message (%s): its connection is closed", error)
            self.close()

    def send_reply(
        self, reply: VarlinkMethodReply, fds: list[int] | None = None, autoclose: bool = True
    ) -> asyncio.Future[None]:
        future = super().send_reply(reply, fds, autoclose)
        self._replies += 1
        future.add_done_callback(self._reply_sent)
        # A stream that is ended while it waits for this would cancel the transport's own future, and break its writer.
        waited_for = asyncio.shield(future)
        waited_for.add_done_callback(lambda done: done.cancelled() or done.exception())
        return waited_for

    def _reply_sent(self, _future: asyncio.Future[None]) -> None:
        self._replies -= 1
        if self._replies <= _MOST_REPLIES:
            self._drained.set()

    def request_received(self, obj: JSONObject, fds: FileDescriptorArray | None) -> asyncio.Future[None] | None:
        future: asyncio.Future[None] | None = super().request_received(obj, fds)
        if self._replies <= _MOST_REPLIES:
            return future
        # Backpressure: who does not read replies is not read from either.
        return asyncio.ensure_future(self._until_drained(future))

    async def _until_drained(self, future: asyncio.Future[None] | None) -> None:
        if future is not None:
            await future
        while self._replies > _MOST_REPLIES:
            self._drained.clear()
            await self._drained.wait()

    def call_received(
        self, call: VarlinkMethodCall, fds: FileDescriptorArray | None
    ) -> asyncio.Future[None] | None:
        if self._access is Access.NOTHING:
            raise PermissionDenied()
        if not permits(self._access, call):
            raise _reply_of(
                StoragedError(
                    ErrorCode.PERMISSION_DENIED, f"you may look, and not call {call.method}",
                    cause="the configuration lets you read only ([access] read_only)",
                    hint="run this as root, or as a member of the group that owns the socket",
                ),
                interface.PermissionDenied,
            )
        streams = self._interfaces.lookup_method(call)[1].more
        if streams and len(self._streams) >= _MOST_STREAMS:
            raise _reply_of(
                StoragedError(
                    ErrorCode.INVALID_ARGUMENT, f"more than {_MOST_STREAMS} streams on one connection",
                    hint="one Watch without a name tells everything",
                )
            )
        future: asyncio.Future[None] | None = super().call_received(call, fds)
        if future is None or not streams:
            return future
        # Returning the future would stop reading from the client until the stream ends, and so the end of the
        # client would not be seen.
        self._streams.add(future)
        future.add_done_callback(self._stream_done)
        return None

    def _stream_done(self, future: asyncio.Future[None]) -> None:
        self._streams.discard(future)
        if not future.cancelled() and future.exception() is not None:
            log.error("a stream failed", exc_info=future.exception())

    def eof_received(self) -> None:
        self._end_streams()
        super().eof_received()

    def connection_lost(self, exc: Exception | None) -> None:
        self._end_streams()
        super().connection_lost(exc)

    def _end_streams(self) -> None:
        for future in list(self._streams):
            future.cancel()


class Server:
    """Listens on a socket and serves root, the daemon's user, and the socket's group if it has one; readers may look.

    ``service`` is what is served there, io.storaged if nothing is said.
    """

    def __init__(
        self, manager: Manager, listener: socket.socket, group: int | None, readers: Readers = NOBODY, *,
        service: VarlinkInterface | None = None,
    ) -> None:
        refuse_descriptors(listener)
        self._listener = listener
        self._gate = Gate(group, readers)
        self._clients: set[VarlinkTransport] = set()
        self._registry = VarlinkInterfaceRegistry()
        self._registry.register_interface(
            VarlinkServiceInterface("storaged", "storaged", __version__, "https://varlink.org", self._registry)
        )
        self._registry.register_interface(service or Service(manager))

    def start(self) -> None:
        """Accept clients from now on."""
        self._listener.setblocking(False)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    async def close(self) -> None:
        """Stop accepting, and end all connections."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        for client in list(self._clients):
            client.abort()
        await asyncio.sleep(0)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionAbortedError):
            return
        except OSError as error:
            # Out of descriptors, for example: the client stays in the backlog, and the loop must not spin.
            log.error("cannot accept a client for now: %s", error)
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._listener)
            loop.call_later(_ACCEPT_PAUSE, self._accept_again)
            return
        try:
            peer = Peer.of(connection)
        except OSError:
            connection.close()
            return
        access = self._gate.access_of(peer)
        guest = access is not Access.ALL
        if guest and not self._gate.enter(peer.uid):
            log.debug("user %d has too many connections: another one is closed", peer.uid)
            connection.close()
            return
        connection.setblocking(False)
        transport = VarlinkTransport(
            asyncio.get_running_loop(), connection, connection, _Protocol(self._registry, access=access),
            # No descriptors come in, so messages need not be received one by one. And with a predictor, asyncvarlink
            # 0.3.3 reads until nothing is left: a client that is always faster would have the daemon for itself.
            boundary_predictor=None,
        )
        self._clients.add(transport)
        transport.closed_future.add_done_callback(lambda _: self._clients.discard(transport))
        if guest:
            transport.closed_future.add_done_callback(lambda _: self._gate.leave(peer.uid))

    def _accept_again(self) -> None:
        if self._listener.fileno() >= 0:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
