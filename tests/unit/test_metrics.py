"""What a scrape is answered with: right in both formats, bounded in its labels, and the same as its documentation."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from prometheus_client.samples import Sample as Series

from storaged.errors import ErrorCode
from storaged.host import process
from storaged.model.history import PAUSE_BOUNDS
from storaged.model.states import State
from storaged.observe.counts import LAG_BOUNDS, Counts
from storaged.observe.facts import Facts, Sample, sample, since
from storaged.observe.families import FAMILIES
from storaged.observe.metrics import OPENMETRICS, TEXT, Metrics

ROOT = Path(__file__).parents[2]
WANTS_OPENMETRICS = "application/openmetrics-text;version=1.0.0;q=0.5,*/*;q=0.1"
#: Labels that a series may have: none whose values somebody could make more and more of.
LABELS = {"volume", "transport", "backend", "state", "code", "le"}

A = Facts(
    name="a", transport="nbd", backend="rbd", state="online", since=1000.5, code="", size=1 << 30, device="/dev/nbd0",
    counted=(), process=None, open_seconds=0.25, waiting=0.0, waited=12.5, deaths=2, hangs=1, stalls=3, recoveries=4,
    rescues=5, pauses=(1, 0, 0, 2, 0, 0, 0, 0, 0, 0, 1), pause_seconds=400.5,
)
FAILED = replace(A, name="b", state="failed", code="open-failed", device=None, size=0, open_seconds=0.0)
#: reads, merged, sectors, ms, writes, merged, sectors, ms, in flight, ms, weighted ms, discards, …, flushes, ms
DISK = [10, 0, 20, 30, 40, 0, 50, 60, 7, 80, 90, 100, 0, 110, 120, 130, 140]
SEEN = Sample(disk=DISK, qsd=process.Usage(1.5, 4096))


def look(facts: Facts) -> Sample:
    return SEEN if facts.device else Sample(disk=None, qsd=None)


def scraped(*facts: Facts, counts: Counts | None = None, openmetrics: bool = True) -> dict[str, list[Series]]:
    """The samples of a scrape, by their names, as Prometheus' own parsers read them."""
    accept = WANTS_OPENMETRICS if openmetrics else "text/plain"
    content_type, content = Metrics(counts or Counts()).render(accept, facts, look)
    assert content_type == (OPENMETRICS if openmetrics else TEXT)
    families = [*(parse_openmetrics if openmetrics else parse_text)(content.decode())]
    found: dict[str, list[Series]] = {}
    for family in families:
        for series in family.samples:
            found.setdefault(series.name, []).append(series)
    return found


def value(found: dict[str, list[Series]], name: str, **labels: str) -> float:
    values = [series.value for series in found[name] if series.labels == labels]
    assert len(values) == 1, (name, labels, found.get(name))
    return float(values[0])


@pytest.mark.parametrize("openmetrics", [True, False])
def test_each_volume_has_what_is_known_of_it(openmetrics: bool) -> None:
    found = scraped(A, FAILED, openmetrics=openmetrics)
    for name, expected in {
        "reads_completed_total": 10, "read_bytes_total": 20 * 512, "read_time_seconds_total": 0.03,
        "writes_completed_total": 40, "written_bytes_total": 50 * 512, "write_time_seconds_total": 0.06,
        "requests_in_flight": 7, "io_time_seconds_total": 0.08,
        "discards_completed_total": 100, "discarded_bytes_total": 110 * 512, "discard_time_seconds_total": 0.12,
        "flushes_completed_total": 130, "flush_time_seconds_total": 0.14,
        "state_change_timestamp_seconds": 1000.5, "size_bytes": 1 << 30, "backend_open_seconds": 0.25,
        "waiting_seconds": 0, "stalled_seconds_total": 12.5, "deaths_total": 2, "hangs_total": 1, "stalls_total": 3,
        "recoveries_total": 4, "rescues_total": 5, "qsd_cpu_seconds_total": 1.5, "qsd_resident_memory_bytes": 4096,
    }.items():
        assert value(found, f"storaged_volume_{name}", volume="a") == expected
    assert value(found, "storaged_volume_info", volume="a", transport="nbd", backend="rbd") == 1
    for state in State:
        assert value(found, "storaged_volume_state", volume="a", state=state.value) == (state is State.ONLINE)
    assert {series.labels["volume"] for series in found["storaged_volume_failure"]} == {"b"}
    assert value(found, "storaged_volume_failure", volume="b", code="open-failed") == 1


