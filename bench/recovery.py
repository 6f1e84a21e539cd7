"""How long I/O waits when QSD dies, and how soon it ends when it is rescued, against the same by hand, in turns.

    make bench-recovery    (in the test machine: python bench/recovery.py [--json FILE] [PART …]; here: … calls:fuse)

Parts, each with a transport: ``pause`` after SIGKILL, with and without a request in flight; ``rescue`` with 64 requests
in flight at a QSD that is stopped; ``all`` QSDs of 100 volumes killed at once; ``calls`` of the API while a volume
hangs and others are busy. Nothing here is a test: figures are printed, with the limit that each is meant to keep.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import standstill
from aio import BLOCK, Reads, open_direct
from common import Daemon, machine, middle, run
from hand import SIZE, Hand, kill, stop, successors_by_shell

from storaged.host import disk

#: Seconds after an attach until nothing of it is under way in the background any more (its systemd scope).
_CALM = 2.0
#: Seconds until what has not gone on never will.
_PATIENCE = 120.0
DEPTH = 64
Figures = dict[str, list[float]]


def note(text: str) -> None:
    """Say where it is."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def images(count: int) -> Iterator[list[str]]:
    """Sparse images on a tmpfs: what is below is not measured."""
    paths = [f"/dev/shm/recovery-{number}.raw" for number in range(count)]
    try:
        for path in paths:
            run("truncate", "-s", SIZE, path)
        yield paths
    finally:
        for path in paths:
            Path(path).unlink(missing_ok=True)


def in_flight(devices: Sequence[str], count: int) -> None:
    """Wait until so many requests are in flight at each device."""
    deadline = time.monotonic() + _PATIENCE
    for device in devices:
        while (progress := disk.progress(device)) is None or progress.in_flight < count:
            if time.monotonic() > deadline:
                raise SystemExit(f"{device} has not {count} requests in flight")
            time.sleep(0.01)


def check(results: Sequence[int], wanted: int) -> None:
    """No figure of something that went wrong."""
    if any(result != wanted for result in results):
        raise SystemExit(f"reads ended with {sorted(set(results))}, not with {wanted}")


# Pause ---------------------------------------------------------------------------------------------------------


