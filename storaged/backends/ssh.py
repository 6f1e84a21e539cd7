"""QEMU's ``ssh`` driver: a file behind an SSH server, by SFTP. block/ssh.c in QEMU, which uses libssh.

The URI is QEMU's own: ``ssh://[USER@]HOST[:PORT]/PATH``. Keys come from an agent only, passwords are not known to it.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from storaged.backends.base import NO_REQUIREMENTS, NetworkDefaults, Node, Requirements
from storaged.backends.cache import cache_flags
from storaged.backends.uri import authority_of, bare_host, escaped, refuse, same_host, unescaped
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers

DEFAULT_PORT = 22
#: QSD is root, and QEMU takes the user that it runs as where none is said.
DEFAULT_USER = "root"
_USER, _HOST_KEY, _KEY, _AGENT = "user", "host-key", "ssh-key", "agent"
KNOWN_HOSTS, UNCHECKED = "known-hosts", "none"
#: sun_path, less the byte that ends it.
_LONGEST_SOCKET = 107
_SHA256 = 32
_FORMS = "write ssh://[USER@]HOST[:PORT]/PATH, with the whole path of the file"


@dataclass(frozen=True)
class _File:
    user: str
    host: str
    port: int
    path: str

    def __str__(self) -> str:
        user = f"{escaped(self.user, safe='')}@" if self.user else ""
        return f"ssh://{user}{self.host}:{self.port}{escaped(self.path)}"


class SshBackend(NetworkDefaults):
    """A file behind an SSH server."""

    name = "ssh"
    schemes = ("ssh",)
    example = "ssh://[USER@]HOST[:PORT]/PATH"
    options: Mapping[str, str] = {
        _USER: f"the user at the server, if the source names none; default {DEFAULT_USER}",
        _HOST_KEY: f"the server's host key: SHA256:FINGERPRINT as ssh-keygen -l prints it, or {KNOWN_HOSTS}: it is in "
        f"/etc/ssh/ssh_known_hosts; {UNCHECKED} checks nothing, and whoever answers has the data; "
        f"default {KNOWN_HOSTS}",
        _KEY: "where the private key comes from: a file, credential:NAME, or - (standard input); it has no passphrase",
        _AGENT: "the socket (SSH_AUTH_SOCK) of an ssh-agent that holds the key, in place of ssh-key",
    }
    defaults: Mapping[str, str] = {_HOST_KEY: KNOWN_HOSTS}
    secret_options = (_KEY,)
    recovers = False

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the URI with user, host, port and the plain path. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
        file = _read(source)
        user = options.get(_USER, "")
        if user and file.user and user != file.user:
            refuse(source, f"the source says {file.user!r}, and option user={user!r}", "say one of them")
        return str(replace(file, user=file.user or user or DEFAULT_USER))

    def check_options(self, options: Mapping[str, str]) -> None:
        """Raise INVALID_ARGUMENT for a host key that is none, an agent that is no socket, or two sources of the key."""
        if _USER in options:
            _check_user(options[_USER])
        _host_key_check(options.get(_HOST_KEY, KNOWN_HOSTS))
        agent = options.get(_AGENT)
        if agent is None:
            return
        if _KEY in options:
            _refuse_option("the options ssh-key and agent exclude each other", "leave one of them out")
        if not agent.startswith("/") or len(agent.encode(errors="surrogateescape")) > _LONGEST_SOCKET:
            _refuse_option(
                f"option agent={agent!r} is no path of a socket",
                f"write its whole path, at most {_LONGEST_SOCKET} bytes; a symbolic link to its directory is shorter",
            )

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsSsh."""
        file = _read(location)
        return {
            "driver": "ssh",
            # keep-alive: a server that was restarted while nothing was asked of it is noticed before the next request.
            "server": {"host": bare_host(file.host), "port": str(file.port), "keep-alive": True},
            "user": file.user or DEFAULT_USER,
            "path": file.path,
            "host-key-check": _host_key_check(options.get(_HOST_KEY, KNOWN_HOSTS)),
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """An agent of the volume's own, or the one that is there."""
        if _AGENT in options:
            return Requirements(environment={"SSH_AUTH_SOCK": options[_AGENT]})
        return Requirements(agent_key=_KEY) if _KEY in options else NO_REQUIREMENTS

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """libssh has to find its user among those of the host, and an agent answers its own user and root alone.

        Without a key and an agent it tries root's own keys.
        """
        own_keys = _KEY not in options and _AGENT not in options
        return Powers(
            root="ssh wants a user of the host",
            reads=("/root/.ssh",) if own_keys else ("/root/.ssh/known_hosts", "/root/.ssh/config"),
            connects_unix=True, files=((options[_AGENT], True),) if _AGENT in options else (),
        )

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """The file without its user: two users of one server mean the same file by the same path."""
        file = _read(location)
        return str(replace(file, user="", host=same_host(file.host)))


def _read(source: str) -> _File:
    _, _, rest = source.partition(":")
    authority, slash, path = rest.removeprefix("//").partition("/")
    before, at, server = authority.rpartition("@")
    port = re.sub(r"\[[^][]*\]", "", server).partition(":")[2]
    if ":" in before or ("@" in path and not port.isdigit() and port):
        # The source is not said again: there may be a password in it, with a slash perhaps.
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, "an ssh source holds no password", cause="QEMU authenticates by keys only",
            hint="write ssh://USER@HOST/PATH, and say where the private key is: -o ssh-key=PATH",
        )
    if not rest.startswith("//"):
        refuse(source, "there is no // after the scheme", _FORMS)
    if "#" in rest:
        refuse(source, "there is a # in it", "a plain # is written %23")
    if "?" in rest:
        refuse(
            source, "there is a ? in it",
            "how the host key is checked is said by -o host-key=…; a plain ? is written %3F",
        )
    user = unescaped(before, source)
    if at:
        try:
            _check_user(user)
        except StoragedError as error:
            refuse(source, str(error), _FORMS)
    host, number = authority_of(server, source, DEFAULT_PORT)
    if not slash:
        refuse(source, "it does not say which file", _FORMS)
    return _File(user, host, number, _plain(unescaped(path, source), source))


