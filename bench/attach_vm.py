"""How long attach and detach of a VDUSE and an NBD device take, against the same commands by hand, in turns.

    make bench-vm          (in the test machine: python bench/attach_vm.py [--rounds N] [--json FILE])
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path

import byhand
from common import Daemon, machine, middle, ratios, run, timed

IMAGE = "/var/tmp/bench.raw"
OTHER = "/var/tmp/bench-byhand.raw"


def ours(daemon: Daemon, transport: str) -> None:
    """One call, and the device can be opened."""
    answer = daemon.call("Attach", {"name": "bench", "source": IMAGE, "format": "raw", "transport": transport})
    byhand.open_it(answer["volume"]["device"])


def measure(daemon: Daemon, transport: str, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each round."""
    setup = byhand.Setup(transport)
    figures: dict[str, list[float]] = {key: [] for key in ("attach", "attach by hand", "detach", "detach by hand")}
    for turn in range(rounds + 2):
        def by_storaged(values: dict[str, float]) -> None:
            values["attach"] = timed(functools.partial(ours, daemon, transport))
            values["detach"] = timed(functools.partial(daemon.call, "Detach", {"name": "bench"}))

        def by_hand(values: dict[str, float]) -> None:
            devices: list[str] = []
            values["attach by hand"] = timed(lambda: devices.append(byhand.attach(setup, OTHER)))
            values["detach by hand"] = timed(lambda: byhand.detach(setup, devices[0]))

        values: dict[str, float] = {}
        for work in (by_storaged, by_hand) if turn % 2 else (by_hand, by_storaged):
            work(values)
        if turn >= 2:  # the first two warm the caches
            for key, value in values.items():
                figures[key].append(value)
    return figures


def main() -> int:
    """Measure and print a table (Markdown)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", metavar="FILE", help="write all figures, too")
    options = parser.parse_args()
    run("modprobe", "-a", "vduse", "virtio_vdpa", "nbd")
    for image in (IMAGE, OTHER):
        run("truncate", "-s", "1G", image)
    daemon = Daemon()
    try:
        found = {transport: measure(daemon, transport, options.rounds) for transport in ("vduse", "nbd")}
    finally:
        daemon.close()
    print(f"{'; '.join(f'{key} {value}' for key, value in machine().items())}\n")
    print("| what | storaged, ms | by hand, ms | ratio | meant to keep |\n|---|---|---|---|---|")
    for transport, figures in found.items():
        for what in ("attach", "detach"):
            mine, other = figures[what], figures[f"{what} by hand"]
            limit = "at most 2" if what == "attach" else ""
            print(f"| {what} {transport} | {middle(mine, 0)} | {middle(other, 0)} | {ratios(mine, other)} | {limit} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"machine": machine(), "figures": found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
