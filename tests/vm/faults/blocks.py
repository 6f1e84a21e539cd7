"""What the verifier writes: every block says which disk, which block and which write it is, in each 64 bytes of it."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass

BLOCK = 4096
_MAGIC = b"storaged"
#: Magic, run, number of the block, generation, and a checksum of these.
_FIELDS = struct.Struct("<8sQQQ28x")
_SUM = struct.Struct("<I")
_UNIT = _FIELDS.size + _SUM.size


@dataclass(frozen=True)
class Found:
    """What a block holds: generation 0 is one that was never written (all zeros)."""

    run: int
    number: int
    generation: int


def block(run: int, number: int, generation: int) -> bytes:
    """Return the content of block ``number`` as write ``generation`` of ``run`` leaves it."""
    fields = _FIELDS.pack(_MAGIC, run, number, generation)
    return (fields + _SUM.pack(zlib.crc32(fields))) * (BLOCK // _UNIT)


def read(data: bytes) -> Found | None:
    """Return what a block says that it is; None if it is torn or nothing that a verifier wrote."""
    if data == bytes(BLOCK):
        return Found(0, 0, 0)
    unit = data[:_UNIT]
    fields, checksum = unit[: _FIELDS.size], _SUM.unpack_from(unit, _FIELDS.size)[0]
    magic, run, number, generation = _FIELDS.unpack(fields)
    if magic != _MAGIC or checksum != zlib.crc32(fields) or unit * (BLOCK // _UNIT) != data:
        return None
    return Found(run, number, generation)


def wrong(data: bytes, run: int, number: int, oldest: int, newest: int) -> str | None:
    """Return what is wrong with block ``number``; it may hold a generation from ``oldest`` to ``newest``."""
    found = read(data)
    if found is None:
        return f"block {number} is torn: it begins with {data[:_UNIT].hex()}"
    if found.generation == 0:
        return None if oldest == 0 else f"block {number} is empty; write {oldest} was expected"
    if (found.run, found.number) != (run, number):
        return f"block {number} is block {found.number} of run {found.run:x}, not of {run:x}"
    if not oldest <= found.generation <= newest:
        return f"block {number} holds write {found.generation}, not {oldest} to {newest}"
    return None
