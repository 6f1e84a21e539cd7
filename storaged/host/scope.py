"""A QSD's own systemd scope: nothing of it is swapped, a minimum of it stays in memory, and it outlives the daemon.

Only where systemd is PID 1. The process is moved after it was started, and nobody waits for that: a successor that
all I/O waits for must not wait for PID 1. It takes no child either, for which there may be no memory.
docs/architecture.md has the reasons, and what cannot be protected so.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from typing import Any

from storaged.errors import StoragedError
from storaged.host import protection
from storaged.host.blocking import BlockingCalls
from storaged.observe.journald import about

#: Bytes of a QSD that are not reclaimed. Under load the scope of one holds 4 to 15 MiB beside the page cache of its
#: image; its program and libraries are 9 MiB, which count where they were read first; the rest is reserve.
MEMORY_MIN = 32 << 20
SLICE = "storaged.slice"
#: Ends, at a shutdown, what is not used any more: after the mounts.
SHUTDOWN = "storaged-shutdown.service"
SYSTEM_BUS = "/run/dbus/system_bus_socket"
#: Path, name on the bus and interface.
_BUS = ("/org/freedesktop/DBus", "org.freedesktop.DBus", "org.freedesktop.DBus")
_SYSTEMD = ("/org/freedesktop/systemd1", "org.freedesktop.systemd1", "org.freedesktop.systemd1.Manager")
#: org.freedesktop.systemd1(5): JobRemoved(id, path of the job, unit, result).
_JOBS = (
    "type='signal',sender='org.freedesktop.systemd1',interface='org.freedesktop.systemd1.Manager',"
    "member='JobRemoved',arg2='{unit}'"
)
_PROPERTIES = "a(sv)"
#: Bytes that may come over one connection. It takes some hundreds; anybody on the bus may send us more.
_MOST = 1 << 20
#: Seconds. Nobody waits for it.
_PATIENCE = 30.0

log = logging.getLogger(__name__)
_calls = BlockingCalls("memory protection")
_told: set[str] = set()
#: The slice's minimum is counted and set by one at a time.
_counting = threading.Lock()


def available() -> bool:
    """Whether systemd is PID 1 (sd_booted(3))."""
    return os.path.isdir("/run/systemd/system")


def unit_name(name: str, pid: int) -> str:
    """The scope of a volume's QSD with that pid.

    Names of volumes need no escaping. Each process has its own: the scope of a dead QSD is still known to systemd when
    its successor runs. The dashes let drop-ins apply: storaged-qsd-.scope.d to all, storaged-qsd-NAME-.scope.d to one.
    """
    return f"storaged-qsd-{name}-{pid}.scope"


async def protect(pid: int, name: str, device: str | None = None, *, memory_min: int = MEMORY_MIN) -> None:
    """Protect a volume's QSD from the OOM killer, and move it into its scope where there is systemd.

    ``device`` is what it serves (/dev/nbd0). Meant for the background: it may take long, and never raises for what goes
    wrong (which is logged, once each). Nothing is changed for a process that has it all already, so an adopted one can
    be protected again.
    """
    protection.spare(pid)
    try:
        await _calls("keep qemu-storage-daemon's program in memory", _PATIENCE, protection.keep_program, pid)
        if available():
            await _calls(
                "move qemu-storage-daemon into its scope", _PATIENCE + 5, enclose, pid, name, device, memory_min
            )
    except (StoragedError, OSError, ImportError) as error:
        _complain(name, error)


def _complain(name: str, error: Exception) -> None:
    text = str(error)
    if text not in _told:
        _told.add(text)
        log.warning(
            "qemu-storage-daemon of %s has no systemd scope of its own, and may be swapped out: %s "
            "(said once; others may follow)", name, text, extra=about(name),
        )


def enclose(pid: int, name: str, device: str | None = None, memory_min: int = MEMORY_MIN) -> None:
    """Move a process into its scope, unless it is there or gone. Blocks. Raises OSError (as TimeoutError), ImportError.
    """
    # Not at the top, because without systemd nobody needs it. But read even if there is nothing to do, for an adopted
    # QSD: memory may be short when its successor comes.
    import jeepney  # noqa: F401

    unit = unit_name(name, pid)
    if _gone_or_in(unit, pid):
        return
    with SystemBus(_PATIENCE) as bus:
        try:
            bus.call(_BUS, "AddMatch", "s", _JOBS.format(unit=unit))
            bus.call(_SYSTEMD, "Subscribe")
            properties = _properties_of(pid, name, device, memory_min)
            try:
                _start(bus, unit, [*properties, ("SurviveFinalKillSignal", ("b", True))])
            except OSError as error:
                if "unknown property" not in str(error):
                    raise
                _start(bus, unit, properties)  # systemd < 255: there is only the "@" (qsd/process.py)
        except OSError:
            if cgroup_of(pid):
                raise
            return  # it died meanwhile
        if not _gone_or_in(unit, pid):
            raise OSError(f"systemd has not moved it, see systemctl status {unit}")
        _set_minimum(bus, cgroup_of(pid), memory_min)
        if device is not None:
            _order(bus, unit, name, device)


def _properties_of(pid: int, name: str, device: str | None, memory_min: int) -> list[tuple[str, tuple[str, Any]]]:
    targets = _targets(name, device)
    return [
        ("Description", ("s", f"qemu-storage-daemon of the storaged volume {name}")),
        ("Slice", ("s", SLICE)),
        ("PIDs", ("au", [pid])),
        # At the shutdown it has to outlive the filesystems on its disk. So has the slice, whose unit file says so.
        ("DefaultDependencies", ("b", False)),
        # systemd.special(7): who uses the device is stopped before these are.
        ("Wants", ("as", targets)),
        ("Before", ("as", targets)),
        ("CollectMode", ("s", "inactive-or-failed")),
        ("CPUAccounting", ("b", True)),
        ("IOAccounting", ("b", True)),
        ("MemoryAccounting", ("b", True)),
        ("MemorySwapMax", ("t", 0)),
        ("MemoryMin", ("t", memory_min)),
        # systemd-oomd does not look at oom_score_adj.
        ("ManagedOOMPreference", ("s", "omit")),
    ]


def _start(bus: SystemBus, unit: str, properties: list[tuple[str, tuple[str, Any]]]) -> None:
    """Start a transient unit, and see it started. Raises OSError."""
    (job,) = bus.call(
        _SYSTEMD, "StartTransientUnit", f"ss{_PROPERTIES}a(s{_PROPERTIES})", unit, "fail", properties, []
    )
    result = bus.result_of(job)
    if result != "done":
        raise OSError(f"systemd's job to start it has ended with {result!r}")


def _targets(name: str, device: str | None) -> list[str]:
    """The targets that mounts of a device are ordered after, by each of its names."""
    return [f"blockdev@{escape_path(path)}.target" for path in (device, f"/dev/storaged/{name}") if path is not None]


def order_unit(name: str, pid: int) -> str:
    """The slice, with nothing in it, by which the mounts of a volume come before its end and the network's at shutdown.

    No dash: it would be below another one.
    """
    return f"storagedvolume_{name.replace('-', _escaped('-'))}_{pid}.slice"


def _order(bus: SystemBus, scope: str, name: str, device: str) -> None:
    """Have the end of the volumes and of the network wait, at a shutdown, for whatever mount of the device there is.

    The daemon itself is not stopped. The scope is never stopped either, so nothing can be ordered by it. A slice is the
    one transient unit that is stopped and needs no process. It goes with the scope.
    """
    pid = int(scope.rpartition(".")[0].rpartition("-")[2])
    unit = order_unit(name, pid)
    bus.call(_BUS, "AddMatch", "s", _JOBS.format(unit=unit))
    _start(bus, unit, [
        ("Description", ("s", f"Mounts of the storaged volume {name} end before it and the network")),
        ("BindsTo", ("as", [scope])),
        ("Before", ("as", _targets(name, device))),
        ("After", ("as", [scope, SHUTDOWN, "network.target", "network-online.target"])),
        ("CollectMode", ("s", "inactive-or-failed")),
    ])


def escape_path(path: str) -> str:
    """A path as the name of a unit has it (systemd-escape --path)."""
    text = path.strip("/")
    escaped = [
        "-" if char == "/" else char if char.isascii() and (char.isalnum() or char in ":_.") else _escaped(char)
        for char in text
    ]
    if text.startswith("."):
        escaped[0] = _escaped(".")
    return "".join(escaped)


def _escaped(char: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in char.encode())


class SystemBus:
    """A connection to D-Bus's system bus. All of it has to end within ``timeout`` seconds of its making.

    jeepney knows the protocol. Its own connections are not used, because they wait without a deadline for the answer
    to Hello, and for a bus that does not take what they send.
    Raises OSError where the bus cannot be reached, ends it or sends what is no message; TimeoutError is one.
    """

    def __init__(self, timeout: float) -> None:
        from jeepney import Parser

        self._deadline = time.monotonic() + timeout
        self._received = 0
        self._serial = 0
        self._parser = Parser()
        self._ended: dict[str, str] = {}
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._limit()
            self._socket.connect(SYSTEM_BUS)
            self._authenticate()
            self.call(_BUS, "Hello")
        except BaseException:
            self._socket.close()
            raise

    def __enter__(self) -> SystemBus:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def call(self, where: tuple[str, str, str], member: str, signature: str | None = None, *arguments: Any) -> Any:
        """Call a method of (path, name, interface), return what it returns. Raises OSError with the error's name."""
        from jeepney import DBusAddress, HeaderFields, MessageType, new_method_call

        self._serial += 1
        self._send(new_method_call(DBusAddress(*where), member, signature, arguments).serialise(self._serial))
        while True:
            message = self._receive()
            fields = message.header.fields
            if fields.get(HeaderFields.reply_serial) == self._serial:
                if message.header.message_type is MessageType.error:
                    raise OSError(f"{fields.get(HeaderFields.error_name)}: {' '.join(map(str, message.body))}")
                return message.body

    def result_of(self, job: str) -> str:
        """Wait until systemd's job has ended, and return how: org.freedesktop.systemd1(5), JobRemoved."""
        while job not in self._ended:
            self._receive()
        return self._ended[job]

    def _authenticate(self) -> None:
        from jeepney.auth import BEGIN, AuthenticationError, Authenticator

        authenticator = Authenticator()
        try:
            for line in authenticator:
                self._send(line)
                authenticator.feed(self._read())
        except AuthenticationError as error:
            raise ConnectionError(f"the system bus refuses us: {error}") from error
        self._send(BEGIN)

    def _receive(self) -> Any:
        """The next message. The end of a job is noted, whatever is waited for."""
        from jeepney import HeaderFields

        while True:
            try:
                message = self._parser.get_next_message()
            except Exception as error:  # jeepney has no errors of its own for that
                raise ConnectionError("the system bus sends what cannot be read") from error
            if message is None:
                self._parser.add_data(self._read())
                continue
            fields = message.header.fields
            if fields.get(HeaderFields.member) == "JobRemoved" and fields.get(HeaderFields.signature) == "uoss":
                self._ended[message.body[1]] = message.body[3]
            return message

    def _send(self, data: bytes) -> None:
        self._limit()
        self._socket.sendall(data)

    def _read(self) -> bytes:
        self._limit()
        data = self._socket.recv(4096)
        if not data:
            raise ConnectionError("the system bus has closed the connection")
        self._received += len(data)
        if self._received > _MOST:
            raise ConnectionError("the system bus sends too much")
        return data

    def _limit(self) -> None:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("no answer over the system bus")
        self._socket.settimeout(left)


def _set_minimum(bus: SystemBus, cgroup: str, memory_min: int) -> None:
    """A minimum counts only as far as that of the slice reaches (cgroup-v2.rst, memory.min)."""
    with _counting:
        try:
            entries = os.listdir(f"/sys/fs/cgroup{os.path.dirname(cgroup)}")
        except FileNotFoundError:
            return  # no cgroup v2, or it is gone
        scopes = sum(entry.endswith(".scope") for entry in entries)
        bus.call(_SYSTEMD, "SetUnitProperties", f"sb{_PROPERTIES}", SLICE, True,
                 [("MemoryMin", ("t", scopes * memory_min))])


def _gone_or_in(unit: str, pid: int) -> bool:
    cgroup = cgroup_of(pid)
    return not cgroup or os.path.basename(cgroup) == unit


def cgroup_of(pid: int) -> str:
    """The path of a process's control group (cgroup v2, or systemd's own), empty if it is gone."""
    try:
        with open(f"/proc/{pid}/cgroup", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    for line in lines:
        hierarchy, controllers, path = line.split(":", 2)
        if hierarchy == "0" or controllers == "name=systemd":
            return path
    return ""
