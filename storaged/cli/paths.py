"""Relative paths made absolute: the daemon that opens them has another working directory."""

from __future__ import annotations

import os
import re

from storaged.errors import ErrorCode, StoragedError

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:")
#: Schemes whose rest is a path of this host.
_PATH_SCHEMES = ("file:", "host_device:")
_ALLOW = "allow:"
_TREE = "json:"
#: Options that are a path, beside those whose name ends in -file.
_PATH_OPTIONS = frozenset({"agent", "ceph-conf", "conf", "config-path", "ssh-key", "tls-certificates"})


def absolute(path: str, *, cwd: str | None = None) -> str:
    """Return ``path`` as seen from the root directory.

    ``..`` stays where it is: after a symlink it does not mean the directory that is written before it.
    """
    if not path.startswith("/"):
        path = f"{_cwd() if cwd is None else cwd}/{path}"
    return "/" + "/".join(part for part in path.split("/") if part not in ("", "."))


def absolute_source(source: str, *, cwd: str | None = None) -> str:
    """Return ``source``, its path made absolute if it is one, or ``file:PATH`` or ``host_device:PATH``."""
    # host_device: is no scheme by the letter of RFC 3986 (it has no underscore): look for it first.
    prefix = next((scheme for scheme in _PATH_SCHEMES if source.startswith(scheme)), "")
    path = source.removeprefix(prefix)
    if not path:
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, "the source is empty", hint="name an image: a path, or SCHEME:…"
        )
    if source.startswith(_TREE):
        return _absolute_tree(source, cwd)
    if not prefix and _SCHEME.match(source):
        return source
    return prefix + absolute(path, cwd=cwd)


def _absolute_tree(source: str, cwd: str | None) -> str:
    """Return a tree of block nodes with the names of files in it made absolute. What is no tree the daemon refuses."""
    import json

    def of_objects(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found: dict[str, object] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(key)
            name = key.rpartition(".")[2] == "filename" and isinstance(value, str) and value
            found[key] = absolute(str(value), cwd=cwd) if name else value
        return found

    try:
        tree = json.loads(source.removeprefix(_TREE), object_pairs_hook=of_objects)
    except (ValueError, RecursionError):
        return source
    return _TREE + json.dumps(tree)


def absolute_option(key: str, value: str, *, cwd: str | None = None) -> str:
    """Return an option's value with the paths in it made absolute."""
    if (key.endswith("-file") or key in _PATH_OPTIONS) and value not in ("", "-"):
        # Without a slash it may be the secret itself, by mistake: the daemon refuses it, and says it to nobody.
        is_path = "/" in value and not value.startswith("credential:")
        return absolute(value, cwd=cwd) if is_path else value
    if key != "backing" or not value.startswith(_ALLOW):
        return value
    paths = [absolute(path, cwd=cwd) if path else "" for path in value.removeprefix(_ALLOW).split(":")]
    if any(":" in path for path in paths):
        # Only the working directory can have brought it in. Sent on, it would allow other directories.
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT,
            "-o backing=allow: cannot name a directory that has a colon in its path",
            cause=f"the working directory is {_cwd() if cwd is None else cwd}",
            hint="reach the directory by a path without a colon, such as a bind mount",
        )
    return _ALLOW + ":".join(paths)


def _cwd() -> str:
    try:
        return os.getcwd()
    except OSError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT,
            "a relative path means nothing here",
            cause=f"the working directory is gone: {error.strerror}",
            hint="write the whole path, or change to another directory",
        ) from error
