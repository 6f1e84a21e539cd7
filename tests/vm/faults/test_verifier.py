"""The verifier finds what it is there to find."""

from __future__ import annotations

import json
import os
from pathlib import Path

from tests.harness import image
from tests.vm.faults.blocks import BLOCK, block
from tests.vm.faults.load import Verifier
from tests.vm.faults.verifier import after_power_failure


def _overwrite(path: Path, number: int, data: bytes) -> bytes:
    with open(path, "r+b") as file:
        file.seek(number * BLOCK)
        before = file.read(BLOCK)
        file.seek(number * BLOCK)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return before


def test_a_lost_a_stale_a_torn_and_a_misplaced_write_are_found(place: Path) -> None:
    disk = image(place / "disk", "raw")
    journal = place / "journal"
    load = Verifier(str(disk), 4, journal=journal)
    try:
        load.progresses(200)
        said = load.stop()
        assert said["errors"] == {}
        assert load.wrong(disk, "acked") == []
        state = json.loads(journal.read_text())
        number = next(number for number, generation in enumerate(state["flushed"]) if generation > 1)
        for data, said_of_it in (
            (bytes(BLOCK), "empty"),
            (block(state["run"], number, 1), "holds write 1"),
            (block(state["run"], number + 1, state["flushed"][number]), "is block"),
            (block(state["run"] + 1, number, state["flushed"][number]), "of run"),
            (block(state["run"], number, 5)[:512] + os.urandom(512) + bytes(BLOCK - 1024), "torn"),
        ):
            before = _overwrite(disk, number, data)
            for found in (load.wrong(disk, "acked"), load.wrong(disk, "flushed"),
                          after_power_failure(str(disk), str(journal), "")["wrong"]):
                assert len(found) == 1, said_of_it
                assert said_of_it in found[0]
            _overwrite(disk, number, before)
        assert load.wrong(disk, "acked") == []
    finally:
        load.end()
