"""The daemon: configuration, stores, manager and API, put together and taken apart."""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import fcntl
import gc
import grp
import logging
import os
import resource
import signal
import socket
from dataclasses import replace

import uvloop

from storaged.api.access import Readers
from storaged.api.server import Server
from storaged.api.storageserver import ProviderServer
from storaged.errors import ErrorCode, StoragedError
from storaged.host import heap, locks
from storaged.host.configfiles import load_config
from storaged.host.protection import protect_daemon
from storaged.host.servicemanager import ServiceManager
from storaged.host.unixsock import bind_unix
from storaged.model.config import Config
from storaged.model.layout import LOCK_DIR, Layout
from storaged.observe import journald
from storaged.observe.serving import serve_metrics
from storaged.store.local import LocalStore
from storaged.supervisor import confinement
from storaged.supervisor.environment import Environment
from storaged.supervisor.events import EventHub
from storaged.supervisor.faults import fault_from_environment
from storaged.supervisor.manager import Manager
from storaged.supervisor.reloading import reload
from storaged.supervisor.watchdog import watch

log = logging.getLogger("storaged")


def run(layout: Layout, config_file: str | None) -> int:
    """Run the daemon until SIGTERM or SIGINT and return its exit status. Volumes stay attached."""
    # Whatever the umask of who starts it: modes are said where directories and sockets are made.
    os.umask(0o022)
    heap.keep_small()
    # The watchdog ends a daemon that stands still by SIGABRT: where it stood is in the journal then.
    faulthandler.enable()
    service = ServiceManager()
    config = load_config(layout, config_file)
    confinement.pin_places()
    group, readers = _group(config), _readers(config)
    journald.set_up(config.log_level.upper())
    # Before there is a second thread: it would not inherit what this one gets.
    for failure in protect_daemon():
        log.warning("%s", failure)
    # The kernel shows paths without symbolic links; ours must read the same.
    for directory, mode in ((layout.run_dir, 0o755), (layout.state_dir, 0o700), (layout.dev_dir, 0o755)):
        _make_directory(directory, mode)
    layout = replace(
        layout, run_dir=os.path.realpath(layout.run_dir), state_dir=os.path.realpath(layout.state_dir)
    )
    _raise_descriptor_limit()
    lock = _lock_out_others(layout)
    try:
        uvloop.run(_serve(layout, config, config_file, group, readers, service))
    finally:
        os.close(lock)
    return 0


async def _serve(
    layout: Layout, config: Config, config_file: str | None, group: int, readers: Readers, service: ServiceManager
) -> None:
    stop = asyncio.Event()
    hang_up = asyncio.Event()
    for number, event in ((signal.SIGTERM, stop), (signal.SIGINT, stop), (signal.SIGHUP, hang_up)):
        asyncio.get_running_loop().add_signal_handler(number, event.set)
    environment = Environment(
        layout=layout, config=config, persistent=LocalStore(layout.desired_persistent),
        volatile=LocalStore(layout.desired_volatile), events=EventHub(), lock_directory=LOCK_DIR,
        fault=fault_from_environment(), config_file=config_file,
    )
    listener, ours = _listen(layout, service)
    os.chown(layout.socket, -1, group)
    # Also of a socket that the service manager keeps: another configuration may have let more in.
    os.chmod(layout.socket, readers.socket_mode)
    async with asyncio.TaskGroup() as tasks:
        manager = Manager(environment, tasks)
        server = Server(manager, listener, group, readers)
        # Modules and classes are there for ever: no collection of garbage has to look through them again.
        gc.collect()
        gc.freeze()
        await manager.start()
        server.start()
        provider = ProviderServer(manager, layout)
        metrics = tasks.create_task(serve_metrics(manager), name="metrics")
        log.info(
            "ready, %d volumes, socket %s", len(manager.volumes()), layout.socket, extra=journald.about(event="ready")
        )
        service.tell("READY=1")
        watchdog = tasks.create_task(watch(manager, service), name="watchdog")
        reloads = tasks.create_task(_reload_when(hang_up, manager, service), name="reload")
        await stop.wait()
        log.info("ending; volumes stay attached", extra=journald.about(event="ending"))
        service.tell("STOPPING=1", "STATUS=ending; volumes stay attached")
        watchdog.cancel()
        metrics.cancel()
        reloads.cancel()
        await provider.close()
        await server.close()
        if ours:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(layout.socket)
        for task in manager.actors():
            task.cancel()


async def _reload_when(asked: asyncio.Event, manager: Manager, service: ServiceManager) -> None:
    """SIGHUP: what is wrong with the files is in the log, and the daemon goes on with what it has."""
    while True:
        await asked.wait()
        asked.clear()
        service.tell_reloading()
        with contextlib.suppress(StoragedError):
            await reload(manager)
        service.tell("READY=1")


def _listen(layout: Layout, service: ServiceManager) -> tuple[socket.socket, bool]:
    """The API's socket, and whether it was made here: one that the service manager has made outlives us."""
    try:
        listener = service.take_listener(layout.socket)
    except ValueError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "the service manager's socket cannot be used", cause=str(error),
            hint="correct ListenStream= in storaged.socket",
        ) from error
    return (bind_unix(layout.socket, mode=0o660), True) if listener is None else (listener, False)


def _group(config: Config) -> int:
    return os.getegid() if config.socket_group is None else _number_of(config.socket_group, "socket_group")


def _readers(config: Config) -> Readers:
    groups = frozenset(_number_of(name, "[access] read_only") for name in config.access.groups)
    return Readers(config.access.read_only == "everybody", groups)


def _number_of(group: str, key: str) -> int:
    try:
        return grp.getgrnam(group).gr_gid
    except KeyError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"there is no group {group!r}",
            hint=f"create it (groupadd --system), or correct {key} in storaged.toml",
        ) from error


def _raise_descriptor_limit() -> None:
    """Each volume and each client needs some: take all that the hard limit allows."""
    _soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_directory(path: str, mode: int) -> None:
    try:
        os.makedirs(path, mode=mode, exist_ok=True)
    except OSError as error:
        raise StoragedError(
            ErrorCode.PERMISSION_DENIED, f"cannot create {path}", cause=error.strerror or "",
            hint="run the daemon as root, or give it a --root that it may write to",
        ) from error


def _lock_out_others(layout: Layout) -> int:
    """One daemon per root: return the descriptor that holds its lock. Raises DAEMON_RUNNING.

    A daemon that was killed while the kernel holds a thread of it, on a device that hangs, keeps its descriptors, and
    does nothing any more: its lock file is replaced.
    """
    path = os.path.join(layout.run_dir, "daemon.lock")
    directory = os.open(layout.run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # One at a time: two that replace the file would both have a lock.
        fcntl.flock(directory, fcntl.LOCK_EX)
        for _ in range(2):
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return fd
            except BlockingIOError:
                dying = locks.holders_are_dying(fd)
                os.close(fd)
                if not dying:
                    break
                log.warning("an earlier daemon was killed and cannot end, because the kernel holds a thread of it")
                os.unlink(path)
    finally:
        os.close(directory)
    raise StoragedError(
        ErrorCode.DAEMON_RUNNING, "another storaged runs here", cause=f"it holds {path}",
        hint="end it first, or use another --root",
    )
