"""A reboot with mounted volumes, by systemd and its units: ``python -m tests.vm.boot`` (scripts/reboot-test).

Runs outside of the machine, because it has to outlive it. ``before`` and ``after`` run inside, on both sides of the
reboot. There are ten volumes, by all transports, kept by --persist or by files, mounted by /etc/fstab or by hand; one
more of each transport whose server has died while it was written to; and one that never comes up. At the end the
machine is switched off with all that mounted, and the servers dead again.
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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from storaged.host.scope import cgroup_of, unit_name
from tests.harness import STORAGED, Daemon, eventually, image, run
from tests.vm.machine.__main__ import LAST, collect, log_directory, throwaway, told
from tests.vm.machine.qemu import CACHE, MACHINES, Machine
from tests.vm.machine.session import MachineError, MachineGone

#: On the machine's disk; what storaged keeps is in its real places.
PLACE = Path("/var/tmp/boot")
UNITS = Path("/etc/systemd/system")
TRANSPORTS = ("vduse", "nbd", "fuse")
#: Those whose server dies, by transport and with its port; and the one whose source is missing at the boot.
DEAD = {f"dead-{transport}": (transport, 10809 + number) for number, transport in enumerate(TRANSPORTS)}
NEVER = "never"
UNITS_OF_THE_BOOT = ("storaged.service", "remote-fs.target", "multi-user.target")
#: Seconds for which a volume may hang at the shutdown: less than in service, so that nobody has to wait for it.
STUCK_AFTER = 8
#: Seconds for the way down and up again, which takes 40 in an emulated machine that has its processors for itself. A
#: mount that hangs takes systemd 90, and that more than once.
LONGEST = 180

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


@dataclass(frozen=True)
class Volume:
    """One that works. Of four in a row each is kept and mounted in another way."""

    number: int

    @property
    def name(self) -> str:
        """With a dash: systemd escapes it."""
        return f"v-{self.number}"

    @property
    def persistent(self) -> bool:
        """Whether --persist keeps it; else a file does."""
        return self.number % 4 < 2

    @property
    def in_fstab(self) -> bool:
        """Whether it is in /etc/fstab; else it is mounted by hand."""
        return self.number % 2 == 0

    @property
    def wishes(self) -> dict[str, str]:
        """What else is wished for."""
        round, number = divmod(self.number, len(TRANSPORTS))
        return {"format": ("raw", "qcow2")[round % 2], "transport": TRANSPORTS[number]}


@dataclass(frozen=True)
class Plan:
    """What is done. ``short`` leaves out what has other tests, too: what CI has time for."""

    volumes: int
    short: bool

    @property
    def working(self) -> list[Volume]:
        """The volumes that work."""
        return [Volume(number) for number in range(self.volumes)]

    @property
    def names(self) -> list[str]:
        """Of all that are mounted."""
        return [*(volume.name for volume in self.working), *DEAD]

    @property
    def words(self) -> list[str]:
        """As the command line has it."""
        return ["--volumes", str(self.volumes), *(["--short"] if self.short else [])]


def waiter(name: str) -> str:
    """The unit that waits for a volume."""
    return "storaged@{}.service".format(name.replace("-", r"\x2d"))


def content(name: str) -> bytes:
    """What is written to the filesystem on a volume, and not flushed."""
    return (name.encode() * 10_000)[:16_384]


def say(text: str) -> None:
    """Tell where it is, and when."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def write(path: Path, text: str) -> None:
    """Write a file of the machine's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


# --- in the machine, before ------------------------------------------------------------------------------------


def before(plan: Plan) -> None:
    """Install, attach, mount; restart the daemon under all that; write; and let servers die."""
    install()
    daemon = Daemon(Path("/"))
    say("the units are installed")
    if not plan.short:
        a_restart_spares_a_server_without_a_scope(daemon)
        the_units_of_a_volume_go_with_it(daemon)
    say("attaching")
    fstab = ""
    for volume in plan.working:
        name, wishes = volume.name, volume.wishes
        source = image(PLACE / f"{name}.img", wishes["format"], "48M")
        if volume.persistent:
            daemon.attach(name, source, persist=True, **wishes)
        else:
            text = "".join(f"{key} = '{value}'\n" for key, value in {"source": source, **wishes}.items())
            write(Path(daemon.layout.volume_files, f"{name}.toml"), text)
        if volume.in_fstab:
            # systemd's 90 seconds for a device begin with the boot, and an emulated one is slow.
            options = f"_netdev,x-systemd.requires={waiter(name)},x-systemd.device-timeout=300"
            fstab += f"/dev/storaged/{name} /mnt/{name} ext4 {options} 0 2\n"
    write(Path(daemon.layout.volume_files, f"{NEVER}.toml"), f"source = '{PLACE}/none'\n")
    fstab += f"/dev/storaged/{NEVER} /mnt/{NEVER} ext4 _netdev,nofail,x-systemd.requires={waiter(NEVER)} 0 2\n"
    write(Path("/etc/fstab"), fstab)
    run("systemctl", "daemon-reload")
    run("systemctl", "reload", "storaged")
    eventually(lambda: {*(volume.name for volume in plan.working), NEVER} <= set(daemon.names()), "the files are read")

    for name, (transport, port) in DEAD.items():
        image(PLACE / f"{name}.img", "raw", "48M")
        serve(name, port)
        daemon.attach(name, f"nbd://127.0.0.1:{port}/disk", transport=transport, persist=True)
    in_fstab = {volume.name for volume in plan.working if volume.in_fstab}
    for name in plan.names:
        run(*STORAGED, "wait", name, "--timeout", "90")
        run("mkfs.ext4", "-q", f"/dev/storaged/{name}")
        Path("/mnt", name).mkdir()
        if name in in_fstab:
            # As at the boot: by its unit, which waits for the volume.
            run("systemctl", "start", f"/mnt/{name}")
        else:
            run("mount", f"/dev/storaged/{name}", f"/mnt/{name}")
    say("mounted")
    for name in plan.names:
        pid = daemon.qsd(name)
        eventually(lambda pid=pid, name=name: in_scope(pid, unit_name(name, pid)), f"{name}: scope", 60)  # type: ignore[misc]
    if not plan.short:
        nobody_notices_the_daemon(daemon, plan.names)
        swap = daemon.device("swap", image(PLACE / "swap.img", "raw", "32M"), transport="nbd")
        run("mkswap", swap)
        run("swapon", swap)
    write_and_let_servers_die(plan)
    say("going down")


def write_and_let_servers_die(plan: Plan) -> None:
    """Nothing of it is flushed; and the last of what happens from now on is to be on the console."""
    for name in plan.names:
        Path("/mnt", name, "file").write_bytes(content(name))
    for name in DEAD:
        run("systemctl", "kill", "-s", "KILL", f"server-{name}.service")
        eventually(lambda name=name: not listens(DEAD[name][1]), "its server is gone")  # type: ignore[misc]
    run("dmesg", "--console-level", "info")


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
    # What happens on the way down is to be read afterwards; and on the console, if it does not come up again.
    write(
        Path("/etc/systemd/journald.conf.d/zz.conf"),
        "[Journal]\nStorage=persistent\nForwardToConsole=yes\nTTYPath=/dev/ttyS0\nMaxLevelConsole=info\n",
    )
    Path("/var/log/journal").mkdir(exist_ok=True)
    run("systemctl", "restart", "systemd-journald")
    run("systemctl", "unmask", "systemd-journal-flush")
    run("journalctl", "--flush")
    run("systemctl", "enable", "--now", "storaged", "storaged-shutdown")


def nobody_notices_the_daemon(daemon: Daemon, names: list[str]) -> None:
    """It is restarted, stands still until the watchdog ends it, is stopped and asked: the QSDs and I/O go on."""
    servers = {name: daemon.qsd(name) for name in names}

    def main_pid() -> int:
        return int(run("systemctl", "show", "-P", "MainPID", "storaged").stdout)

    with writing(names[:4]) as pauses:
        run("systemctl", "restart", "storaged")
        say("restarted")
        former = main_pid()
        os.kill(former, signal.SIGSTOP)
        eventually(lambda: main_pid() not in (0, former), "the watchdog has ended a daemon that stood still", 90)
        say("ended by its watchdog")
        run("systemctl", "stop", "storaged")
        # The socket starts it.
        eventually(lambda: all(daemon.online(name) for name in names), "adopted", 60)
        say("started by its socket")
        assert {name: daemon.qsd(name) for name in servers} == servers
        eventually(lambda: all(log.stat().st_size > 100 for log in PLACE.glob("*.writes")), "they have written")
        longest = max(pauses())
    say(f"the longest write while the daemon was restarted three times: {longest:.2f} s")
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


def after(plan: Plan) -> None:
    """All is there again; what could not come up has held up nothing, and comes as soon as it can."""
    daemon = Daemon(Path("/"))

    def moment(unit: str, of: str = "ActiveEnter") -> int:
        return int(run("systemctl", "show", "-P", f"{of}TimestampMonotonic", unit).stdout)

    eventually(lambda: moment("multi-user.target"), "the machine is up", 60)
    say(f"up: {', '.join(f'{unit} {moment(unit) / 1e6:.1f} s' for unit in UNITS_OF_THE_BOOT)}")
    assert moment("storaged.service") < moment("remote-fs.target")
    # Nothing has waited for the volume that is not there: it still is, or was later, given up.
    given_up = moment(waiter(NEVER), "InactiveEnter")
    assert moment(waiter(NEVER), "InactiveExit")
    assert given_up == 0 or given_up > moment("multi-user.target")
    for volume in plan.working:
        name = volume.name
        if volume.in_fstab:
            assert os.path.ismount(f"/mnt/{name}"), name
            assert moment(waiter(name)) < moment("remote-fs.target")
        else:
            run(*STORAGED, "wait", name, "--timeout", "90")
            run("mount", f"/dev/storaged/{name}", f"/mnt/{name}")
        assert Path("/mnt", name, "file").read_bytes() == content(name), name
        assert daemon.show(name)["transport"] == volume.wishes["transport"]
    # Each filesystem was unmounted in good order before, also that of the machine, where the images are.
    recovered = [line for line in run("dmesg").stdout.splitlines() if "recovery complete" in line or "orphan" in line]
    assert recovered == []

    # Nothing of the host waited in vain, however long it took; and only what was dead has been given up.
    said = run("journalctl", "-b", "-1", "-o", "short-monotonic", "_PID=1").stdout
    assert [line for line in said.splitlines() if "timed out" in line or "ordering cycle" in line] == []
    shown = run("journalctl", "-b", "-1", "-o", "short-monotonic", "-u", "storaged-stuck").stdout
    assert sorted(re.findall("volume (.*): its I/O is ended", shown)) == sorted(DEAD), shown
    say("all is there")

    for name, (_, port) in DEAD.items():
        assert not daemon.online(name)
        serve(name, port)
    for name in DEAD:
        run(*STORAGED, "wait", name, "--timeout", "90")
        run("mount", f"/dev/storaged/{name}", f"/mnt/{name}")
    run("mkfs.ext4", "-q", image(PLACE / "none.new", "raw", "8M"))
    (PLACE / "none.new").rename(PLACE / "none")
    run(*STORAGED, "wait", NEVER, "--timeout", "90")
    run("systemctl", "start", f"/mnt/{NEVER}")
    assert os.path.ismount(f"/mnt/{NEVER}")
    say("what was away is there")
    if not plan.short:
        write_and_let_servers_die(plan)


# --- outside ---------------------------------------------------------------------------------------------------


def inside(machine: Machine, half: str, plan: Plan) -> None:
    """Run one half. Raises CalledProcessError."""
    machine.sync()
    status = machine.run(
        ["python", "-m", "tests.vm.boot", half, *plan.words], output=sys.stdout.buffer.write,
        error=sys.stderr.buffer.write, deadline=time.monotonic() + 600,
    )
    sys.stdout.flush()
    if status:
        raise subprocess.CalledProcessError(status, half)


def main() -> int:
    """Outside: start a machine, reboot it in good order, and switch it off."""
    parser = argparse.ArgumentParser()
    parser.add_argument("half", nargs="?", choices=("before", "after"), help=argparse.SUPPRESS)
    parser.add_argument("--machine", choices=MACHINES, default="trixie")
    parser.add_argument("--logs", type=log_directory, default=LAST.name, metavar="NAME", help="as with scripts/vm")
    parser.add_argument("--volumes", type=int, default=10, help="how many work (default: %(default)s)")
    parser.add_argument("--short", action="store_true", help="no restarts of the daemon, and only the reboot")
    arguments = parser.parse_args()
    plan = Plan(arguments.volumes, arguments.short)
    if arguments.half is not None:
        (before if arguments.half == "before" else after)(plan)
        return 0
    logs = CACHE / arguments.logs
    try:
        with throwaway(arguments.machine, logs) as machine, told(machine, logs / "console.log"):
            outside(machine, plan)
    except (MachineError, subprocess.CalledProcessError) as error:
        print(f"reboot: {error}", file=sys.stderr)
        return 1
    return 0


def outside(machine: Machine, plan: Plan) -> None:
    """Both halves, and the times of what is between and after them. Raises MachineError, CalledProcessError."""
    times = {}
    try:
        inside(machine, "before", plan)
        times["down and up again"] = timed(lambda: machine.restart(orderly=True))
        inside(machine, "after", plan)
    finally:
        if machine.alive():
            collect(machine)
    if not plan.short:
        times["switched off"] = timed(lambda: switch_off(machine))
    for what, seconds in times.items():
        say(f"{what} after {seconds:.0f} s")
        if seconds > LONGEST:
            raise MachineError(f"with dead servers it is {what} after {seconds:.0f} s")


def timed(work: Callable[[], None]) -> float:
    """Seconds."""
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def switch_off(machine: Machine) -> None:
    """Switch a machine off in good order, and wait for its end. Raises MachineError."""
    with suppress(MachineGone):
        machine.quietly(["systemctl", "--no-block", "poweroff"])
    deadline = time.monotonic() + 3 * LONGEST
    while machine.alive():
        if time.monotonic() > deadline:
            raise MachineError("it does not switch itself off")
        time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(main())
