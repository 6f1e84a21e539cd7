"""What a resize asks of QSD, and what it refuses, for drivers whose servers are not here."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.blocking import BlockingCalls
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.supervisor.growing import grow
from storaged.supervisor.holding import Holding
from storaged.transports import TRANSPORTS

MIB = 1 << 20


class Qsd:
    """A session with a QSD that has the disk open, and finds the source to have ``source`` bytes at a new look."""

    def __init__(self, source: int, **nodes: int) -> None:
        self.source, self.nodes, self.asked = source, nodes, list[tuple[str, dict[str, Any]]]()

    async def node_names(self, *, timeout: float = 0) -> dict[str, int]:
        return dict(self.nodes)

    async def add_node(self, node: dict[str, Any], *, timeout: float) -> None:
        assert node["read-only"]
        self.nodes[node["node-name"]] = self.source

    async def execute(self, command: str, arguments: dict[str, Any], *, timeout: float) -> None:
        self.asked.append((command, arguments))
        if command == "blockdev-del":
            del self.nodes[arguments["node-name"]]


def holding(qsd: Qsd, spec: VolumeSpec, transport: str = "fuse") -> tuple[Holding, dict[str, object]]:
    noted: dict[str, object] = {}

    async def session() -> Qsd:
        return qsd

    async def note(**changes: object) -> None:
        noted.update(changes)

    record = Record(spec=spec, transport=transport, transport_reason="", binary="/qsd", size=64 * MIB)
    held = SimpleNamespace(
        spec=spec, qsd=SimpleNamespace(session=session), known=lambda: record, note=note,
        transport=TRANSPORTS[transport], source_calls=BlockingCalls("test"),
        environment=SimpleNamespace(fault=lambda place: None),
    )
    return cast(Holding, held), noted


def grown(qsd: Qsd, spec: VolumeSpec, size: int | None, transport: str = "fuse") -> dict[str, object]:
    held, noted = holding(qsd, spec, transport)
    asyncio.run(grow(held, size, 5))
    return noted


def refused(qsd: Qsd, spec: VolumeSpec, size: int | None, transport: str = "fuse") -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        grown(qsd, spec, size, transport)
    assert "block_resize" not in [command for command, _ in qsd.asked]
    return caught.value


VITASTOR = VolumeSpec(name="a", source="vitastor:image=x:etcd_host=127.0.0.1\\:2379")
RBD = VolumeSpec(name="a", source="rbd:rbd/x")


def test_an_image_of_vitastor_grows_to_what_it_has_and_no_further() -> None:
    """Its driver would only believe in another size (vitastor_co_truncate)."""
    error = refused(Qsd(64 * MIB, disk=64 * MIB), VITASTOR, 128 * MIB)
    assert error.code is ErrorCode.UNSUPPORTED
    assert "vitastor-cli" in error.hint
    assert refused(Qsd(128 * MIB, disk=64 * MIB), VITASTOR, 96 * MIB).code is ErrorCode.INVALID_SIZE
    assert grown(Qsd(128 * MIB, disk=64 * MIB), VITASTOR, 128 * MIB) == {"size": 128 * MIB, "source_size": 0}


def test_what_the_source_has_is_looked_at_anew_though_a_successor_has_seen_it_grow() -> None:
    qsd = Qsd(192 * MIB, disk=64 * MIB, full=128 * MIB)
    assert refused(qsd, RBD, 160 * MIB).code is ErrorCode.INVALID_SIZE
    assert grown(qsd, RBD, None) == {"size": 192 * MIB, "source_size": 0}
    assert [command for command, _ in qsd.asked if command != "blockdev-del"] == ["blockdev-reopen", "block_resize"]
    assert "look" not in qsd.nodes


def test_a_look_that_was_left_behind_is_not_in_the_way() -> None:
    assert grown(Qsd(128 * MIB, disk=64 * MIB, look=64 * MIB), RBD, None)["size"] == 128 * MIB


def test_a_resize_that_lost_its_answer_is_finished_by_the_next() -> None:
    """QSD's disk has grown already, and the record does not know."""
    assert grown(Qsd(128 * MIB, disk=128 * MIB), RBD, None) == {"size": 128 * MIB, "source_size": 0}


def test_what_does_not_grow_says_so_before_anything_is_asked() -> None:
    read_only = VolumeSpec(name="a", source="rbd:rbd/x", read_only=True)
    for spec, transport in ((RBD, "nbd"), (read_only, "fuse")):
        for size in (128 * MIB, None):
            qsd = Qsd(128 * MIB, disk=64 * MIB)
            assert refused(qsd, spec, size, transport).code is ErrorCode.UNSUPPORTED


def test_a_size_that_is_there_already_is_nothing_to_do() -> None:
    qsd = Qsd(64 * MIB, disk=64 * MIB)
    assert grown(qsd, RBD, None) == grown(qsd, RBD, 64 * MIB) == {}
