"""Opens the disk of a snapshot in QSD: an overlay of a limited size over a source that is only read."""

from __future__ import annotations

from storaged.backends import BACKENDS
from storaged.host.blocking import BlockingCalls
from storaged.model import blockdev
from storaged.model.spec import VolumeSpec
from storaged.qsd.session import Session
from storaged.supervisor import overlay
from storaged.supervisor.environment import Environment
from storaged.supervisor.opening import behaviour, cache_flags


async def open_snapshot(
    spec: VolumeSpec, fingerprint: list[list[int]], path: str, session: Session, environment: Environment,
    blocking: BlockingCalls, timeout: float,
) -> None:
    """Open the overlay at ``path`` over the base, which is open already; make one of the file that
    ``overlay.create_new`` has made, where there is none yet."""
    snapshots = environment.layout.snapshots_dir
    backend = BACKENDS["file"]

    async def add_file(place: str, limit: int) -> None:
        protocol = backend.node(place, read_only=False, options=spec.options)
        await session.execute("blockdev-add", blockdev.overlay_file_node(protocol, limit), timeout=timeout)

    mark = await blocking("look at the overlay", timeout, overlay.check, snapshots, spec.name, fingerprint)
    limit = mark.limit if mark is not None else overlay.limit_of(spec)
    if mark is None:
        await add_file(overlay.new_file(path), limit)
        size = (await session.node_names())[blockdev.BASE]
        create = {
            "job-id": "create", "options": {"driver": "qcow2", "file": blockdev.OVERLAY_FILE, "size": size},
        }
        await session.run_job("blockdev-create", create, "create", timeout=timeout)
        await session.execute("blockdev-del", {"node-name": blockdev.OVERLAY_FILE}, timeout=timeout)
        environment.fault("open: overlay created")
        await blocking(
            "finish the overlay", timeout, overlay.finish, snapshots, spec.name, path, fingerprint
        )
    await add_file(path, limit)
    await session.execute("blockdev-add", blockdev.overlay_tree(cache_flags(spec), behaviour(spec)), timeout=timeout)
