"""A reboot with mounted volumes, by systemd and its units: ``python -m tests.vm.boot`` (scripts/reboot-test).

Runs outside of the machine, because it has to outlive it. ``before`` and ``after`` run inside, on both sides of the
reboot. There are ten volumes, by vduse and nbd, kept by --persist or by files, mounted by /etc/fstab or by hand; two
more whose servers have died while they were written to; and one that never comes up.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from storaged.host.scope import cgroup_of, unit_name
from tests.harness import STORAGED, Daemon, eventually, image, run
from tests.vm.machine.__main__ import throwaway, told
from tests.vm.machine.qemu import CACHE, MACHINES, Machine
from tests.vm.machine.session import MachineError

#: On the machine's disk; what storaged keeps is in its real places.
PLACE = Path("/var/tmp/boot")
UNITS = Path("/etc/systemd/system")
#: The volumes that work. A dash in each: systemd escapes it.
NAMES = [f"v-{number}" for number in range(10)]
#: Of them: those in /etc/fstab, and those that --persist keeps; the others are kept by files.
IN_FSTAB = {"v-0", "v-1", "v-6", "v-7"}
PERSISTENT = {"v-0", "v-1", "v-2", "v-3"}
#: Those whose server dies, by transport and with its port; and the one whose source is missing at the boot.
DEAD = {"dead-nbd": ("nbd", 10809), "dead-vduse": ("vduse", 10810)}
NEVER = "never"
#: Seconds for which a volume may hang at the shutdown: less than in service, so that nobody has to wait for it.
STUCK_AFTER = 8
#: Seconds for the way down and up again. A mount that hangs takes systemd 90, and that more than once.
LONGEST = 80

#: Writes past the page cache, and says how long it took at the most.
WRITER = """
import mmap, os, sys, time
longest, fd = 0.0, os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_DIRECT)
page = mmap.mmap(-1, 4096)
while True:
    begin = time.monotonic()
    os.pwrite(fd, page, 0)
    longest = max(longest, time.monotonic() - begin)
    print(longest, flush=True)
    time.sleep(0.01)
"""


def transport_of(name: str) -> str:
    """Half of them each."""
    return ("vduse", "nbd")[NAMES.index(name) % 2]


def wishes_of(name: str) -> dict[str, str]:
    """What else is wished for: raw and qcow2 with either transport."""
    return {"format": ("raw", "qcow2")[NAMES.index(name) // 2 % 2], "transport": transport_of(name)}


def waiter(name: str) -> str:
    """The unit that waits for a volume."""
    return "storaged@{}.service".format(name.replace("-", r"\x2d"))


def content(name: str) -> bytes:
    """What is written to the filesystem on a volume, and not flushed."""
    return (name.encode() * 10_000)[:16_384]


def write(path: Path, text: str) -> None:
    """Write a file of the machine's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- in the machine, before ------------------------------------------------------------------------------------


def before() -> None:
    """Install, attach, mount; restart the daemon under all that; write; and let two servers die."""
    install()
    daemon = Daemon(Path("/"))
    a_restart_spares_a_server_without_a_scope(daemon)
    the_units_of_a_volume_go_with_it(daemon)
    fstab = ""
    for name in NAMES:
        wishes = wishes_of(name)
        source = image(PLACE / f"{name}.img", wishes["format"], "48M")
        if name in PERSISTENT:
            daemon.attach(name, source, persist=True, **wishes)
        else:
            text = "".join(f"{key} = '{value}'\n" for key, value in {"source": source, **wishes}.items())
            write(Path(daemon.layout.volume_files, f"{name}.toml"), text)
        if name in IN_FSTAB:
            fstab += f"/dev/storaged/{name} /mnt/{name} ext4 _netdev,x-systemd.requires={waiter(name)} 0 2\n"
    write(Path(daemon.layout.volume_files, f"{NEVER}.toml"), f"source = '{PLACE}/none'\n")
    fstab += f"/dev/storaged/{NEVER} /mnt/{NEVER} ext4 _netdev,nofail,x-systemd.requires={waiter(NEVER)} 0 2\n"
    write(Path("/etc/fstab"), fstab)
    run("systemctl", "daemon-reload")
    run("systemctl", "reload", "storaged")
    eventually(lambda: {*NAMES, NEVER} <= set(daemon.names()), "the files are read")

    for name, (transport, port) in DEAD.items():
        image(PLACE / f"{name}.img", "raw", "48M")
        serve(name, port)
        daemon.attach(name, f"nbd://127.0.0.1:{port}/disk", transport=transport, persist=True)
    for name in [*NAMES, *DEAD]:
        run(*STORAGED, "wait", name, "--timeout", "90")
        run("mkfs.ext4", "-q", f"/dev/storaged/{name}")
        Path("/mnt", name).mkdir()
        if name in IN_FSTAB:
            # As at the boot: by its unit, which waits for the volume.
            run("systemctl", "start", f"/mnt/{name}")
        else:
            run("mount", f"/dev/storaged/{name}", f"/mnt/{name}")
    for name in [*NAMES, *DEAD]:
        pid = daemon.qsd(name)
        eventually(lambda pid=pid, name=name: in_scope(pid, unit_name(name, pid)), f"{name}: scope", 60)  # type: ignore[misc]
    nobody_notices_the_daemon(daemon)
    for name in [*NAMES, *DEAD]:
        Path("/mnt", name, "file").write_bytes(content(name))
    for name in DEAD:
        run("systemctl", "kill", "-s", "KILL", f"server-{name}.service")


