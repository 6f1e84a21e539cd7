"""All generic netlink of the host stands still, because of a device that is none of ours."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host import nbd, vdpa, vduse
from storaged.host.worker import Worker
from tests.harness import Daemon, error_of, eventually, image, reads, run, writes

QSD = "/usr/bin/qemu-storage-daemon"
NAME = "foreign"
SIZE = 64 << 20
PATTERN = b"reviewed" * 8192
#: A node that fails all I/O.
FAILING = (
    f'{{"driver":"blkdebug","node-name":"d","image":{{"driver":"null-co","size":{SIZE}}},"inject-error":[{{'
    '"event":"none","iotype":"read","errno":5,"once":false}]}'
)


def waits(pid: int) -> bool:
    """Whether a process is in D state."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "D"


def foreign_qsd(place: Path, node: str) -> subprocess.Popen[bytes]:
    """Serves the device that is none of ours."""
    export = f"vduse-blk,id=e,node-name=d,name={NAME},num-queues=1,writable=on"
    (place / "tmp").mkdir(exist_ok=True)
    return subprocess.Popen(
        [QSD, "--blockdev", node, "--export", export], cwd=place, env={**os.environ, "TMPDIR": str(place / "tmp")}
    )


class Standstill:
    """A device with a dead server, a request in flight, and somebody who deletes it."""

    def __init__(self, place: Path) -> None:
        self._place = place
        run("modprobe", "-a", "vduse", "virtio_vdpa", "virtio_blk")
        source = image(place / "foreign.raw", "raw", str(SIZE))
        server = foreign_qsd(place, f"driver=file,filename={source},node-name=d")
        eventually(lambda: vduse.node_exists(NAME), "it serves")
        # Its node is there before it answers.
        eventually(lambda: subprocess.call(shlex.split(f"vdpa dev add name {NAME} mgmtdev vduse")) == 0, "on the bus")
        eventually(lambda: vdpa.find_disk(NAME), "its disk")
        found = vdpa.find_disk(NAME)
        assert found is not None
        time.sleep(1)  # udev has looked at it
        server.send_signal(signal.SIGSTOP)
        self.reader = subprocess.Popen(
            ["dd", f"if={found.path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"], stderr=subprocess.DEVNULL
        )
        eventually(lambda: waits(self.reader.pid), "it reads")
        server.kill()
        server.wait()
        self.deleter = subprocess.Popen(["vdpa", "dev", "del", NAME])
        eventually(lambda: waits(self.deleter.pid), "it hangs")
        self._rescue: subprocess.Popen[bytes] | None = None

    def stands(self) -> bool:
        """Whether it does: another one that asks gets no answer."""
        asking = subprocess.Popen(["vdpa", "mgmtdev", "show"], stdout=subprocess.DEVNULL)
        try:
            asking.wait(2)
        except subprocess.TimeoutExpired:
            asking.kill()
            return True
        return False

    def end(self) -> None:
        """A server that fails everything lets all of it go."""
        if self._rescue is None:
            self._rescue = foreign_qsd(self._place, FAILING)
            self.deleter.wait(60)
            assert self.reader.wait(60) != 0
            self._rescue.terminate()
            self._rescue.wait(30)
            with suppress(StoragedError):
                vduse.destroy(NAME)


@contextmanager
def standstill(place: Path) -> Iterator[Standstill]:
    """Generic netlink stands still until its end."""
    made = Standstill(place)
    try:
        assert made.stands()
        yield made
    finally:
        made.end()


def backends() -> list[str]:
    """The identifiers of all NBD devices."""
    found = []
    for entry in Path("/sys/block").glob("nbd*/backend"):
        with suppress(OSError):
            found.append(entry.read_text().strip())
    return found


def answers_at_once(daemon: Daemon, name: str) -> None:
    """``list`` and ``show`` are answered, by a daemon of which no thread is stuck."""
    begin = time.monotonic()
    daemon.names()
    daemon.show(name)
    assert time.monotonic() - begin < 10
    assert daemon.process is not None
    threads = [entry.read_text() for entry in Path(f"/proc/{daemon.process.pid}/task").glob("*/stat")]
    assert not [line for line in threads if line.rpartition(")")[2].split()[0] == "D"]


