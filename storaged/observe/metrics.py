"""/metrics: the daemon's own metrics by prometheus_client, and behind them those of the volumes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client import exposition as text
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from storaged.errors import ErrorCode
from storaged.observe.counts import LAG_BOUNDS, Counts
from storaged.observe.exposition import volumes_text
from storaged.observe.facts import Facts, Sample

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"
TEXT = "text/plain; version=0.0.4; charset=utf-8"
_END = b"# EOF\n"


class Metrics:
    """What a scrape is answered with. Used by one thread at a time, not by the event loop's."""

    def __init__(self, counts: Counts) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_Daemon(counts))
        ProcessCollector(registry=self.registry)

    def render(self, accept: str, facts: Sequence[Facts], look: Callable[[Facts], Sample]) -> tuple[str, bytes]:
        """Return the content type and the text of all metrics, in the format that the client's ``Accept`` asks for."""
        # Not by prometheus_client's choose_encoder, which may choose a format that the volumes cannot be written in.
        if "application/openmetrics-text" in accept:
            daemon: bytes = openmetrics.generate_latest(self.registry)  # type: ignore[no-untyped-call]  # it has none
            volumes = volumes_text(facts, look, openmetrics=True)
            return OPENMETRICS, b"".join([daemon.removesuffix(_END), *volumes, _END])
        daemon = text.generate_latest(self.registry)
        return TEXT, b"".join([daemon, *volumes_text(facts, look, openmetrics=False)])


class _Daemon(Collector):
    """The metrics of the daemon itself; they begin with its start."""

    def __init__(self, counts: Counts) -> None:
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        yield self._by_code(
            "storaged_request_errors", "Errors that callers of the API were answered with.", counts.request_errors
        )
        yield self._by_code(
            "storaged_failures", "Tries to bring a volume up, down or back that failed, and deaths of QSD.",
            counts.volume_failures,
        )
        below = [*accumulate(counts.lags)]
        lag = HistogramMetricFamily(
            "storaged_loop_lag_seconds", "How late the daemon's event loop is, measured once a second.", unit="seconds"
        )
        lag.add_metric(
            [], [(str(bound), below[index]) for index, bound in enumerate((*LAG_BOUNDS, "+Inf"))], counts.lag_seconds
        )
        yield lag

    def _by_code(self, name: str, text: str, numbers: Mapping[ErrorCode, int]) -> Metric:
        family = CounterMetricFamily(name, text, labels=["code"])
        for code, number in numbers.items():
            family.add_metric([code.value], number, created=self._counts.began)
        return family
