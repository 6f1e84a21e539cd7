"""The ways to a disk: how each is set up for some jobs, and taken away again. Blocks."""

from __future__ import annotations

import contextlib
import os
import select
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from storaged.api.client import Client
from storaged.backends import find_backend
from storaged.bench import engines
from storaged.bench.consumption import parent_of
from storaged.bench.engines import NoDirect
from storaged.bench.fio import Leave
from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, imagelock
from storaged.host.users import device_users, only_probes
from storaged.images import operand
from storaged.images.commands import virtual_size
from storaged.images.operand import Operand
from storaged.images.provide import provided
from storaged.images.workspace import Workspace
from storaged.model.config import Config
from storaged.model.layout import Layout
from storaged.transports import options_of

#: What the names of all volumes of a benchmark begin with.
PREFIX = "storaged-bench-"
#: Seconds for an attach, and for a detach before force is used.
PATIENCE = 60.0
#: Seconds that the daemon may answer late: it keeps the deadline itself, and then cleans up.
_GRACE = 15.0
#: Settings of a queue that are told.
_QUEUE = ("scheduler", "nr_requests", "read_ahead_kb", "max_sectors_kb", "rotational", "write_cache", "io_poll")


@dataclass(frozen=True)
class Target:
    """A disk that fio can be run on now."""

    words: tuple[str, ...]
    """fio's, that say where."""
    what: str
    size: int | None = None
    """Bytes; None where only fio's engine knows."""
    environment: Mapping[str, str] = field(default_factory=dict)
    inherited: Sequence[int] = ()
    processes: Mapping[str, int] = field(default_factory=dict)
    """Pids of those who serve it, by who they are."""
    server: int | None = None
    """A pidfd of who serves it, where fio does not notice that it is gone."""
    engine: str = ""
    """fio's, where it is what the figures depend on."""
    volume: Mapping[str, Any] = field(default_factory=dict)
    queue: Mapping[str, str] = field(default_factory=dict)
    is_still_there: Callable[[], bool] = lambda: True
    """Whether it is the same disk as before; asked before each job."""


@dataclass(frozen=True)
class Way:
    """A way to the disk, by its name in tables."""

    name: str
    up: Callable[[], contextlib.AbstractContextManager[Target]]
    optional: bool
    """Whether the rest is measured where this host does not have it."""
    lacking: frozenset[ErrorCode] = frozenset({ErrorCode.TRANSPORT_UNAVAILABLE})
    """How it fails where this host does not have it."""
    only_reads: bool = False
    """Jobs that write are left out."""


@dataclass(frozen=True)
class Subject:
    """What is measured."""

    source: str
    """As an attach takes it."""
    options: Mapping[str, str]
    secrets: Mapping[str, str]
    """From standard input, in base64, by the option that says ``-``."""
    one: Operand
    """The same as a command on images takes it."""
    leave: Leave | None
    """Why it may be overwritten; None: it is only read."""
    of_transports: Mapping[str, str] = field(default_factory=dict)
    """Options that are no source's: each way has those that its transport knows."""


