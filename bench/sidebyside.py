"""All ways to a disk side by side, for the repository's own results: ``make bench``.

    python bench/sidebyside.py measure [WORDS …] >FILE  storaged bench, with a daemon of its own, on an image in memory
    python bench/sidebyside.py publish NAME FILE        bench/results/NAME.json, .html and .svg of it
    python bench/sidebyside.py table                    what bench/results has, as Markdown

The image is in memory (a tmpfs, O_DIRECT) so that nothing is measured but the ways: what the storage costs is a copy
of memory, the same everywhere. Into bench/results goes what says nothing of where it was measured but kind and
versions: no name of the host, no path, and not fio's own output (which is most of it).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from common import STORAGED, Daemon
from msgspec.structs import replace

from storaged.bench import report, shown
from storaged.bench.page import page, picture
from storaged.bench.report import Report, WayFacts

HERE = Path(__file__).parent
RESULTS = HERE / "results"
JOBS = HERE / "jobs" / "side-by-side.fio"
SIZE = "64M"
#: In this order they are shown, as far as they are there.
TITLES = {
    "native": "natively",
    "emulated": "the test machine, steady (QEMU's emulator: 8 ns for each instruction)",
    "uml": "User Mode Linux",
}
WAYS = ("direct", "vduse", "nbd", "fuse")
#: Of what the machine is, as storaged.bench.facts tells it: what says nothing of where it is.
_FACTS = ("kernel", "architecture", "processors", "memory", "qemu-storage-daemon", "fio", "storaged", "python")
#: Of a volume, as the daemon tells it.
_OF_VOLUME = ("transport", "format", "options", "read_only", "qsd_version", "limits")


def measure(words: list[str]) -> int:
    """Run ``storaged bench`` and write its JSON to standard output, and its table to standard error."""
    daemon = Daemon()
    try:
        # A tmpfs, as /run is.
        with tempfile.TemporaryDirectory(prefix="storaged-side-by-side-", dir="/dev/shm") as place:
            found = Path(place) / "report.json"
            done = subprocess.run(
                [STORAGED, "--root", daemon.root, "bench", place, "--scratch", SIZE, "--jobs", JOBS, "--json", found,
                 *words],
                stdin=subprocess.DEVNULL, stdout=sys.stderr, check=False,
            )
            if found.exists():
                sys.stdout.write(found.read_text())
            return done.returncode
    finally:
        daemon.close()


def published(found: Report) -> Report:
    """The same without what tells where it was measured."""
    return replace(
        found, source=f"an image of {SIZE} in memory", job_set=Path(found.job_set).name,
        machine={key: found.machine[key] for key in _FACTS if key in found.machine},
        ways=[_published(way) for way in found.ways], runs=[replace(run, fio={}) for run in found.runs],
    )


def _published(way: WayFacts) -> WayFacts:
    return replace(way, volume={key: way.volume[key] for key in _OF_VOLUME if key in way.volume})


def publish(name: str, path: Path) -> None:
    """Make a report one of the repository's own."""
    made = published(report.decoded(path.read_bytes(), str(path)))
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_bytes(report.encoded(made) + b"\n")
    (RESULTS / f"{name}.html").write_text(page(made))
    (RESULTS / f"{name}.svg").write_text(picture(made))


def table() -> str:
    """What was measured in all machines, as a table of Markdown for each."""
    parts = []
    for name, title in TITLES.items():
        path = RESULTS / f"{name}.json"
        if not path.exists():
            continue
        found = report.decoded(path.read_bytes(), str(path))
        against = report.reference(found)
        facts = ", ".join(f"{key} {value}" for key, value in found.machine.items() if key not in ("storaged", "python"))
        rounds = 1 + max(run.round for run in found.runs)
        told = f"{rounds} rounds, the last not whole," if found.partial else f"{rounds} rounds"
        text = f"**{title[0].upper()}{title[1:]}**: {facts}; {told} of {found.runtime:g} s."
        parts.append(f"{textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)}\n")
        parts.append(f"| job | {' | '.join(WAYS)} |\n|---|{'---|' * len(WAYS)}")
        lines = {(line.job.name, line.way): line for line in report.lines(found)}
        for job in found.jobs:
            cells = []
            for way in WAYS:
                line = lines.get((job.name, way))
                told = "" if line is None or way == against else f": {shown.ratio(line.ratio)}"
                cells.append("" if line is None else f"{shown.figure(line)}{told}")
            parts.append(f"| {job.name} | {' | '.join(cells)} |")
        parts.append("")
    return "\n".join(parts)


def main() -> int:
    """Do what the command line says."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(required=True, dest="command")
    commands.add_parser("measure", help="all other words are storaged bench's")
    one = commands.add_parser("publish")
    one.add_argument("name", choices=TITLES)
    one.add_argument("file", type=Path)
    commands.add_parser("table")
    arguments, words = parser.parse_known_args()
    if arguments.command == "measure":
        return measure(words)
    if words:
        parser.error(f"what is {' '.join(words)}?")
    if arguments.command == "publish":
        publish(arguments.name, arguments.file)
    else:
        print(table())
    return 0


if __name__ == "__main__":
    sys.exit(main())
