"""The plots of a report, as SVG without a script, a font or an address. Pure.

Each bar and each line bears its name, so that nothing is told by colour alone. Texts of the report may be hostile: all
go through ``text``.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from storaged.bench import shown
from storaged.bench.report import CONSUMERS, Line

WIDTH = 960
_BAR, _STEP, _HEADING = 14, 20, 24
_LEFT, _RIGHT = 64, 620
"""Where bars begin and end; the figures stand behind."""
_PANEL_WIDTH, _PANEL_HEIGHT, _IN_A_ROW = 312, 210, 3
#: Of the latencies that are drawn.
_LEAST_PERCENTILE = 50.0
_TITLES = {"fio": "fio (who does the I/O)", "qsd": "QSD", "daemon": "the daemon", "kernel": "the kernel's threads"}

STYLE = """\
svg { font-size: 13px; font-family: system-ui, sans-serif; fill: var(--ink); }
svg .job { font-weight: 600; }
svg .dim { fill: var(--dim); font-size: 11px; }
svg .rule { stroke: var(--rule); stroke-width: 1; fill: none; }
svg .whisker { stroke: var(--ink); stroke-width: 1.5; fill: none; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
"""
_COLOURS = {
    "direct": ("#5b6472", "#aab4c2"), "nbd": ("#c2560c", "#f0945a"), "vduse": ("#1d66c9", "#6ea8f7"),
    "fuse": ("#12794a", "#55c492"), "fio": ("#5b6472", "#aab4c2"), "qsd": ("#8b3fc0", "#c58af0"),
    "daemon": ("#b3860b", "#e6bd4f"), "kernel": ("#a3324b", "#ec8aa0"), "ink": ("#1b1f24", "#e8eaed"),
    "dim": ("#59636e", "#a3abb5"),
    "rule": ("#d5d9de", "#3c434c"), "paper": ("#ffffff", "#16191d"),
}


def colours(*, dark: bool) -> str:
    """The variables that STYLE and the plots name."""
    return " ".join(f"--{name}: {pair[dark]};" for name, pair in _COLOURS.items())


def written_out(svg: str) -> str:
    """Return a picture without variables: with the colours that they have on white."""
    return re.sub(rf"var\(--({'|'.join(_COLOURS)})\)", lambda found: _COLOURS[found[1]][0], svg)


def text(value: object) -> str:
    """Return what may be hostile as text of XML."""
    return html.escape("".join(char if char.isprintable() else "�" for char in str(value)))


@dataclass(frozen=True)
class Plot:
    """A part of a picture: ``body`` is drawn from the top, WIDTH wide."""

    title: str
    about: str
    height: float
    body: str

    def svg(self) -> str:
        """The plot as an element of a page."""
        return (
            f'<svg viewBox="0 0 {WIDTH} {self.height:.0f}" role="img" aria-label="{text(self.title)}">{self.body}</svg>'
        )


def plots(lines: Sequence[Line], against: str) -> list[Plot]:
    """Return the plots that there are figures for; ``against`` is the way that ratios are to."""
    found = []
    for unit, title in (("IOPS", "Requests a second"), ("MB/s", "Megabytes a second")):
        of_unit = [line for line in lines if line.job.unit == unit]
        if of_unit:
            found.append(_bars(of_unit, title, against))
    with_latency = [line for line in lines if _points(line)]
    if with_latency:
        found.append(_latencies(with_latency))
    with_cpu = [line for line in lines if any(who in line.cpu for who in CONSUMERS)]
    if with_cpu:
        found.append(_consumption(with_cpu))
    return found


def _by_job(lines: Sequence[Line]) -> dict[str, list[Line]]:
    found: dict[str, list[Line]] = {}
    for line in lines:
        found.setdefault(line.job.name, []).append(line)
    return found


def _bars(lines: Sequence[Line], title: str, against: str) -> Plot:
    parts, top = [], 0.0
    for job, ways in _by_job(lines).items():
        parts.append(_at(0, top + 15, job, "job"))
        top += _HEADING
        most = max(_upper(line) for line in ways)
        for line in ways:
            length = _length(line.figure.value, most)
            parts.append(_at(0, top + 11, line.way))
            parts.append(_bar(_LEFT, top, length, line.way, f"{line.way}: {shown.figure(line)}"))
            if line.figure.low is not None and line.figure.high is not None:
                low, high = (_LEFT + _length(min(end, most), most) for end in (line.figure.low, line.figure.high))
                middle = top + _BAR / 2
                parts.append(
                    f'<path class="whisker" d="M{low:.1f} {middle - 4:.1f}v8M{low:.1f} {middle:.1f}H{high:.1f}'
                    f'M{high:.1f} {middle - 4:.1f}v8"/>'
                )
            behind = shown.figure(line)
            if line.way != against and line.ratio is not None:
                behind += f", {shown.ratio(line.ratio)} of {against}"
            parts.append(_at(_RIGHT + 12, top + 11, behind))
            top += _STEP
        top += 8
    about = "Bars are means of the rounds, whiskers intervals of 95 %. Each job has a scale of its own."
    return Plot(title, about, top, "".join(parts))


def _upper(line: Line) -> float:
    """Where the scale must reach: a whisker of two wild rounds is cut."""
    return min(line.figure.high or line.figure.value, 1.6 * line.figure.value)


def _length(value: float, most: float) -> float:
    return (_RIGHT - _LEFT) * value / most if most > 0 else 0.0


def _bar(left: float, top: float, length: float, colour: str, says: str) -> str:
    fill = colour if colour in _COLOURS else "dim"
    return (
        f'<rect x="{left:.1f}" y="{top:.1f}" width="{max(length, 0.5):.1f}" height="{_BAR}" rx="2"'
        f' fill="var(--{fill})" fill-opacity="0.82"><title>{text(says)}</title></rect>'
    )


def _at(left: float, base: float, what: str, kind: str = "", anchor: str = "") -> str:
    kind = f' class="{kind}"' if kind else ""
    anchor = f' text-anchor="{anchor}"' if anchor else ""
    return f'<text x="{left:.1f}" y="{base:.1f}"{kind}{anchor}>{text(what)}</text>'


# Latencies -------------------------------------------------------------------------------------------------------


def _points(line: Line) -> list[tuple[float, float]]:
    """Percentile and nanoseconds, of those that are drawn."""
    found = sorted((float(key), value) for key, value in line.latency.items())
    return [(key, value) for key, value in found if _LEAST_PERCENTILE <= key < 100 and value > 0]


def _latencies(lines: Sequence[Line]) -> Plot:
    by_job = _by_job(lines)
    legend, parts, left = list(dict.fromkeys(line.way for line in lines)), [], 0.0
    for way in legend:
        parts.append(_bar(left, 0, 22, way, way))
        parts.append(_at(left + 28, 12, way))
        left += 44 + 9 * len(way)
    for place, (job, ways) in enumerate(by_job.items()):
        x, y = place % _IN_A_ROW * (_PANEL_WIDTH + 12), 28 + place // _IN_A_ROW * _PANEL_HEIGHT
        parts.append(f'<g transform="translate({x} {y})">{_panel(job, ways)}</g>')
    height = 28 + math.ceil(len(by_job) / _IN_A_ROW) * _PANEL_HEIGHT
    about = (
        "How long requests took: so many percent of them not longer. Both scales are logarithmic. Medians of the"
        " rounds."
    )
    return Plot("Latency", about, height, "".join(parts))


def _panel(job: str, ways: Sequence[Line]) -> str:
    left, right, top, bottom = 46.0, _PANEL_WIDTH - 8.0, 26.0, _PANEL_HEIGHT - 34.0
    points = {line.way: _points(line) for line in ways}
    values = [value for several in points.values() for _, value in several]
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    high = max(high, low + 1)
    last = max(key for several in points.values() for key, _ in several)

    def across(percentile: float) -> float:
        first, end = _rarity(_LEAST_PERCENTILE), max(_rarity(last), 1.0)
        return left + (right - left) * (_rarity(percentile) - first) / (end - first)

    def up(nanoseconds: float) -> float:
        return bottom - (bottom - top) * (math.log10(nanoseconds) - low) / (high - low)

    parts = [_at(0, 14, job, "job")]
    for decade in range(low, high + 1):
        parts.append(f'<path class="rule" d="M{left:.1f} {up(10**decade):.1f}H{right:.1f}"/>')
        parts.append(_at(left - 5, up(10**decade) + 4, shown.latency(10.0**decade), "dim", "end"))
    for percentile in (50, 90, 99, 99.9, 99.99):
        if percentile <= last:
            parts.append(f'<path class="rule" d="M{across(percentile):.1f} {bottom:.1f}v4"/>')
            anchor = "start" if percentile == 50 else "end" if across(percentile) > right - 12 else "middle"
            parts.append(_at(across(percentile), bottom + 17, f"{percentile:g}%", "dim", anchor))
    for way, several in points.items():
        colour = way if way in _COLOURS else "dim"
        path = "L".join(f"{across(key):.1f} {up(value):.1f}" for key, value in several)
        parts.append(f'<path class="line" stroke="var(--{colour})" d="M{path}"/>')
        parts += [
            f'<circle cx="{across(key):.1f}" cy="{up(value):.1f}" r="2.5" fill="var(--{colour})">'
            f"<title>{text(f'{way}: {key:g} % in {shown.latency(value)}')}</title></circle>" for key, value in several
        ]
    return "".join(parts)


def _rarity(percentile: float) -> float:
    """One of so many (logarithm) takes longer."""
    return -math.log10(1 - percentile / 100)


# Processors ------------------------------------------------------------------------------------------------------


def _consumption(lines: Sequence[Line]) -> Plot:
    parts, left = [], 0.0
    for who in CONSUMERS:
        parts.append(_bar(left, 0, 22, who, _TITLES[who]))
        parts.append(_at(left + 28, 12, _TITLES[who]))
        left += 44 + 8 * len(_TITLES[who])
    top = 30.0
    for job, ways in _by_job(lines).items():
        parts.append(_at(0, top + 15, job, "job"))
        top += _HEADING
        most = max(sum(line.cpu.get(who, 0.0) for who in CONSUMERS) for line in ways)
        for line in ways:
            parts.append(_at(0, top + 11, line.way))
            at = float(_LEFT)
            for who in CONSUMERS:
                if line.cpu.get(who, 0.0) > 0:
                    length = _length(line.cpu[who], most)
                    parts.append(_bar(at, top, length, who, f"{line.way}, {_TITLES[who]}: {line.cpu[who]:.3g} µs"))
                    at += length
            parts.append(_at(_RIGHT + 12, top + 11, f"{shown.consumption(line.cpu)} µs a request"))
            top += _STEP
        top += 8
    about = (
        "Microseconds of a processor that each request costs. The kernel's threads are those of the device, and all"
        " others; a server on this host is not in it."
    )
    return Plot("Processor time for a request", about, top, "".join(parts))
