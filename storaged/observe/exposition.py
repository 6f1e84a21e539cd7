"""Writes the metrics of all volumes in Prometheus' text format, or in that of OpenMetrics.

By hand, and for the volumes only: with 500 of them these are more than 20 000 samples, for which prometheus_client's
encoders take 150 ms (text) and 400 ms (OpenMetrics), this a tenth (docs/benchmarks.md). All else is written by them.
Formats: "Exposition formats" in Prometheus' documentation, and OpenMetrics 1.0.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from storaged.errors import ErrorCode
from storaged.model.history import PAUSE_BOUNDS
from storaged.model.states import State
from storaged.observe.facts import Facts, Sample
from storaged.observe.families import FAILURE, FAMILIES, INFO, PAUSE, SIMPLE, STATE, Family

#: Volumes that are written in one go, and the pause behind them (seconds): the event loop gets its turn meanwhile.
#: Without it the interpreter would hold the loop up for 5 ms at a time (sys.setswitchinterval).
_AT_ONCE = 25
_PAUSE = 0.0001

_STATES = tuple(f'state="{state.value}"}}' for state in State)
_BUCKETS = (*(f'le="{bound}"}}' for bound in PAUSE_BOUNDS), 'le="+Inf"}')
_CODES = frozenset(code.value for code in ErrorCode)


def header(family: Family, *, openmetrics: bool) -> str:
    """Return the lines before the samples of a metric."""
    if not openmetrics:
        kind = "gauge" if family.kind == "info" else family.kind
        return f"# HELP {family.series} {family.help}\n# TYPE {family.series} {kind}\n"
    unit = f"# UNIT {family.name} {family.unit}\n" if family.unit else ""
    return f"# HELP {family.name} {family.help}\n# TYPE {family.name} {family.kind}\n{unit}"


def volumes_text(facts: Sequence[Facts], look: Callable[[Facts], Sample], *, openmetrics: bool) -> Iterator[bytes]:
    """Yield the metrics of the volumes; ``look`` is called for each, in this thread, which is not the event loop's.

    In pieces: with 500 volumes all of it is 2 MB, of which there need not be many copies at a time.
    """
    lines: dict[str, list[str]] = {family.name: [header(family, openmetrics=openmetrics)] for family in FAMILIES}
    simple = [(lines[family.name], family.series, value) for family, value in SIMPLE]
    info, states, failures, pauses = (lines[family.name] for family in (INFO, STATE, FAILURE, PAUSE))
    for number, volume in enumerate(facts):
        if number % _AT_ONCE == 0:
            time.sleep(_PAUSE)
        now = look(volume)
        label = f'{{volume="{escaped(volume.name)}"'
        for out, series, value_of in simple:
            value = value_of(volume, now)
            if value is not None:
                out.append(f"{series}{label}}} {value}\n")
        info.append(
            f'{INFO.series}{label},transport="{escaped(volume.transport)}",backend="{escaped(volume.backend)}"}} 1\n'
        )
        wanted = f'state="{volume.state}"}}'
        states.append("".join([
            f"{STATE.series}{label},{state} {1 if state == wanted else 0}\n" for state in _STATES
        ]))
        if volume.code in _CODES:
            failures.append(f'{FAILURE.series}{label},code="{volume.code}"}} 1\n')
        pauses.append("".join(_histogram(label, volume.pauses, volume.pause_seconds)))
    for found in lines.values():
        yield "".join(found).encode()
        found.clear()


def _histogram(label: str, counts: Sequence[int], total: float) -> list[str]:
    lines, below = [], 0
    for bucket, count in zip(_BUCKETS, counts, strict=True):
        below += count
        lines.append(f"{PAUSE.name}_bucket{label},{bucket} {below}\n")
    lines.append(f"{PAUSE.name}_count{label}}} {below}\n")
    lines.append(f"{PAUSE.name}_sum{label}}} {total}\n")
    return lines


def escaped(value: str) -> str:
    """Return a label's value as it is written between quotes."""
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
