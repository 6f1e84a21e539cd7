"""Keeps the daemon and its QSDs going while the host has no memory left, and their memory to themselves.

prctl(2), proc(5), mlockall(2), core(5).

A host that is short of memory writes dirty pages back and swaps, and with a userspace disk both wait for a process that
needs memory itself. So neither QSD nor the daemon, which starts a dead QSD's successor while everything waits for it,
may wait for a disk when it allocates, be chosen by the OOM killer, or be read back from swap.
docs/architecture.md has the reasons for each.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import resource
import threading
from collections.abc import Iterator

#: include/uapi/linux/prctl.h, Linux 5.6. Sets PF_MEMALLOC_NOIO and PF_LOCAL_THROTTLE of the calling thread.
_PR_SET_IO_FLUSHER = 57
_PR_SET_DUMPABLE = 4
#: include/uapi/asm-generic/mman.h; MCL_ONFAULT is Linux 4.4.
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
#: CAP_SYS_RESOURCE in include/uapi/linux/capability.h.
_SYS_RESOURCE = 24
#: A limit of a core, in bytes; 1 counts for one that goes to a program (systemd-coredump), too: vfs_coredump in
#: fs/coredump.c.
NO_CORE = 1
_WITHOUT = "the container or the service must leave CAP_SYS_RESOURCE to the daemon"

#: The daemon is killed for want of memory after all others, a QSD never: oom_score_adj in proc(5). What else the daemon
#: starts inherits its value, and so is never what cannot be killed.
DAEMON_SCORE = -900
QSD_SCORE = -1000

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mlock.argtypes = _libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
_NO_ADDRESS = ctypes.c_void_p(-1).value

#: What keep_program has locked: device and inode, offset, length.
_kept: set[tuple[str, str, int, int]] = set()
_keeping = threading.Lock()
_limiting = threading.Lock()


def protect_daemon() -> list[str]:
    """Protect this process, and what it starts from now on; return what could not be had, in sentences.

    Must be called before there is a second thread: threads and processes inherit from the thread that makes them.
    """
    failures = []
    if os.geteuid() == 0:
        # Secrets go through it: it writes no core. Another user would lose what is its own in /proc.
        _libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)
    if (error := _become_io_flusher()) is not None:
        failures.append(
            f"neither qemu-storage-daemon nor the daemon can be made an I/O flusher ({error}), and may wait for their "
            f"own disks when memory is short: {_WITHOUT}"
        )
    if (error := _lower_score("self", DAEMON_SCORE)) is not None:
        failures.append(
            f"neither qemu-storage-daemon nor the daemon can be protected from the OOM killer ({error}): {_WITHOUT}"
        )
    if (error := _lock_memory()) is not None:
        failures.append(f"the daemon's memory cannot be locked and may be swapped out ({error}): {_WITHOUT}")
    return failures


def spare(pid: int) -> None:
    """Keep the OOM killer away from a QSD. Where that is not allowed ``protect_daemon`` has said so; it may be gone."""
    _lower_score(str(pid), QSD_SCORE)


def write_no_core(pid: int) -> None:
    """Have a process that will hold secrets write none of its memory to a file when it crashes. It may be gone.

    That of another user stays as it was started (``without_core``), where the daemon has no CAP_SYS_RESOURCE.
    """
    with contextlib.suppress(ProcessLookupError, PermissionError):
        resource.prlimit(pid, resource.RLIMIT_CORE, (NO_CORE, NO_CORE))


@contextlib.contextmanager
def without_core() -> Iterator[None]:
    """Have what is started meanwhile write no core, whoever it will be: of another user's process only CAP_SYS_RESOURCE
    could say so later. See ``write_no_core``.
    """
    # One at a time: the next would take the limit of the first for what was there before.
    with _limiting:
        before = resource.getrlimit(resource.RLIMIT_CORE)
        least = NO_CORE if before[1] == resource.RLIM_INFINITY else min(NO_CORE, before[1])
        resource.setrlimit(resource.RLIMIT_CORE, (least, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_CORE, before)


def keep_program(pid: int) -> None:
    """Keep the program of a QSD and its libraries in memory, as long as this process lives. Blocks, and may read.

    They are pages of files, the same for all who map them, and so can be locked from here: a page that one locks is
    evicted for nobody. No QSD then waits for the disk that its program is on, nor does the start of a successor.
    """
    try:
        with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as file:
            lines = file.read().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return
    for line in lines:
        addresses, mode, offset, device, inode, *path = line.split(maxsplit=5)
        if "w" in mode or inode == "0" or not path or not path[0].startswith("/"):
            continue
        begin, end = (int(address, 16) for address in addresses.split("-"))
        known = (device, inode, int(offset, 16), end - begin)
        # One at a time: many volumes are protected at once, and each page is to be locked once.
        with _keeping:
            # By map_files: the path may lead to a newer file by now.
            if known not in _kept and _keep(f"/proc/{pid}/map_files/{addresses}", known[2], known[3]):
                _kept.add(known)


def _keep(path: str, offset: int, length: int) -> bool:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return False  # it has ended, or its mappings are not ours to see
    try:
        address = _libc.mmap(None, length, mmap.PROT_READ, mmap.MAP_SHARED, fd, offset)
    finally:
        os.close(fd)
    if address == _NO_ADDRESS:
        return False
    if _libc.mlock(address, length) != 0:
        _libc.munmap(address, length)
        return False
    return True


def may_protect() -> bool:
    """Whether this process has CAP_SYS_RESOURCE, without which there is no protection."""
    with open("/proc/self/status", encoding="ascii") as file:
        for line in file:
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) >> _SYS_RESOURCE & 1)
    return False


def _become_io_flusher() -> str | None:
    """The calling thread: its allocations start no I/O and wait for none; its writes wait for their own disk alone.

    Inherited by threads and processes (copy_process in kernel/fork.c) and kept by execve(2) (begin_new_exec in
    fs/exec.c): so a QSD has it with all of its threads.
    """
    return None if _libc.prctl(_PR_SET_IO_FLUSHER, 1, 0, 0, 0) == 0 else os.strerror(ctypes.get_errno())


def _lower_score(who: str, score: int) -> str | None:
    try:
        # Unbuffered: the error must not come with the close.
        with open(f"/proc/{who}/oom_score_adj", "r+b", buffering=0) as file:
            if int(file.read()) > score:
                file.write(str(score).encode())
    except OSError as error:
        return error.strerror or str(error)
    return None


def _lock_memory() -> str | None:
    """Keep in memory what is there once: the program, its libraries, its data. Children do not inherit it."""
    try:
        # A limit would make allocations fail later on. Without one, locking cannot fail any more.
        resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    except (OSError, ValueError) as error:
        return str(error)
    # ONFAULT: not the 8 MiB of each thread's stack that nobody uses.
    locked = _libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT)
    return None if locked == 0 else os.strerror(ctypes.get_errno())
