"""FUSE and a loop device: QSD exports the disk as a file (block/export/fuse.c in QEMU), the kernel makes a disk
of it. Works on every kernel with FUSE and loop.

What it survives: the daemon's death, always. QSD's death ends I/O with EIO (ENOTCONN below): a new export and
a new loop device are set up, users of the old one have to open the new one.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
from collections.abc import Mapping
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, fusectl, loop, mounts, queue
from storaged.model.blockdev import DISK, EXPORT
from storaged.model.plan import Device
from storaged.model.powers import Powers
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.version import Build, fuse_has_threads, loop_direct_io_is_safe, parse_version
from storaged.transports.base import IOTHREAD, Availability, Connected, HostDevice, Seen, Site
from storaged.transports.needs import lacking, load_modules
from storaged.transports.options import Number, number
from storaged.transports.queue import QUEUE_OPTIONS, attributes

#: As many as a loop device has (queue/nr_requests). The kernel's 12 are too few where each goes over a network.
_IN_FLIGHT = 128
_NODES = ("/dev/fuse", "/dev/loop-control")
#: How many serve the export (BlockExportIothreads in qapi/block-export.json); 0: QSD's main loop does.
THREADS = "iothreads"
_THREADS = Number("threads of QSD that serve the export, 0: its main one does; needs QSD 11", 0, 64)


class FuseTransport(HostDevice):
    """The transport ``fuse``."""

    name = "fuse"
    options: Mapping[str, str] = {THREADS: f"{_THREADS.about}; default 0", **QUEUE_OPTIONS}

    def powers(self, site: Site) -> Powers:
        """libfuse mounts, and unmounts at the end (fuse_mount_sys in lib/mount.c): QSD takes no mount of others."""
        return Powers(
            capabilities=frozenset({"SYS_ADMIN"}), root="fuse mounts", mounts=True,
            all_files="Landlock forbids to mount",
        )

    def probe(self, build: Build | None) -> Availability:
        """FUSE and the loop driver in the kernel, QSD ≥ 6.0 with a FUSE export."""
        if build is not None and "fuse" not in build.exports:
            return Availability(False, f"qemu-storage-daemon {build.version} has no FUSE export, 6.0 brought it")
        if not all(_is_device(path) for path in _NODES):
            missing = lacking("fuse")
            if missing is not None:
                return missing
        return Availability(True, "FUSE and loop devices are there")

    def make_ready(self, timeout: float) -> None:
        """Load what is missing, and look whether it can be used."""
        if not all(_is_device(path) for path in _NODES):
            load_modules("fuse", timeout)
        for path in _NODES:
            try:
                os.close(os.open(path, os.O_RDWR | os.O_CLOEXEC))
                problem = "" if _is_device(path) else "it is no device"
            except OSError as error:
                problem = error.strerror or str(error)
            if problem:
                raise StoragedError(
                    ErrorCode.TRANSPORT_UNAVAILABLE, "this host cannot do FUSE and loop", cause=f"{path}: {problem}",
                    hint="storaged doctor says what is missing",
                )

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """No thread of its own, or as many as the user says."""
        threads = number(spec, THREADS, _THREADS, 0)
        if threads == 0 or (build.exports and fuse_has_threads(build.version)):
            return {THREADS: threads} if threads else {}
        # Of a build without exports nothing is known. What auto took need not have all that was said.
        if build.exports and spec.transport != "auto":
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {THREADS} cannot be had by fuse here", volume=spec.name,
                cause=f"qemu-storage-daemon {build.version} serves a FUSE export by its main thread alone; 11 can",
                hint="leave it out, or take another transport",
            )
        return {}

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """The threads."""
        return [{"qom-type": "iothread", "id": name} for name in _threads(record)]

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """BlockExportOptionsFuse. Only root may look into it, and it never grows by a write."""
        options: dict[str, Any] = {
            "type": "fuse", "id": EXPORT, "node-name": DISK, "mountpoint": self._mountpoint(site),
            "writable": not record.spec.read_only, "growable": False, "allow-other": "off",
        }
        version = parse_version(f"version {record.qsd_version}")
        if (threads := _threads(record)) and version is not None and fuse_has_threads(version):
            # A successor may be an older one: better slow than not at all.
            options["iothread"] = threads
        return options

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """The mount point is a regular file."""

        def touch() -> None:
            path = self._mountpoint(site)
            mounts.unmount(path)
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))

        await site.blocking("prepare the mount point", timeout, touch)

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """The mount by statx, which asks no FUSE server; the device by sysfs."""
        mounted = mounts.is_mount_point(self._mountpoint(site))
        device = Device.NONE
        known = self._loop(record)
        if known is not None and loop.is_bound(known):
            # The device holds on to QSD's export by itself. Whether the mount can be seen from here says nothing
            # about it: somebody may have unmounted it lazily, or it is in another mount namespace.
            device = Device.HEALTHY if alive else Device.STALE
        return Seen(reachable=mounted or device is Device.HEALTHY, device=device, remains=mounted)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        """A loop device over the path of the export."""
        found = loop.find_by_backing(self._mountpoint(site))
        return Connected(found[0].path, found[0].diskseq, False) if found else None

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """A loop device over the export. One that is there already (the reply was lost) is taken over."""
        version = parse_version(f"version {record.qsd_version}")
        # What older ones do wrong they do to the data of a write.
        direct_io = record.spec.read_only or (version is not None and loop_direct_io_is_safe(version))

        def set_up() -> disk.Disk:
            mountpoint = self._mountpoint(site)
            if direct_io:
                with contextlib.suppress(OSError):  # only slower
                    fusectl.let_in_flight(mountpoint, _IN_FLIGHT)
            found = loop.find_by_backing(mountpoint)
            if found:
                for extra in found[1:]:
                    loop.release_by_force(extra)
                return found[0]
            return loop.set_up(
                mountpoint, label=f"storaged:{site.name}", read_only=record.spec.read_only,
                direct_io=direct_io, block_size=record.spec.logical_block_size,
            )

        device = await site.blocking("set up a loop device", timeout, set_up)
        return Connected(device.path, device.diskseq, direct_io)

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Flush, give the queue back, then LOOP_CLR_FD, under an O_EXCL descriptor: whoever gets the device next finds
        it as it was."""
        device = self._loop(record)
        if device is None:
            return
        given_up = threading.Event()
        try:
            await site.blocking(
                "take the loop device away", timeout, loop.release, device, read_only=record.spec.read_only,
                given_up=given_up,
                before=lambda: queue.give_back(device.path, record.queue, attributes(record.spec)),
            )
        except BaseException:
            given_up.set()
            raise

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Flush what can be flushed in a few seconds, then let go of the device at its last close."""
        device = self._loop(record)
        if device is None:
            return []
        notes: list[str] = []
        if flush and not record.spec.read_only:
            notes = await self.flush_before_force(site, device.path, lambda: loop.is_bound(device), timeout)
            if notes:
                # To open the device may take as long as the flush: its I/O has to end first.
                raise StoragedError(ErrorCode.HOST_STUCK, notes[0])
        users = await site.blocking("take the loop device away", timeout, loop.release_by_force, device)
        await site.blocking("give the loop device back", timeout, _give_back, device, record)
        return notes + _stays(device, users)

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """Unmount lazily, release every loop device that stands on this export."""
        mountpoint = self._mountpoint(site)
        known = self._loop(record)

        def work() -> list[str]:
            devices = loop.find_by_backing(mountpoint)
            if known is not None and known not in devices:
                devices.append(known)
            # The devices first: once the mount is gone, the kernel no longer shows what they stand on.
            notes = [note for device in devices for note in _stays(device, loop.release_by_force(device))]
            mounts.unmount(mountpoint)
            if known is not None and record is not None:
                _give_back(known, record)
            for device in devices:
                # Nothing tells udev that a device which somebody still has open has lost its volume, and its name.
                if loop.is_bound(device):
                    with contextlib.suppress(OSError):
                        disk.set_attribute(device.path, "uevent", "change")
            return notes

        return await site.blocking("clear what a dead export left", timeout, work)

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """The kernel must ask QSD for the file's size before the loop device can follow."""

        def follow() -> None:
            seen = mounts.fresh_size(self._mountpoint(site))
            if seen != size or record.device is None:
                raise StoragedError(
                    ErrorCode.DEVICE_FAILED, "the image has grown, but its device cannot follow",
                    cause=f"the host sees {seen} bytes of it", hint="detach the volume and attach it again",
                )
            loop.update_size(record.device)

        await site.blocking("resize the loop device", timeout, follow)

    @staticmethod
    def _mountpoint(site: Site) -> str:
        # A loop device is found by this path, which the kernel tells without saying whose path it is: a container that
        # shares /dev may have a volume of the same name. So it has the directory's numbers, which nobody else has.
        try:
            status = os.stat(site.directory)
        except FileNotFoundError:
            return os.path.join(site.directory, "disk")
        return os.path.join(site.directory, f"disk-{status.st_dev:x}-{status.st_ino:x}")

    @staticmethod
    def _loop(record: Record | None) -> disk.Disk | None:
        if record is None or record.device is None:
            return None
        return disk.Disk(record.device, record.diskseq)


def _threads(record: Record) -> list[str]:
    return [f"{IOTHREAD}{number}" for number in range(record.settings.get(THREADS, 0))]


def _give_back(device: disk.Disk, record: Record) -> None:
    """The queue as it was, of a loop device that nobody has any more: the next one's is as it is left."""
    queue.give_back(
        device.path, record.queue, attributes(record.spec), is_ours=lambda: loop.backing_file(device.path) is None
    )


def _is_device(path: str) -> bool:
    try:
        return stat.S_ISCHR(os.stat(path).st_mode)
    except OSError:
        return False


def _stays(device: disk.Disk, users: list[str]) -> list[str]:
    """What to tell of a device that was taken away by force, and is still used."""
    return [f"{device.path} fails all I/O and stays until its last user is gone: {user}" for user in users]


TRANSPORT = FuseTransport()
