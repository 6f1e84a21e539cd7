"""What qemu-img is given for an image: secrets, TLS credentials, files, an ssh-agent, its environment, a program.

The same that QSD gets (``Requirements`` in backends/base.py), which takes secrets over QMP. qemu-img has no QMP: each
secret is in a file without a name (memfd_create(2)) that it inherits, and names as /dev/fd/N. So nothing is left of it
when the processes are gone, however they ended, and no other user of the host can open it.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host import secrets, sshagent
from storaged.host.identity import block_identity, file_identity
from storaged.images import arguments
from storaged.images.claims import refuse_attached
from storaged.images.operand import Operand, together
from storaged.images.workspace import Workspace
from storaged.model.config import Config
from storaged.model.formats import Format
from storaged.model.layout import LOCK_DIR, Layout
from storaged.qsd.version import parse_version
from storaged.supervisor import fetching, opening

#: Of its own environment, what is handed on.
_ENVIRONMENT = ("PATH", "LANG", "LC_ALL", "CREDENTIALS_DIRECTORY")
_DESCRIPTOR = re.compile(r"/dev/fd/([0-9]+)\b")
#: Seconds that the fetching of a source may take which has to be fetched whole. Its own time-out ends one that stands.
_LONGEST_FETCH = 7 * 86400.0


@dataclass
class Provided:
    """All that qemu-img needs beside its command."""

    program: str
    directory: str
    """Its working directory."""
    directory_fd: int
    """A descriptor of it, inherited: names in it can be said shortly, as /proc/self/fd/N/NAME."""
    objects: list[str] = field(default_factory=list)
    """Words of its command line."""
    environment: dict[str, str] = field(default_factory=dict)
    inherited: list[int] = field(default_factory=list)
    """Descriptors: locks, claims, secrets. The locks live as long as the process."""
    names: dict[str, str] = field(default_factory=dict)
    """What stands for each image on the command line, by the name of its wish."""
    nodes: dict[str, dict[str, Any]] = field(default_factory=dict)
    paths: dict[int, str] = field(default_factory=dict)
    """Of files of this host that are handed on open: descriptor → path."""

    def readable(self, text: str, *, as_json: bool = False) -> str:
        """Return what qemu-img says with the paths of files in place of their descriptors."""

        def path(found: re.Match[str]) -> str:
            known = self.paths.get(int(found[1]), found[0])
            return json.dumps(known)[1:-1] if as_json else known

        return _DESCRIPTOR.sub(path, text)


@contextlib.contextmanager
def provided(
    operands: list[Operand], place: Workspace, layout: Layout, config: Config, *, owner: str, shares: bool = False,
    commits: bool = False, pinned: bool = True, progress: Callable[[str], None] = lambda text: None,
) -> Iterator[Provided]:
    """Take the locks of all images, and yield what qemu-img is given for them. Blocks.

    ``shares``: take no lock, for who only looks at a header that somebody else may change meanwhile. ``pinned``: hand
    on the files themselves, so that none can take the place of what was looked at and locked.
    Raises SOURCE_IN_USE, OPEN_FAILED, UNSUPPORTED, QSD_MISSING.
    """
    found = Provided(find_program(operands, config), place.path, place.lock)
    found.environment = {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ}
    found.environment["TMPDIR"] = os.path.join(place.path, "tmp")
    with contextlib.ExitStack() as stack:
        if not shares:
            needed = together(operands)
            for fd in _taken(needed, owner):
                found.inherited.append(fd)
                stack.callback(os.close, fd)
            refuse_attached(layout, needed.sources)
        # Whose copy of a descriptor is closed last lets go of the workspace.
        found.inherited.append(place.lock)
        for operand in operands:
            _give(operand, found, place, stack, commits=commits, pinned=pinned, progress=progress)
        yield found


def _taken(needed: opening.Opening, owner: str) -> list[int]:
    try:
        return opening.take(needed, LOCK_DIR, owner)
    except StoragedError as error:
        if error.users:
            error.hint = "wait until it has ended; or, if that is a volume, detach it first" + (
                "" if any(needed.sources.values()) else ", or attach it with --read-only or --snapshot"
            )
        raise


def find_program(operands: list[Operand], config: Config) -> str:
    """Return the path of qemu-img. Where QSD is another program for a backend, it is the qemu-img beside that one.

    Raises QSD_MISSING.
    """
    binaries = [config.qsd.binary_for(find_backend(operand.spec.source).name) for operand in operands]
    chosen = next((binary for binary in binaries if binary != config.qsd.binary), config.qsd.binary)
    qsd = shutil.which(chosen)
    path = beside(qsd, "qemu-img") if qsd else None
    if path is None and chosen == config.qsd.binary:
        path = shutil.which("qemu-img")
    if path is None:
        raise StoragedError(
            ErrorCode.QSD_MISSING, "the program qemu-img is not there",
            cause=f"looked for it beside {chosen}" if chosen != "qemu-storage-daemon" else "",
            hint="apt install qemu-utils" if chosen == config.qsd.binary else
            f"put the qemu-img of that build beside {chosen}",
        )
    return path


def beside(program: str, name: str) -> str | None:
    """Return the program of that name in the directory of another, or in that of the file that it is a link to."""
    places = (os.path.dirname(program), os.path.dirname(os.path.realpath(program)))
    return next(filter(None, (shutil.which(os.path.join(place, name)) for place in places)), None)


def _give(
    operand: Operand, found: Provided, place: Workspace, stack: contextlib.ExitStack, *, commits: bool, pinned: bool,
    progress: Callable[[str], None],
) -> None:
    spec, wanted = operand.spec, operand.opened
    directory = place.layout.volume_dir(spec.name)
    os.makedirs(directory, mode=0o700, exist_ok=True)
    secrets.keep(directory, operand.given)
    if fetching.is_fetched(spec):
        wanted = fetching.fetch(
            spec, wanted, place.layout, deadline=time.monotonic() + _LONGEST_FETCH, stop=threading.Event(),
            progress=lambda done, total: progress(fetching.told(done, total)),
        )
    elif isinstance(find_backend(spec.source), NetworkBackend):
        _refuse_bad_program(operand, found.program)
    needed = wanted.requirements
    objects: list[dict[str, Any]] = []
    for secret in needed.secrets:
        data = opening.secret_object(secret, spec, directory)["data"].encode()
        fd = _nameless(data)
        stack.callback(os.close, fd)
        found.inherited.append(fd)
        objects.append({"qom-type": "secret", "id": secret.id, "format": "base64", "file": f"/dev/fd/{fd}"})
    opening.put_files(needed, spec, directory)
    environment = dict(needed.environment)
    if needed.agent_key:
        if "SSH_AUTH_SOCK" in found.environment:
            raise _one_of_two("ssh keys")
        key = secrets.read(needed.agent_key, spec.options[needed.agent_key], directory)
        environment["SSH_AUTH_SOCK"] = sshagent.ensure(place.path, key)
    for name, value in environment.items():
        if found.environment.setdefault(name, value) != value:
            raise _one_of_two(name)
    node, others = opening.outside(wanted, spec, directory)
    objects += others[len(needed.secrets):]
    found.objects += arguments.object_words([{**one, "id": operand.prefix + one["id"]} for one in objects])
    node = arguments.renamed(node, operand.prefix)
    if pinned:
        node = _pinned(node, wanted, found, stack)
    found.nodes[spec.name] = node
    found.names[spec.name] = arguments.filename(arguments.committable(node) if commits else node)


def _pinned(
    node: dict[str, Any], wanted: opening.Opening, found: Provided, stack: contextlib.ExitStack
) -> dict[str, Any]:
    """Return the tree with open descriptors for paths. Raises SOURCE_CHANGED where a path leads elsewhere by now.

    An attach looks afterwards what QSD has open (opening.opened_as_wanted); qemu-img would be at work by then. What is
    opened as /dev/fd/N is the very same file. Not so with vmdk, whose parts are found beside its path.
    """
    if node.get("driver") in ("file", "host_device"):
        path = node["filename"]
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        stack.callback(os.close, fd)
        seen = os.fstat(fd)
        identity = (
            block_identity(seen.st_rdev) if stat.S_ISBLK(seen.st_mode) else file_identity(seen.st_dev, seen.st_ino)
        )
        if identity not in wanted.files:
            raise StoragedError(
                ErrorCode.SOURCE_CHANGED, f"{path} was replaced while it was looked at",
                hint="try again when nobody moves files there",
            )
        found.inherited.append(fd)
        found.paths[fd] = path
        return {**node, "filename": f"/dev/fd/{fd}"}
    return {
        key: _pinned(value, wanted, found, stack)
        if isinstance(value, dict) and not (key == "file" and node.get("driver") == Format.VMDK) else value
        for key, value in node.items()
    }


def _nameless(data: bytes) -> int:
    """Return a descriptor of a file in memory that nobody can find by a name, nor change."""
    fd = os.memfd_create("storaged", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.write(fd, data)
    seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _refuse_bad_program(operand: Operand, program: str) -> None:
    """Of QSD and qemu-img of one release, the drivers are the same."""
    import subprocess

    try:
        said = subprocess.run(
            [program, "--version"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, timeout=30, check=False
        ).stdout.decode(errors="replace")
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoragedError(
            ErrorCode.QSD_MISSING, f"cannot execute {program}", cause=str(error), hint="install qemu-utils again"
        ) from error
    version = parse_version(said)
    if version is not None:
        fetching.check_program(operand.spec, version)


def _one_of_two(what: str) -> StoragedError:
    return StoragedError(
        ErrorCode.UNSUPPORTED, f"two images of one command cannot have different {what}",
        hint="go through a file of this host in between",
    )


