"""What a backend is: one file per QEMU block driver that reaches data. Pure: nothing is opened here.

A backend has a *location* for each source: a text that says where the data is, the same for all spellings of it. For
a thing of this host it is the path; for one on the network it is a source itself, in its plainest spelling.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from storaged.model.powers import NO_POWERS, Powers

Node = dict[str, Any]
"""A member of QEMU's BlockdevOptions union (qapi/block-core.json in the QEMU tree)."""


class Backend(Protocol):
    """Turns a source as the user writes it into QEMU's options for the node that reaches it."""

    @property
    def name(self) -> str:
        """The QEMU driver; of one that QEMU has no more, the name that it had."""

    @property
    def schemes(self) -> tuple[str, ...]:
        """What stands before the first colon of its sources. Those of two backends are disjoint."""

    @property
    def options(self) -> Mapping[str, str]:
        """The options (-o) that this backend knows, with a line of help each."""

    @property
    def defaults(self) -> Mapping[str, str]:
        """What those of its options mean that are not said, where a value says the same."""

    @property
    def example(self) -> str:
        """How a source is written, for hints."""

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the location. What the source leaves out, options may say; what both say must be the same.

        Raises INVALID_SOURCE, INVALID_ARGUMENT, UNSUPPORTED.
        """

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT where an option of this backend has a value that it cannot have."""

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """Return the blockdev options of the protocol node, without node-name."""


@dataclass(frozen=True)
class Secret:
    """A secret that QSD gets as an object (object-add, qom-type secret) before it opens the node."""

    id: str
    """Of the object; the node names it."""
    option: str
    """The option (-o) that says where it comes from, or a secret that the source itself held."""
    encoded: bool = False
    """It is base64 already, and QEMU shall have what that stands for."""
    exact: bool = False
    """Every byte of it counts. Else a newline at its end does not: it is a password in a file."""


@dataclass(frozen=True)
class Requirements:
    """What QSD must be given before it opens the node."""

    secrets: tuple[Secret, ...] = ()
    objects: tuple[Node, ...] = ()
    """Arguments of object-add, in this order, after the secrets."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Name and text of files in QSD's working directory, readable by root alone. The node names them without a path."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of QSD, added to what it has anyway. Everybody who is root can read it: it holds no secret."""
    agent_key: str = ""
    """The option that says where the private key is that QSD's ssh-agent shall hold; empty for no agent."""
    secret_files: Mapping[str, str] = field(default_factory=dict)
    """Name of a file in QSD's working directory, mode 0600, and the option whose secret is in it, every byte of it.
    Written before the objects are made, which read it; nobody needs it after that."""


NO_REQUIREMENTS = Requirements()


@dataclass(frozen=True)
class Inquiry:
    """A program that tells a disk behind a server from another one that gets its name."""

    program: str
    package: str
    """The Debian package that has it."""
    arguments: tuple[str, ...]
    """None of them is a secret."""
    understand: Callable[[bytes], str]
    """Makes the answer of what it prints; raises ValueError, LookupError or TypeError where that is something else."""
    secret_files: Mapping[str, str] = field(default_factory=dict)
    """Option of a secret, and the argument before the path of its file."""
    environment: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class NetworkBackend(Backend, Protocol):
    """A backend whose data is behind a server: there is no file to look at, and the server may be away for a while.

    ``parse`` of a location, with the same options, returns the same location.
    """

    @property
    def secret_options(self) -> tuple[str, ...]:
        """Those of its options whose value says where a secret comes from: a path, ``credential:NAME`` or ``-``."""

    @property
    def read_only(self) -> bool:
        """Whether QEMU's driver cannot write."""

    @property
    def caches_writes(self) -> bool:
        """Whether QEMU's driver acknowledges writes that are in its own memory only, in the cache modes with a cache.

        Then the default cache mode is none: they are gone when QSD dies.
        """

    @property
    def caches_direct(self) -> bool:
        """Whether it does so with cache=none, too, so that only writethrough and directsync keep nothing there."""

    @property
    def recovers(self) -> bool:
        """Whether QEMU's driver makes a new connection when it has lost its own. Else it needs another QSD."""

    @property
    def safe_when_acknowledged(self) -> bool:
        """Whether what the server has acknowledged needs no flush, as long as QEMU's driver does not cache it."""

    @property
    def identity_is_whole(self) -> bool:
        """Whether sources of one scheme and one identity are one disk, reached in one way: only their spelling differs.

        Else the identity leaves out the server or the cluster, so that it is locked however it is reached.
        """

    def without_secrets(self, source: str) -> tuple[str, dict[str, str]]:
        """Take the secrets out of a source whose spelling can hold one: the source without, and option → secret.

        Must not raise for what ``parse`` refuses, and ``parse`` refuses a source that still holds one.
        """

    def image_node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """Return the node as qemu-img takes it, which knows more of some sources than blockdev-add."""

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """Return what QSD must be given before the node."""

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """Return what QSD needs of the host to reach this source."""

    def inquiries(self, location: str, options: Mapping[str, str]) -> tuple[Inquiry, ...]:
        """Return the programs that tell which disk has this name, better than its name and size do."""

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Return what the source is locked by: the same text for every spelling that can be told to be one disk.

        It must not change when the server is restarted. ``real_path`` resolves the symbolic links of a path of this
        host (a unix socket's); it may block.
        """


class NetworkDefaults(ABC):
    """What most backends of the network have in common."""

    defaults: Mapping[str, str] = {}
    secret_options: tuple[str, ...] = ()
    read_only = False
    safe_when_acknowledged = False
    identity_is_whole = False
    caches_writes = False
    caches_direct = False
    recovers = True

    def without_secrets(self, source: str) -> tuple[str, dict[str, str]]:
        """No spelling of this one holds a secret."""
        return source, {}

    @abstractmethod
    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """Return the blockdev options of the protocol node (see :class:`Backend`)."""

    def image_node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """The same as for QSD."""
        return self.node(location, read_only=read_only, options=options)

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """Nothing."""
        return NO_REQUIREMENTS

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """Nothing: any user will do."""
        return NO_POWERS

    def inquiries(self, location: str, options: Mapping[str, str]) -> tuple[Inquiry, ...]:
        """None is known."""
        return ()
