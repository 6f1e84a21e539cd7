"""System calls by their number: those that glibc does for all threads at once, and those that a filter names.

setresuid(2) of glibc changes every thread (nptl(7)); the kernel's own changes the calling thread alone.
"""

from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Mapping

#: arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h: name → number on x86_64, and on
#: those that have the generic table.
_TABLE: Mapping[str, tuple[int, int]] = {
    "socket": (41, 198), "connect": (42, 203), "truncate": (76, 45), "ptrace": (101, 117), "syslog": (103, 116),
    "setgroups": (116, 159), "setresuid": (117, 147), "setresgid": (119, 149), "personality": (135, 92),
    "vhangup": (153, 58), "pivot_root": (155, 41), "adjtimex": (159, 171), "chroot": (161, 51), "acct": (163, 89),
    "settimeofday": (164, 170), "mount": (165, 40), "umount2": (166, 39), "swapon": (167, 224), "swapoff": (168, 225),
    "reboot": (169, 142), "sethostname": (170, 161), "setdomainname": (171, 162), "init_module": (175, 105),
    "delete_module": (176, 106), "quotactl": (179, 60), "clock_settime": (227, 112), "kexec_load": (246, 104),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "mknodat": (259, 33),
    "unshare": (272, 97), "perf_event_open": (298, 241), "fanotify_init": (300, 262),
    "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "clock_adjtime": (305, 266),
    "setns": (308, 268), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    "finit_module": (313, 273), "kexec_file_load": (320, 294), "bpf": (321, 280), "userfaultfd": (323, 282),
    # From here on all have the same numbers.
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),
    "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "pidfd_getfd": (438, 438), "mount_setattr": (442, 442),
    "quotactl_fd": (443, 443), "landlock_create_ruleset": (444, 444), "landlock_add_rule": (445, 445),
    "landlock_restrict_self": (446, 446), "open_tree_attr": (467, 467),
}
#: Those that only x86_64 has.
_X86_ONLY: Mapping[str, int] = {
    "mknod": 133, "uselib": 134, "modify_ldt": 154, "iopl": 172, "ioperm": 173, "lookup_dcookie": 212,
}
#: AUDIT_ARCH_* in include/uapi/linux/audit.h, and the column of the table.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1), "riscv64": (0xC00000F3, 1)}

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def architecture() -> int | None:
    """Return what a filter is told of this machine's system calls (AUDIT_ARCH_*); None where no number is known."""
    found = MACHINES.get(os.uname().machine)
    return found[0] if found is not None else None


@functools.cache
def numbers(machine: str = "") -> dict[str, int]:
    """Return name → number of the system calls of a machine (``uname -m``; this one), empty where none is known."""
    machine = machine or os.uname().machine
    if machine not in MACHINES:
        return {}
    column = MACHINES[machine][1]
    found = {name: both[column] for name, both in _TABLE.items()}
    return {**found, **_X86_ONLY} if machine == "x86_64" else found


def call(name: str, *arguments: object) -> int:
    """Make a system call in the calling thread. Raises OSError; with ENOSYS where its number is not known."""
    number = numbers().get(name)
    if number is None:
        raise OSError(38, f"{name}: not known on {os.uname().machine}")
    result = int(_libc.syscall(ctypes.c_long(number), *(_wide(argument) for argument in arguments)))
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{name}: {os.strerror(error)}")
    return result


def _wide(argument: object) -> object:
    if isinstance(argument, int):
        return ctypes.c_long(argument)
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument
