"""The program of host/worker.py: makes calls into the kernel that may never return. The only importer of pyroute2.

It runs by its path, apart from the package, and imports nothing of it: so it starts fast. Its descriptor 0 is a
SOCK_SEQPACKET socket, on which it says {"ready": true} once it has started. Each packet that comes is a question, in
JSON, perhaps with descriptors, and gets one packet as an answer:

    {"netlink": [FAMILY, COMMAND, ATTRIBUTES]}   {"result": [[COMMAND, ATTRIBUTES], ...]}
    {"family": FAMILY}                           {"result": whether the kernel has it}
    {"listen": [FAMILY, GROUP]}                  {"result": true}, and then {"event": [COMMAND, ATTRIBUTES]} for ever
    {"write": [PATH, TEXT]}                      {"result": null}
    {"fsync": 0}                                 {"result": null}, of the descriptor that came with it

or {"errno": NUMBER, "text": TEXT}, or {"missing": FAMILY}. ATTRIBUTES are pairs of name and value; a value is a number,
a text, {"attrs": ATTRIBUTES}, or {"descriptor": I} for the I-th descriptor of the packet.

One thread makes the calls. The other one waits for the end of the socket, which means that nobody wants an answer any
more: it takes the descriptors out of the hands of a call that still waits for its turn in the kernel, so that no
device is made of them, and ends the process as soon as the kernel lets it go.
"""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import queue
import socket
import sys
import threading
import types
from typing import Any

LARGEST = 1 << 16
_DESCRIPTORS = 64


class Calls:
    """The calls, made one after another."""

    def __init__(self, channel: socket.socket) -> None:
        self.questions: queue.SimpleQueue[tuple[dict[str, Any], list[int]]] = queue.SimpleQueue()
        self.held: list[int] = []
        self._channel = channel
        self._messages: dict[str, type] = {}

    def serve(self) -> None:
        """Answer questions for ever."""
        try:
            # It takes a while: done before the first question comes.
            self._messages = messages()
            problem = ""
        except ImportError as error:
            problem = str(error)
        self.say({"ready": True})
        while True:
            question, descriptors = self.questions.get()
            try:
                if problem and "write" not in question and "fsync" not in question:
                    raise OSError(errno.ENOSYS, problem)
                answer = self.answer(question, descriptors)
            except OSError as error:
                answer = {"errno": error.errno or errno.EIO, "text": error.strerror or str(error)}
            except Exception as error:  # whatever it is, somebody waits for an answer
                answer = {"errno": errno.EIO, "text": f"{type(error).__name__}: {error}"}
            self.held = []
            for descriptor in descriptors:
                os.close(descriptor)
            self.say(answer)

    def say(self, answer: dict[str, Any]) -> None:
        """Send a packet. Nobody may be there any more."""
        with contextlib.suppress(OSError):
            self._channel.send(json.dumps(answer).encode())

    def answer(self, question: dict[str, Any], descriptors: list[int]) -> dict[str, Any]:
        """Do what is asked. Raises OSError."""
        if "write" in question:
            path, text = question["write"]
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(fd, text.encode())
            finally:
                os.close(fd)
            return {"result": None}
        if "fsync" in question:
            os.fsync(descriptors[question["fsync"]])
            return {"result": None}
        if "family" in question:
            return self._speak(question["family"], lambda _: True)
        if "listen" in question:
            return self._speak(question["listen"][0], lambda sock: self._listen(sock, question["listen"][1]))
        family, command, attributes = question["netlink"]
        return self._speak(family, lambda sock: self._ask(sock, family, command, attributes, descriptors))

    def _speak(self, family: str, do: Any) -> dict[str, Any]:
        from pyroute2.netlink import genlmsg
        from pyroute2.netlink.exceptions import NetlinkError

        with netlink_socket() as sock:
            try:
                sock.bind(family, self._messages.get(family, genlmsg))
            except NetlinkError as error:
                if error.code == errno.ENOENT:
                    return {"missing": family}
                raise OSError(error.code, error.args[-1]) from error
            try:
                return {"result": do(sock)}
            except NetlinkError as error:
                raise OSError(error.code, error.args[-1]) from error

    def _ask(self, sock: Any, family: str, command: int, attributes: list[Any], descriptors: list[int]) -> list[Any]:
        from pyroute2.netlink import NLM_F_ACK, NLM_F_REQUEST

        message = self._messages[family]()
        message["cmd"] = command
        message["version"] = 1
        message["attrs"] = filled(attributes, descriptors)
        answers = sock.nlm_request(message, msg_type=sock.prid, msg_flags=NLM_F_REQUEST | NLM_F_ACK)
        # The last one is the kernel's agreement, and no message of the family.
        return [plain(answer) for answer in answers if "cmd" in answer]

    def _listen(self, sock: Any, group: str) -> None:
        sock.add_membership(group)
        self.say({"result": True})
        while True:
            for message in sock.get():
                self.say({"event": plain(message)})


def netlink_socket() -> Any:
    """A socket for one request."""
    from pyroute2.netlink.generic import GenericNetlinkSocket

    class NoComplaints(GenericNetlinkSocket.async_class):
        # A family that is missing is our caller's to tell; pyroute2 would log it as an error of its own.
        module_err_level = "debug"

    class Socket(GenericNetlinkSocket):
        async_class = NoComplaints

    return Socket()


def leave_out_the_rest() -> None:
    """Have ``import pyroute2.x`` load that module alone. Raises ImportError where there is no pyroute2.

    The package itself imports all that it has, 150 modules: 9 MiB, and a third of the time that this program takes to
    start. None of what is used here looks for names in it.
    """
    if "pyroute2" in sys.modules:
        return
    found = importlib.util.find_spec("pyroute2")
    if found is None or found.submodule_search_locations is None:
        raise ImportError("there is no pyroute2")
    package = types.ModuleType("pyroute2")
    package.__path__ = list(found.submodule_search_locations)
    sys.modules["pyroute2"] = package


def messages() -> dict[str, type]:
    """The families and their attributes (include/uapi/linux/vdpa.h and nbd-netlink.h)."""
    leave_out_the_rest()
    from pyroute2.netlink import genlmsg, nla
    from pyroute2.netlink.generic import GenericNetlinkSocket  # noqa: F401 for those who ask later

    class Vdpa(genlmsg):
        # Nothing above 20 is stable: numbers were moved in 2024.
        nla_map = (
            ("VDPA_ATTR_UNSPEC", "none"),
            ("VDPA_ATTR_MGMTDEV_BUS_NAME", "asciiz"),
            ("VDPA_ATTR_MGMTDEV_DEV_NAME", "asciiz"),
            ("VDPA_ATTR_MGMTDEV_SUPPORTED_CLASSES", "uint64"),
            ("VDPA_ATTR_DEV_NAME", "asciiz"),
        )

    class Nbd(genlmsg):
        nla_map = (
            ("NBD_ATTR_UNSPEC", "none"),
            ("NBD_ATTR_INDEX", "uint32"),
            ("NBD_ATTR_SIZE_BYTES", "uint64"),
            ("NBD_ATTR_BLOCK_SIZE_BYTES", "uint64"),
            ("NBD_ATTR_TIMEOUT", "uint64"),
            ("NBD_ATTR_SERVER_FLAGS", "uint64"),
            ("NBD_ATTR_CLIENT_FLAGS", "uint64"),
            ("NBD_ATTR_SOCKETS", "sockets"),
            ("NBD_ATTR_DEAD_CONN_TIMEOUT", "uint64"),
            ("NBD_ATTR_DEVICE_LIST", "devices"),
            ("NBD_ATTR_BACKEND_IDENTIFIER", "asciiz"),
        )

        class sockets(nla):
            nla_map = (("NBD_SOCK_ITEM_UNSPEC", "none"), ("NBD_SOCK_ITEM", "item"))

            class item(nla):
                nla_map = (("NBD_SOCK_UNSPEC", "none"), ("NBD_SOCK_FD", "uint32"))

        class devices(nla):
            nla_map = (("NBD_DEVICE_ITEM_UNSPEC", "none"), ("NBD_DEVICE_ITEM", "item"))

            class item(nla):
                nla_map = (
                    ("NBD_DEVICE_UNSPEC", "none"), ("NBD_DEVICE_INDEX", "uint32"),
                    ("NBD_DEVICE_CONNECTED", "uint8"),
                )

    return {"vdpa": Vdpa, "nbd": Nbd}


def filled(attributes: list[Any], descriptors: list[int]) -> list[Any]:
    """Put the numbers that descriptors have in this process into the attributes."""
    done: list[Any] = []
    for name, value in attributes:
        if isinstance(value, dict) and "descriptor" in value:
            value = descriptors[value["descriptor"]]
        elif isinstance(value, dict):
            value = {"attrs": filled(value["attrs"], descriptors)}
        done.append([name, value])
    return done


def plain(message: Any) -> list[Any]:
    """Command and attributes of a message, for JSON."""
    return [message["cmd"], _plain_attributes(message["attrs"])]


def _plain_attributes(attributes: Any) -> list[Any]:
    return [
        [name, {"attrs": _plain_attributes(value["attrs"])} if isinstance(value, dict) and "attrs" in value
         else value if isinstance(value, int | str | None) else str(value)]
        for name, value in attributes
    ]


def main() -> None:
    """Live until nobody wants an answer any more."""
    channel = socket.socket(fileno=0)
    nothing = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    calls = Calls(channel)
    threading.Thread(target=calls.serve, daemon=True).start()
    while True:
        try:
            packet, descriptors, _, _ = socket.recv_fds(channel, LARGEST, _DESCRIPTORS)
        except OSError:
            break
        if not packet:
            break
        calls.held = descriptors
        calls.questions.put((json.loads(packet), descriptors))
    for descriptor in calls.held:
        os.dup2(nothing, descriptor)
    os._exit(0)


if __name__ == "__main__":
    main()