class Shop:
    """What all ways share: the daemon, the directories, and what has to be taken away in the end."""

    def __init__(self, layout: Layout, config: Config, place: Workspace, command: str) -> None:
        """``command``: how the user calls storaged, for hints."""
        self.layout, self.config, self.place, self.command = layout, config, place, command
        self._names: set[str] = set()

    @property
    def id(self) -> str:
        """What tells this benchmark from others that run now: the name of its workspace."""
        return os.path.basename(self.place.path)

    def call(self, method: str, parameters: dict[str, Any] | None = None, timeout: float = PATIENCE) -> dict[str, Any]:
        """One call to the daemon, on a connection of its own."""
        with Client(self.layout.socket, command=self.command) as client:
            return client.call(method, parameters, timeout + _GRACE)

    # The direct way ----------------------------------------------------------------------------------------------

    def direct_words(self, subject: Subject, known: frozenset[str]) -> engines.Direct:
        """Return how fio reaches the source by itself, without a look at it. Raises NoDirect."""
        spec = subject.one.spec
        backend = find_backend(spec.source)
        if "encrypt" in spec.options:
            raise NoDirect("fio cannot decrypt an image")
        location = backend.parse(spec.source, spec.options)
        node = backend.node(location, read_only=subject.leave is None, options=spec.options)
        return engines.direct(spec.format, node, known)

    @contextlib.contextmanager
    def direct(self, subject: Subject, known: frozenset[str]) -> Iterator[Target]:
        """Take the locks that an attach would take, for as long as fio may use the source."""
        found = self.direct_words(subject, known)
        one = operand.looked_at(subject.one)
        with contextlib.ExitStack() as stack:
            given = stack.enter_context(provided(
                [one], self.place, self.layout, self.config, owner=f"storaged bench (pid {os.getpid()})"
            ))
            size, words = one.opened.size, found.words
            if one.local_path is not None:
                # What was looked at and locked, whatever has its name by now.
                node = given.nodes[one.spec.name]["file"]
                stack.callback(os.close, imagelock.take(node["filename"], write=subject.leave is not None))
                words = engines.direct(one.spec.format, node, known).words
            else:
                # Not every engine finds out by itself; and what is too small is to be told alike by all ways.
                size = virtual_size(one, given)
                words = (*words, f"--size={size}")
            yield Target(
                words=words, size=size, what=f"fio's engine {found.engine}", engine=found.engine,
                environment={**given.environment, **found.environment}, inherited=given.inherited,
            )

    # Volumes -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def attached(
        self, subject: Subject, transport: str, known: frozenset[str], patience: float = PATIENCE
    ) -> Iterator[Target]:
        """Attach the source as a volume of its own, never persisted, and detach it in the end.

        The attach may take ``patience`` seconds.
        """
        options = {key: value for key, value in subject.of_transports.items() if key in options_of(transport)}
        with (
            self._volume(subject, transport, transport, options, patience) as volume,
            self.held(volume, known) as target,
        ):
            yield target

    @contextlib.contextmanager
    def exported(self, subject: Subject, way: str, queues: int, why: str) -> Iterator[Target]:
        """Attach the source by vhost-user, for fio in the place of a virtual machine, with a queue for each job of it.

        What the kernel does for a device falls out, what QSD does not. ``why`` there is no other direct way is told.
        """
        options = {"queues": str(queues)}
        with self._volume(subject, way, "vhost-user", options, PATIENCE) as volume:
            try:
                server = os.pidfd_open(int(volume["qsd_pid"]))
            except ProcessLookupError as error:
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, "qemu-storage-daemon is gone already", volume=str(volume["name"]),
                    hint="look into the journal",
                ) from error
            try:
                yield Target(
                    words=engines.through_vhost_user(str(volume["socket"])), engine=engines.BLKIO,
                    what=f"fio's engine {engines.BLKIO} on a vhost-user-blk export of QSD {volume.get('qsd_version')}: "
                    f"past the kernel, not past QSD ({why})",
                    size=int(volume["size"]), processes=_processes(volume), server=server, volume=dict(volume),
                    # A pidfd can be read once its process has ended (pidfd_open(2)).
                    is_still_there=lambda: not select.select([server], [], [], 0)[0],
                )
            finally:
                os.close(server)

    @contextlib.contextmanager
    def _volume(
        self, subject: Subject, way: str, transport: str, options: Mapping[str, str], patience: float
    ) -> Iterator[dict[str, Any]]:
        """A volume of our own, called after the way."""
        name = f"{PREFIX}{self.id}-{way}"
        # From here on it may be there, whatever becomes of the answer.
        self._names.add(name)
        try:
            wishes: dict[str, Any] = {
                "name": name, "source": subject.source, "format": str(subject.one.spec.format), "transport": transport,
                "options": {**subject.options, **options}, "timeout": patience,
            }
            if subject.leave is None:
                wishes["read_only"] = True
            if subject.secrets:
                wishes["secrets"] = dict(subject.secrets)
            yield self.call("Attach", wishes, patience)["volume"]
        except BaseException:
            # What happened first is what is told; ``clear`` tries again, and tells.
            with contextlib.suppress(StoragedError):
                self.detach(name)
            raise
        self.detach(name)

    @contextlib.contextmanager
    def held(self, volume: Mapping[str, Any], known: frozenset[str]) -> Iterator[Target]:
        """Keep everybody from mounting a volume's device meanwhile. Raises DEVICE_IN_USE where somebody uses it."""
        name, device = str(volume["name"]), str(volume["device"])
        fd = disk.open_alone(device, lambda: os.path.exists(device), deadline=time.monotonic() + disk.PROBE_PATIENCE)
        try:
            number = disk.diskseq(device)
            now = self.call("Show", {"name": name})["volume"]
            if fd is None or now.get("device") != device or now.get("state") != "online":
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, "its device went away", volume=name, cause=f"it is {now.get('state')}",
                    hint=f"look with: {self.command} show {name}",
                )
            _refuse_users(device)
            engine = next((name for name in engines.LOCAL_ENGINES if name in known), "psync")
            yield Target(
                words=(f"--ioengine={engine}", "--direct=1", f"--filename={device}"),
                what=f"{engine} on {device}, served by QSD {volume.get('qsd_version') or 'of an unknown version'}"
                # storaged sets up such a one where QSD's FUSE export corrupts the data of direct I/O.
                + (", with the page cache below it: blocks that were read before are not asked for again"
                   if disk.attribute(device, "loop/dio") == "0" else ""),
                size=disk.size(device), processes=_processes(volume), volume=dict(volume),
                queue={key: text for key in _QUEUE if (text := disk.attribute(device, f"queue/{key}")) is not None},
                is_still_there=lambda: disk.diskseq(device) == number,
            )
        finally:
            if fd is not None:
                os.close(fd)

    def detach(self, name: str) -> None:
        """Take a volume of this benchmark away, by force if it hangs. Raises DEVICE_IN_USE where somebody uses it."""
        try:
            self.call("Detach", {"name": name, "timeout": PATIENCE})
        except StoragedError as error:
            if error.code is ErrorCode.DEVICE_IN_USE:
                # Not ours to take from them.
                self._names.discard(name)
                error.hint = f"the benchmark's volume stays; when nobody uses it: {self.command} detach {name}"
                raise
            if error.code is not ErrorCode.NO_SUCH_VOLUME:
                self.call("Detach", {"name": name, "timeout": PATIENCE, "force": True})
        self._names.discard(name)

    def clear(self) -> list[str]:
        """Take away what an interruption has left; return what could not be, in sentences."""
        failures = []
        for name in sorted(self._names):
            try:
                self.detach(name)
            except StoragedError as error:
                failures.append(f"the volume {name} is left: {error}; take it away with: {self.command} detach {name}")
        return failures

    def leftovers(self) -> list[str]:
        """Say which volumes are left of benchmarks that were killed."""
        names = [str(volume["name"]) for volume in self.call("List")["volumes"]]
        return [
            f"the volume {name} is left of a benchmark that was killed; take it away with: {self.command} detach {name}"
            for name in names if name.startswith(PREFIX) and not self.runs(name.removeprefix(PREFIX).rpartition("-")[0])
        ]

    def runs(self, id: str) -> bool:
        """Whether a benchmark with that id still runs: workspaces of dead ones were swept when ours was made."""
        return os.path.isdir(os.path.join(os.path.dirname(self.place.path), id)) if id else False


def _refuse_users(device: str) -> None:
    """Raise DEVICE_IN_USE where somebody has it open without O_EXCL, as dd has it; udev's probes are waited for."""
    deadline, pauses = time.monotonic() + disk.PROBE_PATIENCE, disk.pauses_for_probes()
    while users := device_users(device):
        if not only_probes(users) or not disk.patience_is_left(users, deadline):
            raise disk.in_use(device, users)
        time.sleep(next(pauses))


def _processes(volume: Mapping[str, Any]) -> dict[str, int]:
    pid = volume.get("qsd_pid")
    if not isinstance(pid, int):
        return {}
    # One that an earlier daemon has started is a child of init.
    daemon = parent_of(pid)
    return {"qsd": pid, **({"daemon": daemon} if daemon > 1 else {})}
