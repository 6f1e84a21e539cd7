"""Who may call what over the socket, by who is at its other end when a connection is accepted (unix(7))."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections import Counter
from dataclasses import dataclass
from enum import IntEnum

from asyncvarlink import VarlinkMethodCall

from storaged.api.interface import INTERFACE, READING

#: include/uapi/asm-generic/socket.h; Python does not know them.
_SO_PEERGROUPS = 59
_SO_PASSRIGHTS = 83
#: Bytes: what Python can ask for at most, 256 groups. A peer with more of them is turned away.
_GROUPS_SIZE = 1024
#: Connections of those who may not do everything: of one user, and of all of them together. Each costs a descriptor,
#: and whoever may do everything must always get one.
MOST_OF_ONE_USER = 32
MOST_OF_ALL = 256
#: What a connection is asked about itself; it tells nothing of volumes.
_SERVICE = "org.varlink.service"


class Access(IntEnum):
    """What a client may do."""

    NOTHING = 0
    LOOK = 1
    """Call the methods that change nothing (READING in api/interface.py)."""
    ALL = 2


@dataclass(frozen=True)
class Readers:
    """Who may look, beside those who may do everything."""

    everybody: bool = False
    groups: frozenset[int] = frozenset()

    @property
    def socket_mode(self) -> int:
        """The mode of the socket that lets them in: a file has one group, and that is the one of who may do all."""
        return 0o666 if self.everybody or self.groups else 0o660


NOBODY = Readers()


@dataclass(frozen=True)
class Peer:
    """Who has connected: as it was when it did, and by the numbers of this user namespace."""

    uid: int
    groups: frozenset[int]

    @classmethod
    def of(cls, connection: socket.socket) -> Peer:
        """Ask the kernel. Raises OSError; a peer in more than 256 groups is such an error."""
        credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        _pid, uid, gid = struct.unpack("3i", credentials)
        groups = connection.getsockopt(socket.SOL_SOCKET, _SO_PEERGROUPS, _GROUPS_SIZE)
        return cls(uid, frozenset({gid, *struct.unpack(f"{len(groups) // 4}I", groups)}))


class Gate:
    """Decides who gets in, and remembers how many guests (all who may not do everything) there are."""

    def __init__(self, group: int | None, readers: Readers) -> None:
        self._group = group
        self._readers = readers
        self._guests: Counter[int] = Counter()

    def access_of(self, peer: Peer) -> Access:
        """What a peer may do: all for root, the daemon's user and the socket's group; to look for readers."""
        if peer.uid in (0, os.geteuid()) or self._group in peer.groups:
            return Access.ALL
        if self._readers.everybody or self._readers.groups & peer.groups:
            return Access.LOOK
        return Access.NOTHING

    def enter(self, uid: int) -> bool:
        """Count one more connection of a guest; False, and nothing counted, where there are too many already."""
        if self._guests[uid] >= MOST_OF_ONE_USER or self._guests.total() >= MOST_OF_ALL:
            return False
        self._guests[uid] += 1
        return True

    def leave(self, uid: int) -> None:
        """A connection that has entered is closed."""
        self._guests[uid] -= 1
        if not self._guests[uid]:
            del self._guests[uid]


def permits(access: Access, call: VarlinkMethodCall) -> bool:
    """Whether a method may be called; one that is not known to change nothing needs all."""
    if access is Access.LOOK:
        return call.method_interface == _SERVICE or (
            call.method_interface == INTERFACE and call.method_name in READING
        )
    return access is Access.ALL


def refuse_descriptors(listener: socket.socket) -> None:
    """Nobody can send descriptors to who is accepted from ``listener``; before Linux 6.16 there is no such switch.

    To close one that was sent may take as long as its sender likes (a socket that lingers, a file of a FUSE server).
    """
    with contextlib.suppress(OSError):
        listener.setsockopt(socket.SOL_SOCKET, _SO_PASSRIGHTS, 0)