def a_restart_spares_a_server_without_a_scope(daemon: Daemon) -> None:
    """systemd cannot be asked for one: it stays in the cgroup of the daemon."""
    bus = Path("/run/dbus/system_bus_socket")
    away = bus.rename(f"{bus}.away")
    daemon.attach("bare", image(PLACE / "bare.img", "raw", "1M"), transport="nbd")
    pid = daemon.qsd("bare")
    eventually(lambda: "no systemd scope" in run("journalctl", "-u", "storaged").stdout, "it is said")
    run("systemctl", "restart", "storaged")
    eventually(lambda: daemon.online("bare"), "adopted")
    assert daemon.qsd("bare") == pid
    assert os.path.basename(cgroup_of(pid)) == "storaged.service"
    daemon.detach("bare")
    away.rename(bus)


def the_units_of_a_volume_go_with_it(daemon: Daemon) -> None:
    """Its scope, and what orders its mounts."""
    def units() -> str:
        return run("systemctl", "list-units", "--plain", "*brief*").stdout

    daemon.attach("brief", image(PLACE / "brief.img", "raw", "1M"), transport="nbd")
    own = ("storaged-qsd-brief-", "storagedvolume_brief_", "blockdev@dev-storaged-brief.target")
    eventually(lambda: all(unit in units() for unit in own), "it has all of its units")
    daemon.detach("brief")
    eventually(lambda: not any(unit in units() for unit in own), "they are gone")


