"""What an earlier daemon left of a volume: its record, processes without a record, a device without a record."""

from __future__ import annotations

import os

from storaged.errors import ErrorCode, StoragedError
from storaged.host import process
from storaged.model.record import ProcessIdentity, Record
from storaged.model.spec import VolumeSpec
from storaged.qsd.process import pidfile
from storaged.supervisor.confinement import SOCKETS
from storaged.supervisor.records import load_record
from storaged.transports import TRANSPORTS, nbd
from storaged.transports.base import Site


def read_record(site: Site) -> tuple[Record | None, str]:
    """Return the record of a volume, or None and what is wrong with it; nothing is where there is none. Blocks."""
    try:
        record = load_record(site.directory)
    except FileNotFoundError:
        return None, ""
    except (OSError, ValueError) as error:
        return None, f"record.json is damaged: {error}"
    if record.spec.name != site.name or record.transport not in TRANSPORTS:
        return None, "record.json speaks of another volume or transport"
    return record, ""


def strays(site: Site) -> list[ProcessIdentity]:
    """Return the QSD processes that were started for this volume, recorded or not. Blocks."""
    return process.find_by_arguments("--pidfile", pidfile(site.directory))


def find_in_doubt(spec: VolumeSpec, site: Site, servers: list[ProcessIdentity]) -> Record | None:
    """Return what can be told of a device of this volume whose record is lost; None where there is no such device."""
    for transport in TRANSPORTS.values():
        # A name that all of the host share is ours only while our process holds the lock on it.
        found = transport.find_device(site, None) if servers or not transport.claims(site) else None
        # The socket of a dead process serves nobody.
        if found is None or not (found.device or (found.socket and servers)):
            continue
        server = servers[0] if servers else None
        return Record(
            spec=spec, transport=transport.name, transport_reason="found without a record", binary="",
            process=server, served_by=server, device=found.device, diskseq=found.diskseq, socket=found.socket,
            # An older daemon's QSD has it in the directory itself.
            sockets="" if os.path.lexists(os.path.join(site.directory, nbd.SOCKET)) else SOCKETS,
        )
    return None


def refusal(record: Record, damage: str) -> StoragedError:
    """The failure of an adoption without a record; ``damage`` is what is wrong with it."""
    return StoragedError(
        ErrorCode.ADOPTION_REFUSED, f"the record of {record.device or record.socket} is lost",
        volume=record.spec.name, step="adopt", cause=damage or "there is none",
        hint="the device goes on working; detach the volume and attach it again when it is free",
    )
