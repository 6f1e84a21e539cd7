"""A power cut of the whole machine under load, and its boot: ``python -m tests.vm.faults.powercut [--cuts N]``.

Runs outside of the machine, because it has to outlive it, and prints a line of JSON for each volume and cut, as the
tests in the machine do. ``write`` and ``look`` are what runs inside, before and after the cut.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from tests.vm.machine.__main__ import LAST, log_directory, throwaway, told
from tests.vm.machine.qemu import CACHE, MACHINES, Machine
from tests.vm.machine.session import MachineError

TITLE = "power cut of the machine, and boot"
EXPECTED = "attached again, nothing lost that was flushed"
#: On the machine's disk; what storaged keeps is in its real places.
PLACE = Path("/var/tmp/power")
READY = "under load"
#: Transport, use and queue depth of each volume; in CI the first two.
VOLUMES = (
    ("vduse", "raw", 32), ("nbd", "ext4", 1), ("vduse", "ext4", 32), ("nbd", "raw", 1),
    ("vduse", "ext4", 1), ("nbd", "raw", 32), ("vduse", "raw", 1), ("nbd", "ext4", 32),
)


def write(count: int) -> None:
    """In the machine: attach the volumes, keep them busy, say so, and wait for the end."""
    from tests.harness import Daemon, image
    from tests.vm.faults.cases import Case
    from tests.vm.faults.load import Site

    PLACE.mkdir(exist_ok=True)
    daemon = Daemon(Path("/"))
    daemon.log = PLACE / "storaged.log"
    daemon.start()
    sites = []
    for number, (transport, use, depth) in enumerate(VOLUMES[:count]):
        place = PLACE / str(number)
        place.mkdir(exist_ok=True)
        source = image(place / "disk", "raw", "64M")
        site = Site(daemon, place, Case(transport, use, depth), source, {"persist": True}, name=f"v{number}")
        site.begin(place / "journal")
        sites.append(site)
    print(READY, flush=True)
    while True:
        for site in sites:
            said = site.load.status()
            assert said["errors"] == {}, said
            assert said["wrong"] == [], said
        time.sleep(0.5)


def look(count: int) -> None:
    """In the machine, after the cut: start the daemon, look at each volume, and take it away."""
    from tests.harness import Daemon, eventually, leftovers, mounted, run
    from tests.vm.faults.conftest import versions
    from tests.vm.faults.load import Kernel, nothing_is_stuck
    from tests.vm.faults.verifier import after_power_failure

    kernel = Kernel()
    daemon = Daemon(Path("/"))
    daemon.log = PLACE / "storaged.log"
    begin = time.monotonic()
    daemon.start()
    for number, (transport, use, depth) in enumerate(VOLUMES[:count]):
        place = PLACE / str(number)
        name = f"v{number}"
        eventually(lambda name=name: daemon.online(name), f"{name} is attached again", 60)  # type: ignore[misc]
        online = round(time.monotonic() - begin, 1)
        device = str(daemon.show(name)["device"])
        assert daemon.show(name)["transport"] == transport
        journal = str(place / "journal")
        if use == "raw":
            found = after_power_failure(device, journal, "")
        else:
            with mounted(device, place / "mnt") as directory:
                found = after_power_failure(str(directory / "file"), journal, str(directory / "mark"))
            run("fsck.ext4", "-fn", device)
        assert found["wrong"] == [], found
        assert found["flushed"] > 0, found
        daemon.detach(name, timeout=60)
        print(json.dumps({
            "fault": TITLE, "expected": EXPECTED, "transport": transport, "use": use, "depth": depth, "step": "",
            "passed": True, "outcome": "attached again, nothing lost", "pause": None, "seconds": online, **versions(),
        }), flush=True)
    assert daemon.names() == []
    assert leftovers(daemon.root) == []
    assert daemon.stop() == 0
    assert run("pgrep", "-f", "qemu-storage-daemon", check=False).stdout == ""
    nothing_is_stuck()
    assert kernel.complaints() == []


def cut(machine: Machine, count: int) -> list[str]:
    """Run both halves with a power cut in between; return the lines of the results."""
    said, busy = bytearray(), threading.Event()

    def listen(data: bytes) -> None:
        said.extend(data)
        if READY.encode() in said:
            busy.set()

    ended: list[int] = []

    def first_half() -> None:
        with suppress(MachineError):  # it ends with the machine
            ended.append(machine.run(command("write", count), output=listen, error=sys.stderr.buffer.write))
        busy.set()

    machine.sync()
    thread = threading.Thread(target=first_half, daemon=True)
    thread.start()
    if not busy.wait(600) or ended:
        raise MachineError(f"the volumes did not come under load: {said.decode(errors='replace')}")
    time.sleep(random.uniform(1, 4))
    if ended:
        raise MachineError("the load failed before the power cut")
    machine.restart(orderly=False)
    thread.join(60)
    machine.sync()
    lines = bytearray()
    status = machine.run(command("look", count), output=lines.extend, error=sys.stderr.buffer.write,
                         deadline=time.monotonic() + 600)
    if status:
        raise subprocess.CalledProcessError(status, "look")
    return lines.decode().splitlines()


def command(half: str, count: int) -> list[str]:
    """What to run in the machine."""
    return ["python", "-m", "tests.vm.faults.powercut", half, str(count)]


def main() -> int:
    """Outside: start a machine, and cut."""
    if sys.argv[1:2] in (["write"], ["look"]):
        (write if sys.argv[1] == "write" else look)(int(sys.argv[2]))
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--machine", choices=MACHINES, default="trixie")
    parser.add_argument("--cuts", type=int, default=1)
    parser.add_argument("--volumes", type=int, default=2, help="how many (default: %(default)s; all: 8)")
    parser.add_argument("--logs", type=log_directory, default=LAST.name, metavar="NAME", help="as with scripts/vm")
    arguments = parser.parse_args()
    logs = CACHE / arguments.logs
    try:
        with throwaway(arguments.machine, logs) as machine, told(machine, logs / "console.log"):
            for _ in range(arguments.cuts):
                print(*cut(machine, arguments.volumes), sep="\n", flush=True)
    except (MachineError, subprocess.CalledProcessError) as error:
        print(f"power cut: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
