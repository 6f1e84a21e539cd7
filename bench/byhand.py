"""A VDUSE or NBD device set up by hand, as an administrator would: the benchmarks' other side.

Modules are loaded; qemu-storage-daemon gets image and export on its command line, then `vdpa dev add` or
`nbd-client -unix`; and back again.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

from common import QSD, end, run

PLACE = Path("/run/byhand")
NBD_DEVICE = "/dev/nbd15"


@dataclass(frozen=True)
class Setup:
    """What can be chosen."""

    transport: str
    queues: int = 1
    queue_size: int = 256
    iothread: bool = True
    connections: int = 1
    aio: str = "threads"
    cache: str = "writeback"
    sysfs: dict[str, object] = field(default_factory=dict, hash=False)
    """Attributes below /sys/block/X/queue."""

    @property
    def name(self) -> str:
        """Its name on the vDPA bus: /dev/vduse/NAME outlives QSD, and a later one gets its queues, asked for or not."""
        return f"byhand-{self.queues}-{self.queue_size}"

    def blockdev(self, image: str) -> list[str]:
        """The words for a raw image; ``null`` is a disk that does nothing at all."""
        if image == "null":
            return ["--blockdev", "driver=null-co,node-name=d,size=1073741824"]
        file = f"file.driver=file,file.filename={image},file.aio={self.aio},file.discard=unmap"
        if self.cache == "none":
            file += ",cache.direct=on,file.cache.direct=on"
        return ["--blockdev", f"driver=raw,node-name=d,discard=unmap,{file}"]

    def command(self, image: str) -> list[str]:
        """The words that start QSD."""
        thread = ["--object", "iothread,id=io"] if self.iothread else []
        where = ",iothread=io" if self.iothread else ""
        if self.transport == "vduse":
            export = [
                "--export", f"type=vduse-blk,id=e,node-name=d,name={self.name},writable=on,num-queues={self.queues},"
                f"queue-size={self.queue_size}{where}",
            ]
        else:
            export = [
                "--nbd-server", f"addr.type=unix,addr.path={PLACE}/nbd.sock",
                "--export", f"type=nbd,id=e,node-name=d,name={self.name},writable=on{where}",
            ]
            if self.connections > 1:
                export[1] += f",max-connections={self.connections}"
        return [QSD, "--daemonize", "--pidfile", f"{PLACE}/pid", *thread, *self.blockdev(image), *export]

    def script(self, image: str) -> str:
        """The lines that somebody types."""
        if self.transport == "vduse":
            device = f"vdpa dev add name {self.name} mgmtdev vduse"
        else:
            device = (
                f"nbd-client -unix {PLACE}/nbd.sock {NBD_DEVICE} -name {self.name} -block-size 512 "
                f"-connections {self.connections} >/dev/null"
            )
        return f"{shlex.join(self.command(image))} && {device}"


def attach(setup: Setup, image: str) -> str:
    """Set the device up; it can be opened afterwards."""
    PLACE.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(PLACE)}
    subprocess.run(["/bin/sh", "-c", setup.script(image)], check=True, stderr=subprocess.DEVNULL, env=environment)
    device = NBD_DEVICE if setup.transport == "nbd" else vduse_device(setup.name)
    open_it(device)
    for name, value in setup.sysfs.items():
        Path(f"/sys/block/{os.path.basename(device)}/queue/{name}").write_text(str(value))
    return device


def vduse_device(name: str) -> str:
    """The disk that the kernel made."""
    while True:
        for found in Path(f"/sys/bus/vdpa/devices/{name}").glob("virtio*/block/*"):
            return f"/dev/{found.name}"
        time.sleep(0.001)


def open_it(device: str) -> None:
    """As whoever wants to use it."""
    os.close(os.open(device, os.O_RDWR))


def detach(setup: Setup, device: str) -> None:
    """Flush, the device away, QSD away."""
    away = f"vdpa dev del {setup.name}" if setup.transport == "vduse" else f"nbd-client -d {device} >/dev/null"
    run("/bin/sh", "-c", f"sync {device} && {away}")
    end(int((PLACE / "pid").read_text()))
