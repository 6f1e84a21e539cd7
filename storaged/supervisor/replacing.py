"""Puts another server in the place of a QSD that works: a newer program, or one that fails everything."""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError
from storaged.model.plan import Step
from storaged.qsd.build import build_of
from storaged.qsd.process import find_binary
from storaged.supervisor import leaving
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


async def choose_program(attachment: Attachment, timeout: float) -> None:
    """Find the program that is installed now, and see that it can serve the volume, before the old one is ended.

    Raises QSD_MISSING, TRANSPORT_UNAVAILABLE.
    """
    configured = attachment.environment.config.qsd.binary

    def work() -> str:
        binary = find_binary(configured)
        found = attachment.transport.probe(build_of(binary))
        if not found.available:
            raise StoragedError(
                ErrorCode.TRANSPORT_UNAVAILABLE, f"{binary} cannot serve the volume", cause=found.reason,
                hint=found.hint or "the old one goes on; install another qemu-storage-daemon",
            )
        return binary

    binary = await attachment.blocking("look at the installed qemu-storage-daemon", timeout, work)
    if binary != attachment.known().binary:
        await attachment.note(binary=binary)


async def end_the_old_one(attachment: Attachment, timeout: float) -> None:
    """End QSD in good order, with nothing lost; a device that cannot wait goes with it.

    Raises UNSUPPORTED where such a device is in use, with nothing changed.
    """
    if attachment.transport.bridges:
        await leaving.hand_over(attachment, timeout)
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
    await attachment.perform(Step.STOP, timeout=timeout, force=False)