def _plain(path: str, source: str) -> str:
    """Return a path behind the slash as all its spellings are compared."""
    parts = [part for part in path.split("/") if part not in ("", ".")]
    if not parts or path.endswith(("/", "/.")) or path == ".":
        refuse(source, "it names a directory", _FORMS)
    if ".." in parts:
        refuse(source, "there is a .. in the path", "write the path without it: which file that is the server decides")
    if parts[0].startswith("~"):
        refuse(source, "~ means nothing to QEMU", "write the whole path of the file")
    return "/" + "/".join(parts)


def _check_user(user: str) -> None:
    if not user or not user.isprintable():
        _refuse_option(f"{user!r} is no user", "leave it out, or write the name of a user at the server")


def _host_key_check(value: str) -> Node:
    """SshHostKeyCheck. Raises INVALID_ARGUMENT."""
    if value == KNOWN_HOSTS:
        return {"mode": "known_hosts"}
    if value == UNCHECKED:
        return {"mode": "none"}
    kind, _, text = value.partition(":")
    if kind.lower() == "sha256":
        digest = _fingerprint(text)
        if digest is not None:
            return {"mode": "hash", "type": "sha256", "hash": digest.hex()}
    _refuse_option(
        f"option host-key={value!r} is no fingerprint",
        f"write host-key=SHA256:… as ssh-keygen -l prints it, or host-key={KNOWN_HOSTS}; "
        "MD5 and SHA1 are not safe any more",
    )


def _fingerprint(text: str) -> bytes | None:
    """Read 64 hexadecimal digits, or OpenSSH's base64 without padding; None for anything else."""
    if re.fullmatch(r"[0-9A-Fa-f]{2}(:?[0-9A-Fa-f]{2}){31}", text):
        return bytes.fromhex(text.replace(":", ""))
    if not re.fullmatch(r"[A-Za-z0-9+/]{43}=?", text):
        return None
    try:
        digest = base64.b64decode(text.rstrip("=") + "=", validate=True)
    except binascii.Error:
        return None
    return digest if len(digest) == _SHA256 else None


def _refuse_option(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)


BACKEND = SshBackend()
