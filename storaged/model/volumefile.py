"""A file /etc/storaged/volumes/NAME.toml: what an administrator wishes for at each boot. Pure."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Sequence
from typing import Any

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec
from storaged.model.treespec import spelled_out

SUFFIX = ".toml"


class VolumeFile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of such a file: the wishes of an attach. The name is the file's."""

    source: str
    format: Format = Format.RAW
    transport: str = "auto"
    read_only: bool = False
    snapshot: bool = False
    snapshot_dir: str | None = None
    profile: str | None = None
    options: dict[str, str | int | bool] = {}


def parse_volume_file(text: bytes, path: str, name: str) -> VolumeSpec:
    """Return what the file wishes for. Raises INVALID_ARGUMENT that says where it is wrong."""

    def refuse(message: str, cause: str = "", hint: str = "") -> StoragedError:
        return StoragedError(
            ErrorCode.INVALID_ARGUMENT, message, volume=name, cause=cause,
            hint=hint or f"correct {path}, and then: systemctl reload storaged",
        )

    try:
        values: dict[str, Any] = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(f"{path} cannot be read", str(error)) from error
    known = VolumeFile.__struct_fields__
    for key in values:
        if key not in known:
            raise refuse(f"{path}: unknown key {key!r}", hint=nearest(key, known))
    try:
        file = msgspec.convert(values, VolumeFile)
    except msgspec.ValidationError as error:
        raise refuse(f"{path} cannot be understood", str(error)) from error
    spec = VolumeSpec(
        name=name, source=file.source, format=file.format, transport=file.transport, read_only=file.read_only,
        snapshot=file.snapshot, snapshot_dir=file.snapshot_dir, profile=file.profile,
        options={key: as_text(value) for key, value in file.options.items()},
    )
    try:
        return spelled_out(spec, file.format if "format" in values else None)
    except StoragedError as error:
        raise refuse(f"{path}: {error.message}", error.cause, error.hint) from error


def as_text(value: str | int | bool) -> str:
    """As on the command line: on and off, and numbers as they are written."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


def nearest(key: str, known: Sequence[str]) -> str:
    """Name the key that may have been meant. Dashes are as good as underscores to who types them."""
    plain = {name.replace("-", "_"): name for name in known}
    found = difflib.get_close_matches(key.replace("-", "_"), plain, n=1, cutoff=0.5)
    return f"did you mean {plain[found[0]]!r}?" if found else f"known here: {', '.join(known)}"