def test_what_a_volume_does_not_have_is_left_out() -> None:
    found = scraped(FAILED)
    assert not {name for name in found if "bytes" in name and name.startswith("storaged_volume")}
    assert "storaged_volume_backend_open_seconds" not in found
    assert value(found, "storaged_volume_state", volume="b", state="failed") == 1


def test_a_histogram_counts_each_pause_in_all_ranges_above_it() -> None:
    found = scraped(A)
    for bound, expected in {"0.1": 1, "0.5": 1, "1.0": 3, "300.0": 3, "+Inf": 4}.items():
        assert value(found, "storaged_volume_recovery_pause_seconds_bucket", volume="a", le=bound) == expected
    assert value(found, "storaged_volume_recovery_pause_seconds_count", volume="a") == 4
    assert value(found, "storaged_volume_recovery_pause_seconds_sum", volume="a") == 400.5


def test_the_daemon_tells_its_errors_and_its_lag() -> None:
    counts = Counts()
    counts.request_failed(ErrorCode.NO_SUCH_VOLUME)
    counts.volume_failed(ErrorCode.QSD_DIED)
    counts.volume_failed(ErrorCode.QSD_DIED)
    counts.loop_was_late(0.002)
    counts.loop_was_late(60)
    found = scraped(counts=counts)
    assert value(found, "storaged_request_errors_total", code="no-such-volume") == 1
    assert value(found, "storaged_request_errors_total", code="no-space") == 0
    assert value(found, "storaged_failures_total", code="qsd-died") == 2
    assert value(found, "storaged_failures_created", code="qsd-died") == pytest.approx(counts.began)
    assert value(found, "storaged_loop_lag_seconds_bucket", le="0.001") == 0
    assert value(found, "storaged_loop_lag_seconds_bucket", le="0.0025") == 1
    assert value(found, "storaged_loop_lag_seconds_bucket", le=str(LAG_BOUNDS[-1])) == 1
    assert value(found, "storaged_loop_lag_seconds_count") == 2
    assert value(found, "process_resident_memory_bytes") > 1 << 20


def test_no_label_is_unbounded_and_both_formats_tell_the_same() -> None:
    counts = Counts()
    one, other = (
        {
            (name, tuple(sorted(series.labels.items())), series.value)
            for name, all_series in scraped(A, FAILED, counts=counts, openmetrics=openmetrics).items()
            for series in all_series if not name.startswith("process_")
        }
        for openmetrics in (True, False)
    )
    assert one == other
    assert {label for _, labels, _ in one for label, _ in labels} == LABELS


@settings(max_examples=30, deadline=None)  # on a busy machine
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"])) | st.sampled_from(['"', "\\", "\n", '\\"', "a\\n"]))
def test_whatever_a_value_is_it_stays_one_label(name: str) -> None:
    found = scraped(replace(A, name=name))
    assert [series.labels for series in found["storaged_volume_size_bytes"]] == [{"volume": name}]


def test_a_device_is_counted_from_when_it_became_the_volumes() -> None:
    before = [number // 2 for number in DISK]
    before[8] = 99  # in flight then, which is no count
    counts = since(DISK, before)
    assert counts[8] == 7
    assert [now + then for index, (now, then) in enumerate(zip(counts, before, strict=True)) if index != 8] == [
        number for index, number in enumerate(DISK) if index != 8
    ]


@pytest.mark.parametrize("counted", [[], DISK[:11], [number + 1 for number in DISK]])
def test_where_it_is_not_known_what_a_device_had_counted_the_kernels_counts_are_told(counted: list[int]) -> None:
    assert since(DISK, counted) == DISK


def test_a_process_that_only_has_the_number_of_a_dead_qsd_is_not_counted() -> None:
    me = process.identify(os.getpid())
    assert me is not None
    mine = sample(replace(A, device=None, process=me)).qsd
    assert mine is not None
    assert mine.resident > 1 << 20
    assert mine.cpu > 0
    other = type(me)(pid=me.pid, start_time=me.start_time + 1, exe_device=0, exe_inode=0)
    assert sample(replace(A, device=None, process=other)).qsd is None


# Documentation, rules, dashboard ---------------------------------------------------------------------------------


def documented() -> dict[str, tuple[str, str, str]]:
    """The tables of docs/metrics.md: name → kind, labels, meaning."""
    text = (ROOT / "docs/metrics.md").read_text()
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()
        if line.startswith("| `storaged_")
    ]
    return {name.strip("`"): (kind, labels, meaning) for name, kind, labels, meaning in cells}


