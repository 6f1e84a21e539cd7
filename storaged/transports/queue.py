"""What can be said of a device's request queue (-o KEY=VALUE), by all transports that make a device. Pure.

The kernel judges the values: which schedulers there are and how large a request may be is known when the device is
there (Documentation/ABI/stable/sysfs-block).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import VolumeSpec
from storaged.transports.options import Number, number

SCHEDULER = "scheduler"
_NUMBERS = {
    "max-sectors-kb": Number("KiB of the largest request that the kernel makes", 4, 1 << 21),
    "nr-requests": Number("requests that may wait in a queue of the device", 4, 1 << 16),
    "read-ahead-kb": Number("KiB that the page cache reads ahead of who reads in order", 0, 1 << 21),
}
QUEUE_OPTIONS: Mapping[str, str] = {
    SCHEDULER: "the I/O scheduler of the device, as none, mq-deadline or bfq; default: the transport's",
    **{key: f"{about.about}; default: the kernel's" for key, about in _NUMBERS.items()},
}
_WORD = re.compile(r"[a-z][a-z0-9_-]{0,30}")


def attributes(spec: VolumeSpec) -> dict[str, str]:
    """Return what was said: attributes below /sys/block/X and their values, in the order in which they are written.

    Raises INVALID_ARGUMENT. The scheduler comes first, since another one sets nr_requests anew (blk_mq_init_sched).
    """
    found: dict[str, str] = {}
    scheduler = spec.options.get(SCHEDULER)
    if scheduler is not None:
        if not _WORD.fullmatch(scheduler):
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {SCHEDULER}={scheduler!r}", volume=spec.name,
                hint="it is the name of an I/O scheduler, such as none or mq-deadline",
            )
        found["queue/scheduler"] = scheduler
    for key, about in _NUMBERS.items():
        if key in spec.options:
            found[f"queue/{key.replace('-', '_')}"] = str(number(spec, key, about, 0))
    return found
