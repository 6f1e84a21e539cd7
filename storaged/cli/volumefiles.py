"""``storaged config`` of /etc/storaged/volumes/NAME.toml and profiles/NAME.toml: what the daemon would refuse."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import msgspec

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.configfiles import read_config
from storaged.model.config import schema
from storaged.model.configcheck import Problem, check_file
from storaged.model.layout import Layout
from storaged.model.names import check_name
from storaged.model.profile import Profile, check_profile_name
from storaged.model.spec import check_spec
from storaged.model.volumefile import SUFFIX, VolumeFile, parse_volume_file
from storaged.store.profiles import read_profile, with_profile
from storaged.transports import options_of


def check_below(path: str) -> list[Problem] | None:
    """Return all that is wrong with a file of a volume or a profile, None where it is neither. Blocks.

    What it is is told by the directory that it is in. Raises INVALID_ARGUMENT for a file that cannot be read.
    """
    directory = os.path.basename(os.path.dirname(path))
    check = {"volumes": check_volume_file, "profiles": check_profile_file}.get(directory)
    return None if check is None else check(path)


def check_volume_file(path: str) -> list[Problem]:
    """Return all that is wrong with a file of a volume and can be known without the daemon. Blocks.

    Raises INVALID_ARGUMENT for a file that cannot be read.
    """

    def judge(data: bytes, name: str) -> None:
        spec = parse_volume_file(data, path, check_name(name))
        profiles = os.path.join(os.path.dirname(os.path.dirname(path)), "profiles")
        spec = with_profile(spec, profiles)
        backend = find_backend(spec.source)
        check_spec(spec, backend.options.keys() | options_of(spec.transport).keys())
        backend.check_options(spec.options)
        backend.parse(spec.source, spec.options)

    return _problems(path, VolumeFile, judge)


def check_profile_file(path: str) -> list[Problem]:
    """The same of a profile. Whether a value of it fits is known where a volume uses it."""

    def judge(data: bytes, name: str) -> None:
        check_profile_name(name)
        read_profile(path)

    return _problems(path, Profile, judge)


def _problems(
    path: str, struct: type[msgspec.Struct], judge: Callable[[bytes, str], None]
) -> list[Problem]:
    data = read_config(path)
    _values, problems = check_file(path, data, struct)
    if not problems:
        try:
            judge(data, os.path.basename(path).removesuffix(SUFFIX))
        except StoragedError as error:
            why = f": {error.cause}" if error.cause else ""
            problems.append(Problem(path, None, "", f"{error.message}{why}", error.hint))
    return problems


def files_below(layout: Layout) -> list[str]:
    """The profiles and the files of volumes. Blocks. Raises INVALID_ARGUMENT where a directory cannot be read."""
    return [path for directory in (layout.profiles, layout.volume_files) for path in _files_in(directory)]


def _files_in(directory: str) -> list[str]:
    try:
        names = sorted(os.listdir(directory))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"cannot read {directory}", cause=error.strerror or ""
        ) from error
    return [f"{directory}/{name}" for name in names if name.endswith(SUFFIX) and not name.startswith(".")]


def schema_of(file: str) -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of ``storaged`` (storaged.toml), of a ``volume`` or of a ``profile``."""
    if file == "storaged":
        return schema()
    struct = VolumeFile if file == "volume" else Profile
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"{file}s/NAME.toml",
        **msgspec.json.schema(struct),
    }
