"""The results as a table: faults × transports, with what happened and the longest pause."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def load(paths: Iterable[Path]) -> list[Result]:
    """Read results: a line of JSON each."""
    return [json.loads(line) for path in paths for line in path.read_text().splitlines()]


def _cell(results: list[Result]) -> str:
    if not results:
        return "not tested"
    failed = [result for result in results if not result["passed"]]
    if failed:
        return f"**failed: {len(failed)} of {len(results)}**"
    outcomes = list(dict.fromkeys(result["outcome"] for result in results))
    pauses = [result["pause"] for result in results if result["pause"] is not None]
    said = " or ".join(outcomes)
    if pauses:
        said += f"; {max(pauses):.1f} s"
    return f"{said} ({len(results)})"


def markdown(results: list[Result]) -> str:
    """Return the table, in the order in which the faults come in ``results``."""
    rows = [("fault", "expected", "`vduse`", "`nbd`"), ("---",) * 4]
    for title in dict.fromkeys(result["fault"] for result in results):
        of_it = [result for result in results if result["fault"] == title]
        by_transport = [[one for one in of_it if one["transport"] == name] for name in ("vduse", "nbd")]
        rows.append((title, of_it[0]["expected"], *map(_cell, by_transport)))
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def document(results: list[Result]) -> str:
    """Return docs/faults-matrix.md."""
    machines = sorted({f"Linux {result['kernel']} with QSD {result['qsd']}" for result in results})
    return f"""# Faults under load

Written by `make test-faults` (scripts/faults-table): do not edit. Seen on
{'; '.join(machines)},
in the test machine, which is an emulator and 10 to 20 times slower than a processor. What storaged does and why is in
[faults.md](faults.md); how it is tested in [testing.md](testing.md).

Each fault happens while a verifier writes, reads and flushes with direct I/O, to the device itself and to a file on a
mounted ext4, with one request and with 32 in flight. The number in parentheses says how many such cases there are, the
seconds are the longest request among all of them. In all of them: no wrong data, no flushed write lost, no process
left in D, nothing of the volume left behind, no complaint of the kernel.

{markdown(results)}"""