def test_the_tables_of_the_documentation_are_the_registry() -> None:
    expected = {
        family.series: (
            family.kind, ", ".join(f"`{label}`" for label in family.labels if label != "volume"), family.help
        )
        for family in FAMILIES
    }
    for family in Metrics(Counts()).registry.collect():
        if not family.name.startswith("process_"):
            name = family.name + ("_total" if family.type == "counter" else "")
            labels = {label for series in family.samples for label in series.labels} - {"le"}
            expected[name] = (family.type, ", ".join(f"`{label}`" for label in labels), family.documentation)
    assert documented() == expected


@pytest.mark.parametrize("file", ["storaged.rules.yml", "grafana-dashboard.json"])
def test_rules_and_dashboard_use_only_what_a_scrape_has(file: str) -> None:
    text = (ROOT / "observability" / file).read_text()
    data = yaml.safe_load(text) if file.endswith("yml") else json.loads(text)
    used = {name for query in queries(data) for name in re.findall(r"\b(?:storaged|process)_\w+", query)}
    assert len(used) > 5
    assert used <= set(scraped(A, FAILED))


def queries(data: object) -> list[str]:
    """All that stands where rules and dashboards have queries."""
    if isinstance(data, list):
        return [query for part in data for query in queries(part)]
    if not isinstance(data, dict):
        return []
    own = [str(data[key]) for key in ("expr", "definition") if key in data]
    return own + [query for part in data.values() for query in queries(part)]


def test_every_alert_is_explained() -> None:
    rules = yaml.safe_load((ROOT / "observability/storaged.rules.yml").read_text())
    alerts = [rule["alert"] for group in rules["groups"] for rule in group["rules"]]
    explained = re.findall(r"^\| `(Storaged\w+)` \|", (ROOT / "docs/metrics.md").read_text(), re.MULTILINE)
    assert alerts == explained


def test_the_dashboard_has_an_expression_and_a_place_for_each_panel() -> None:
    dashboard = json.loads((ROOT / "observability/grafana-dashboard.json").read_text())
    panels = dashboard["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
        assert panel["type"] == "row" or all(target["expr"] for target in panel["targets"]), panel["title"]


def test_the_dashboard_has_the_shape_that_grafana_imports() -> None:
    # Its "classic" model, as grafana.com/docs/grafana/latest describes it ("JSON model").
    dashboard = json.loads((ROOT / "observability/grafana-dashboard.json").read_text())
    assert dashboard.get("id") is None  # a number would be that of somebody else's dashboard
    assert re.fullmatch(r"[\w-]{1,40}", dashboard["uid"])
    assert dashboard["title"]
    assert isinstance(dashboard["schemaVersion"], int)
    assert {"from", "to"} <= dashboard["time"].keys()
    variables = {one["name"]: one for one in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    ours = {"type": variables["datasource"]["query"], "uid": "${datasource}"}
    assert [one["datasource"] for one in variables.values() if one["type"] == "query"] == [ours, ours]
    for panel in dashboard["panels"]:
        if panel["type"] == "row":
            assert (panel["collapsed"], panel["panels"]) == (False, [])  # its panels come after it
            continue
        # All are in Grafana itself.
        assert panel["type"] in ("stat", "state-timeline", "table", "timeseries", "heatmap"), panel["title"]
        assert all(one["datasource"] == ours for one in [panel, *panel["targets"]]), panel["title"]
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names), panel["title"]
        used = set(re.findall(r"\$\{?(\w+)", json.dumps(panel["targets"])))
        assert used <= variables.keys() | {"__rate_interval"}, panel["title"]


def test_the_ranges_of_pauses_are_those_that_alerts_ask_for() -> None:
    rules = (ROOT / "observability/storaged.rules.yml").read_text()
    asked = set(re.findall(r'pause_seconds_bucket\{le="([\d.]+)"', rules))
    assert asked
    assert asked <= {str(bound) for bound in PAUSE_BOUNDS}