class Timeline:
    """When each step of a volume's recovery began, as the daemon's events tell it."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.events: list[tuple[float, str]] = []
        self._ready = threading.Event()
        self._online = threading.Event()
        self._daemon, self._name = daemon, name
        threading.Thread(target=self._watch, daemon=True).start()
        self._ready.wait(_PATIENCE)

    def _watch(self) -> None:
        from storaged.api.client import Client

        with Client(self._daemon.layout.socket) as client:
            for answer in client.stream("Watch", {"name": self._name}):
                event = answer["event"]
                if event["kind"] == "ready":
                    self._ready.set()
                    continue
                self.events.append((event["time"], f"{event['kind']}: {event['message']}"))
                if event["kind"] == "state" and event["message"] == "online":
                    self._online.set()
                    return

    def told(self, begin: float) -> list[tuple[float, str]]:
        """Milliseconds from ``begin`` (of the epoch) to each."""
        self._online.wait(_PATIENCE)
        return [((at - begin) * 1000, what.split(";")[0][:60]) for at, what in self.events]


def killed(device: str, pid: int, *, before: bool) -> float:
    """SIGKILL, and milliseconds until a read ends that was issued before it, or right after it."""
    fd = open_direct(device)
    try:
        reads = Reads([(fd, 0)])
        if before:
            stop([pid])  # or it might end before the kill
            reads.submit()
            in_flight([device], 1)
        begin = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        if not before:
            reads.submit()
        ended = reads.wait(_PATIENCE)
        check([one.result for one in ended], BLOCK)
        return (ended[-1].at - begin) * 1000
    finally:
        os.close(fd)


def pause_of_ours(
    daemon: Daemon, transport: str, image: str, values: dict[str, float], timelines: list[Any] | None
) -> None:
    """A fresh volume each time: repeated deaths are repaired after a while only."""
    # With FUSE nothing waits: I/O fails until there is another device.
    ways = (("another device", False),) if transport == "fuse" else (("in flight", True), ("issued after", False))
    for key, before in ways:
        wishes = {"name": "bench", "source": image, "format": "raw", "transport": transport}
        volume = daemon.call("Attach", wishes)["volume"]
        time.sleep(_CALM)
        timeline = Timeline(daemon, "bench") if timelines is not None else None
        begin = time.time()
        if transport == "fuse":
            values[key] = standstill.online_again(daemon, volume) * 1000
        else:
            values[key] = killed(volume["device"], volume["qsd_pid"], before=before)
        after = daemon.call("Show", {"name": "bench"})["volume"]
        deadline = time.monotonic() + 20
        while after["paused"] is None and time.monotonic() < deadline:
            time.sleep(0.01)
            after = daemon.call("Show", {"name": "bench"})["volume"]
        kept = transport == "fuse" or after["device"] == volume["device"]
        if not kept or after["deaths"] != 1 or after["qsd_pid"] == volume["qsd_pid"]:
            raise SystemExit(f"this was no recovery: {after}")
        values[f"{key}, as Show says"] = after["paused"] * 1000
        if timelines is not None and timeline is not None:
            timelines.append([key, values[key], *timeline.told(begin)])
        daemon.call("Detach", {"name": "bench"})


def pause_by_hand(hand: Hand, values: dict[str, float]) -> None:
    """The device waits; bare QSD is started, with a read in flight that ends meanwhile."""
    if hand.transport == "fuse":
        hand.kill()
        run("umount", "-l", hand.place / "export")
        run("losetup", "--detach", hand.device)
        begin = time.monotonic()
        values["bare"] = hand.start()
        run("/bin/sh", "-c", hand.losetup())
        values["bare, until there is a device"] = (time.monotonic() - begin) * 1000
        hand.adopt()
        return
    fd = open_direct(hand.device)
    try:
        reads = Reads([(fd, 0)])
        stop([hand.pid])
        reads.submit()
        in_flight([hand.device], 1)
        begin = time.monotonic()
        hand.kill()
        values["death"] = (time.monotonic() - begin) * 1000
        begin = time.monotonic()
        values["bare"] = hand.start()
        hand.reconnect()
        ended = reads.wait(_PATIENCE)
        check([one.result for one in ended], BLOCK)
        values["bare, until the read ends"] = (ended[-1].at - begin) * 1000
    finally:
        os.close(fd)


def pause(transport: str, options: argparse.Namespace) -> dict[str, Any]:
    """Both, in turns."""
    figures: Figures = {}
    timelines: list[Any] = []
    with images(2) as (ours, other), contextlib.closing(Daemon()) as daemon:
        hand = Hand(transport, other)
        hand.attach()
        for turn in range(options.rounds + 1):
            values: dict[str, float] = {}
            works = [
                functools.partial(
                    pause_of_ours, daemon, transport, ours, values, timelines if options.timeline else None
                ),
                functools.partial(pause_by_hand, hand, values),
            ]
            for number in range(2):
                works[(turn + number) % 2]()
            note(f"pause {transport}: " + ", ".join(f"{key} {value:.0f}" for key, value in values.items()))
            if turn:  # the first warms the caches
                for key, value in values.items():
                    figures.setdefault(key, []).append(value)
        hand.detach()
    bare = figures["bare"]
    extra, times = (1500, 1.0) if transport == "nbd" else (50, 1.5)
    print(f"\npause {transport}, ms; limit: {times:g} x bare QSD + {extra} ms\n")
    print("| what | ms | beyond bare | of the limit, pair by pair |\n|---|---|---|---|")
    for key, values_of in figures.items():
        beyond = [value - one for value, one in zip(values_of, bare, strict=True)]
        share = [value / (times * one + extra) for value, one in zip(values_of, bare, strict=True)]
        ours_ = key in ("in flight", "issued after", "another device")
        print(f"| {key} | {middle(values_of, 0)} | {middle(beyond, 0)} | {middle(share, 2) if ours_ else ''} |")
    return {"figures": figures, "timelines": timelines}


# Rescue --------------------------------------------------------------------------------------------------------


def stuck_reads(device: str, pid: int) -> tuple[Reads, int]:
    """64 reads at a QSD that is stopped."""
    fd = open_direct(device)
    reads = Reads([(fd, number << 19) for number in range(DEPTH)])
    stop([pid])
    reads.submit()
    in_flight([device], DEPTH)
    return reads, fd


def rescue_of_ours(daemon: Daemon, transport: str, image: str, values: dict[str, float], *, keep: bool) -> None:
    """The reads end, the answer comes, and then the volume is detached."""
    key = "rescue --keep" if keep else "rescue"
    wishes = {"name": "bench", "source": image, "format": "raw", "transport": transport}
    volume = daemon.call("Attach", wishes)["volume"]
    reads, fd = stuck_reads(volume["device"], volume["qsd_pid"])
    begin = time.monotonic()
    answered: list[float] = []

    def ask() -> None:
        daemon.call("Rescue", {"name": "bench", "keep": keep})
        answered.append(time.monotonic())

    asking = threading.Thread(target=ask)
    asking.start()
    ended = reads.wait(_PATIENCE)
    asking.join()
    check([one.result for one in ended], -5)
    values[f"{key}: all ended"] = (ended[-1].at - begin) * 1000
    values[f"{key}: answered"] = (answered[0] - begin) * 1000
    os.close(fd)
    begin = time.monotonic()
    daemon.call("Detach", {"name": "bench"})
    values[f"{key}: detach"] = (time.monotonic() - begin) * 1000


def rescue_by_hand(transport: str, image: str, values: dict[str, float]) -> None:
    """Kill it, and a QSD that fails everything for VDUSE; nbd-client -d for NBD."""
    hand = Hand(transport, image)
    hand.attach()
    reads, fd = stuck_reads(hand.device, hand.pid)
    begin = time.monotonic()
    hand.kill()
    if transport == "vduse":
        hand.start(failing=True)
    else:
        run("nbd-client", "-d", hand.device)
    ended = reads.wait(_PATIENCE)
    check([one.result for one in ended], -5)
    values["by hand: all ended"] = (ended[-1].at - begin) * 1000
    os.close(fd)
    if transport == "vduse":
        hand.detach()


def rescue(transport: str, options: argparse.Namespace) -> dict[str, Any]:
    """With and without --keep, and by hand, in turns."""
    figures: Figures = {}
    with images(2) as (ours, other), contextlib.closing(Daemon()) as daemon:
        for turn in range(options.rounds + 1):
            values: dict[str, float] = {}
            works: list[Callable[[], None]] = [
                functools.partial(rescue_of_ours, daemon, transport, ours, values, keep=False),
                functools.partial(rescue_of_ours, daemon, transport, ours, values, keep=True),
                functools.partial(rescue_by_hand, transport, other, values),
            ]
            for number in range(3):
                works[(turn + number) % 3]()
            note(f"rescue {transport}: " + ", ".join(f"{key} {values[key]:.0f}" for key in sorted(values)))
            if turn:
                for key, value in values.items():
                    figures.setdefault(key, []).append(value)
    print(f"\nrescue {transport}, {DEPTH} requests in flight; all ended within 2 s, then detach within 1 s\n")
    print("| what | ms | worst |\n|---|---|---|")
    for key in sorted(figures):
        print(f"| {key} | {middle(figures[key], 0)} | {max(figures[key]):.0f} |")
    return {"figures": figures}


# All at once ---------------------------------------------------------------------------------------------------


def all_ours(daemon: Daemon, transport: str, volumes: list[dict[str, Any]]) -> tuple[list[float], float]:
    """Kill all QSDs at once. Seconds until each one's read has ended; for FUSE, until each one is online."""
    if transport == "fuse":
        return standstill.all_online_again(daemon, volumes)
    fds = [open_direct(volume["device"]) for volume in volumes]
    stop([volume["qsd_pid"] for volume in volumes])
    reads = Reads([(fd, 0) for fd in fds])
    reads.submit()
    in_flight([volume["device"] for volume in volumes], 1)
    begin = time.monotonic()
    kill([volume["qsd_pid"] for volume in volumes], wait=False)
    ended = reads.wait(10 * _PATIENCE)
    check([one.result for one in ended], BLOCK)
    for fd in fds:
        os.close(fd)
    return [one.at - begin for one in ended], standstill.await_all_online(daemon) - begin


