"""The table of a benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from storaged.bench.report import (
    CONSUMERS,
    SHOWN_PERCENTILES,
    Change,
    Report,
    failures,
    lines,
    reference,
)
from storaged.bench.shown import UNTOLD, consumption, figure, latency, number, ratio, spread
from storaged.cli.render import clean, terminal_width


def table(report: Report) -> str:
    """Return the figures of a report, what they were measured on, and what has to be known beside them."""
    found, against = lines(report), reference(report)
    percentiles = [f"P{key}" for key in SHOWN_PERCENTILES]
    grid = _grid("JOB", "WAY", "FIGURE", "±", f"OF {against.upper()}", *percentiles, "CPU/IO")
    last = ""
    for line in found:
        cells = [*(latency(line.latency.get(key)) for key in SHOWN_PERCENTILES), consumption(line.cpu)]
        grid.add_row(
            clean(line.job.name) if line.job.name != last else "", line.way, figure(line), spread(line.figure),
            ratio(line.ratio) if line.way != against else "1", *cells,
        )
        last = line.job.name
    notes = [f"{way.name}: {clean(way.what) or f'not measured: {clean(way.missing)}'}" for way in report.ways]
    notes += [clean(note) for note in report.notes]
    notes += [
        f"failed: {run.way}, {clean(run.job)}, round {run.round + 1}: {clean(run.error)}" for run in failures(report)
    ]
    if any(not line.is_told for line in found):
        notes.append(UNTOLD)
    if report.partial:
        notes.append(f"PARTIAL: not all was measured: {clean(report.partial)}")
    legend = (
        f"±: interval of 95 % of {report.repeat} rounds of {report.runtime:g} s; P: latency of a request (of the flush "
        f"where each write is flushed); CPU/IO: µs of a processor for each request, {' + '.join(CONSUMERS)}"
    )
    return "\n".join([_drawn(grid), "", legend, *notes])


def comparison(changes: Sequence[Change], differences: Sequence[str]) -> str:
    """Return what changed from one report to another."""
    grid = _grid("JOB", "WAY", "BEFORE", "±", "AFTER", "±", "AFTER OF BEFORE")
    last = ""
    for change in changes:
        grid.add_row(
            clean(change.job) if change.job != last else "", clean(change.way),
            f"{number(change.before.value)} {change.unit}", spread(change.before),
            f"{number(change.after.value)} {change.unit}", spread(change.after), ratio(change.ratio),
        )
        last = change.job
    notes = [f"not the same: {clean(difference)}" for difference in differences]
    if any(not change.ratio.tells_a_difference for change in changes):
        notes.append(UNTOLD)
    return "\n".join([_drawn(grid), "", *notes]).rstrip()


def _grid(*titles: str) -> Any:
    from rich.table import Table

    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, title in enumerate(titles):
        grid.add_column(title, justify="left" if place < 2 else "right", no_wrap=place > 0, overflow="fold")
    return grid


def _drawn(grid: Any) -> str:
    from rich.console import Console

    console = Console(width=terminal_width(), highlight=False, markup=False, force_terminal=False)
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
