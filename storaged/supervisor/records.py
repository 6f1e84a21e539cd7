"""Where the record of a volume's attachment is, and how it is read and written."""

from __future__ import annotations

import os

import msgspec

from storaged.host.reserve import write_reserved
from storaged.model.record import RECORDS, Record


def record_path(directory: str) -> str:
    """The path of a volume's record in its private directory."""
    return os.path.join(directory, "record.json")


def write_record(directory: str, record: Record) -> None:
    """Write the record, all or nothing."""
    write_reserved(record_path(directory), msgspec.json.encode(record))


def load_record(directory: str) -> Record:
    """Return the record. Raises OSError, and ValueError for one that is damaged, however it is."""
    with open(record_path(directory), "rb") as file:
        data = file.read()
    try:
        return RECORDS.decode(data)
    except RecursionError as error:
        raise ValueError(str(error)) from error
