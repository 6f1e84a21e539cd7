"""The table of a benchmark in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from storaged.bench.report import (
    CONSUMERS,
    SHOWN_PERCENTILES,
    Change,
    Report,
    failures,
    lines,
    reference,
)
from storaged.bench.shown import consumption, figure, latency, number, ratio, spread, untold
from storaged.cli.render import clean, terminal_width

#: Left out where the terminal is too narrow, in this order; the page and the JSON have them.
_EXPENDABLE = ("CPU/IO", "P99.9", "P50", "±", "P99")


def table(report: Report, width: int | None = None) -> str:
    """Return the figures of a report, what they were measured on, and what has to be known beside them.

    It is as wide as ``width`` columns at most, by default the terminal's.
    """
    found, against = lines(report), reference(report)
    rows, last = [], ""
    for line in found:
        rows.append({
            "JOB": clean(line.job.name) if line.job.name != last else "", "WAY": clean(line.way),
            "FIGURE": figure(line), "±": spread(line.figure),
            f"OF {against.upper()}": ratio(line.ratio) if line.way != against else "1",
            **{f"P{key}": latency(line.latency.get(key)) for key in SHOWN_PERCENTILES}, "CPU/IO": consumption(line.cpu),
        })
        last = line.job.name
    notes = [f"{way.name}: {clean(way.what) or f'not measured: {clean(way.missing)}'}" for way in report.ways]
    notes += [clean(note) for note in report.notes]
    notes += [
        f"failed: {run.way}, {clean(run.job)}, round {run.round + 1}: {clean(run.error)}" for run in failures(report)
    ]
    if any(not line.is_told for line in found):
        notes.append(untold(report.repeat))
    if report.partial:
        notes.append(f"PARTIAL: not all was measured: {clean(report.partial)}")
    legend = (
        f"±: interval of 95 % of {report.repeat} rounds of {report.runtime:g} s; P: latency of a request (of the flush "
        f"where each write is flushed); CPU/IO: µs of a processor for each request, {' + '.join(CONSUMERS)}"
    )
    return "\n".join([drawn(rows, terminal_width() if width is None else width), "", legend, *notes])


def comparison(changes: Sequence[Change], differences: Sequence[str], width: int | None = None) -> str:
    """Return what changed from one report to another."""
    rows, last = [], ""
    for change in changes:
        rows.append({
            "JOB": clean(change.job) if change.job != last else "", "WAY": clean(change.way),
            "BEFORE": f"{number(change.before.value)} {change.unit}",
            "AFTER": f"{number(change.after.value)} {change.unit}", "AFTER OF BEFORE": ratio(change.ratio),
        })
        last = change.job
    notes = [f"not the same: {clean(difference)}" for difference in differences]
    if any(not change.ratio.tells_a_difference for change in changes):
        notes.append(untold(2))
    return "\n".join([drawn(rows, terminal_width() if width is None else width), "", *notes]).rstrip()


def drawn(rows: Sequence[Mapping[str, str]], width: int, left: Sequence[str] = ("JOB", "WAY")) -> str:
    """Draw the rows under their titles; those of ``left`` begin at one column, the others end there.

    What does not fit is left out, and never cut in the middle of a figure.
    """
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table

    titles = list(rows[0]) if rows else []
    console = Console(width=100_000, highlight=False, markup=False, force_terminal=False)
    for expendable in (None, *_EXPENDABLE):
        titles = [title for title in titles if title != expendable]
        grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        for title in titles:
            grid.add_column(title, justify="left" if title in left else "right", no_wrap=True)
        for row in rows:
            grid.add_row(*(row[title] for title in titles))
        if Measurement.get(console, console.options, grid).maximum <= width:
            break
    with console.capture() as capture:
        console.print(grid)
    return "\n".join(line.rstrip() for line in capture.get().splitlines())
