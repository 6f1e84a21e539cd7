"""Where secrets come from: files, systemd credentials, and what a client handed over. Blocks, use a thread.

An option tells where: an absolute path; ``credential:NAME``, a credential of the daemon's own unit (systemd.exec(5),
LoadCredential=); or ``-``, which is what the client read from its standard input. The last is kept in the volume's
directory below /run, in memory and readable by root alone, since a successor of QSD needs it again.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Mapping

from storaged.errors import ErrorCode, StoragedError
from storaged.host.atomic import write_atomic

#: What an option says of a secret that the client handed over.
GIVEN = "-"
_CREDENTIAL = "credential:"
#: systemd.exec(5): a credential's name is a file's name.
_NAME = re.compile(r"[A-Za-z0-9_.@:-]{1,255}")
#: A secret is not a disk image (bytes).
LONGEST = 64 * 1024


def check_reference(option: str, value: str) -> None:
    """Raise INVALID_ARGUMENT where an option does not say where a secret comes from."""
    name = value.removeprefix(_CREDENTIAL)
    if value == GIVEN or value.startswith("/") or (value != name and _NAME.fullmatch(name) and name.strip(".")):
        return
    # The value may be the secret itself: it must not be said again.
    raise StoragedError(
        ErrorCode.INVALID_ARGUMENT, f"option {option} does not say where the secret comes from",
        hint=f"write -o {option}=/PATH, -o {option}=credential:NAME, or -o {option}=- (standard input)",
    )


def place_of(option: str, value: str, directory: str) -> str:
    """Return the path of the file that holds a secret; ``directory`` is the volume's. Raises OPEN_FAILED."""
    if value == GIVEN:
        return os.path.join(directory, "secrets", option)
    if not value.startswith(_CREDENTIAL):
        return value
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    if not credentials:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"the daemon has no credentials: option {option} cannot be followed",
            cause="systemd gave it no CREDENTIALS_DIRECTORY",
            hint=f"LoadCredential={value.removeprefix(_CREDENTIAL)}:PATH in its unit, or name a file",
        )
    return os.path.join(credentials, value.removeprefix(_CREDENTIAL))


def read(option: str, value: str, directory: str) -> bytes:
    """Return a secret, every byte as it is. Raises OPEN_FAILED; the secret is in no error."""
    path = place_of(option, value, directory)
    hint = f"check what -o {option} says"
    if value == GIVEN:
        hint = f"it was given on standard input: detach the volume, and attach it again with -o {option}=-"
    try:
        # Not one that waits for a writer, as a FIFO does: the thread would keep the source's locks.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            data = file.read(LONGEST + 1)
    except OSError as error:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"cannot read the file of option {option}: {path}", cause=error.strerror or "",
            hint=hint,
        ) from error
    if not 0 < len(data) <= LONGEST:
        raise StoragedError(
            ErrorCode.OPEN_FAILED, f"the file of option {option} holds no usable secret: {path}",
            cause="it is empty" if not data else f"it is larger than {LONGEST} bytes", hint=hint,
        )
    return data


def keep(directory: str, given: Mapping[str, bytes]) -> None:
    """Keep what a client handed over, option → secret, in the volume's directory. Raises NO_SPACE, INTERNAL."""
    if not given:
        return
    place = os.path.join(directory, "secrets")
    os.makedirs(place, mode=0o700, exist_ok=True)
    for option, data in given.items():
        write_atomic(os.path.join(place, option), data)


def are_kept(directory: str, given: Mapping[str, bytes]) -> bool:
    """Whether these very secrets are what is kept of a client's. One that cannot be read is another."""
    with contextlib.suppress(StoragedError):
        return all(read(option, GIVEN, directory) == data for option, data in given.items())
    return False
