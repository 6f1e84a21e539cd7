"""The interface io.storaged as types. docs/architecture.md tells the way of a request through it."""

# No "from __future__ import annotations" here: asyncvarlink reads the annotations as objects.

import dataclasses
import typing
from collections.abc import AsyncIterator

from asyncvarlink import TypedVarlinkErrorReply, VarlinkInterface, varlinkmethod

INTERFACE = "io.storaged"
#: The methods that only look: they answer from what is known, and neither change, start nor open anything. A method
#: that is not named here is for those who may do everything.
READING = frozenset({"List", "Show", "Watch"})


@dataclasses.dataclass
class Failure:
    """Why a volume is in trouble: a stable code, what failed, at which step, why, and what to do."""

    code: str
    message: str
    step: str
    cause: str
    hint: str


@dataclasses.dataclass
class Condition:
    """What keeps the I/O of a volume waiting, since when, and what policy will do about it.

    acts_at is null where nothing will be done by itself.
    """

    trouble: str
    since: float
    detail: str
    policy: str
    acts_at: float | None


@dataclasses.dataclass
class HistoryEntry:
    """Something that happened to a volume: first at time, last at last, so many times in a row.

    seconds is how long it lasted (of several the longest): the pause of a recovery, the time of a hang. kind is death,
    hang, stall, recovered, rescue, resume, upgrade, lost, failure or adopted.
    """

    time: float
    kind: str
    message: str
    seconds: float | None
    times: int
    last: float


@dataclasses.dataclass
class Layer:
    """An image of a chain, as it was opened: where it is, its format, its virtual size in bytes.

    backing is the source of the image below it, data_file that of its data where it is in another file.
    """

    source: str
    format: str
    virtual_size: int
    backing: str | None
    data_file: str | None


@dataclasses.dataclass
class Volume:
    """A volume as wished for and as observed. Sizes in bytes, times in seconds since the epoch.

    layers are the images that were opened, the disk first; there are none before it is open.
    A volume for a virtual machine has a socket in place of a device. qsd_confinement says what its QSD was left of the
    host. profile is where some of the options came from. deaths is how often its QSD has died, paused for how many
    seconds I/O waited at the last recovery. history has the newest last; only Show tells it. file is what wishes for
    the volume at each boot, if there is one.
    """

    name: str
    source: str
    format: str
    transport: str
    transport_reason: str
    read_only: bool
    snapshot: bool
    persist: bool
    options: dict[str, str]
    profile: str | None
    state: str
    since: float
    device: str | None
    socket: str | None
    link: str | None
    size: int | None
    source_size: int | None
    logical_block_size: int | None
    qsd_pid: int | None
    qsd_version: str | None
    qsd_confinement: str | None
    overlay: str | None
    failure: Failure | None
    condition: Condition | None
    deaths: int
    paused: float | None
    history: list[HistoryEntry] | None
    file: str | None
    layers: list[Layer]


@dataclasses.dataclass
class QemuArguments:
    """Words for the command line of a virtual machine's QEMU; vhost_user is null for a volume without a socket."""

    blockdev: list[str]
    drive: list[str]
    vhost_user: list[str] | None
    notes: list[str]


@dataclasses.dataclass
class FileFailure:
    """What is wrong with the file of a volume; volume is empty where it is wrong with all of them."""

    volume: str
    code: str
    message: str
    cause: str
    hint: str


@dataclasses.dataclass
class Reloaded:
    """What a reload has changed, and what it has not.

    applied and needs_restart are keys of the configuration that got another value: in force now, and those that need a
    restart of the daemon. Of the files of volumes: attaching are the names of new ones, differing those that are
    attached with other wishes (and stay so), failures tells of those that are wrong; all others count.
    """

    applied: list[str]
    needs_restart: list[str]
    attaching: list[str]
    differing: list[str]
    failures: list[FileFailure]


@dataclasses.dataclass
class Event:
    """Something that happened to a volume. ``kind`` is ready, step, state, failure or removed."""

    time: float
    volume: str
    kind: str
    state: str
    message: str


class ErrorParameters(typing.TypedDict):
    """What every error carries: see Failure."""

    code: str
    message: str
    volume: str
    step: str
    cause: str
    hint: str
    users: list[str]


