"""What a search for settings found, in the terminal."""

from __future__ import annotations

from storaged.bench.search import ERROR
from storaged.bench.tunereport import TuneReport
from storaged.cli.benchtable import drawn
from storaged.cli.render import clean, terminal_width


def table(report: TuneReport, wanted: str | None, command: str, width: int | None = None) -> str:
    """Return each change that was tried, and what came of it all; ``wanted`` is the profile that was asked for."""
    rows = [
        {
            "SETTING": f"{change.option}={change.value}", "WAS": clean(change.former),
            "TIMES AS FAST": change.ratio.estimate.times if change.ratio is not None else "",
            "PAIRS": str(change.pairs), "": clean(f"kept: {change.why}" if change.accepted else f"no: {change.why}"),
        }
        for change in report.changes
    ]
    lines = [drawn(rows, terminal_width() if width is None else width, left=("SETTING", "WAS", ""))] if rows else []
    lines += ["", *_outcome(report, wanted, command)]
    if report.untried:
        lines.append(f"There was no time for {', '.join(report.untried)}: --budget gives more.")
    lines += [clean(note) for note in report.notes]
    if report.partial:
        lines.append(f"PARTIAL: not all was done: {clean(report.partial)}")
    return "\n".join(lines).lstrip("\n")


def _outcome(report: TuneReport, wanted: str | None, command: str) -> list[str]:
    found = report.verification
    kept = [change for change in report.changes if change.accepted]
    unwritten = [f"The profile {wanted} was not written."] if wanted is not None and not report.profile else []
    if found is None and kept:
        best = _said({change.option: change.value for change in kept})
        return [f"Until then {best} was faster. It was not verified against the defaults.", *unwritten]
    if found is None:
        so_far = "Until then nothing" if report.partial else "Nothing"
        return [f"{so_far} was faster than the defaults, beyond the noise: they are kept.", *unwritten]
    told = f"{found.ratio.estimate.times} times as fast as the defaults, {found.pairs} pairs"
    if not found.taken:
        return [f"{_said(found.settings)}: {told}. That is no more than noise: the defaults are kept.", *unwritten]
    lines = [
        f"{_said(report.settings)}: {told}.",
        f"The intervals are of 95 %: where nothing helps, a search ends like this in {100 * ERROR:g} % of all cases.",
    ]
    if report.profile:
        lines.append(f"Written to {clean(report.profile)}: {command} attach NAME SOURCE --profile {wanted}")
    return lines + unwritten


def _said(settings: dict[str, str]) -> str:
    return " ".join(f"-o {key}={value}" for key, value in settings.items())
