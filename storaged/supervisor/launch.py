"""Starts the qemu-storage-daemon of a volume: what has to be looked at, locked and written down before it runs."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import msgspec

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend, Requirements
from storaged.errors import ErrorCode, StoragedError
from storaged.host import locks, process, secrets, sshagent
from storaged.host.unixsock import bind_unix, connect_unix
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.build import build_of
from storaged.qsd.process import find_binary, qmp_socket, spawn
from storaged.supervisor import confinement, fetching, opening, overlay
from storaged.supervisor.environment import Environment
from storaged.supervisor.records import write_record
from storaged.transports import TRANSPORTS, choose_transport
from storaged.transports.base import Site


@dataclass(frozen=True)
class Started:
    """A QSD that was just started."""

    opening: opening.Opening | None
    """What it shall open; None for a rescue server."""
    record: Record
    monitor: socket.socket
    pid: int
    pidfd: int
    locks_to: socket.socket | None = None
    """By which it gets locks while it opens the source, where these are not all known yet."""

    def give_up(self) -> None:
        """Nobody waits for this QSD any more, and it has opened nothing yet."""
        if self.locks_to is not None:
            self.locks_to.close()
        self.monitor.close()
        process.kill(self.pidfd)
        os.close(self.pidfd)


def launch(
    spec: VolumeSpec, former: Record | None, site: Site, environment: Environment, *, timeout: float,
    given_up: threading.Event, progress: Callable[[int, int | None], None],
) -> Started:
    """Look at the source, take its locks, write the record and start QSD with a monitor only. Blocks.

    ``former`` is the record of a QSD that is gone: its successor gets the same transport, settings and program, and
    must find the same source. ``progress`` is told how many bytes of a source that is fetched first have come, and of
    how many. Raises SOURCE_CHANGED, SOURCE_IN_USE, NAME_TAKEN, TRANSPORT_UNAVAILABLE, QSD_MISSING,
    and what ``opening.inspect`` raises.
    """
    deadline = time.monotonic() + timeout
    configured = environment.config.qsd.binary_for(find_backend(spec.source).name)
    binary = find_binary((former.binary if former else "") or configured)
    wanted = opening.inspect(spec)
    fetching.check_program(spec, build_of(binary).version)
    if given_up.is_set():
        # The source let this thread hang for so long that the volume may be gone by now.
        raise StoragedError(ErrorCode.HOST_STUCK, "too late")
    if former is not None and former.sources and not opening.is_same(wanted, former.sources):
        raise StoragedError(
            ErrorCode.SOURCE_CHANGED, "the source is not the one that was attached",
            cause="it was replaced or moved while qemu-storage-daemon was down",
            hint="bring the old one back; or detach the volume and attach it again",
        )
    if former is not None and former.size:
        fetching.refuse_lost_copy(spec, environment.layout)
    locked = wanted
    if former is not None and wanted.is_open_ended:
        # All that its predecessor had, before the headers tell whether it is still so.
        locked = replace(wanted, sources={**wanted.sources, **former.sources})
    environment.claims.hold(spec.name, locked.sources)
    held: list[int] = []
    try:
        if former is None:
            build = build_of(binary)
            transport, why = choose_transport(spec.transport, build, max(0.1, deadline - time.monotonic()))
            record = Record(
                spec=spec, transport=transport.name, transport_reason=why, binary=binary,
                settings=transport.settings(spec, build), settled=True,
            )
        else:
            transport = TRANSPORTS[former.transport]
            record = msgspec.structs.replace(
                # It has acknowledged nothing yet. (Of its predecessor's losses the record says "lost" by now.)
                former, binary=binary, process=None, qsd_version="", rescue=False, settled=True
            )
        held += take_names(site, transport.claims(site), environment.lock_directory)
        if former is None:
            transport.refuse_foreign(site)
        held += opening.take(locked, environment.lock_directory, owner_of(site))
        if given_up.is_set():
            # Modules or netlink let this thread hang for so long.
            raise StoragedError(ErrorCode.HOST_STUCK, "too late")
        wanted = fetching.fetch(
            spec, wanted, environment.layout, deadline=deadline, stop=given_up, progress=progress
        )
        place = _reserve_overlay(spec, environment) if spec.snapshot else None
        record = msgspec.structs.replace(record, sources=dict(locked.sources), overlay=place)
        return _run(record, wanted, site, environment, held)
    finally:
        for fd in held:
            os.close(fd)


def launch_rescue(former: Record, site: Site, environment: Environment) -> Started:
    """Start a QSD in the place of a dead one that shall open nothing of the volume's. Blocks."""
    held = take_names(site, TRANSPORTS[former.transport].claims(site), environment.lock_directory)
    try:
        record = msgspec.structs.replace(former, process=None, qsd_version="", rescue=True)
        return _run(record, None, site, environment, held)
    finally:
        for fd in held:
            os.close(fd)


