"""The metrics of volumes: their names, kinds and meanings, and the value of each. docs/metrics.md has the same table.

Names follow OpenMetrics (base units as suffix, ``_total`` for counters) and, for what the kernel counts of a device,
node_exporter's diskstats. Labels are ``volume``, ``transport``, ``backend``, ``state`` and ``code``, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from storaged.observe.facts import Facts, Sample

_Value = Callable[[Facts, Sample], float | None]


@dataclass(frozen=True, slots=True)
class Family:
    """A metric; ``name`` is without the suffixes of its samples (``_total``, ``_info``, ``_bucket``)."""

    name: str
    kind: str
    """``counter``, ``gauge``, ``info`` or ``histogram``."""
    help: str
    labels: tuple[str, ...] = ("volume",)

    @property
    def unit(self) -> str:
        """The unit, which the name ends with; empty where it has none."""
        last = self.name.rpartition("_")[2]
        return last if last in ("seconds", "bytes") else ""

    @property
    def series(self) -> str:
        """The name of the series that a query asks for (of a histogram: its family)."""
        return self.name + {"counter": "_total", "info": "_info"}.get(self.kind, "")


def _disk(index: int) -> _Value:
    """Field ``index`` of /sys/block/X/stat, from 0; those that a kernel does not have are left out."""
    return lambda facts, now: None if now.disk is None or index >= len(now.disk) else now.disk[index]


def _sectors(index: int) -> _Value:
    """A field in sectors, of 512 bytes whatever the device's block size is (Documentation/block/stat.rst)."""
    return lambda facts, now: None if now.disk is None or index >= len(now.disk) else now.disk[index] * 512


def _milliseconds(index: int) -> _Value:
    """A field in milliseconds."""
    return lambda facts, now: None if now.disk is None or index >= len(now.disk) else now.disk[index] / 1000


#: With one sample for each volume, labelled with its name alone; None: the volume has none of this.
SIMPLE: tuple[tuple[Family, _Value], ...] = (
    (
        Family("storaged_volume_state_change_timestamp_seconds", "gauge", "When the volume came into its state."),
        lambda facts, now: facts.since,
    ),
    (
        Family("storaged_volume_size_bytes", "gauge", "Size of the disk."),
        lambda facts, now: facts.size or None,
    ),
    (Family("storaged_volume_reads_completed", "counter", "Reads that ended, well or not."), _disk(0)),
    (Family("storaged_volume_writes_completed", "counter", "Writes that ended, well or not."), _disk(4)),
    (Family("storaged_volume_discards_completed", "counter", "Discards that ended, well or not."), _disk(11)),
    (Family("storaged_volume_flushes_completed", "counter", "Flushes that ended, well or not."), _disk(15)),
    (Family("storaged_volume_read_bytes", "counter", "Bytes that were read."), _sectors(2)),
    (Family("storaged_volume_written_bytes", "counter", "Bytes that were written."), _sectors(6)),
    (Family("storaged_volume_discarded_bytes", "counter", "Bytes that were discarded."), _sectors(13)),
    (Family("storaged_volume_read_time_seconds", "counter", "Time that all reads took together."), _milliseconds(3)),
    (Family("storaged_volume_write_time_seconds", "counter", "Time that all writes took together."), _milliseconds(7)),
    (
        Family("storaged_volume_discard_time_seconds", "counter", "Time that all discards took together."),
        _milliseconds(14),
    ),
    (
        Family("storaged_volume_flush_time_seconds", "counter", "Time that all flushes took together."),
        _milliseconds(16),
    ),
    (
        Family("storaged_volume_io_time_seconds", "counter", "Time in which requests were in flight."),
        _milliseconds(9),
    ),
    (Family("storaged_volume_requests_in_flight", "gauge", "Requests in flight now."), _disk(8)),
    (
        Family(
            "storaged_volume_waiting_seconds", "gauge",
            "For how long I/O has been waiting now; 0 while it moves, or nobody does any.",
        ),
        lambda facts, now: facts.waiting,
    ),
    (
        Family(
            "storaged_volume_stalled_seconds", "counter",
            "Time in which I/O had to wait: QSD was dead or silent, or the storage below answered nothing.",
        ),
        lambda facts, now: facts.waited,
    ),
    (
        Family("storaged_volume_deaths", "counter", "How often QSD ended and nobody had asked for it."),
        lambda facts, now: facts.deaths,
    ),
    (
        Family("storaged_volume_hangs", "counter", "How often QSD did not answer."),
        lambda facts, now: facts.hangs,
    ),
    (
        Family("storaged_volume_stalls", "counter", "How often QSD answered and its I/O stood still."),
        lambda facts, now: facts.stalls,
    ),
    (
        Family("storaged_volume_recoveries", "counter", "How often I/O went on after it had waited."),
        lambda facts, now: facts.recoveries,
    ),
    (
        Family("storaged_volume_rescues", "counter", "How often all I/O was ended with errors."),
        lambda facts, now: facts.rescues,
    ),
    (
        Family("storaged_volume_qsd_cpu_seconds", "counter", "Processor time of the present QSD."),
        lambda facts, now: now.qsd.cpu if now.qsd is not None else None,
    ),
    (
        Family("storaged_volume_qsd_resident_memory_bytes", "gauge", "Memory of the present QSD, program included."),
        lambda facts, now: now.qsd.resident if now.qsd is not None else None,
    ),
    (
        Family("storaged_volume_backend_open_seconds", "gauge", "How long QSD took to open the source, the last time."),
        lambda facts, now: facts.open_seconds or None,
    ),
)

INFO = Family(
    "storaged_volume", "info", "How the volume is attached, to join with.", ("volume", "transport", "backend")
)
STATE = Family(
    "storaged_volume_state", "gauge", "1 for the state that the volume is in, 0 for all others.", ("volume", "state")
)
FAILURE = Family(
    "storaged_volume_failure", "gauge", "1 while the volume fails, with the code of its failure.", ("volume", "code")
)
PAUSE = Family(
    "storaged_volume_recovery_pause_seconds", "histogram", "For how long I/O had waited when it went on.",
)

FAMILIES: tuple[Family, ...] = (INFO, STATE, FAILURE, *(family for family, _ in SIMPLE), PAUSE)
