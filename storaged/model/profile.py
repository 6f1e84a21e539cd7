"""A file /etc/storaged/profiles/NAME.toml: how volumes are to be served, under a name. Pure.

A profile says how a volume is served, and never what: where the data is, who is trusted and which secrets are used
belongs to the volume. So the options that it may have are listed here. At an attach its values become the volume's own
(:func:`applied`); what the volume says itself wins.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Set
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from storaged.backends import BACKENDS
from storaged.backends.base import Backend
from storaged.errors import ErrorCode, StoragedError
from storaged.model.names import check_name
from storaged.model.spec import COMMON_OPTIONS, VolumeSpec
from storaged.model.volumefile import as_text, nearest

SUFFIX = ".toml"
#: Options of all volumes that a profile may have.
_COMMON = frozenset({"cache", "detect-zeroes", "discard", "on-hang", "on-stall"})
#: Those of backends, whichever has them.
_OF_BACKENDS = frozenset({
    "aio", "header-digest", "open-timeout", "page-cache-size", "read-ahead", "readahead-size", "reconnect-delay",
    "request-timeout", "tcp-syn-count",
})
#: Of transports: it says whose the disk is, not how it is served.
_NOT_OF_TRANSPORTS = frozenset({"socket-owner"})
#: What can be written as a number, and is read as the same text.
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The keys of such a file."""

    transport: Annotated[Literal["auto", "vduse", "nbd", "fuse", "vhost-user"], Meta(
        description="the way onto the host, for volumes that do not say one",
    )] = "auto"
    options: Annotated[dict[str, str | int | bool], Meta(
        description="a table of what -o takes, of the options that say how a volume is served",
    )] = {}


def known_options(of_transports: Iterable[str]) -> frozenset[str]:
    """Return the options that a profile may have; ``of_transports`` are those of all transports."""
    return _COMMON | _OF_BACKENDS | (frozenset(of_transports) - _NOT_OF_TRANSPORTS)


def check_profile_name(name: str) -> str:
    """Return ``name`` if a profile may have it. Raises INVALID_NAME."""
    try:
        return check_name(name)
    except StoragedError as error:
        raise StoragedError(
            ErrorCode.INVALID_NAME, error.message.replace("volume name", "name of a profile"), cause=error.cause,
            hint=error.hint,
        ) from None


def parse_profile(text: bytes, path: str, of_transports: Iterable[str]) -> tuple[str, dict[str, str]]:
    """Return the transport and the options of a file. Raises INVALID_ARGUMENT that says where it is wrong.

    ``of_transports`` are the options of all transports: which of them fit is known when the profile is used.
    """

    def refuse(message: str, cause: str = "", hint: str = "") -> StoragedError:
        return StoragedError(ErrorCode.INVALID_ARGUMENT, message, cause=cause, hint=hint or f"correct {path}")

    try:
        values: dict[str, Any] = tomllib.loads(text.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise refuse(f"{path} cannot be read", str(error)) from error
    for key in values:
        if key not in Profile.__struct_fields__:
            raise refuse(f"{path}: unknown key {key!r}", hint=nearest(key, Profile.__struct_fields__))
    try:
        profile = msgspec.convert(values, Profile)
    except msgspec.ValidationError as error:
        raise refuse(f"{path} cannot be understood", str(error)) from error
    known = known_options(of_transports)
    for key in profile.options:
        if key not in known:
            cause = "a profile says how a volume is served; this is the volume's own" if is_option(key) else ""
            raise refuse(f"{path}: {key!r} is no option of a profile", cause, nearest(key, sorted(known)))
    return profile.transport, {key: as_text(value) for key, value in profile.options.items()}


def applied(spec: VolumeSpec, transport: str, options: dict[str, str]) -> VolumeSpec:
    """Return the wishes with those of the profile that they name, in the places where they say nothing themselves."""
    return msgspec.structs.replace(
        spec, transport=transport if spec.transport == "auto" else spec.transport, options={**options, **spec.options}
    )


def check_fits(spec: VolumeSpec, options: Iterable[str], backend: Backend, of_transport: Set[str]) -> None:
    """Raise INVALID_ARGUMENT where the profile of a volume has an option that neither source nor transport have."""
    for key in options:
        if key not in COMMON_OPTIONS.keys() | backend.options.keys() | of_transport:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the profile {spec.profile!r} does not fit: option {key!r}",
                volume=spec.name,
                cause=f"neither the backend {backend.name} nor the transport {spec.transport} has it",
                hint="take another profile, or another --transport; or take the option out of the profile",
            )


def is_option(key: str) -> bool:
    """Whether a volume may have that option, whatever it is about."""
    return key in COMMON_OPTIONS or key in _NOT_OF_TRANSPORTS or any(key in each.options for each in BACKENDS.values())


def profile_text(transport: str, options: dict[str, str], comment: Iterable[str]) -> str:
    """Return a file of a profile, with lines of comment before it."""
    def quoted(text: str) -> str:
        # JSON's spelling is TOML's, but for this one.
        return msgspec.json.encode(text).decode().replace("\x7f", "\\u007f")

    lines = [f"# {line}".rstrip() for line in comment]
    lines += [f"transport = {quoted(transport)}"] if transport != "auto" else []
    lines += ["", "[options]"]
    for key, value in options.items():
        lines.append(f"{key} = {value if _NUMBER.fullmatch(value) else quoted(value)}")
    return "\n".join(lines) + "\n"