def _run(
    record: Record, wanted: opening.Opening | None, site: Site, environment: Environment, held: list[int]
) -> Started:
    directory = site.directory
    os.makedirs(os.path.join(directory, "tmp"), mode=0o700, exist_ok=True)
    further = _provide(wanted.requirements, record.spec, directory) if wanted is not None else {}
    locks_to: socket.socket | None = None
    with contextlib.ExitStack() as ends:
        cell = _cell(record, wanted, site, environment)
        for fd in cell.held:
            ends.callback(os.close, fd)
        held = [*held, *cell.held]
        record = msgspec.structs.replace(record, confinement=cell.told, sockets=confinement.SOCKETS)
        if wanted is not None:
            _show_files(wanted.requirements, directory, cell.told.uid if cell.told is not None else 0)
        write_record(directory, record)
        environment.fault("start: recorded")
        listener = ends.enter_context(bind_unix(qmp_socket(directory), mode=0o600))
        if wanted is not None and wanted.is_open_ended:
            locks_to, kept = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            held = [*held, ends.enter_context(kept).fileno()]
        # In the backlog before QSD is there: it is served as soon as its main loop runs.
        monitor = connect_unix(qmp_socket(directory))
        objects = TRANSPORTS[record.transport].objects(record)
        pid, pidfd = spawn(
            record.binary, directory, listener, held, further, objects=objects,
            secret=wanted is not None and _holds_secrets(wanted, record.spec), sandbox=cell.sandbox,
        )
    environment.fault("start: spawned")
    return Started(wanted, record, monitor, pid, pidfd, locks_to)


def _show_files(needed: Requirements, directory: str, uid: int) -> None:
    """Let QSD, with this user, read what was put into its directory for it."""
    for name in (*needed.files, *needed.secret_files) if uid else ():
        os.chown(os.path.join(directory, name), 0, uid)
        os.chmod(os.path.join(directory, name), 0o640)


def _cell(
    record: Record, wanted: opening.Opening | None, site: Site, environment: Environment
) -> confinement.Cell:
    """Decide what QSD is left of the host: all of it where the administrator says so, or the daemon is not root."""
    if environment.config.qsd.sandbox and os.geteuid() == 0:
        return confinement.prepare(record, wanted, site, environment.lock_directory, owner_of(site))
    return confinement.open_cell(site.directory)


def _holds_secrets(wanted: opening.Opening, spec: VolumeSpec) -> bool:
    # A client library reads keys of its own, too: Ceph's keyring.
    return bool(wanted.requirements.secrets) or isinstance(find_backend(spec.source), NetworkBackend)


def _provide(needed: Requirements, spec: VolumeSpec, directory: str) -> dict[str, str]:
    """Put what QSD will read into its directory, start its ssh-agent; return what its environment must have.

    Raises OPEN_FAILED.
    """
    opening.put_files(needed, spec, directory)
    environment = dict(needed.environment)
    if needed.agent_key:
        key = secrets.read(needed.agent_key, spec.options[needed.agent_key], directory)
        environment["SSH_AUTH_SOCK"] = sshagent.ensure(directory, key)
    return environment


def take_names(site: Site, names: tuple[str, ...], directory: str) -> list[int]:
    """Lock names that are the host's: another daemon may have a volume of the same name."""
    held: list[int] = []
    for name in names:
        try:
            held.append(locks.take_lock(directory, name, exclusive=True, owner=owner_of(site)))
        except StoragedError as error:
            for fd in held:
                os.close(fd)
            raise StoragedError(
                ErrorCode.NAME_TAKEN, f"the name {site.bus_name} is taken on this host", cause=error.cause,
                hint="choose another name for the volume, or --transport fuse", users=error.users,
            ) from error
    return held


def _reserve_overlay(spec: VolumeSpec, environment: Environment) -> str:
    limit = overlay.limit_of(spec)
    snapshots = environment.layout.snapshots_dir
    place = overlay.reserve(snapshots, spec.snapshot_dir or environment.config.snapshot_dir, spec.name)
    mark = overlay.locate(snapshots, spec.name)
    if mark is not None and not mark.inode:
        # Now, and not when it is opened: QSD reaches only files that are there when it is started.
        overlay.create_new(place, limit)
    return place


def owner_of(site: Site) -> str:
    """What an error about a lock calls the volume that holds it."""
    return f"volume {site.name} ({site.directory})"