def memory() -> float:
    """MiB that are used of the machine's."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return (int(lines["MemTotal"].split()[0]) - int(lines["MemAvailable"].split()[0])) / 1024


def everything(transport: str, options: argparse.Namespace) -> dict[str, Any]:
    """Attached once; killed by turns, a minute apart, so that each is a volume's first death."""
    count, before = options.volumes, memory()
    figures: Figures = {}
    with images(2 * count) as paths, contextlib.closing(Daemon()) as daemon:
        for number in range(count):
            wishes = {"name": f"v{number}", "source": paths[number], "format": "raw", "transport": transport}
            daemon.call("Attach", wishes)
        used = memory() - before
        note(f"all {transport}: {count} volumes attached, {used:.0f} MiB more in use")
        hands = [Hand(transport, paths[count + number], number) for number in range(count)]
        for hand in hands:
            hand.attach()
        note(f"all {transport}: {count} by hand, too, {memory() - before:.0f} MiB")
        for _ in range(options.rounds):
            at = time.monotonic()
            each, online = all_ours(daemon, transport, daemon.call("List", {})["volumes"])
            values = {"first read": min(each), "median read": statistics.median(each), "last read": max(each),
                      "all online": online}
            for parallel in (False, True):
                kill([hand.pid for hand in hands])
                values["by hand, & and wait" if parallel else "by hand"] = successors_by_shell(hands, parallel=parallel)
            note(f"all {transport}: " + ", ".join(f"{key} {value:.2f}" for key, value in values.items()))
            for key, value in values.items():
                figures.setdefault(key, []).append(value)
            time.sleep(max(0.0, at + 62 + online - time.monotonic()))
        for hand in hands:
            hand.detach()
    print(f"\nall {transport}: {count} volumes, {used:.0f} MiB; the last within 2 times of the shell loop\n")
    print("| what | s | of the loop, round by round | of the loop with &, round by round |\n|---|---|---|---|")
    for key, seconds in figures.items():
        shares = [
            middle([one / other for one, other in zip(seconds, figures[loop], strict=True)], 2)
            for loop in ("by hand", "by hand, & and wait")
        ]
        print(f"| {key} | {middle(seconds, 2)} | {' | '.join(shares)} |")
    return {"figures": figures, "volumes": count, "memory": used}


def calls(transport: str, options: argparse.Namespace) -> dict[str, Any]:
    """See bench/standstill.py."""
    with images(options.volumes) as paths:
        return standstill.calls(transport, paths, options.rounds)


PARTS: dict[str, Callable[[str, argparse.Namespace], dict[str, Any]]] = {
    "pause": pause, "rescue": rescue, "all": everything, "calls": calls,
}


def main() -> int:
    """Measure and print tables (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--volumes", type=int, default=100, help="for all and calls (default: %(default)s)")
    parser.add_argument("--timeline", action="store_true", help="of each pause, when each step began; costs a bit")
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    parser.add_argument("parts", nargs="+", metavar="PART:TRANSPORT", help="pause, rescue, all, calls")
    options = parser.parse_args()
    if any(not part.endswith(":fuse") for part in options.parts):
        run("modprobe", "-a", "vduse", "virtio_vdpa", "nbd")
    found = {}
    for part in options.parts:
        what, _, transport = part.partition(":")
        found[part] = PARTS[what](transport, options)
        sys.stdout.flush()
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "parts": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
