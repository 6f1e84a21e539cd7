"""What the qemu-storage-daemon of a volume is left of the host: its user, capabilities, files and system calls.

Blocks. docs/security.md says what somebody who has taken it over can do then.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import landlock, locks, sandbox, seccomp
from storaged.host.landlock import OWN, READ, RUN, WRITE, Rule
from storaged.host.sandbox import Sandbox
from storaged.model import backingsources
from storaged.model.formats import Format
from storaged.model.powers import FIRST_USER, LAST_USER, USERS, Powers
from storaged.model.record import Confinement, Record
from storaged.qsd.process import pidfile
from storaged.supervisor import overlay
from storaged.supervisor.opening import Opening
from storaged.transports import TRANSPORTS
from storaged.transports.base import Site

#: Of the volume's directory, the part that is QSD's own: its TMPDIR, and its sockets.
SOCKETS = "tmp"
_TRIES = 64
#: Bytes of a configuration of Ceph that are read.
_LONGEST_CONF = 1 << 20

_PROGRAMS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
#: Where programs are that come from elsewhere: one that is below needs all of it.
_STORES = ("/opt", "/nix/store", "/gnu/store")
#: The modules of a QEMU that was upgraded meanwhile (Debian).
_OLD_MODULES = "/run/qemu"
_SYSTEM = ("/proc", "/sys/block", "/sys/class", "/sys/dev", "/sys/devices", "/dev/random", "/dev/urandom")
_NOTHING = ("/dev/null", "/dev/zero", "/dev/full")
#: What programs and libraries read that reach nobody.
_SETTINGS = tuple(f"/etc/{name}" for name in (
    "ld.so.cache", "ld.so.conf", "ld.so.conf.d", "ld.so.preload", "localtime", "nsswitch.conf", "passwd", "group",
    "ssl/openssl.cnf", "gnutls", "crypto-policies",
))
#: What those read that reach servers. All of /etc, and no single files: who writes a new resolv.conf puts another file
#: in its place, and a rule is about the file that was there.
_NETWORK = (
    "/etc", "/run/systemd/resolve", "/run/resolvconf", "/run/NetworkManager", "/run/connman",
)
_NETWORK_DATA = ("/var/lib/ca-certificates", "/var/lib/sss/mc")

_MOUNT = ("mount", "umount2")
_IO_URING = ("io_uring_setup", "io_uring_enter", "io_uring_register")
#: Never needed, and useful to who wants more than he has. mknod, truncate: QSD makes no devices, and truncates what it
#: has open; Landlock knows the latter only since Linux 6.2.
_NEVER = (
    "ptrace", "process_vm_readv", "process_vm_writev", "pidfd_getfd", "kcmp", "bpf", "perf_event_open", "userfaultfd",
    "setns", "unshare", "chroot", "pivot_root", "open_tree", "open_tree_attr", "move_mount", "fsopen", "fsconfig",
    "fsmount", "fspick", "mount_setattr", "name_to_handle_at", "open_by_handle_at", "fanotify_init", "mknod", "mknodat",
    "truncate", "init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon",
    "swapoff", "quotactl", "quotactl_fd", "acct", "add_key", "request_key", "keyctl", "syslog", "settimeofday",
    "clock_settime", "clock_adjtime", "adjtimex", "sethostname", "setdomainname", "vhangup", "personality",
    "modify_ldt", "iopl", "ioperm", "uselib", "lookup_dcookie",
)


@dataclass(frozen=True)
class Cell:
    """What one QSD is put into."""

    sandbox: Sandbox | None
    """None: it has all that the daemon has."""
    told: Confinement | None
    held: tuple[int, ...] = ()
    """Descriptors that it inherits: the lock on its user."""


def open_cell(directory: str) -> Cell:
    """Return what a QSD gets that may do all that the daemon may."""
    if os.geteuid() == 0:
        give_directory(directory, 0)
    return Cell(None, None)


def prepare(record: Record, wanted: Opening | None, site: Site, lock_directory: str, owner: str) -> Cell:
    """Decide what the QSD of a volume gets, and make that of its directory its own. ``wanted``: None for a rescue.

    The files that it has to read must be in the directory by now. Raises INTERNAL where the directory cannot be given
    to it.
    """
    powers = TRANSPORTS[record.transport].powers(site)
    reaches_servers = False
    if wanted is not None:
        backend = find_backend(record.spec.source)
        if isinstance(backend, NetworkBackend) and not _is_local(wanted):
            reaches_servers = True
            location = backend.parse(record.spec.source, record.spec.options)
            powers = powers.and_of(backend.powers(location, record.spec.options))
        if wanted.is_open_ended:
            reaches_servers = True
            powers = backingsources.powers(record.spec, powers)
    lacks = [f"it is root because {powers.root}"] if powers.root else []
    held: list[int] = []
    uid = 0
    if not powers.root:
        problem = sandbox.lacking(LAST_USER)
        if problem:
            lacks.append(f"it is root because {problem}")
        else:
            uid, lock = _user(site.directory, lock_directory, owner)
            held.append(lock)
    try:
        return _prepare(record, wanted, site, powers, uid, tuple(held), lacks, reaches_servers)
    except BaseException:
        for fd in held:
            os.close(fd)
        raise


def _prepare(
    record: Record, wanted: Opening | None, site: Site, powers: Powers, uid: int, held: tuple[int, ...],
    lacks: list[str], reaches_servers: bool,
) -> Cell:
    files = [
        (os.path.join(site.directory, SOCKETS), os.R_OK | os.W_OK | os.X_OK), (record.binary, os.R_OK | os.X_OK),
        *((path, os.R_OK | os.W_OK if written else os.R_OK) for path, written in _files(record, wanted)),
        *(
            (path, os.R_OK | os.W_OK if written else os.R_OK) for path, written in powers.files
            if os.path.exists(path)
        ),
    ]
    if any(written and not os.path.exists(path) for path, written in powers.files):
        # A socket whose server is away: whose it will be is not known.
        powers = replace(powers, capabilities=powers.capabilities | {"DAC_OVERRIDE"})
    if wanted is not None and wanted.is_open_ended and record.spec.allowed_backing:
        # Which of the files there it opens is not known yet.
        further = "DAC_OVERRIDE" if record.spec.writes_source else "DAC_READ_SEARCH"
        powers = replace(powers, capabilities=powers.capabilities | {further})
    give_directory(site.directory, uid)
    found = _least(powers.capabilities, uid, files)
    if found is None and uid:
        lacks.append("it is root because another user cannot reach all that it needs, as on a server")
        uid = 0
        give_directory(site.directory, uid)
        found = _least(powers.capabilities, uid, files)
    if found is None:
        # Nobody can, and QSD will say so.
        found = Sandbox(uid, sandbox.had(powers.capabilities | {"DAC_OVERRIDE"}))
    rules: tuple[Rule, ...] | None = None
    version = landlock.abi()
    if powers.all_files:
        lacks.append(powers.all_files)
    elif not version:
        lacks.append("this kernel has no Landlock, or it is switched off")
    else:
        rules = tuple(_rules(record, wanted, site, powers, reaches_servers))
    filter = seccomp.program(_denied(record, powers, reaches_servers), _families(record, powers, reaches_servers, uid))
    if not filter:
        lacks.append("the system calls of this machine are not known")
    told = Confinement(
        uid=uid, capabilities=sorted(found.capabilities), landlock=version if rules is not None else 0,
        filtered=bool(filter), lacks=lacks,
    )
    return Cell(Sandbox(uid, found.capabilities, rules, filter), told, held)


def give_directory(directory: str, uid: int) -> None:
    """Let QSD, with this user (0: root), go through the volume's directory, write to its part of it, and no more."""
    try:
        own = os.path.join(directory, SOCKETS)
        os.makedirs(own, mode=0o700, exist_ok=True)
        if uid:
            # Whose names are no secret (/dev/storaged), and who may go through one is said there.
            os.chmod(os.path.dirname(directory), 0o711)
        os.chown(directory, 0, uid)
        os.chmod(directory, 0o710 if uid else 0o700)
        os.chown(own, uid, uid)
        os.close(os.open(pidfile(directory), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
        os.chown(pidfile(directory), uid, uid)
    except OSError as error:
        raise StoragedError(
            ErrorCode.INTERNAL, "the volume's directory cannot be given to qemu-storage-daemon", cause=str(error),
            hint="say sandbox = false in [qsd] of storaged.toml",
        ) from error


def pin_places() -> None:
    """Look up what every QSD may reach, while the host's storage answers: a successor's start does not wait for it.

    Not what is replaced by another file now and then, or comes later: /etc and /run. Blocks.
    """
    landlock.pin((*_PROGRAMS, *_NETWORK_DATA))


def _is_below(path: str, directory: str) -> bool:
    return path.startswith(directory + "/")


def _is_local(wanted: Opening) -> bool:
    """A source that was fetched is a file of this host."""
    return bool(wanted.paths)


def _user(directory: str, lock_directory: str, owner: str) -> tuple[int, int]:
    """Return a user that no other QSD of the host has, and a descriptor of the lock on it. The same each time, if so.

    Who could be two volumes' could trace the one from the other.
    """
    begin = int.from_bytes(hashlib.sha256(directory.encode(errors="surrogateescape")).digest()[:4])
    for number in range(begin, begin + _TRIES):
        uid = FIRST_USER + number % USERS
        try:
            return uid, locks.take_lock(lock_directory, f"user:{uid}", exclusive=True, owner=owner)
        except StoragedError as error:
            if error.code is not ErrorCode.SOURCE_IN_USE:
                raise
    raise StoragedError(ErrorCode.INTERNAL, f"{_TRIES} users in a row are taken by other volumes")


def _least(capabilities: frozenset[str], uid: int, files: list[tuple[str, int]]) -> Sandbox | None:
    """Return the least that opens all the files; None where no capability helps."""
    for further in (frozenset[str](), frozenset({"DAC_READ_SEARCH"}), frozenset({"DAC_OVERRIDE"})):
        tried = Sandbox(uid, sandbox.had(capabilities | further))
        files = sandbox.unreachable(tried, files)
        if not files:
            return tried
    return None


def _files(record: Record, wanted: Opening | None) -> Iterator[tuple[str, bool]]:
    """The files of this host that it has to open, and whether it writes to each."""
    if wanted is None:
        return
    yield from wanted.paths
    if record.overlay is not None:
        complete = os.path.lexists(record.overlay)
        yield record.overlay if complete else overlay.new_file(record.overlay), True


def _keyrings(conf: str) -> Iterator[str]:
    """What a configuration of Ceph calls a keyring; where it leaves a part of the name open ($name), the directory."""
    try:
        with open(conf, encoding="utf-8", errors="surrogateescape") as file:
            text = file.read(_LONGEST_CONF)
    except OSError:
        return  # Ceph will say so
    for words in re.findall(r"^[ \t]*keyring[ \t]*=(.*)$", text, re.MULTILINE):
        for path in re.split(r"[,;\s]+", words):
            if path.startswith("/"):
                yield path if "$" not in path else os.path.dirname(path.partition("$")[0] + "x")


def _rules(
    record: Record, wanted: Opening | None, site: Site, powers: Powers, reaches_servers: bool
) -> Iterator[Rule]:
    for path in (*_PROGRAMS, _OLD_MODULES, record.binary):
        yield Rule(path, RUN)
    program = os.path.realpath(record.binary)
    for store in _STORES:
        if _is_below(program, store):
            yield Rule(store, RUN)
    if not any(_is_below(program, path) for path in _PROGRAMS):
        # Beside a program of another place are its libraries and its data.
        prefix = os.path.dirname(os.path.dirname(program))
        for name in ("bin", "lib", "lib64", "libexec", "share"):
            yield Rule(os.path.join(prefix, name), RUN)
    outside = (*_NETWORK, *_NETWORK_DATA) if reaches_servers else _SETTINGS
    for path in (*_SYSTEM, *outside, *powers.reads):
        yield Rule(path, READ)
    for conf in powers.keyrings_of:
        for path in _keyrings(conf):
            yield Rule(path, READ)
    for path in (*_NOTHING, *powers.uses):
        yield Rule(path, WRITE)
    for path in powers.sockets:
        os.makedirs(path, mode=0o711, exist_ok=True)
        yield Rule(path, landlock.SOCKETS)
    yield Rule(site.directory, READ)
    yield Rule(os.path.join(site.directory, SOCKETS), OWN)
    yield Rule(pidfile(site.directory), WRITE)
    for path, written in _files(record, wanted):
        yield Rule(path, WRITE if written else READ)
    if wanted is not None and wanted.is_open_ended:
        for path in record.spec.allowed_backing:
            yield Rule(path, WRITE if record.spec.writes_source else READ)


def _denied(record: Record, powers: Powers, reaches_servers: bool) -> Iterator[str]:
    yield from _NEVER
    if not powers.mounts:
        yield from _MOUNT
    if record.spec.options.get("aio") != "io_uring":
        # Which does what this filter refuses: it looks at system calls only.
        yield from _IO_URING
    if not reaches_servers:
        yield "connect"


def _families(record: Record, powers: Powers, reaches_servers: bool, uid: int) -> tuple[int, ...]:
    """The sockets that it makes. Root without capabilities is still root to who looks at the user of a unix socket."""
    if not reaches_servers:
        return seccomp.UNIX
    serves = record.transport in ("nbd", "vhost-user")
    exports_aside = record.spec.format is not Format.RAW or record.spec.snapshot
    # Who may mount has other ways.
    if uid or serves or exports_aside or powers.connects_unix or powers.mounts:
        return seccomp.UNIX + seccomp.NETWORK
    return seccomp.NETWORK
