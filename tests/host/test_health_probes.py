"""The probes by which hangs are told apart, with real processes, block devices and a network that is cut."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from storaged.host.disk import progress
from storaged.host.process import thread_states
from storaged.host.tcp import silent_peers
from storaged.model.health import STALLED_AFTER, Progress, Standstill, Trouble, judge
from tests.contract.conftest import HERE
from tests.harness import Daemon, eventually, image, run
from tests.host.test_nbd_handshake import CMD_READ, CMD_WRITE, SIMPLE_REPLY, answer, ask, handshake


@pytest.fixture(params=HERE)
def transport(request: pytest.FixtureRequest) -> str:
    """Each transport that can be had here."""
    return str(request.param)


def trouble_of(pid: int, *, silent: bool, standstill: float = 0.0) -> Trouble | None:
    """What the probes and the judgement say of a process."""
    return judge(
        silent=silent, opening=False, threads=thread_states(pid), standstill=standstill,
        network=bool(silent_peers(pid)),
    )


@contextmanager
def program(*command: object, behind: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A program that is killed at the end; the stopped process ``behind`` which it may wait goes on before."""
    with subprocess.Popen(
        [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield process
        finally:
            if behind:
                os.kill(behind, signal.SIGCONT)
            process.kill()


@contextmanager
def held_up(pid: int) -> Iterator[None]:
    """A process is stopped for a while."""
    os.kill(pid, signal.SIGSTOP)
    try:
        eventually(lambda: set(thread_states(pid)) <= {"T", "D"}, "stopped")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


KERNEL = tuple(int(number) for number in os.uname().release.split("-")[0].split(".")[:2])
#: Where (bytes) nobody has read yet: a loop device may have what was read in the cache of its file.
UNREAD = 16 << 20


def read_past_the_cache(device: str) -> tuple[object, ...]:
    return (
        "dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", f"skip={UNREAD // 4096}", "iflag=direct",
        "status=none",
    )


def look(device: str) -> Progress:
    found = progress(device)
    assert found is not None
    return found


# Threads ------------------------------------------------------------------------------------------------------


def test_every_thread_of_a_qsd_has_a_state_and_all_are_stopped_together(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"))
    pid = daemon.qsd("a")
    assert len(thread_states(pid)) == len(os.listdir(f"/proc/{pid}/task")) > 1
    assert trouble_of(pid, silent=False) is None
    with held_up(pid):
        eventually(lambda: set(thread_states(pid)) == {"T"}, "all threads stop")
        assert trouble_of(pid, silent=True) is Trouble.QSD_STOPPED
    eventually(lambda: "T" not in thread_states(pid), "it goes on")
    assert trouble_of(pid, silent=True) is Trouble.QSD_SILENT


def test_a_process_that_is_traced_is_stopped_too() -> None:
    # ptrace(2): PTRACE_SEIZE and PTRACE_INTERRUPT, which need no signal; PTRACE_DETACH
    libc = ctypes.CDLL(None, use_errno=True)
    with program("sleep", 60) as process:
        assert libc.ptrace(0x4206, process.pid, 0, 0) == 0
        assert libc.ptrace(0x4207, process.pid, 0, 0) == 0
        eventually(lambda: thread_states(process.pid) == "t", "traced")
        assert trouble_of(process.pid, silent=True) is Trouble.QSD_STOPPED
        assert libc.ptrace(17, process.pid, 0, 0) == 0
        eventually(lambda: thread_states(process.pid) == "S", "it goes on")


def test_a_dead_process_is_a_zombie_and_then_nothing() -> None:
    with program("sleep", 60) as process:
        process.kill()
        eventually(lambda: thread_states(process.pid) == "Z", "dead")
        assert trouble_of(process.pid, silent=True) is None
    assert thread_states(process.pid) == ""
    assert silent_peers(process.pid) == []


def test_what_reads_a_device_whose_server_is_stopped_is_held_by_the_kernel(
    daemon: Daemon, place: Path, transport: str
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    pid = daemon.qsd("a")
    with held_up(pid), program(*read_past_the_cache(device), behind=pid) as reader:
        eventually(lambda: thread_states(reader.pid) == "D", "in the kernel")
        os.kill(pid, signal.SIGCONT)
        assert reader.wait(20) == 0


def test_a_killed_qsd_whose_storage_hangs_is_a_zombie_that_the_kernel_still_holds(
    daemon: Daemon, place: Path, transport: str
) -> None:
    """The storage of one QSD is the device of another, which is stopped."""
    device = daemon.device("below", image(place / "below.raw", "raw"), transport=transport)
    path = place / "nbd.sock"
    qsd = [
        "qemu-storage-daemon", "--blockdev", f"driver=host_device,node-name=d,filename={device},cache.direct=on",
        "--nbd-server", f"addr.type=unix,addr.path={path}", "--export", "type=nbd,id=e,node-name=d,name=e,writable=on",
    ]
    with program(*qsd) as above:
        eventually(path.exists, "QSD listens")
        sock, _ = handshake(path, "e")
        with sock, held_up(daemon.qsd("below")):
            ask(sock, CMD_READ, UNREAD, 4096)
            eventually(lambda: "D" in thread_states(above.pid), "a thread of it is held")
            assert trouble_of(above.pid, silent=False) is None, "it answers"
            assert trouble_of(above.pid, silent=True) is Trouble.QSD_IN_KERNEL
            with held_up(above.pid):
                assert trouble_of(above.pid, silent=True) is Trouble.QSD_IN_KERNEL, "though it is stopped as well"
            above.kill()
            eventually(lambda: "Z" in thread_states(above.pid), "dead, but for what the kernel holds")
            assert "D" in thread_states(above.pid)
            assert above.poll() is None
            assert trouble_of(above.pid, silent=True) is Trouble.QSD_IN_KERNEL
        assert above.wait(20) == -signal.SIGKILL


# Block devices ------------------------------------------------------------------------------------------------


def test_what_ends_is_counted_whatever_it_is(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    for command in (
        read_past_the_cache(device),
        ("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "oflag=direct", "status=none"),
        ("sync", device),
        ("blkdiscard", "--offset", 0, "--length", 1 << 20, device),
    ):
        before = look(device)
        run(*command)
        assert look(device).ended > before.ended, command
    eventually(lambda: look(device).in_flight == 0, "nothing is left")


def test_a_stopped_server_is_a_standstill_until_it_goes_on(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    pid, standstill = daemon.qsd("a"), Standstill()
    assert standstill.update(progress(device), time.monotonic()) == 0
    with held_up(pid):
        before = look(device)
        with program(*read_past_the_cache(device), behind=pid) as reader:
            eventually(lambda: look(device).in_flight > 0, "it is in flight")
            assert standstill.update(progress(device), time.monotonic()) == 0
            time.sleep(1)  # what does not happen cannot be awaited
            lasted = standstill.update(progress(device), time.monotonic())
            assert 1 <= lasted < STALLED_AFTER
            assert look(device).ended == before.ended
            # Seen by the device alone, it would be the backend; that QSD is silent says more.
            assert trouble_of(pid, silent=False, standstill=lasted + STALLED_AFTER) is Trouble.BACKEND_SILENT
            assert trouble_of(pid, silent=True, standstill=lasted + STALLED_AFTER) is Trouble.QSD_STOPPED
            os.kill(pid, signal.SIGCONT)
            assert reader.wait(20) == 0
    eventually(lambda: look(device).in_flight == 0, "nothing is in flight")
    assert look(device).ended > before.ended
    assert standstill.update(progress(device), time.monotonic()) == 0


def test_a_write_and_the_flush_behind_it_are_in_flight(daemon: Daemon, place: Path, transport: str) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    pid = daemon.qsd("a")
    with held_up(pid):
        before = look(device)
        writes = ("dd", "if=/dev/zero", f"of={device}", "bs=4096", "count=1", "conv=fsync", "status=none")
        with program(*writes, behind=pid) as writer:
            eventually(lambda: look(device).in_flight > 0, "it is in flight")
            assert look(device).ended == before.ended
            os.kill(pid, signal.SIGCONT)
            assert writer.wait(20) == 0
    eventually(lambda: look(device).in_flight == 0, "nothing is in flight")
    assert look(device).ended >= before.ended + 2


def test_a_flush_with_nothing_beside_it_is_in_flight_too_but_not_to_the_eyes_of_linux_6_1(
    daemon: Daemon, place: Path, transport: str
) -> None:
    device = daemon.device("a", image(place / "a.raw", "raw"), transport=transport)
    eventually(lambda: look(device).in_flight == 0, "nothing is in flight")
    pid = daemon.qsd("a")
    with held_up(pid):
        before = look(device)
        with program("sync", device, behind=pid) as flush:
            eventually(lambda: thread_states(flush.pid) == "D", "it waits")
            assert look(device).in_flight > 0 or KERNEL < (6, 12)
            assert look(device).ended == before.ended
            os.kill(pid, signal.SIGCONT)
            assert flush.wait(20) == 0
    eventually(lambda: look(device).ended > before.ended, "the flush is counted")


def test_what_is_no_block_device_cannot_be_told() -> None:
    assert progress("/dev/null") is None
    assert progress("/dev/no-such-device") is None


# The network --------------------------------------------------------------------------------------------------

_CLIENT = """
import socket, sys
sock = socket.socket(socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET)
for line in sys.stdin:
    match line.split():
        case ["connect"]:
            sock.connect((sys.argv[1], 3260))
        case ["send", length]:
            sock.sendall(bytes(int(length)))
        case ["keepalive"]:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
                sock.setsockopt(socket.IPPROTO_TCP, option, 1)
    print("done", flush=True)
"""
_SERVER = """
import socket
with socket.create_server(("::", 3260), family=socket.AF_INET6, dualstack_ipv6=True) as listening:
    print("listens", flush=True)
    while True:
        with listening.accept()[0] as connection:
            while connection.recv(1 << 16):
                pass
"""
_NAMES = ("near", "far")


def network_of(pid: int) -> str:
    return os.readlink(f"/proc/{pid}/ns/net")


class Network:
    """Two network namespaces with a cable between them. Neighbours are known for good: nothing tells of a cut."""

    def __init__(self) -> None:
        self._holders = [subprocess.Popen(["unshare", "--net", "sleep", "infinity"]) for _ in _NAMES]
        self.near, self.far = (holder.pid for holder in self._holders)
        ours = network_of(os.getpid())
        eventually(lambda: ours not in map(network_of, (self.near, self.far)), "the namespaces are there")
        self.ip(
            self.near, "link", "add", "near", "address", "02:00:00:00:00:01", "type", "veth",
            "peer", "name", "far", "address", "02:00:00:00:00:02", "netns", self.far,
        )
        for pid, name, number, other in ((self.near, "near", 1, 2), (self.far, "far", 2, 1)):
            self.ip(pid, "link", "set", name, "up")
            self.ip(pid, "address", "add", f"192.0.2.{number}/24", "dev", name)
            self.ip(pid, "address", "add", f"2001:db8::{number}/64", "dev", name, "nodad")
            for address in (f"192.0.2.{other}", f"2001:db8::{other}"):
                self.ip(pid, "neighbour", "add", address, "lladdr", f"02:00:00:00:00:0{other}", "dev", name)

    def end(self) -> None:
        for holder in self._holders:
            holder.kill()
            holder.wait()

    def inside(self, pid: int, *command: object) -> tuple[object, ...]:
        """A command line that runs in one of the namespaces (and is the process itself: nsenter only executes)."""
        return ("nsenter", f"--net=/proc/{pid}/ns/net", *command)

    def ip(self, pid: int, *command: object) -> None:
        run(*self.inside(pid, "ip", *command))

    def cut_the_cable(self) -> None:
        self.ip(self.far, "link", "set", "far", "down")

    def drop_all_that_comes(self) -> None:
        """The near side sees nothing of this but the silence."""
        self.ip(self.far, "address", "delete", "192.0.2.2/24", "dev", "far")

    def mend(self) -> None:
        self.ip(self.far, "link", "set", "far", "up")
        self.ip(self.far, "address", "replace", "192.0.2.2/24", "dev", "far")
        self.ip(self.far, "neighbour", "replace", "192.0.2.1", "lladdr", "02:00:00:00:00:01", "dev", "far")


@pytest.fixture
def network() -> Iterator[Network]:
    network = Network()
    try:
        yield network
    finally:
        network.end()


@pytest.fixture
def server(network: Network) -> Iterator[subprocess.Popen[str]]:
    with program(*network.inside(network.far, sys.executable, "-c", _SERVER)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "listens\n"
        yield process


@contextmanager
def client(network: Network, address: str = "192.0.2.2") -> Iterator[subprocess.Popen[str]]:
    with program(*network.inside(network.near, sys.executable, "-c", _CLIENT, address)) as process:
        yield process


def tell(process: subprocess.Popen[str], *words: str, wait: bool = True) -> None:
    """Tell a client what to do, and wait until it is done."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(" ".join(words) + "\n")
    process.stdin.flush()
    assert not wait or process.stdout.readline() == "done\n"


def columns(pid: int) -> list[str]:
    """The columns of a client's connection in the kernel's table (there is no other one in its namespace)."""
    lines = Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]
    assert len(lines) == 1
    return lines[0].split()


def all_acknowledged(pid: int) -> bool:
    return columns(pid)[4].startswith("00000000:")


@pytest.mark.parametrize("cut", [Network.cut_the_cable, Network.drop_all_that_comes])
def test_a_peer_is_away_when_what_is_sent_to_it_is_not_acknowledged_and_back_when_it_is(
    network: Network, server: subprocess.Popen[str], cut: Callable[[Network], None]
) -> None:
    with client(network) as process:
        tell(process, "connect")
        tell(process, "send", "100")
        eventually(lambda: all_acknowledged(process.pid), "acknowledged")
        assert silent_peers(process.pid) == []
        cut(network)
        assert silent_peers(process.pid) == [], "nobody knows yet"
        tell(process, "send", "100")
        eventually(lambda: silent_peers(process.pid) == ["192.0.2.2:3260"], "it is away")
        assert trouble_of(process.pid, silent=False, standstill=STALLED_AFTER) is Trouble.NETWORK_AWAY
        assert silent_peers(server.pid) == [], "it has sent nothing"
        network.mend()
        eventually(lambda: silent_peers(process.pid) == [], "it is back")
        assert all_acknowledged(process.pid)


@pytest.mark.parametrize(
    ("address", "peer"), [("2001:db8::2", "[2001:db8::2]:3260"), ("::ffff:192.0.2.2", "192.0.2.2:3260")]
)
def test_ipv6_is_no_different(network: Network, server: subprocess.Popen[str], address: str, peer: str) -> None:
    with client(network, address) as process:
        tell(process, "connect")
        network.cut_the_cable()
        tell(process, "send", "100")
        eventually(lambda: silent_peers(process.pid) == [peer], "it is away")


def test_a_peer_that_answers_no_attempt_to_connect_is_away(network: Network, server: subprocess.Popen[str]) -> None:
    with client(network) as process:
        network.drop_all_that_comes()
        tell(process, "connect", wait=False)
        eventually(lambda: silent_peers(process.pid) == ["192.0.2.2:3260"], "no answer", timeout=40)


def test_keepalive_tells_of_a_peer_to_which_nothing_was_to_be_sent(
    network: Network, server: subprocess.Popen[str]
) -> None:
    with client(network) as process:
        tell(process, "connect")
        tell(process, "keepalive")
        network.cut_the_cable()
        eventually(lambda: silent_peers(process.pid) == ["192.0.2.2:3260"], "it is away")


def test_a_server_that_is_stopped_is_not_away_for_its_kernel_acknowledges(
    network: Network, server: subprocess.Popen[str]
) -> None:
    with client(network) as process:
        tell(process, "connect")
        with held_up(server.pid):
            tell(process, "send", "100")
            eventually(lambda: all_acknowledged(process.pid), "acknowledged")
            assert silent_peers(process.pid) == []
            assert trouble_of(process.pid, silent=False, standstill=STALLED_AFTER) is Trouble.BACKEND_SILENT


def test_a_window_that_is_closed_for_long_is_not_away(network: Network, server: subprocess.Popen[str]) -> None:
    """The stopped server's buffer is full; the kernels go on asking and answering whether it still is."""
    with client(network) as process:
        tell(process, "connect")
        with held_up(server.pid):
            fill_the_window(process)
            # Long enough for three probes, and then some: 0.2, 0.4, 0.8, 1.6 seconds.
            until = time.monotonic() + 4
            while time.monotonic() < until:
                assert silent_peers(process.pid) == []
                time.sleep(0.05)
        eventually(lambda: all_acknowledged(process.pid), "it goes on")


def test_a_peer_with_a_closed_window_behind_a_cut_is_away(network: Network, server: subprocess.Popen[str]) -> None:
    with client(network) as process:
        tell(process, "connect")
        with held_up(server.pid):
            fill_the_window(process)
            network.cut_the_cable()
            eventually(lambda: silent_peers(process.pid) == ["192.0.2.2:3260"], "it is away", timeout=40)


def fill_the_window(process: subprocess.Popen[str]) -> None:
    tell(process, "send", str(64 << 20), wait=False)
    # 04: the timer of the probes runs.
    eventually(lambda: columns(process.pid)[5].startswith("04:"), "the window is closed")


def test_a_peer_that_closes_or_resets_is_not_silent(network: Network, server: subprocess.Popen[str]) -> None:
    with client(network) as process:
        tell(process, "connect")
        server.kill()
        eventually(lambda: columns(process.pid)[3] == "08", "it has closed")
        assert silent_peers(process.pid) == []
        tell(process, "send", "100")
        eventually(lambda: len(Path(f"/proc/{process.pid}/net/tcp").read_text().splitlines()) == 1, "it was reset")
        assert silent_peers(process.pid) == []


def test_a_qsd_tells_a_cut_network_from_a_server_that_hangs(network: Network, place: Path) -> None:
    path, disk = place / "nbd.sock", image(place / "disk.raw", "raw", "8M")
    export = "type=nbd,id=e,node-name=d,name=e,writable=on"
    below = network.inside(
        network.far, "qemu-storage-daemon", "--blockdev", f"driver=file,node-name=d,filename={disk}",
        "--nbd-server", "addr.type=inet,addr.host=192.0.2.2,addr.port=10809", "--export", export,
    )
    above = network.inside(
        network.near, "qemu-storage-daemon",
        "--blockdev", "driver=nbd,node-name=d,server.type=inet,server.host=192.0.2.2,server.port=10809,export=e",
        "--nbd-server", f"addr.type=unix,addr.path={path}", "--export", export,
    )

    def seen() -> Trouble | None:
        return trouble_of(qsd.pid, silent=False, standstill=STALLED_AFTER)

    with program(*below) as server:
        # Port 10809 in state 0A; others may listen where the process was before it came into its namespace.
        listens = ":2A39 00000000:0000 0A "
        eventually(lambda: listens in Path(f"/proc/{server.pid}/net/tcp").read_text(), "the server listens")
        with program(*above) as qsd:
            eventually(path.exists, "QSD listens")
            sock, _ = handshake(path, "e")
            with sock:
                sock.settimeout(30)
                with held_up(server.pid):
                    ask(sock, CMD_WRITE, 0, 4096, b"h" * 4096, handle=1)
                    time.sleep(2)  # as long as a cut takes to be seen
                    assert seen() is Trouble.BACKEND_SILENT
                assert answer(sock) == (SIMPLE_REPLY, 0, 1)
                network.cut_the_cable()
                ask(sock, CMD_WRITE, 4096, 4096, b"c" * 4096, handle=2)
                eventually(lambda: seen() is Trouble.NETWORK_AWAY, "the network is away")
                assert silent_peers(qsd.pid) == ["192.0.2.2:10809"]
                network.mend()
                assert answer(sock) == (SIMPLE_REPLY, 0, 2)
                assert silent_peers(qsd.pid) == []
    assert disk.read_bytes()[:8192] == b"h" * 4096 + b"c" * 4096
