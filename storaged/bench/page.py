"""A report as one page that needs nothing but itself, and its plots as one picture. Pure."""

from __future__ import annotations

import time
from collections.abc import Sequence

from storaged.bench import shown
from storaged.bench.charts import STYLE, WIDTH, Plot, colours, plots, text, written_out
from storaged.bench.report import CONSUMERS, SHOWN_PERCENTILES, Line, Report, failures, lines, reference
from storaged.model.sizes import format_size

_PAGE_STYLE = f"""
:root {{ {colours(dark=False)} color-scheme: light dark; }}
@media (prefers-color-scheme: dark) {{ :root {{ {colours(dark=True)} }} }}
body {{ margin: 2rem auto; max-width: {WIDTH}px; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }}
h1 {{ font-size: 1.5rem; overflow-wrap: anywhere; }} h2 {{ font-size: 1.15rem; margin: 2.2rem 0 0.2rem; }}
p.about {{ color: var(--dim); margin: 0 0 0.8rem; }}
.wide {{ overflow-x: auto; }} .wide svg {{ display: block; width: 100%; min-width: 760px; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 0.2rem 0.9rem 0.2rem 0; border-bottom: 1px solid var(--rule);
  vertical-align: top; }}
td.n, th.n {{ text-align: right; white-space: nowrap; }} td.j {{ font-weight: 600; white-space: nowrap; }}
dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.1rem 1rem; }}
dt {{ color: var(--dim); }} dd {{ margin: 0; overflow-wrap: anywhere; }}
.partial {{ border-left: 4px solid var(--nbd); padding: 0.3rem 0.8rem; }}
"""
#: Of the picture: between its plots, and around it.
_GAP, _MARGIN = 34.0, 20.0


def page(report: Report) -> str:
    """Return the page as HTML. Nothing in it is loaded from anywhere, nor could be."""
    found, against = lines(report), reference(report)
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(report.began))
    parts = [
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">",
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; style-src \'unsafe-inline\'">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>storaged bench: {text(report.source)}</title><style>{_PAGE_STYLE}{STYLE}</style></head><body>",
        f"<h1>{text(report.source)}</h1><p class=\"about\">{text(_subtitle(report))}; {when}</p>",
    ]
    if report.partial:
        parts.append(f'<p class="partial">Not all was measured: {text(report.partial)}</p>')
    parts += [
        f'<section><h2>{text(plot.title)}</h2><p class="about">{text(plot.about)}</p>'
        f'<div class="wide">{plot.svg()}</div></section>' for plot in plots(found, against)
    ]
    parts.append(f"<section><h2>All figures</h2>{_table(found, against, report)}</section>")
    parts.append(f"<section><h2>What was measured, and on what</h2>{_facts(report)}</section></body></html>\n")
    return "\n".join(parts)


def picture(report: Report) -> str:
    """Return all plots as one SVG, for a document: on white, whatever the reader's screen is.

    Its colours are written out: what is no browser (librsvg, word processors) knows no variables of CSS.
    """
    drawn = plots(lines(report), reference(report))
    top, parts = _MARGIN + 18, []
    parts.append(
        f'<text x="{_MARGIN:.0f}" y="{top:.0f}" class="job" font-size="17">{text(_short(report.source))}</text>'
    )
    parts.append(f'<text x="{_MARGIN:.0f}" y="{top + 18:.0f}" class="dim">{text(_subtitle(report))}</text>')
    top += 18 + _GAP
    for plot in drawn:
        parts.append(_placed(plot, top))
        top += 40 + plot.height + _GAP
    width = WIDTH + 2 * _MARGIN
    return written_out(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {top:.0f}" width="{width:.0f}"'
        f' height="{top:.0f}" role="img" aria-label="storaged bench"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


def _placed(plot: Plot, top: float) -> str:
    return (
        f'<g transform="translate({_MARGIN:.0f} {top:.0f})"><text x="0" y="0" class="job" font-size="15">'
        f'{text(plot.title)}</text><text x="0" y="18" class="dim">{text(plot.about)}</text>'
        f'<g transform="translate(0 34)">{plot.body}</g></g>'
    )


def _short(source: str) -> str:
    return source if len(source) <= 90 else f"…{source[-89:]}"


def _subtitle(report: Report) -> str:
    size = f", {format_size(report.size)}" if report.size else ""
    return f"{report.format}{size}; {report.repeat} rounds of {report.runtime:g} s for each job"


def _table(found: Sequence[Line], against: str, report: Report) -> str:
    titles = ["job", "way", "figure", "±", f"of {against}", *(f"{key} %" for key in SHOWN_PERCENTILES), "µs a request"]
    rows = ["".join(f"<th{' class=n' if at > 1 else ''}>{text(title)}</th>" for at, title in enumerate(titles))]
    last = ""
    for line in found:
        cells = [
            shown.figure(line), shown.spread(line.figure), "1" if line.way == against else shown.ratio(line.ratio),
            *(shown.latency(line.latency.get(key)) for key in SHOWN_PERCENTILES), shown.consumption(line.cpu),
        ]
        job = line.job.name if line.job.name != last else ""
        rows.append(
            f"<td class=j>{text(job)}</td><td>{text(line.way)}</td>"
            + "".join(f"<td class=n>{text(cell)}</td>" for cell in cells)
        )
        last = line.job.name
    notes = [
        "±: interval of 95 %. Latency: of a request, or of the flush where each write is flushed. µs a request: "
        f"processor time of {' + '.join(CONSUMERS)}."
    ]
    if any(not line.is_told for line in found):
        notes.append(shown.untold(report.repeat) + ".")
    notes += [f"Failed: {run.way}, {run.job}, round {run.round + 1}: {run.error}" for run in failures(report)]
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    below = "".join(f'<p class="about">{text(note)}</p>' for note in notes)
    return f'<div class="wide"><table>{body}</table></div>{below}'


def _facts(report: Report) -> str:
    facts = {way.name: way.what or f"not measured: {way.missing}" for way in report.ways}
    facts |= {f"option {key}": value for key, value in sorted(report.options.items())} | report.machine
    facts |= {
        f"queue of {way.name}": ", ".join(f"{key} {value}" for key, value in way.queue.items())
        for way in report.ways if way.queue
    }
    facts["jobs"] = report.job_set
    items = "".join(f"<dt>{text(key)}</dt><dd>{text(value)}</dd>" for key, value in facts.items())
    return f"<dl>{items}</dl>" + "".join(f"<p>{text(note)}</p>" for note in report.notes)
