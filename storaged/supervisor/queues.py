"""The request queue of a volume's device: noted before it is touched, and set up, again where that was cut short."""

from __future__ import annotations

import logging
from typing import Any

from storaged.errors import StoragedError
from storaged.host import queue as host_queue
from storaged.model.record import Record
from storaged.observe.journald import about
from storaged.supervisor.holding import Holding
from storaged.transports.queue import attributes

log = logging.getLogger("storaged.volume")

#: Seconds that a queue may take of a volume that works without it.
_PATIENCE = 10.0


def of_new_device(record: Record, device: str | None) -> dict[str, Any]:
    """What the record says of the queue of a device from its first moment on. Never blocks."""
    wanted = attributes(record.spec) if device is not None else {}
    return {"queue": host_queue.former(device, wanted) if device is not None else {}, "queue_due": bool(wanted)}


async def set_up(held: Holding, timeout: float) -> None:
    """Set what was asked for and is not set yet.

    What the kernel refuses fails the first attach, with INVALID_ARGUMENT. Later it is told, and the volume goes on:
    its data is worth more than its speed. What failed otherwise is tried again with the next look.
    """
    record = held.known()
    if record.device is None or not record.queue_due or (held.blocking.stuck and not held.first):
        return
    try:
        refused = await held.blocking(
            "set up the device's queue", timeout if held.first else min(timeout, _PATIENCE), host_queue.set_up,
            record.device, attributes(record.spec),
        )
    except StoragedError as error:
        if held.first:
            raise
        _tell(held, error)
        return
    if refused and held.first:
        raise refused[0]
    held.environment.fault("connect: queue set")
    for refusal in refused:
        _tell(held, refusal)
    await held.note(queue_due=False)


async def note_given_back(held: Holding) -> None:
    """The device did not go after all: what was given back of its queue is due again."""
    record = held.record
    if record is not None and record.device is not None and host_queue.is_given_back(
        record.device, record.queue, attributes(record.spec)
    ):
        await held.note(queue_due=True)


def _tell(held: Holding, error: StoragedError) -> None:
    text = f"{error}; {error.hint}"
    if text != held.told_of_queue:
        held.told_of_queue = text
        held.notes.append(text)
        log.warning("volume %s: %s", held.spec.name, text, extra=about(held.spec.name))