class Failed(TypedVarlinkErrorReply, interface=INTERFACE):
    """The operation failed; code is stable, message, cause and hint are for people."""

    parameters: ErrorParameters


class NoSuchVolume(TypedVarlinkErrorReply, interface=INTERFACE):
    """No volume has that name."""

    parameters: ErrorParameters


class VolumeExists(TypedVarlinkErrorReply, interface=INTERFACE):
    """A volume of that name is attached with other wishes; nothing was changed."""

    parameters: ErrorParameters


class InUse(TypedVarlinkErrorReply, interface=INTERFACE):
    """The device or the source is in use; users names by whom. Nothing was changed."""

    parameters: ErrorParameters


class InvalidArgument(TypedVarlinkErrorReply, interface=INTERFACE):
    """The request makes no sense: a name, source, format, size or option is wrong. Nothing was changed."""

    parameters: ErrorParameters


class PermissionDenied(TypedVarlinkErrorReply, interface=INTERFACE):
    """The caller may look, and not do this. Nothing was changed."""

    parameters: ErrorParameters


class StoragedInterface(VarlinkInterface):
    """Attach disk images and network disks as block devices of this host, and take them away again."""

    name = INTERFACE
    errors = (Failed, NoSuchVolume, VolumeExists, InUse, InvalidArgument, PermissionDenied)

    @varlinkmethod(return_parameter="volume")
    async def Attach(
        self,
        *,
        name: str,
        source: str,
        format: str | None = None,
        transport: str | None = None,
        read_only: bool | None = None,
        snapshot: bool | None = None,
        snapshot_dir: str | None = None,
        options: dict[str, str] | None = None,
        persist: bool | None = None,
        timeout: float | None = None,
        secrets: dict[str, str] | None = None,
        profile: str | None = None,
    ) -> Volume:
        """Attach a volume and wait until its device can be used, at most timeout seconds.

        profile names a file of options, which count where nothing else is said here. secrets are in base64, by the
        option whose value is "-".
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="notes")
    async def Detach(
        self, *, name: str, force: bool | None = None, timeout: float | None = None
    ) -> list[str]:
        """Take a volume away. Refuses while its device is in use, unless forced; notes say what is left."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="volume")
    async def Resize(
        self, *, name: str, size: int | None = None, timeout: float | None = None
    ) -> Volume:
        """Grow a volume and its device to size bytes; without a size, to what its source has by now."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="notes")
    async def Rescue(
        self, *, name: str, keep: bool | None = None, timeout: float | None = None
    ) -> list[str]:
        """End all I/O in flight with errors, whatever QSD does; the volume stays, in the state rescued.

        Its device goes away, or with keep stays and fails all I/O, until Resume or Detach.
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="volume")
    async def Resume(self, *, name: str, timeout: float | None = None) -> Volume:
        """Put the source of a rescued volume back."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="volume")
    async def Upgrade(self, *, name: str, timeout: float | None = None) -> Volume:
        """Replace the QSD of a volume by the binary that is installed now, while the device is in use."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="volume")
    async def Persist(self, *, name: str, on: bool) -> Volume:
        """Attach a volume again after each boot, or do not."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="notes")
    async def Park(self, *, timeout: float | None = None) -> list[str]:
        """The host goes down: flush and end what nobody uses, and keep the wishes; notes say what goes on, and why."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="volumes")
    async def List(self) -> list[Volume]:
        """All volumes, sorted by name, without their history."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="volume")
    async def Show(self, *, name: str) -> Volume:
        """One volume, with its history."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="arguments")
    async def QemuArguments(self, *, name: str) -> QemuArguments:
        """How a virtual machine uses a volume: the source directly (blockdev, or drive), or through the socket."""
        raise NotImplementedError

    @varlinkmethod(return_parameter="reloaded")
    async def Reload(self) -> Reloaded:
        """Read the configuration and the files of volumes again, as at SIGHUP.

        With a wrong configuration nothing is changed. A wrong file of a volume is in failures; the others count.
        """
        raise NotImplementedError

    @varlinkmethod(return_parameter="event", delay_generator=False)
    async def Watch(self, *, name: str | None = None) -> AsyncIterator[Event]:
        """Events as they happen, of one volume or of all; the first has the kind ready."""
        raise NotImplementedError
        yield
