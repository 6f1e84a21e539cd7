"""VDUSE: QSD serves a vDPA device (block/export/vduse-blk.c in QEMU), virtio_vdpa and virtio_blk make a disk of it.

What it survives: the daemon's death, and QSD's. Requests in flight are kept in the log below the volume's TMPDIR,
and wait, without an error, for a QSD that exports under the same name with the same queues.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk, netlink, reconnectlog, vdpa, vduse, worker
from storaged.model.blockdev import DISK, EXPORT
from storaged.model.plan import Device
from storaged.model.powers import Powers
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.observe.journald import about
from storaged.qsd.version import Build
from storaged.transports.base import IOTHREAD, Availability, Connected, HostDevice, Seen, Site, iothread
from storaged.transports.needs import check_family, lacking, load_modules
from storaged.transports.options import POLLING_OPTION, Number, number, polling
from storaged.transports.queue import QUEUE_OPTIONS, SCHEDULER

log = logging.getLogger("storaged.vduse")

_QUEUES = Number("virtqueues; more than CPUs have no use", 1, 64)
_QUEUE_SIZE = Number("requests in a virtqueue", 16, 1024, power_of_two=True)
_MSG_TIMEOUT = Number("seconds that the kernel waits for QSD to answer a control message", 1, 3600)
_BOUNCE_SIZE = Number("the kernel's buffer between disk and QSD", 1 << 20, 1 << 30, size=True)

#: Seconds for the disk to appear once the device is on the bus, and to follow a change of its size.
_DISK_PATIENCE = 10.0
#: Seconds for virtio_blk to take the device, which it does while the device comes onto the bus.
_DRIVER_PATIENCE = 1.0
#: The msg_timeout in seconds while the device is set up: so long a dead server holds up all netlink of the host.
_SETUP_MSG_TIMEOUT = 10
_STEP = 0.01
#: Seconds that requests may take to end when the disk is taken away by force; then its server is replaced.
_FORCED_PATIENCE = 5.0


class VduseTransport(HostDevice):
    """The transport ``vduse``."""

    name = "vduse"
    needs_server = True
    bridges = True
    options: Mapping[str, str] = {
        "queues": f"{_QUEUES.about}; default 1",
        "queue-size": f"{_QUEUE_SIZE.about}, a power of two; default 256",
        "msg-timeout": f"{_MSG_TIMEOUT.about}; default 30",
        "bounce-size": f"{_BOUNCE_SIZE.about}; default: the kernel's, 64M",
        **POLLING_OPTION, **QUEUE_OPTIONS,
    }

    def powers(self, site: Site) -> Powers:
        """/dev/vduse is root's; the kernel asks for no capability (drivers/vdpa/vdpa_user/vduse_dev.c)."""
        return Powers(root="/dev/vduse is root's", uses=("/dev/vduse",))

    def probe(self, build: Build | None) -> Availability:
        """Linux 5.15 with VDPA_USER, VIRTIO_VDPA, VIRTIO_BLK; QSD 7.1 with vduse-blk."""
        if build is not None and "vduse-blk" not in build.exports:
            return Availability(False, f"qemu-storage-daemon {build.version} has no vduse-blk export, 7.1 brought it")
        missing = lacking("vduse")
        if missing is not None:
            return missing
        return Availability(True, "the kernel has VDUSE, virtio_vdpa and virtio_blk")

    def make_ready(self, timeout: float) -> None:
        """Load them, and look whether VDUSE devices can be made."""
        netlink.start()  # meanwhile
        load_modules("vduse", timeout)
        check_family("vdpa")
        problem = vduse.control_problem()
        if problem:
            raise StoragedError(
                ErrorCode.TRANSPORT_UNAVAILABLE, "this host cannot make VDUSE devices", cause=problem,
                hint="run the daemon as root of the host, outside of containers",
            )

    def settings(self, spec: VolumeSpec, build: Build) -> dict[str, int]:
        """Queues as wished for; the kernel cuts what is more than it has CPUs, QSD and its log must agree with it."""
        chosen = {
            "queues": min(number(spec, "queues", _QUEUES, 1), os.cpu_count() or 1),
            "queue-size": number(spec, "queue-size", _QUEUE_SIZE, 256),
            "msg-timeout": number(spec, "msg-timeout", _MSG_TIMEOUT, 30),
            **polling(spec),
        }
        if "bounce-size" in spec.options:
            chosen["bounce-size"] = number(spec, "bounce-size", _BOUNCE_SIZE, 0)
        if build.vduse_serial:
            chosen["serial"] = 1
        return chosen

    def claims(self, site: Site) -> tuple[str, ...]:
        """The bus is one for all of the host."""
        return (f"vdpa:{site.bus_name}",)

    def refuse_foreign(self, site: Site) -> None:
        """A device of our name that we did not make is left alone; a node that nobody serves is a leftover."""
        if vdpa.exists(site.bus_name):
            raise StoragedError(
                ErrorCode.NAME_TAKEN, f"there is a device {site.bus_name} on the vDPA bus already",
                cause="this daemon did not make it",
                hint="choose another name; or end what it belongs to, while its server lives: "
                f"echo {site.bus_name} > /sys/bus/vdpa/drivers/virtio_vdpa/unbind; vdpa dev del {site.bus_name}",
            )
        vduse.destroy(site.bus_name)

    def objects(self, record: Record) -> list[dict[str, Any]]:
        """A thread for the I/O, so that QMP answers whatever the storage does."""
        return [iothread(record)]

    def export(self, site: Site, record: Record) -> dict[str, Any]:
        """BlockExportOptionsVduseBlk."""
        options: dict[str, Any] = {
            "type": "vduse-blk", "id": EXPORT, "node-name": DISK, "name": site.bus_name, "iothread": IOTHREAD,
            "writable": not record.spec.read_only, "num-queues": record.settings["queues"],
            "queue-size": record.settings["queue-size"], "logical-block-size": record.spec.logical_block_size,
        }
        if record.settings.get("serial"):
            # VIRTIO_BLK_ID_BYTES
            options["serial"] = site.name[:20]
        return options

    async def prepare(self, site: Site, record: Record, timeout: float) -> None:
        """A successor keeps log and node. A fresh attachment has neither, whatever is left of an older one.

        Raises RECONNECT_LOG_LOST for a successor. A rescue server has a try all the same.
        """

        def work() -> None:
            if vdpa.exists(site.bus_name):
                _restore_log(site, record)
            else:
                vduse.destroy(site.bus_name)
                reconnectlog.forget(_log(site, record))

        await site.blocking("prepare the VDUSE device", timeout, work)

    def observe(self, site: Site, record: Record | None, *, alive: bool) -> Seen:
        """The bus, the disk and the node, all in sysfs and devtmpfs."""
        if record is None:
            return Seen(reachable=False, device=Device.NONE, remains=False)
        node, device = vduse.node_exists(site.bus_name), Device.NONE
        if vdpa.exists(site.bus_name):
            found = vdpa.find_disk(site.bus_name)
            ours = record.device is not None and (
                vdpa.is_going(site.bus_name) if found is None
                else (found.path, found.diskseq) == (record.device, record.diskseq)
            )
            # One that goes already needs a server until its requests have ended, as one that stays.
            if ours:
                device = Device.HEALTHY if alive and node else Device.UNSERVED
            return Seen(reachable=node, device=device, remains=device is Device.NONE)
        return Seen(reachable=node, device=device, remains=node)

    def find_device(self, site: Site, record: Record | None) -> Connected | None:
        """The disk of the device of our name."""
        found = vdpa.find_disk(site.bus_name)
        return Connected(found.path, found.diskseq) if found else None

    async def connect(self, site: Site, record: Record, timeout: float) -> Connected:
        """Onto the bus, and the disk looked for: the kernel's agreement does not prove that there is one."""
        name = site.bus_name

        def work() -> Connected:
            if not vdpa.exists(name):
                # From here on requests may be in flight.
                reconnectlog.keep(_log(site, record))
                if "bounce-size" in record.settings:
                    vduse.set_limit(name, "bounce_size", record.settings["bounce-size"])
                patience = min(record.settings["msg-timeout"], _SETUP_MSG_TIMEOUT, timeout / 2)
                vduse.set_limit(name, "msg_timeout", max(1, int(patience)))
            vdpa.add(name)
            vdpa.bind(name)
            begin = time.monotonic()
            while (found := vdpa.find_disk(name)) is None or not os.path.exists(found.path):
                # Nothing tells it but uevents, which a container does not get; mostly it is there at once.
                patience = _DISK_PATIENCE if vdpa.has_virtio_driver(name) else _DRIVER_PATIENCE
                if time.monotonic() - begin >= min(timeout, patience):
                    raise StoragedError(
                        ErrorCode.DEVICE_FAILED, f"the kernel made no disk of {name}",
                        cause="qemu-storage-daemon did not answer it, or another driver has the device",
                        hint="see dmesg and qsd.log; storaged doctor says what is missing",
                    )
                time.sleep(_STEP)
            vduse.set_limit(name, "msg_timeout", record.settings["msg-timeout"])
            present = disk.attribute(found.path, "queue/scheduler") or "[none]"
            if SCHEDULER not in record.spec.options and "[none]" not in present:
                # What is below the image has its own. Writing freezes the queue, which takes longer than all the rest.
                # It waits for the requests in flight, for ever if the server dies meanwhile.
                with contextlib.suppress(OSError, StoragedError):  # only slower with one
                    worker.write(f"/sys/block/{os.path.basename(found.path)}/queue/scheduler", "none")
            return Connected(found.path, found.diskseq)

        return await site.blocking("set up the vDPA device", timeout, work)

    async def disconnect(self, site: Site, record: Record, timeout: float) -> None:
        """Flush, unbind and delete, under an O_EXCL descriptor: the kernel would delete a mounted disk."""
        path, given_up = record.device, threading.Event()
        if path is None:
            return
        try:
            await site.blocking(
                "take the disk away", timeout, disk.remove_unused, path, lambda: _is_ours(site, record),
                lambda: _remove(site.bus_name, timeout), read_only=record.spec.read_only, given_up=given_up,
            )
        except BaseException:
            given_up.set()
            raise
        await site.blocking("see the disk go", timeout, _see_it_go, site.bus_name, timeout)

    async def disconnect_by_force(
        self, site: Site, record: Record, timeout: float, *, flush: bool
    ) -> list[str]:
        """Flush for a few seconds, then unbind it whoever uses it."""
        notes: list[str] = []
        path = record.device
        if flush and path is not None and not record.spec.read_only:
            notes = await self.flush_before_force(site, path, lambda: _is_ours(site, record), timeout)
        await site.blocking(
            "take the disk away", timeout, _remove, site.bus_name, min(timeout, _FORCED_PATIENCE)
        )
        return notes

    async def clear(self, site: Site, record: Record | None, timeout: float) -> list[str]:
        """A device without a disk (a detach that was cut short), and a node that nobody serves."""

        def work() -> None:
            if record is None:
                return
            if vdpa.exists(site.bus_name):
                _remove(site.bus_name, timeout)
            vduse.destroy(site.bus_name)

        await site.blocking("clear what a dead export left", timeout, work)
        return []

    async def resized(self, site: Site, record: Record, size: int, timeout: float) -> None:
        """QSD tells the kernel; its answer comes before the kernel has taken it over."""

        def follow() -> None:
            path = str(record.device)
            deadline = time.monotonic() + min(timeout, _DISK_PATIENCE)
            while disk.size(path) != size:
                if time.monotonic() >= deadline:
                    raise StoragedError(
                        ErrorCode.DEVICE_FAILED, "the image has grown, but its device has not followed",
                        cause=f"{path} has {disk.size(path)} bytes", hint="see dmesg; detach and attach again",
                    )
                time.sleep(_STEP)

        await site.blocking("see the disk grow", timeout, follow)


