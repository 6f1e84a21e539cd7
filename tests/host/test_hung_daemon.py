"""A daemon of which the kernel holds a thread cannot end, and must not keep the next one from starting."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from pathlib import Path

from storaged.errors import StoragedError
from storaged.host.process import thread_states
from tests.harness import Daemon, eventually, image, reads


def test_the_next_daemon_starts_though_the_kernel_holds_a_thread_of_the_killed_one(
    stopped: Daemon, place: Path
) -> None:
    stopped.start()
    device = stopped.device("a", image(place / "a.raw", "raw"), transport="fuse")
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
        eventually(lambda: "D" in thread_states(former.pid), "a thread of it waits in the kernel")
        former.kill()
        waiting.join(20)
        eventually(lambda: "Z" in thread_states(former.pid), "it is about to end")
        assert former.poll() is None, "and cannot"
        stopped.start(wait=False)
        # Until then the old one's socket takes connections, which nobody serves.
        eventually(lambda: stopped.log.read_text().count("ready,") == 2, "the next one serves")
        assert stopped.names() == ["a"]
        assert stopped.cli("daemon", check=False).returncode == 1, "there is still but one"
    finally:
        os.kill(server, signal.SIGCONT)
    former.wait(20)
    eventually(lambda: stopped.names() == [] or stopped.online("a"), "the detach is finished, or taken back")
    if stopped.names():
        assert reads(str(stopped.show("a")["device"]), 0, 5) == b"dirty"
        stopped.detach("a")
