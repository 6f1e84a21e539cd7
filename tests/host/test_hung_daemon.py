"""A daemon of which the kernel holds a thread cannot end, and must not keep the next one from starting."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

from storaged.errors import StoragedError
from storaged.host.process import thread_states
from tests.harness import Daemon, eventually, image


def waits_for(pid: int, device: str) -> bool:
    """Whether the kernel holds a thread of a process that has ``device`` open.

    Without a look at its descriptors, it may be a short wait for the disk that its state is on.
    """
    directory = f"/proc/{pid}/fd"
    opened = set()
    for number in os.listdir(directory):
        with suppress(FileNotFoundError):
            opened.add(os.readlink(f"{directory}/{number}"))
    return device in opened and "D" in thread_states(pid)


def test_the_next_daemon_starts_though_the_kernel_holds_a_thread_of_the_killed_one(
    stopped: Daemon, place: Path
) -> None:
    stopped.start()
    source = image(place / "a.raw", "raw")
    device = stopped.device("a", source, transport="fuse")
    with open(device, "r+b") as file:
        file.write(b"dirty" * 20000)
    server = stopped.qsd("a")
    os.kill(server, signal.SIGSTOP)

    def detach() -> None:
        with suppress(StoragedError):
            stopped.detach("a", timeout=60)

    waiting = threading.Thread(target=detach)
    waiting.start()
    former = stopped.process
    assert former is not None
    try:
        # It asks QSD first, for 5 s.
        eventually(lambda: waits_for(former.pid, device), "a thread of it waits in the kernel", timeout=60)
        former.kill()
        eventually(lambda: "Z" in thread_states(former.pid), "it is about to end", timeout=60)
        assert former.poll() is None, "and cannot"
        stopped.start(wait=False)
        # Until then the old one's socket takes connections, which nobody serves.
        eventually(lambda: stopped.log.read_text().count("ready,") == 2, "the next one serves")
        assert stopped.names() == ["a"]
        assert stopped.cli("daemon", check=False).returncode == 1, "there is still but one"
    finally:
        os.kill(server, signal.SIGCONT)
    former.wait(60)
    # Its descriptors have stayed open until now, and with them the connection.
    waiting.join(60)
    assert not waiting.is_alive()
    # The next daemon goes on with the detach. It is taken back where the old one still had the device open then.
    eventually(
        lambda: stopped.states().get("a") in (None, "online"), "the detach is finished, or taken back", timeout=60
    )
    with suppress(StoragedError):
        stopped.detach("a", timeout=60)
    assert stopped.names() == []
    assert source.read_bytes().startswith(b"dirty")