def install() -> None:
    """The units, as README.md says, and shorter times."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir()
    run("/srv/storaged/scripts/install-units")
    command = "/srv/storaged/.venv/bin/storaged shutdown --stuck-after"
    write(UNITS / "storaged-stuck.service.d/soon.conf", f"[Service]\nExecStart=\nExecStart={command} {STUCK_AFTER}\n")
    write(UNITS / "storaged.service.d/soon.conf", "[Service]\nWatchdogSec=30\nTimeoutAbortSec=1\n")
    # The machine boots without any (tests/vm/guest/prepare).
    Path("/etc/systemd/system-generators/systemd-fstab-generator").unlink(missing_ok=True)
    # What happens on the way down is to be read afterwards.
    write(Path("/etc/systemd/journald.conf.d/zz.conf"), "[Journal]\nStorage=persistent\n")
    Path("/var/log/journal").mkdir(exist_ok=True)
    run("systemctl", "restart", "systemd-journald")
    run("systemctl", "unmask", "systemd-journal-flush")
    run("journalctl", "--flush")
    run("systemctl", "enable", "--now", "storaged", "storaged-shutdown")


def nobody_notices_the_daemon(daemon: Daemon) -> None:
    """It is restarted, stands still until the watchdog ends it, is stopped and asked: the QSDs and I/O go on."""
    servers = {name: daemon.qsd(name) for name in [*NAMES, *DEAD]}

    def main_pid() -> int:
        return int(run("systemctl", "show", "-P", "MainPID", "storaged").stdout)

    with writing(NAMES[:4]) as pauses:
        run("systemctl", "restart", "storaged")
        former = main_pid()
        os.kill(former, signal.SIGSTOP)
        eventually(lambda: main_pid() not in (0, former), "the watchdog has ended a daemon that stood still", 90)
        run("systemctl", "stop", "storaged")
        # The socket starts it.
        eventually(lambda: all(daemon.online(name) for name in NAMES), "adopted", 60)
        assert {name: daemon.qsd(name) for name in servers} == servers
        eventually(lambda: all(log.stat().st_size > 100 for log in PLACE.glob("*.writes")), "they have written")
        longest = max(pauses())
    print(f"the longest write while the daemon was restarted three times: {longest:.2f} s", flush=True)
    # Not a figure of the host's: the machine is emulated, and all volumes are adopted meanwhile.
    assert longest < 3


@contextmanager
def writing(names: list[str]) -> Iterator[Callable[[], list[float]]]:
    """Write to some of them all the time; yields what tells the longest write of each, in seconds."""
    logs = {name: PLACE / f"{name}.writes" for name in names}
    with ExitStack() as stack:
        for name, log in logs.items():
            file = stack.enter_context(open(log, "wb"))
            command = [sys.executable, "-IS", "-c", WRITER, f"/mnt/{name}/written"]
            stack.callback(subprocess.Popen(command, stdout=file).kill)
        # Whole lines: the last may be cut.
        yield lambda: [float(log.read_text().split()[-2]) for log in logs.values()]


def serve(name: str, port: int) -> None:
    """Start the server of a volume, and see that it listens."""
    run("systemd-run", "-q", "--collect", f"--unit=server-{name}", "qemu-nbd", "--persistent", "--shared=0",
        "--format=raw", "--export-name=disk", "--bind=127.0.0.1", f"--port={port}", PLACE / f"{name}.img")
    eventually(lambda: listens(port), "the server listens")


def listens(port: int) -> bool:
    """Whether somebody listens there."""
    return f" 0100007F:{port:04X} 00000000:0000 0A " in Path("/proc/net/tcp").read_text()


def in_scope(pid: int, unit: str) -> bool:
    """Whether a process is in its own unit."""
    return os.path.basename(cgroup_of(pid)) == unit


# --- in the machine, after -------------------------------------------------------------------------------------


def after() -> None:
    """All is there again; what could not come up has held up nothing, and comes as soon as it can."""
    daemon = Daemon(Path("/"))

    def reached(unit: str) -> int:
        return int(run("systemctl", "show", "-P", "ActiveEnterTimestampMonotonic", unit).stdout)

    # It does not wait for the volume that is not there, which has a minute yet.
    eventually(lambda: reached("multi-user.target"), "the machine is up", 60)
    assert reached("storaged.service") < reached("remote-fs.target")
    assert run("systemctl", "is-active", waiter(NEVER), check=False).stdout.strip() == "activating"
    for name in NAMES:
        if name in IN_FSTAB:
            assert os.path.ismount(f"/mnt/{name}"), name
            assert reached(waiter(name)) < reached("remote-fs.target")
        else:
            run("mount", f"/dev/storaged/{name}", f"/mnt/{name}")
        assert Path("/mnt", name, "file").read_bytes() == content(name), name
        assert daemon.show(name)["transport"] == transport_of(name)
    # Each filesystem was unmounted in good order before, also that of the machine, where the images are.
    recovered = [line for line in run("dmesg").stdout.splitlines() if "recovery complete" in line or "orphan" in line]
    assert recovered == []

    for name, (_, port) in DEAD.items():
        assert not daemon.online(name)
        serve(name, port)
    for name in DEAD:
        run(*STORAGED, "wait", name, "--timeout", "90")
    with open(PLACE / "none", "wb") as file:
        file.truncate(1 << 20)
    run(*STORAGED, "wait", NEVER, "--timeout", "90")
    shown = run("journalctl", "-b", "-1", "-o", "short-monotonic", "-u", "storaged-stuck").stdout
    assert re.findall("volume (.*): its I/O is ended", shown) == list(DEAD), shown


# --- outside ---------------------------------------------------------------------------------------------------


def inside(machine: Machine, half: str) -> None:
    """Run one half. Raises CalledProcessError."""
    machine.sync()
    status = machine.run(
        ["python", "-m", "tests.vm.boot", half], output=sys.stdout.buffer.write, error=sys.stderr.buffer.write,
        deadline=time.monotonic() + 600,
    )
    sys.stdout.flush()
    if status:
        raise subprocess.CalledProcessError(status, half)


def main() -> int:
    """Outside: start a machine, and reboot it in good order."""
    if sys.argv[1:2] in (["before"], ["after"]):
        (before if sys.argv[1] == "before" else after)()
        return 0
    parser = argparse.ArgumentParser()
    parser.add_argument("--machine", choices=MACHINES, default="trixie")
    arguments = parser.parse_args()
    try:
        with throwaway(arguments.machine) as machine, told(machine, CACHE / "last/console.log"):
            inside(machine, "before")
            begin = time.monotonic()
            machine.restart(orderly=True)
            seconds = time.monotonic() - begin
            print(f"down and up again after {seconds:.0f} s", flush=True)
            inside(machine, "after")
            if seconds > LONGEST:
                raise MachineError(f"a reboot with a dead server took {seconds:.0f} s")
    except (MachineError, subprocess.CalledProcessError) as error:
        print(f"reboot: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
