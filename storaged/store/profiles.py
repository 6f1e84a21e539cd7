"""The profiles of /etc/storaged/profiles/NAME.toml: read, and written by ``storaged tune`` alone."""

from __future__ import annotations

import os

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.configfiles import read_config
from storaged.model.profile import SUFFIX, applied, check_fits, check_profile_name, parse_profile
from storaged.model.spec import VolumeSpec, check_length
from storaged.model.volumefile import nearest
from storaged.transports import TRANSPORTS, options_of

#: Bytes; a profile has some hundreds.
_LONGEST = 64 << 10


def profile_path(directory: str, name: str) -> str:
    """The file of a profile. Raises INVALID_NAME."""
    return os.path.join(directory, check_profile_name(name) + SUFFIX)


def profile_names(directory: str) -> list[str]:
    """The profiles that there are. Blocks. Raises INVALID_ARGUMENT where their directory cannot be read."""
    try:
        entries = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"cannot read {directory}", cause=error.strerror or "",
            hint="correct its permissions",
        ) from error
    # What an editor or a package manager leaves behind does not count.
    return [name.removesuffix(SUFFIX) for name in entries if name.endswith(SUFFIX) and not name.startswith(".")]


def with_profile(spec: VolumeSpec, directory: str) -> VolumeSpec:
    """Return the wishes with what the profile that they name has for them; the others as they are. Blocks.

    Raises INVALID_NAME, INVALID_ARGUMENT: there is no such profile, it is wrong, or it does not fit the volume.
    """
    if spec.profile is None:
        return spec
    try:
        path = profile_path(directory, spec.profile)
        if not os.path.lexists(path):
            names = profile_names(directory)
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"there is no profile {spec.profile!r}", cause=f"there is no {path}",
                hint=nearest(spec.profile, names) if names else f"make one, in {directory}; or leave --profile out",
            )
        transport, options = read_profile(path)
        made = applied(spec, transport, options)
        check_length(made)
        check_fits(made, options, find_backend(spec.source), options_of(made.transport).keys())
    except StoragedError as error:
        raise error.at(volume=spec.name) from None
    return made


def read_profile(path: str) -> tuple[str, dict[str, str]]:
    """Return the transport and the options of a profile's file. Blocks. Raises INVALID_ARGUMENT."""
    return parse_profile(
        read_config(path, _LONGEST), path, {key for transport in TRANSPORTS.values() for key in transport.options}
    )