def test_a_daemon_can_be_killed_and_started_while_netlink_stands_still_and_goes_on_afterwards(
    stopped: Daemon, place: Path
) -> None:
    stopped.start()
    device = stopped.device("x", image(place / "x.raw", "raw"), transport="nbd")
    writes(device, 0, PATTERN)
    qsd = stopped.qsd("x")
    image(place / "n.raw", "raw")
    with standstill(place) as still:
        with subprocess.Popen(
            [*stopped.cli_command(), "attach", "n", place / "n.raw", "--format", "raw", "--transport", "nbd"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as attaching:
            eventually(
                lambda: "n" in stopped.names() and stopped.show("n")["state"] == "attaching", "it asks for a device"
            )
            time.sleep(3)
            answers_at_once(stopped, "x")
            assert reads(device, 0, len(PATTERN)) == PATTERN

            begin = time.monotonic()
            stopped.kill()  # and waits for its end
            assert time.monotonic() - begin < 20
            attaching.wait(20)
        assert still.deleter.poll() is None
        begin = time.monotonic()
        stopped.start()
        print(f"the next daemon answers after {time.monotonic() - begin:.1f} s")
        time.sleep(5)  # it has begun to look after both
        answers_at_once(stopped, "x")
        assert stopped.qsd("x") == qsd
        writes(device, 1 << 20, PATTERN)
        assert backends() == ["storaged.x"]
        assert still.stands()
    eventually(lambda: stopped.online("x"), "x is online", timeout=60)
    eventually(lambda: stopped.states().get("n") in (None, "online"), "n is done with", timeout=60)
    time.sleep(2)
    assert sorted(backends()) == sorted(f"storaged.{name}" for name in stopped.names()), "nothing came too late"
    if "n" in stopped.names():
        stopped.detach("n")
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert reads(device, 1 << 20, len(PATTERN)) == PATTERN
    stopped.detach("x")
    assert backends() == []


@pytest.mark.parametrize("transport", ["vduse", "nbd"])
def test_an_attach_fails_in_its_time_and_the_next_one_works(stopped: Daemon, place: Path, transport: str) -> None:
    stopped.start()
    stopped.device("x", image(place / "x.raw", "raw"), transport=transport)
    source = image(place / "n.raw", "raw")
    with standstill(place):
        begin = time.monotonic()
        error = error_of(lambda: stopped.attach("n", source, transport=transport, timeout=8))
        assert error.code in (ErrorCode.HOST_STUCK, ErrorCode.TIMEOUT), error
        assert time.monotonic() - begin < 30
        answers_at_once(stopped, "x")
    eventually(lambda: "n" not in stopped.names(), "taken back", timeout=90)
    stopped.detach("x")
    device = stopped.device("n", source, transport=transport)
    writes(device, 0, PATTERN)
    stopped.detach("n")


def test_who_asks_for_a_device_and_dies_gets_none(place: Path) -> None:
    """A connection that waits for its turn when its daemon dies: the kernel gets no socket."""
    run("modprobe", "nbd")
    source = image(place / "n.raw", "raw")
    server = subprocess.Popen([
        QSD, "--blockdev", f"driver=file,filename={source},node-name=d", "--nbd-server",
        f"addr.type=unix,addr.path={place}/nbd.sock", "--export", "nbd,id=e,node-name=d,name=n",
    ])
    eventually((place / "nbd.sock").exists, "it listens")
    code = f"""
import socket
from storaged.host import nbd
from storaged.host.nbdhandshake import negotiate
sock = socket.socket(socket.AF_UNIX)
sock.connect("{place}/nbd.sock")
told = negotiate(sock, "n")
print("asks", flush=True)
nbd.connect("orphan", [sock], told, block_size=512, timeouts=nbd.Timeouts(0, 60))
print("connected", flush=True)
"""
    with standstill(place), subprocess.Popen(
        ["python3", "-c", code], stdout=subprocess.PIPE
    ) as asking:
        assert asking.stdout is not None
        assert asking.stdout.readline() == b"asks\n"
        time.sleep(4)
        asking.kill()
        assert asking.stdout.read() == b""
        asking.wait(10)
    # The next one to be served comes after it.
    worker = Worker()
    worker.send({"family": "nbd"})
    assert worker.receive() == {"result": True}
    worker.close()
    time.sleep(2)
    assert "orphan" not in backends()
    assert nbd.find("orphan") is None
    server.kill()
    server.wait()
