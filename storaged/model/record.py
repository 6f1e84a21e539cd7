"""The record of an attachment, kept below /run: what an adoption is compared with and a successor started from."""

from __future__ import annotations

from typing import Literal

import msgspec

from storaged.model.spec import VolumeSpec


class ProcessIdentity(msgspec.Struct, frozen=True, kw_only=True):
    """What makes a process the one that was started, and no other that got its number (proc(5))."""

    pid: int
    start_time: int
    """Field 22 of /proc/PID/stat, in clock ticks after boot."""
    exe_device: int
    exe_inode: int


class Layer(msgspec.Struct, frozen=True, kw_only=True):
    """An image of a chain, as it was when it was opened."""

    source: str
    """A path of this host, or a source on the network."""
    format: str
    virtual_size: int
    """Bytes."""
    backing: str | None = None
    """The source of the image below it, None for the last."""
    data_file: str | None = None
    """The source of its data, where that is in another file (qcow2)."""


class Confinement(msgspec.Struct, frozen=True, kw_only=True):
    """What a qemu-storage-daemon was given of the host when it was started."""

    uid: int = 0
    """Its user, and its only group."""
    capabilities: list[str] = []
    """Without CAP_."""
    landlock: int = 0
    """The version of Landlock that keeps it to its own files; 0: nothing does."""
    filtered: bool = False
    """It is refused system calls that it never needs."""
    lacks: list[str] = []
    """Why it is not kept shorter."""

    def __str__(self) -> str:
        """As users are told."""
        parts = [
            f"user {self.uid}" if self.uid else "root",
            " and ".join(f"CAP_{name}" for name in self.capabilities) or "no capabilities",
            f"its own files (Landlock {self.landlock})" if self.landlock else "all files",
        ]
        if self.filtered:
            parts.append("system calls are filtered")
        return ", ".join(parts) + (f" ({'; '.join(self.lacks)})" if self.lacks else "")


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """What was chosen and set up for one attachment; a successor uses this, never newer defaults."""

    version: Literal[1] = 1
    spec: VolumeSpec
    transport: str
    transport_reason: str
    binary: str
    qsd_version: str = ""
    process: ProcessIdentity | None = None
    sources: dict[str, bool] = {}
    """The source identities that the process holds locks on, and whether it writes to them."""
    confinement: Confinement | None = None
    """What the process was given of the host; None: all that the daemon had which started it."""
    sockets: str = ""
    """Where QSD makes its sockets, below the volume's directory; empty: in it, as older daemons had it."""
    settings: dict[str, int] = {}
    """What was chosen for the transport: queues, sizes, timeouts. A successor must have the same."""
    size: int = 0
    """Bytes of the disk once it was opened, 0 before."""
    fingerprint: str = ""
    """What tells the disk behind a server from others of its name; empty where nothing does."""
    source_size: int = 0
    """Bytes of the source where it has grown since, and the disk is kept at its size; 0 where that is all of it."""
    device: str | None = None
    """The block device, for example /dev/loop3, once there is one."""
    diskseq: int = 0
    """/sys/block/X/diskseq of that device: another number means that it is another disk by now."""
    counted: list[int] = []
    """/sys/block/X/stat of that device when it was made: a loop or NBD device keeps what its former users did."""
    queue: dict[str, str] = {}
    """What the attributes of its queue were (/sys/block/X) before any was set: some devices are the next user's as they
    are left."""
    queue_due: bool = False
    """Not all of them are set yet that were asked for; one that the kernel refuses counts as set."""
    direct_io: bool = False
    overlay: str | None = None
    served_by: ProcessIdentity | None = None
    """The process that the device is connected to, where a device can outlive its server's connection (nbd)."""
    socket: str | None = None
    """The socket for a virtual machine, where there is no device (vhost-user)."""
    lost: bool = False
    """QSD died with writes in its memory, so that the device must not go on as if nothing had happened."""
    abandoned: list[str] = []
    """Devices that were disconnected by force, and that the kernel keeps for those who still have them open (nbd)."""
    rescue: bool = False
    """The process is a rescue server: it has not opened the source, and fails all I/O."""
    settled: bool = False
    """QSD holds nothing in its memory that it has acknowledged: it has not exported yet, or has closed the source."""
    open_seconds: float = 0.0
    """How long QSD took to open the source, 0 before."""
    layers: list[Layer] = []
    """The images that were opened, the disk first; empty before."""


#: Made here, and not where it is needed: msgspec 0.22 looks for the types of a class when it first decodes one, and
#: dies (SIGSEGV) where two threads begin that at once, as those of two volumes do when a daemon starts.
RECORDS = msgspec.json.Decoder(Record)
