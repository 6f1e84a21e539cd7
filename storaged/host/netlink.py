"""Generic netlink requests (Documentation/userspace-api/netlink in the kernel). The only importer of pyroute2.

All of it blocks: sendmsg(2) runs the kernel's handler, which holds the lock of its family, and returns when it is
done. So: in a thread with a deadline, never on the event loop, which under uvloop could not have such a socket anyway.
"""

from __future__ import annotations

import errno
from collections.abc import Sequence
from typing import Any

from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST, genlmsg, nla
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from storaged.errors import ErrorCode, StoragedError

Attributes = Sequence[tuple[str, Any]]
#: Families that this process can speak to. When one goes with its module, :func:`request` says so.
_seen: set[str] = set()


class Message(genlmsg):
    """A message of some family: a subclass names its attributes."""


class Attribute(nla):
    """An attribute with attributes in it."""


class _Socket(GenericNetlinkSocket):
    """A socket for one request."""


class _NoComplaints(GenericNetlinkSocket.async_class):
    # A family that is missing is our caller's to tell; pyroute2 would log it as an error of its own.
    module_err_level = "debug"


_Socket.async_class = _NoComplaints


def has_family(family: str) -> bool:
    """Whether the kernel has a generic netlink family of that name. One that was seen is not looked for again."""
    if family in _seen:
        return True
    with _Socket() as socket:
        try:
            socket.bind(family, Message)
        except NetlinkError as error:
            if error.code == errno.ENOENT:
                return False
            raise OSError(error.code, error.args[-1]) from error
    _seen.add(family)
    return True


def request(family: str, message: type[Message], command: int, attributes: Attributes) -> list[Any]:
    """Send one command and return the answers. Blocks for as long as the kernel takes.

    Raises OSError with the kernel's errno, TRANSPORT_UNAVAILABLE where the kernel has no such family.
    """
    with _Socket() as socket:
        try:
            socket.bind(family, message)
        except NetlinkError as error:
            if error.code != errno.ENOENT:
                raise OSError(error.code, error.args[-1]) from error
            raise StoragedError(
                ErrorCode.TRANSPORT_UNAVAILABLE, f"this kernel has no netlink family {family!r}",
                cause="its module is not loaded, or this is a network namespace or container without it",
                hint="storaged doctor says what is missing",
            ) from error
        question = message()
        question["cmd"] = command
        question["version"] = 1
        question["attrs"] = [list(attribute) for attribute in attributes]
        try:
            return list(socket.nlm_request(question, msg_type=socket.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK))
        except NetlinkError as error:
            raise OSError(error.code, error.args[-1]) from error


def listen(family: str, message: type[Message], group: str) -> Any:
    """Return a socket that is a member of a family's multicast group; its ``get()`` blocks for messages.

    Raises TRANSPORT_UNAVAILABLE where the kernel has no such family.
    """
    socket = _Socket()
    try:
        socket.bind(family, message)
        socket.add_membership(group)
    except BaseException as error:
        socket.close()
        if isinstance(error, NetlinkError):
            raise StoragedError(
                ErrorCode.TRANSPORT_UNAVAILABLE, f"this kernel has no netlink family {family!r}"
            ) from error
        raise
    return socket
