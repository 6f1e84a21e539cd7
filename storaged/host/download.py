"""Fetches a whole file from a server by curl(1), and says whether what is there is all of it. Blocks, use a thread.

A copy at PATH is complete: it is PATH.part until then. PATH.json, which is there before PATH is, says what it is a
copy of, so that a file that merely has that name is never taken for one.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Self

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import remove_file, state_error, sync_directory, write_atomic

_PART = ".part"
_MARK = ".json"
#: Seconds between two looks at how far it is.
_LOOK = 0.1
#: Bytes in a packet of TFTP (RFC 2348), such that it fits into one frame of Ethernet. A server that does not know
#: the option sends 512.
_BLOCK = 1428
#: What curl -v says of the size: of TFTP (the option tsize, RFC 2349), FTP (SIZE), and HTTP, of whose answers the
#: last counts. lib/tftp.c and lib/ftp.c in curl.
_SIZE = re.compile(
    rb"^(?:\* tsize parsed from OACK \(([0-9]+)\)|\* Getting file with size: ([0-9]+)"
    rb"|< content-length: ([0-9]+)|(< HTTP/))",
    re.MULTILINE | re.IGNORECASE,
)
#: Of curl's words, of which the last tell what went wrong (bytes).
_LONGEST_TALK = 64 * 1024
#: To where a server may send us on, and where it may not: to files of this host.
_PROTOCOLS = "=http,https,ftp,ftps,tftp"

_REFUSED = (
    ErrorCode.OPEN_FAILED, "the server refuses us",
    "check -o user and -o password-file, with HTTP -o cookie-file, with a proxy -o proxy-password-file",
)
_MISSING = (ErrorCode.SOURCE_MISSING, "the server has no such file", "check the path, and the server's directory")
_NO_TLS = (
    ErrorCode.OPEN_FAILED, "the server speaks no TLS on that port, or another one than we",
    "check the port; ftps:// is TLS from the first byte on, usually on port 990",
)
_CUT = (ErrorCode.OPEN_FAILED, "the source was not fetched whole", "try again; the server's log may tell more")
#: curl's exit status (curl(1)) -> code, message, hint.
_FAILURES = {
    6: (ErrorCode.OPEN_FAILED, "the host's name is not known", "check the name, and this host's DNS and /etc/hosts"),
    7: (ErrorCode.OPEN_FAILED, "nobody listens there", "start the server; check host, port and routes"),
    9: _REFUSED, 18: _CUT, 19: _MISSING,
    22: (ErrorCode.OPEN_FAILED, "the server answers with an error", "look at its log"),
    23: (ErrorCode.NO_SPACE, "there is no room for the copy", "make room on that filesystem"),
    47: (
        ErrorCode.OPEN_FAILED, "the server sends us on to another place",
        "name that place; a redirection is not followed with a cookie, which the other server would get",
    ),
    28: (ErrorCode.OPEN_FAILED, "the server does not answer", "start the server; check host, port and firewalls"),
    35: _NO_TLS, 52: _CUT, 56: _CUT,
    60: (
        ErrorCode.OPEN_FAILED, "the server's certificate is not to be trusted",
        "add its CA (/usr/local/share/ca-certificates/X.crt, update-ca-certificates), name the host as the certificate "
        "does, or say -o tls-verify=off, if nobody can stand in its place",
    ),
    67: _REFUSED, 68: _MISSING,
    69: (ErrorCode.OPEN_FAILED, "the server refuses to send the file", "check its permissions, and the server's log"),
    71: (ErrorCode.OPEN_FAILED, "the server does not understand the request", "see its log"),
    72: (ErrorCode.OPEN_FAILED, "somebody else answers in the server's place", "check the network; try again"),
    78: _MISSING,
}
#: Of those that mean nothing but an HTTP status.
_STATUS = {"401": _REFUSED, "403": _REFUSED, "407": _REFUSED, "404": _MISSING, "410": _MISSING}


class Mark(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What PATH is a copy of, and its size in bytes."""

    url: str
    size: int


#: Made here, once: see RECORDS in model/record.py.
_MARKS = msgspec.json.Decoder(Mark)


