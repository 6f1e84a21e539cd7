"""Where the configuration is read from: storaged.toml, and the drop-ins in storaged.toml.d beside it."""

from __future__ import annotations

import errno
import grp
import os
import stat

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import Config
from storaged.model.configcheck import Problem, check_files, refusal
from storaged.model.layout import Layout


def load_config(layout: Layout, config_file: str | None) -> Config:
    """Read and check the configuration; the default file may be missing, one that was named may not. Blocks.

    Raises INVALID_ARGUMENT, with all that is wrong.
    """
    config, problems = check_config(layout, config_file)
    if config is None:
        raise refusal(problems)
    return config


def check_config(layout: Layout, config_file: str | None) -> tuple[Config | None, list[Problem]]:
    """Return the configuration as it would be used on this host, or None and all that is wrong with it. Blocks.

    Raises INVALID_ARGUMENT for a file that cannot be read.
    """
    files = [(path, read_config(path)) for path in config_files(layout, config_file)]
    config, problems = check_files(files)
    if config is not None:
        missing = [
            _missing_group(files, key, group)
            for key, group in [("socket_group", config.socket_group), *(("read_only", g) for g in config.access.groups)]
            if group is not None and not _is_group(group)
        ]
        if missing:
            return None, problems + missing
    return config, problems


def config_files(layout: Layout, config_file: str | None) -> list[str]:
    """The files that count, the one that wins last: the file itself, then FILE.d/*.toml in the order of their names.

    Raises INVALID_ARGUMENT where a file that was named is missing, or the directory cannot be read.
    """
    path = config_file or layout.config_file
    files = [path] if os.path.lexists(path) else []
    if config_file is not None and not files:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"there is no configuration file {path}", hint="check the name"
        )
    try:
        names = sorted(os.listdir(f"{path}.d"))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise _unreadable(f"{path}.d", error) from error
    # What an editor or a package manager leaves behind (a.toml~, .a.toml.swp, a.toml.dpkg-old) does not count.
    return files + [f"{path}.d/{name}" for name in names if name.endswith(".toml") and not name.startswith(".")]


def read_config(path: str, longest: int | None = None) -> bytes:
    """The content of a file, of at most ``longest`` bytes. Raises INVALID_ARGUMENT."""
    try:
        # A FIFO would keep the daemon from starting.
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no file")
            text = file.read() if longest is None else file.read(longest + 1)
            if longest is not None and len(text) > longest:
                raise OSError(errno.EFBIG, f"it has more than {longest >> 10} KiB")
            return text
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: str, error: OSError) -> StoragedError:
    return StoragedError(ErrorCode.INVALID_ARGUMENT, f"cannot read {path}", cause=error.strerror or "")


def _missing_group(files: list[tuple[str, bytes]], key: str, group: str) -> Problem:
    said_in = next((path for path, text in reversed(files) if key.encode() in text), "")
    name = "access.read_only" if key == "read_only" else key
    return Problem(
        said_in, None, name, f"{name}: there is no group {group!r}",
        "create it (groupadd --system), or correct the key",
    )


def _is_group(name: str) -> bool:
    try:
        grp.getgrnam(name)
    except KeyError:
        return False
    return True
