"""Puts another server in the place of a QSD that works: a newer program, or one that fails everything."""

from __future__ import annotations

import os

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import secrets
from storaged.host.nbdhandshake import libnbd_problem
from storaged.model.plan import Step
from storaged.qsd.build import build_of
from storaged.qsd.process import find_binary
from storaged.qsd.version import parse_version
from storaged.supervisor import fetching, fingerprint, leaving, opening
from storaged.supervisor.attachment import Attachment


def refuse_to_keep(attachment: Attachment) -> None:
    """Raise UNSUPPORTED where the device cannot stay without its QSD, VOLUME_BUSY where there is none."""
    transport = attachment.transport
    if not transport.bridges:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, f"a device of the transport {transport.name} cannot be kept",
            volume=attachment.spec.name, step="rescue", cause="it goes with its qemu-storage-daemon",
            hint="rescue it without --keep: all I/O ends with errors, and storaged resume makes a new device",
        )
    if attachment.record is None or attachment.record.device is None:
        raise StoragedError(
            ErrorCode.VOLUME_BUSY, "there is no device that could be kept", volume=attachment.spec.name, step="rescue",
            hint="rescue it without --keep",
        )


async def check_source(attachment: Attachment, timeout: float) -> None:
    """See that a successor would find the source of the record, before anything is ended.

    Raises SOURCE_CHANGED, SOURCE_MISSING and what else ``opening.inspect`` raises.
    """
    record, spec = attachment.record, attachment.spec
    if record is None:
        return  # it has never got as far as that

    def work() -> None:
        wanted = opening.inspect(spec)
        if record.sources and not opening.is_same(wanted, record.sources):
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, "the source is not the one that was attached",
                cause="it was replaced or moved, and qemu-storage-daemon may be the last that has it",
                hint="bring the old one back; or detach the volume and attach it again",
            )
        if wanted.size is not None and wanted.size < record.size and not spec.snapshot:
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, f"the disk has {wanted.size} bytes by now, it had {record.size}",
                hint="bring the old size back; or detach the volume (--force) and attach it again",
            )
        if record.fingerprint:
            try:
                fingerprint.compare(record, fingerprint.ask(spec, attachment.directory, timeout / 2))
            except StoragedError as error:
                if error.code is not ErrorCode.UNSUPPORTED:
                    raise
        if record.size:
            fetching.refuse_lost_copy(spec, attachment.environment.layout)
        for secret in wanted.secrets:
            opening.secret_object(secret, spec, attachment.directory)
        needed = wanted.requirements
        for option in (*needed.secret_files.values(), *([needed.agent_key] if needed.agent_key else [])):
            secrets.read(option, spec.options[option], attachment.directory)
        if record.overlay is not None and not os.path.exists(record.overlay):
            raise StoragedError(
                ErrorCode.SOURCE_MISSING, f"the changes are not in {record.overlay}",
                cause="somebody removed or moved the file, and qemu-storage-daemon is the last that has it",
                hint="copy what you need from the device, then detach the volume",
            )

    await attachment.source_calls("look at the source", timeout, work)


async def choose_program(attachment: Attachment, timeout: float) -> str:
    """Return the program that is installed now. It can serve the volume, and what the old one holds can be flushed.

    Raises QSD_MISSING, TRANSPORT_UNAVAILABLE, UNSUPPORTED, all with nothing changed.
    """
    record = attachment.known()
    configured = attachment.environment.config.qsd.binary_for(find_backend(record.spec.source).name)
    present = parse_version(f"version {record.qsd_version}")

    def work() -> str:
        binary = find_binary(configured)
        build = build_of(binary)
        found = attachment.transport.probe(build)
        if not found.available:
            raise StoragedError(
                ErrorCode.TRANSPORT_UNAVAILABLE, f"{binary} cannot serve the volume", cause=found.reason,
                hint=found.hint or "the old one goes on; install another qemu-storage-daemon",
            )
        if present is not None and build.version < present:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, f"{binary} is older than what serves the volume",
                cause=f"it is {build.version}, the volume has {record.qsd_version}",
                hint="it may lack what the volume was set up with: detach the volume and attach it again",
            )
        problem = libnbd_problem() if attachment.transport.bridges and record.spec.keeps_writes_in_memory else ""
        if problem:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, "what qemu-storage-daemon holds in its memory cannot be flushed", cause=problem,
                hint="apt install python3-libnbd",
            )
        return binary

    return await attachment.blocking("look at the installed qemu-storage-daemon", timeout, work)


async def end_the_old_one(attachment: Attachment, binary: str, timeout: float) -> None:
    """End QSD in good order, with nothing lost; a device that cannot wait goes with it. ``binary`` comes next.

    Raises UNSUPPORTED where such a device is in use, with nothing changed.
    """
    if attachment.transport.bridges:
        await leaving.hand_over(attachment, timeout, binary=binary)
        return
    try:
        await attachment.perform(Step.DISCONNECT, timeout=timeout, force=False)
    except StoragedError as error:
        if error.code is not ErrorCode.DEVICE_IN_USE:
            raise
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "the volume is in use, and its device cannot wait for another qemu-storage-daemon",
            cause=error.cause, users=error.users,
            hint=f"end what uses it first; by the transport {attachment.transport.name} an upgrade makes a new device",
        ) from error
    await attachment.note(binary=binary)
    await attachment.perform(Step.STOP, timeout=timeout, force=False)
