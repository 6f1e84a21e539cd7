"""storaged as a storage provider of systemd: lists its volumes, and hands out descriptors of their devices."""

import errno
import fnmatch
import logging
import os
import time
from collections.abc import AsyncIterator
from weakref import WeakKeyDictionary

from asyncvarlink import varlinkmethod
from asyncvarlink.types import FileDescriptor

from storaged.api import storageprovider as interface
from storaged.api.server import Server
from storaged.errors import ErrorCode, StoragedError
from storaged.host import disk
from storaged.host.blocking import BlockingCalls
from storaged.host.hooksocket import HookSocket
from storaged.model.layout import Layout
from storaged.model.record import Record
from storaged.model.states import State
from storaged.observe.journald import about
from storaged.supervisor.manager import Manager
from storaged.supervisor.volume import Volume
from storaged.transports.vhost_user import VhostUserTransport

log = logging.getLogger("storaged.api")

#: Seconds that opening a device may take. A systemd client waits for an answer for 45 (sd-varlink.c).
_OPEN_PATIENCE = 15.0
#: open(2) of what cannot be written to.
_WRITE_REFUSED = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})


class StorageProvider(interface.StorageProviderInterface):
    """Volumes that give a device of this host, whatever their state. Only one that is online can be acquired."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        # Not the threads of the volume's actor: who asks again and again for a device that hangs uses up his own.
        self._blocking: WeakKeyDictionary[Volume, BlockingCalls] = WeakKeyDictionary()

    @varlinkmethod
    async def Acquire(
        self,
        *,
        name: str,
        createMode: interface.CreateMode | None = None,
        template: str | None = None,
        readOnly: bool | None = None,
        requestAs: interface.VolumeType | None = None,
        createSizeBytes: int | None = None,
        allowInteractiveAuthentication: bool | None = None,
    ) -> interface.Acquired:
        """Acquire a descriptor of a volume's device.

        readOnly false fails where the volume cannot be written to, null takes what the volume allows.
        """
        if createMode is interface.CreateMode.new:
            raise interface.CreateNotSupported()
        if template:
            raise interface.NoSuchTemplate()
        volume = next((volume for volume in self._volumes() if volume.name == name), None)
        if volume is None:
            raise interface.NoSuchVolume()
        record = volume.attachment.record
        if volume.state is not State.ONLINE or record is None or record.device is None:
            log.warning(
                "volume %s: somebody asked for a descriptor of its device, and got none, because it is %s", name,
                volume.state, extra=about(name),
            )
            raise interface.system_failure(errno.EAGAIN)
        writable = not volume.spec.read_only and not disk.is_read_only(record.device)
        if readOnly is False and not writable:
            raise interface.ReadOnlyVolume()
        # As the last of all: mount.storage asks for "reg" first, then for "blk", and tells of the first refusal only
        # (run_as_mount_helper in src/storage/storagectl.c).
        if requestAs not in (None, interface.VolumeType.blk):
            raise interface.TypeNotSupported()
        fd, read_only = await self._open(volume, record, writable and not readOnly, or_less=readOnly is None)
        volume.attachment.handed_out = time.monotonic()
        log.info(
            "volume %s: a descriptor of %s was handed out, %s", name, record.device,
            "read-only" if read_only else "for writing", extra=about(name),
        )
        return {
            "fileDescriptorIndex": FileDescriptor(fd, should_close=True), "type": interface.VolumeType.blk,
            "readOnly": read_only,
        }

    @varlinkmethod
    async def ListVolumes(self, *, matchName: str | None = None) -> AsyncIterator[interface.Listed]:
        """One reply for each volume whose name matches the glob; NoSuchVolume where there is none."""
        found = [
            volume for volume in self._volumes()
            if matchName is None or fnmatch.fnmatchcase(volume.name, matchName)
        ]
        if not found:
            raise interface.NoSuchVolume()
        for volume in found:
            yield _listed(volume)

    @varlinkmethod
    async def ListTemplates(self, *, matchName: str | None = None) -> AsyncIterator[interface.Template]:
        """NoSuchTemplate: storaged has no templates."""
        raise interface.NoSuchTemplate()
        yield

    def _volumes(self) -> list[Volume]:
        return [volume for volume in self._manager.volumes() if _gives_a_device(volume)]

    async def _open(self, volume: Volume, record: Record, write: bool, *, or_less: bool) -> tuple[int, bool]:
        """Return a descriptor, and whether it is read-only. ``or_less``: rather that than none."""
        blocking = self._blocking.get(volume)
        if blocking is None:
            blocking = self._blocking[volume] = BlockingCalls(f"{volume.name}: storage provider")
        path, number = record.device or "", record.diskseq

        def work() -> tuple[int, bool]:
            if write:
                try:
                    return disk.open_same(path, number, write=True), False
                except OSError as error:
                    if error.errno not in _WRITE_REFUSED or not or_less:
                        raise
            return disk.open_same(path, number, write=False), True

        try:
            return await blocking.with_late_result(
                "open the device", _OPEN_PATIENCE, work, lambda late: os.close(late[0])
            )
        except StoragedError as error:
            log.warning("volume %s: %s", volume.name, error, extra=about(volume.name, code=error.code.value))
            self._manager.environment.counts.request_failed(error.code)
            hangs = error.code is ErrorCode.HOST_STUCK
            raise interface.system_failure(errno.ETIMEDOUT if hangs else errno.EIO) from error
        except OSError as error:
            log.warning("volume %s: cannot open %s: %s", volume.name, path, error.strerror, extra=about(volume.name))
            if write and error.errno in _WRITE_REFUSED:
                raise interface.ReadOnlyVolume() from error
            raise interface.system_failure(error.errno or errno.EIO) from error


def _gives_a_device(volume: Volume) -> bool:
    record = volume.attachment.record
    return (record.transport if record is not None else volume.spec.transport) != VhostUserTransport.name


def _listed(volume: Volume) -> interface.Listed:
    record = volume.attachment.record
    listed: interface.Listed = {
        "name": volume.name, "type": interface.VolumeType.blk, "readOnly": volume.spec.read_only,
    }
    if record is not None and record.size:
        listed["sizeBytes"] = record.size
    return listed


class ProviderServer:
    """Serves systemd's programs where systemd runs, and only root. Nothing where the name is somebody else's."""

    def __init__(self, manager: Manager, layout: Layout) -> None:
        self._hook = HookSocket(layout.provider_socket, layout.provider_hook)
        listener = self._hook.register()
        self._server = None
        if listener is not None:
            self._server = Server(manager, listener, None, service=StorageProvider(manager))
            self._server.start()

    async def close(self) -> None:
        """Be no provider any more. Descriptors that were handed out stay open."""
        self._hook.withdraw()
        if self._server is not None:
            await self._server.close()