@dataclass(frozen=True)
class Request:
    """What to fetch, and how."""

    url: str
    """What it is a copy of, to be shown; without secrets."""
    options: dict[str, str] = field(default_factory=dict)
    """Long options of curl(1), which may hold secrets: ``url``, where the one to use has a password; an empty text
    for an option that takes none. No value has a line end."""
    stall: float = 20.0
    """How many seconds nothing may come."""
    size: int | None = None
    """What the user knows of its size, in bytes."""


def fetch(
    request: Request, path: str, *, deadline: float, progress: Callable[[int, int | None], None],
    stop: threading.Event,
) -> int:
    """Fetch a file to ``path``, and return its size in bytes. A copy that is there is taken as it is.

    ``deadline`` is of time.monotonic(). ``progress`` is told how much has come, and how much there is if that is
    known. ``stop`` ends it. Where it fails, nothing new is left.

    Raises SOURCE_CHANGED where what is at ``path`` is no copy of that; SOURCE_MISSING, OPEN_FAILED, NO_SPACE;
    UNSUPPORTED where nobody says how large the file is, because an end that came too early would look like any
    other; TIMEOUT, also when stopped.
    """
    present = _present(request.url, path)
    if present is not None:
        return present
    try:
        os.makedirs(os.path.dirname(path), mode=0o700, exist_ok=True)
        remove_file(path + _PART)
        fd = os.open(path + _PART, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise state_error(path + _PART, error) from error
    try:
        with _Child(request, fd, deadline) as child:
            total = _follow(child, fd, request, deadline, progress, stop)
        os.fsync(fd)
        write_atomic(path + _MARK, msgspec.json.encode(Mark(url=request.url, size=total)))
        os.rename(path + _PART, path)
        sync_directory(os.path.dirname(path))
    except BaseException as error:
        # Not what somebody else has put there meanwhile, because nobody waits for this one any more.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.lstat(path + _PART), os.fstat(fd)):
                os.unlink(path + _PART)
        if isinstance(error, OSError):
            raise state_error(path, error) from error
        raise
    finally:
        os.close(fd)
    return total


def remove(path: str) -> None:
    """Remove a copy and all that is beside it; no error where there is none. The mark goes last."""
    for victim in (path + _PART, path, path + _MARK):
        remove_file(victim)


def _present(url: str, path: str) -> int | None:
    """Return the size of a complete copy of ``url`` at ``path``, None where there is nothing."""
    try:
        seen = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise state_error(path, error) from error
    mark = None
    with contextlib.suppress(OSError, ValueError), open(path + _MARK, "rb") as file:
        mark = _MARKS.decode(file.read())
    if mark is None or mark.url != url:
        cause = "nothing says what it is" if mark is None else f"it is a copy of {mark.url}"
    elif seen.st_size != mark.size:
        cause = f"it has {seen.st_size} bytes, and had {mark.size}"
    else:
        return mark.size
    raise StoragedError(
        ErrorCode.SOURCE_CHANGED, f"{path} is no copy of {url}", cause=cause,
        hint="look at it, and move it away, together with what else has its name",
    )


class _Child:
    """A curl that writes to a descriptor, in a session of its own. What it shall do is no part of its command line."""

    def __init__(self, request: Request, fd: int, deadline: float) -> None:
        left = max(1.0, deadline - time.monotonic())
        options = {
            # Brackets and braces are what they are.
            "globoff": "", "path-as-is": "", "silent": "", "show-error": "", "verbose": "", "fail": "", "location": "",
            "proto": _PROTOCOLS, "proto-redir": _PROTOCOLS, "tftp-blksize": str(_BLOCK),
            "connect-timeout": f"{min(request.stall, left):.3f}",
            # It ends even if nobody is there any more to end it.
            "max-time": f"{left:.3f}",
            "url": request.url, **request.options,
        }
        if "cookie" in request.options:
            # Whoever a server sends us on to would get it.
            options["max-redirs"] = "0"
        self._talk = self._words = b""
        self.size: int | None = None
        """What the server says, once it has."""
        try:
            self._process = subprocess.Popen(
                # -q: no .curlrc; -K -: options from its standard input.
                ["curl", "-q", "-K", "-"], stdin=subprocess.PIPE, stdout=fd, stderr=subprocess.PIPE, cwd="/",
                env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"}, start_new_session=True,
            )
        except OSError as error:
            raise StoragedError(
                ErrorCode.UNSUPPORTED, "the program curl, which fetches the source, cannot be run",
                cause=error.strerror or str(error), hint="apt install curl",
            ) from error
        assert self._process.stdin is not None
        assert self._process.stderr is not None
        self._talk_fd = self._process.stderr.fileno()
        os.set_blocking(self._talk_fd, False)
        # Less than a pipe takes, or else read by it at once.
        with contextlib.suppress(BrokenPipeError), self._process.stdin as config:
            config.write("".join(_config_line(key, value) for key, value in options.items()).encode())

    def poll(self, timeout: float) -> int | None:
        """Wait for its end, and return its exit status; None if it goes on."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._talk_fd, 4096):
                self._talk += data
        lines, newline, rest = self._talk.rpartition(b"\n")
        for found in _SIZE.finditer(lines + newline):
            # An answer that is no file's (a redirection) has a size, too.
            self.size = None if found[4] else int(found[1] or found[2] or found[3])
        self._words = (self._words + lines + newline)[-_LONGEST_TALK:]
        self._talk = rest[-_LONGEST_TALK:]
        return self._process.returncode

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whatever it does, it ends now."""
        with self._process:
            if self._process.returncode is None:
                self._process.kill()

    def failure(self, status: int) -> StoragedError:
        """What an exit status means. Of its words only those that hold no header: there are secrets in them."""
        lines = (self._words + self._talk).decode(errors="replace").splitlines()
        words = [line for line in lines if line.startswith(("curl: (", "* TFTP error"))]
        known = _FAILURES.get(
            status, (ErrorCode.OPEN_FAILED, "the source cannot be fetched", "the words are curl's; try it by hand")
        )
        if status == 22 and (found := re.search(r"returned error: ([0-9]{3})", words[-1] if words else "")):
            known = _STATUS.get(found[1], known)
        code, message, hint = known
        return StoragedError(
            code, message, cause="; ".join(line.removeprefix("* ") for line in words) or f"curl ended with {status}",
            hint=hint,
        )


def _config_line(key: str, value: str) -> str:
    if not value:
        return f"{key}\n"
    quoted = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'{key} = "{quoted}"\n'


def _follow(
    child: _Child, fd: int, request: Request, deadline: float, progress: Callable[[int, int | None], None],
    stop: threading.Event,
) -> int:
    """Watch it to its end, and return how much came: all of it."""
    done, changed, size = -1, time.monotonic(), request.size
    while True:
        # What has come is looked at before curl's words are: they tell the size first.
        seen = os.fstat(fd).st_size
        status = child.poll(_LOOK)
        if status is not None:
            seen = os.fstat(fd).st_size
        total = child.size if child.size is not None else size
        now = time.monotonic()
        if seen != done:
            done, changed = seen, now
            progress(done, total)
        if None not in (size, child.size) and size != child.size:
            raise _other_size(f"the server says that it has {child.size} bytes", size)
        if total is not None and done > total:
            raise _other_size("the server sends more", total)
        if status is not None:
            break
        if stop.is_set():
            raise StoragedError(ErrorCode.TIMEOUT, "fetching the source was given up", hint="attach it again")
        if now > deadline:
            raise StoragedError(
                ErrorCode.TIMEOUT, "the source could not be fetched in time", cause=_how_far(done, total),
                hint="say a longer --timeout, or fetch it by hand and attach the file",
            )
        if now > changed + request.stall:
            raise StoragedError(
                ErrorCode.OPEN_FAILED, "the server does not answer any more" if done else "the server does not answer",
                cause=f"nothing came for {request.stall:g} seconds; {_how_far(done, total)}",
                hint="start the server; check host, port and firewalls",
            )
    if status != 0:
        raise child.failure(status)
    if total is None:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "nobody knows whether the source was fetched whole",
            cause=f"the server does not tell its size; {done} bytes came",
            hint="if you know how large it is, say -o size=BYTES (of TFTP servers, tftpd-hpa tells: RFC 2349)",
        )
    if done != total:
        raise _other_size(f"{done} bytes came", total)
    return done


def _other_size(what: str, size: int | None) -> StoragedError:
    return StoragedError(
        ErrorCode.OPEN_FAILED, "the source was not fetched whole", cause=f"{what}, and should have {size}",
        hint="try again; if it stays so, the file changes on the server, or something on the way cuts it off",
    )


def _how_far(done: int, total: int | None) -> str:
    return f"{done} bytes of {'an unknown number' if total is None else total} have come"
