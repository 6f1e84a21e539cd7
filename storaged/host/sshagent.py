"""An ssh-agent of a volume's own: it holds the private key for QSD's ssh driver, and outlives the daemon.

QEMU takes a key from an agent only (``authenticate`` in block/ssh.c), and a successor of QSD needs it again. The agent
listens on ``agent.sock`` in the volume's directory, which is for root alone. That directory is QSD's working directory,
and so the socket is named without it: the whole path may be too long for a socket. ssh-agent forbids that its memory
is traced or dumped; the key reaches it through a pipe, and never stands in a file, an environment or on a command line.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import select
import shutil
import socket
import struct
import subprocess
import time

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host import process
from storaged.host.atomic import write_atomic
from storaged.host.unixsock import connect_unix
from storaged.model.record import ProcessIdentity

#: SSH_AUTH_SOCK for a process whose working directory is the volume's.
SOCKET = "agent.sock"
_RECORD = "agent.json"
#: Seconds for the start of the agent, and for adding a key.
_PATIENCE = 10.0
_MAGIC = b"openssh-key-v1\0"
_UCRED = struct.Struct("3i")


def ensure(directory: str, key: bytes) -> str:
    """Have an agent that holds exactly this private key, and return SSH_AUTH_SOCK for QSD. Blocks.

    An agent that is there already is used again: what it held before is dropped. Raises OPEN_FAILED, and then there is
    no agent that was not there before.
    """
    _refuse_unusable(key)
    agent, add = _program("ssh-agent"), _program("ssh-add")
    fresh = not answers(directory)
    if fresh:
        end(directory)
        _start(agent, directory)
    try:
        _ask(add, directory, "-D")
        # ssh-add takes neither a missing last newline nor CRs (sshkey_parse_private_fileblob in OpenSSH).
        _ask(add, directory, "-", key.replace(b"\r\n", b"\n").rstrip(b"\n") + b"\n")
    except BaseException:
        if fresh:
            end(directory)
        raise
    return SOCKET


def answers(directory: str) -> bool:
    """Whether the agent of a volume is there and holds a key; one that does not answer is not."""
    try:
        with connect_unix(os.path.join(directory, SOCKET)) as agent:
            agent.settimeout(_PATIENCE)
            agent.sendall(struct.pack(">IB", 1, 11))  # SSH_AGENTC_REQUEST_IDENTITIES
            return bool(agent.recv(4))
    except OSError:
        return False


def end(directory: str) -> None:
    """End the agent of a volume, exactly the process that was started for it, and take its socket away. Blocks."""
    for found in (_recorded(directory), _listener(directory)):
        pidfd = process.open_pidfd(found) if found is not None else None
        if pidfd is not None:
            try:
                process.kill(pidfd)
                _wait(pidfd)
            finally:
                os.close(pidfd)
    for name in (SOCKET, _RECORD):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(directory, name))


def _start(program: str, directory: str) -> None:
    # TMPDIR tells whose it is, as with QSD.
    environment = {"PATH": os.environ.get("PATH", os.defpath), "TMPDIR": os.path.join(directory, "tmp")}
    try:
        child = subprocess.Popen(
            # -D: it stays the process that was started, so that its pid is known.
            [program, "-D", "-a", SOCKET], cwd=directory, env=environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )
    except OSError as error:
        raise _failed("ssh-agent cannot be started", error.strerror or str(error)) from error
    # It is collected by `end`, or by a later daemon's init; Popen must neither wait for it nor warn about it.
    child.returncode = 0
    pidfd = os.pidfd_open(child.pid)
    try:
        deadline = time.monotonic() + _PATIENCE
        while _listener(directory) is None:
            if _ended(pidfd):
                raise _failed("ssh-agent ended at once", process.reap(pidfd))
            if time.monotonic() > deadline:
                process.kill(pidfd)
                raise _failed("ssh-agent does not come up", f"no socket after {_PATIENCE:.0f} s")
            time.sleep(0.005)  # nothing else tells that its socket is there
        # Only now it is ssh-agent for sure, and not yet this program before its exec.
        identity = process.identify(child.pid)
        if identity is None:
            raise _failed("ssh-agent ended at once", process.reap(pidfd))
        write_atomic(os.path.join(directory, _RECORD), msgspec.json.encode(identity))
    finally:
        os.close(pidfd)


def _ask(program: str, directory: str, argument: str, stdin: bytes = b"") -> None:
    environment = {
        "PATH": os.environ.get("PATH", os.defpath), "SSH_AUTH_SOCK": SOCKET, "SSH_ASKPASS_REQUIRE": "never",
    }
    try:
        done = subprocess.run(
            # A session of its own: it has no terminal to ask for a passphrase on.
            [program, "-q", argument], input=stdin, cwd=directory, env=environment, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, timeout=_PATIENCE, start_new_session=True, check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise _failed("ssh-add does not work", type(error).__name__) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise StoragedError(
            ErrorCode.OPEN_FAILED, "the private key cannot be used", cause="; ".join(said[-2:]) or "ssh-add failed",
            hint="check what -o ssh-key says: a private key as ssh-keygen writes it, without a passphrase",
        )


def _refuse_unusable(key: bytes) -> None:
    """What ssh-add would say less well. Raises OPEN_FAILED."""
    if b"PRIVATE KEY-----" not in key:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, "this is no private key", cause="it has no line BEGIN … PRIVATE KEY",
            hint="check what -o ssh-key says: it is the file without .pub",
        )
    if is_protected(key):
        raise StoragedError(
            ErrorCode.OPEN_FAILED, "the private key has a passphrase", cause="nobody is there to type it in",
            hint="give a copy without one (ssh-keygen -p), or run an ssh-agent and say -o agent=/SOCKET",
        )


def is_protected(key: bytes) -> bool:
    """Whether a private key needs a passphrase (PROTOCOL.key in OpenSSH, RFC 1421, RFC 5958)."""
    if b"BEGIN ENCRYPTED PRIVATE KEY" in key or b"Proc-Type: 4,ENCRYPTED" in key:
        return True
    body = b"".join(line for line in key.splitlines() if line and b"-----" not in line and b":" not in line)
    try:
        data = base64.b64decode(body)
    except binascii.Error:
        return False
    if not data.startswith(_MAGIC):
        return False
    length = int.from_bytes(data[len(_MAGIC):len(_MAGIC) + 4])
    return data[len(_MAGIC) + 4:len(_MAGIC) + 4 + length] != b"none"


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise _failed(f"the program {name} is not there", "")
    return path


def _failed(message: str, cause: str) -> StoragedError:
    return StoragedError(
        ErrorCode.OPEN_FAILED, message, cause=cause,
        hint="apt install openssh-client; or run an ssh-agent and say -o agent=/SOCKET",
    )


def _recorded(directory: str) -> ProcessIdentity | None:
    try:
        with open(os.path.join(directory, _RECORD), "rb") as file:
            return msgspec.json.decode(file.read(), type=ProcessIdentity)
    except (OSError, msgspec.MsgspecError):
        return None


def _listener(directory: str) -> ProcessIdentity | None:
    """Who listens on the socket: nobody but root can, and so it is ours, though its daemon died before it wrote it."""
    try:
        with connect_unix(os.path.join(directory, SOCKET)) as agent:
            pid, _, _ = _UCRED.unpack(agent.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    except OSError:
        return None
    found = process.identify(pid)
    # Its working directory tells that the number has not become another's.
    with contextlib.suppress(OSError):
        if found is not None and os.path.samefile(f"/proc/{pid}/cwd", directory):
            return found
    return None


def _ended(pidfd: int) -> bool:
    with contextlib.suppress(ChildProcessError):
        return os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    return False


def _wait(pidfd: int) -> None:
    """Wait until a killed process is gone, and collect it if it is a child."""
    poller = select.poll()
    poller.register(pidfd, select.POLLIN)
    poller.poll(int(_PATIENCE * 1000))
    process.reap(pidfd)
