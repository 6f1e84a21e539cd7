"""What a review tried to break: a virtual machine's disk whose QSD dies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import GuestError, guest, vhost_user
from tests.harness import Daemon, eventually, image

pytestmark = pytest.mark.timeout(400)


@pytest.mark.parametrize("cache", ["writeback", "writethrough"])
def test_a_guest_is_told_when_writes_were_lost_with_qsd(daemon: Daemon, place: Path, cache: str) -> None:
    volume = daemon.attach(
        "a", image(place / "a", "qcow2", "256M"), format="qcow2", transport="vhost-user", options={"cache": cache}
    )
    with guest(place / "vm", vhost_user(str(volume["socket"]))) as machine:
        machine.run("dd if=/dev/urandom of=/ref bs=64k count=4 2>/dev/null")
        for block in range(4):
            # The close writes the pages out, and flushes nothing.
            machine.run(f"dd if=/ref of=/dev/vda bs=64k count=1 skip={block} seek={block * 700} conv=notrunc")
        former = daemon.kill_qsd("a")
        eventually(lambda: daemon.replaced("a", former), "replaced", timeout=60)
        try:
            machine.run("dd if=/dev/zero of=/dev/vda bs=512 count=0 conv=notrunc,fsync")
        except (GuestError, TimeoutError):
            return
        machine.run("echo 3 >/proc/sys/vm/drop_caches")
        for block in range(4):
            machine.run(f"dd if=/dev/vda of=/got bs=64k count=1 skip={block * 700}")
            machine.run(f"dd if=/ref of=/want bs=64k count=1 skip={block}")
            machine.run("cmp /got /want")