def _log(site: Site, record: Record) -> reconnectlog.ReconnectLog:
    return reconnectlog.ReconnectLog(
        site.directory, site.bus_name, record.settings["queues"], record.settings["queue-size"]
    )


def _restore_log(site: Site, record: Record) -> None:
    done = ""
    try:
        done = reconnectlog.restore(_log(site, record), vduse.rings(site.bus_name, record.settings["queues"]))
    except StoragedError as error:
        if error.code is not ErrorCode.RECONNECT_LOG_LOST or not record.rescue:
            raise
        log.warning("%s: %s; the rescue server begins with an empty one", site.name, error, extra=about(site.name))
        reconnectlog.give_up(_log(site, record))
    if done:
        log.warning("%s: %s", site.name, done, extra=about(site.name))


def _is_ours(site: Site, record: Record) -> bool:
    found = vdpa.find_disk(site.bus_name)
    return found is not None and (found.path, found.diskseq) == (record.device, record.diskseq)


def _see_it_go(name: str, timeout: float) -> None:
    """Of a removal that was given up, and goes on by itself."""
    if vdpa.is_going(name):
        _remove(name, timeout)


def _remove(name: str, timeout: float) -> None:
    vdpa.unbind(name, timeout)
    vdpa.delete(name)


TRANSPORT = VduseTransport()
