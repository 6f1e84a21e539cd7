"""The interface io.systemd.StorageProvider as types: storagectl(1), mount.storage and systemd-vmspawn speak it.

Names, types and errors are systemd's (src/shared/varlink-io.systemd.StorageProvider.c, since systemd 261).
"""

# No "from __future__ import annotations" here: asyncvarlink reads the annotations as objects.

import enum
import errno as errnos
import typing
from collections.abc import AsyncIterator

from asyncvarlink import TypedVarlinkErrorReply, VarlinkInterface, varlinkmethod
from asyncvarlink.types import FileDescriptor

INTERFACE = "io.systemd.StorageProvider"


class VolumeType(enum.Enum):
    """The inode type of what is handed out. All volumes of storaged are ``blk``."""

    blk = "blk"
    reg = "reg"
    dir = "dir"


class CreateMode(enum.Enum):
    """Whether a volume that is missing shall be created: storaged creates none here."""

    any = "any"
    new = "new"
    open = "open"


class Acquired(typing.TypedDict):
    """A volume that was opened. The descriptor goes with the reply; its field is the index among the reply's."""

    fileDescriptorIndex: FileDescriptor
    type: VolumeType
    readOnly: bool


class _Listed(typing.TypedDict):
    name: str
    type: VolumeType


class Listed(_Listed, total=False):
    """A volume, as ListVolumes tells of it. sizeBytes is left out as long as it is not known."""

    readOnly: bool
    sizeBytes: int


class Template(typing.TypedDict):
    """What a new volume can be made from."""

    name: str
    type: VolumeType


class NoSuchVolume(TypedVarlinkErrorReply, interface=INTERFACE):
    """No storage volume under the specified name exists."""

    class Parameters:
        pass


class NoSuchTemplate(TypedVarlinkErrorReply, interface=INTERFACE):
    """No template under the specified name exists."""

    class Parameters:
        pass


class TypeNotSupported(TypedVarlinkErrorReply, interface=INTERFACE):
    """The specified volume type is not supported: all volumes of storaged are block devices."""

    class Parameters:
        pass


class CreateNotSupported(TypedVarlinkErrorReply, interface=INTERFACE):
    """storaged creates no volumes here."""

    class Parameters:
        pass


class ReadOnlyVolume(TypedVarlinkErrorReply, interface=INTERFACE):
    """A volume was to be acquired for writing, and can only be read."""

    class Parameters:
        pass


class _SystemParameters(typing.TypedDict):
    origin: str
    errno: int
    errnoName: str


class SystemFailure(TypedVarlinkErrorReply, name="io.systemd.System"):
    """An errno, for which the interface has no error (src/libsystemd/sd-varlink/varlink-io.systemd.c)."""

    parameters: _SystemParameters


def system_failure(number: int) -> SystemFailure:
    """Return the error that systemd's programs show as the text of this errno."""
    return SystemFailure(
        {"origin": "linux", "errno": number, "errnoName": errnos.errorcode.get(number, str(number))}
    )


class StorageProviderInterface(VarlinkInterface):
    """Storage Provider API, a generic interface for acquiring access to storage volumes."""

    name = INTERFACE
    errors = (NoSuchVolume, NoSuchTemplate, TypeNotSupported, CreateNotSupported, ReadOnlyVolume, SystemFailure)

    @varlinkmethod
    async def Acquire(
        self,
        *,
        name: str,
        createMode: CreateMode | None = None,
        template: str | None = None,
        readOnly: bool | None = None,
        requestAs: VolumeType | None = None,
        createSizeBytes: int | None = None,
        allowInteractiveAuthentication: bool | None = None,
    ) -> Acquired:
        """Acquire a descriptor of a volume's device.

        readOnly false fails where the volume cannot be written to, null takes what the volume allows.
        """
        raise NotImplementedError

    @varlinkmethod
    async def ListVolumes(self, *, matchName: str | None = None) -> AsyncIterator[Listed]:
        """One reply for each volume whose name matches the glob; NoSuchVolume where there is none."""
        raise NotImplementedError
        yield

    @varlinkmethod
    async def ListTemplates(self, *, matchName: str | None = None) -> AsyncIterator[Template]:
        """NoSuchTemplate: storaged has no templates."""
        raise NotImplementedError
        yield
