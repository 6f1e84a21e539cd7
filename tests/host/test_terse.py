"""What is left out of a blockdev-add: QSD takes the same for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from storaged.backends import BACKENDS
from storaged.backends.cache import CACHE_FLAGS, cache_flags
from storaged.model.blockdev import DISK, Image, image_tree
from storaged.model.formats import Format
from storaged.qsd.session import Session
from storaged.qsd.terse import terse
from tests.contract.test_backend import with_qsd
from tests.harness import image, run


def opened(directory: Path, node: dict[str, Any]) -> list[dict[str, Any]]:
    """What QSD says of all that it has open then."""
    told: list[dict[str, Any]] = []

    async def talk(session: Session) -> None:
        await session.execute("blockdev-add", node)
        told.extend(await session.execute("query-named-block-nodes"))

    directory.mkdir()
    with_qsd(directory, talk)
    for one in told:
        if one["node-name"].startswith("#"):
            del one["node-name"]  # QSD made it up
    return told


@pytest.mark.parametrize("cache", sorted(CACHE_FLAGS))
@pytest.mark.parametrize("read_only", [True, False])
def test_qsd_opens_the_same(tmp_path: Path, cache: str, read_only: bool) -> None:
    base, top = image(tmp_path / "base.raw", "raw"), tmp_path / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top)
    chain = [
        Image(format, BACKENDS["file"].node(str(path), read_only=not writable, options={"cache": cache}))
        for format, path, writable in ((Format.QCOW2, top, not read_only), (Format.RAW, base, False))
    ]
    node = image_tree(chain, read_only=read_only, node_name=DISK, cache=cache_flags({"cache": cache}))
    assert terse(node) != node
    wordy, few = opened(tmp_path / "wordy", node), opened(tmp_path / "few", terse(node))
    assert len(wordy) == 4
    assert wordy == few
