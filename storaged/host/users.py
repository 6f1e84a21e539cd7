"""Who uses a block device: mounts in any mount namespace, swap, holders, and processes that have it open.

For loop devices this scan is for the names in an error: the guard is the kernel's, an O_EXCL descriptor and the
loop driver's own count of openers (storaged/host/loop.py). The kernel would take away a VDUSE or NBD disk that is
open without O_EXCL; there the scan is the guard against that, too (storaged/host/disk.py, remove_unused).
"""

from __future__ import annotations

import logging
import os
import re
import stat

log = logging.getLogger("storaged.users")


def device_users(device: str) -> list[str]:
    """Return a line for each user of a block device or one of its partitions, most telling first.

    Never raises: what cannot be looked at is left out, because the names are help and not the guard.
    """
    name = os.path.basename(device)
    numbers = _device_numbers(name)
    names = {f"/dev/{number_name}" for number_name in numbers.values()}
    users = [f"held by {holder}" for holder in _holders(name)]
    for look in (_swaps, lambda found: _mounts(found, names), lambda _: _loops(names), _openers):
        try:
            users += look(numbers)
        except (OSError, ValueError, IndexError) as error:
            log.warning("looking for the users of %s: %s", device, error)
    return users


def only_probes(users: list[str]) -> bool:
    """Whether all of these are udev's: it looks at a new or changed device, and will be done soon."""
    return bool(users) and all("(udev-worker)" in user or "(systemd-udevd)" in user for user in users)


def _device_numbers(name: str) -> dict[int, str]:
    """Return the device numbers of a disk and its partitions, with their kernel names."""
    numbers: dict[int, str] = {}
    base = f"/sys/block/{name}"
    try:
        parts = [entry for entry in os.listdir(base) if entry.startswith(name)]
    except FileNotFoundError:
        return numbers
    for entry, path in [(name, base), *((part, f"{base}/{part}") for part in parts)]:
        try:
            with open(f"{path}/dev", encoding="ascii") as file:
                major, minor = map(int, file.read().split(":"))
        except (OSError, ValueError):
            continue
        numbers[os.makedev(major, minor)] = entry
    return numbers


def _holders(name: str) -> list[str]:
    found = []
    base = f"/sys/block/{name}"
    try:
        directories = [base, *(f"{base}/{part}" for part in os.listdir(base) if part.startswith(name))]
        for directory in directories:
            found += [f"/dev/{holder}" for holder in os.listdir(f"{directory}/holders")]
    except FileNotFoundError:
        pass
    return sorted(found)


def _loops(names: set[str]) -> list[str]:
    """Loop devices over it: the kernel itself has it open then, and no process does."""
    found = []
    for entry in sorted(os.listdir("/sys/block")):
        try:
            with open(f"/sys/block/{entry}/loop/backing_file", encoding="utf-8", errors="surrogateescape") as file:
                if file.read().rstrip("\n") in names:
                    found.append(f"held by /dev/{entry}")
        except OSError:
            continue
    return found


def _swaps(numbers: dict[int, str]) -> list[str]:
    found = []
    with open("/proc/swaps", encoding="utf-8", errors="surrogateescape") as file:
        for line in file.readlines()[1:]:
            path = _unescaped(line.split()[0])
            if _is_device(path, numbers):
                found.append(f"used as swap ({_shown(path)})")
    return found


def _mounts(numbers: dict[int, str], names: set[str]) -> list[str]:
    """Look into each mount namespace once, through the first process found in it (proc(5), mountinfo)."""
    found: dict[str, None] = {}
    namespaces: set[str] = set()
    own = os.readlink("/proc/self/ns/mnt")
    for pid in ["self", *_pids()]:
        try:
            namespace = os.readlink(f"/proc/{pid}/ns/mnt")
            if namespace in namespaces:
                continue
            with open(f"/proc/{pid}/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
                lines = file.readlines()
        except OSError:
            continue
        namespaces.add(namespace)
        for line in lines:
            left, _, right = line.partition(" - ")
            fields = left.split()
            major, minor = map(int, fields[2].split(":"))
            # btrfs and others show an anonymous device number: there the source tells.
            source = right.split()[1] if len(right.split()) > 1 else ""
            if os.makedev(major, minor) in numbers or source in names:
                target = _shown(_unescaped(fields[4]))
                elsewhere = "" if namespace == own else f" in the mount namespace of process {pid}"
                found[f"mounted on {target}{elsewhere}"] = None
    return list(found)


def _openers(numbers: dict[int, str]) -> list[str]:
    found: dict[str, None] = {}
    for pid in _pids():
        if int(pid) == os.getpid():
            continue
        directory = f"/proc/{pid}/fd"
        try:
            descriptors = os.listdir(directory)
        except OSError:
            continue
        for descriptor in descriptors:
            path = f"{directory}/{descriptor}"
            try:
                # The name first: stat on a descriptor of a hung network filesystem could block.
                if os.readlink(path).startswith("/") and _is_device(path, numbers):
                    found[f"open in process {pid} ({_command(pid)})"] = None
                    break
            except OSError:
                continue
    return list(found)


def _unescaped(text: str) -> str:
    """Undo the octal escapes of /proc/PID/mountinfo and /proc/swaps (seq_escape in the kernel)."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)


def _shown(path: str) -> str:
    """A path as text that any terminal, log or JSON can take, even if it is no UTF-8."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _is_device(path: str, numbers: dict[int, str]) -> bool:
    # /dev names first, a chroot's too: only those can be device nodes worth a stat.
    target = os.readlink(path) if path.startswith("/proc/") else path
    if "/dev/" not in target:
        return False
    try:
        seen = os.stat(path)
    except OSError:
        return False
    return stat.S_ISBLK(seen.st_mode) and seen.st_rdev in numbers


def _pids() -> list[str]:
    return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def _command(pid: str) -> str:
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return "?"
