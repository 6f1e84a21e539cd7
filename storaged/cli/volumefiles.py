"""``storaged config check`` of /etc/storaged/volumes/NAME.toml: what the daemon would refuse, without the daemon."""

from __future__ import annotations

import os

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.configfiles import read_config
from storaged.model.configcheck import Problem, check_file
from storaged.model.layout import Layout
from storaged.model.names import check_name
from storaged.model.spec import check_spec
from storaged.model.volumefile import SUFFIX, VolumeFile, parse_volume_file
from storaged.transports import options_of


def check_volume_file(path: str) -> list[Problem]:
    """Return all that is wrong with a file of a volume and can be known without the daemon. Blocks.

    Raises INVALID_ARGUMENT for a file that cannot be read.
    """
    data = read_config(path)
    _values, problems = check_file(path, data, VolumeFile)
    if not problems:
        name = os.path.basename(path).removesuffix(SUFFIX)
        try:
            spec = parse_volume_file(data, path, check_name(name))
            backend = find_backend(spec.source)
            check_spec(spec, backend.options.keys() | options_of(spec.transport).keys())
            backend.check_options(spec.options)
            backend.parse(spec.source, spec.options)
        except StoragedError as error:
            why = f": {error.cause}" if error.cause else ""
            problems.append(Problem(path, None, "", f"{error.message}{why}", error.hint))
    return problems


def volume_files(layout: Layout) -> list[str]:
    """The files of volumes. Blocks. Raises INVALID_ARGUMENT where their directory cannot be read."""
    try:
        names = sorted(os.listdir(layout.volume_files))
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"cannot read {layout.volume_files}", cause=error.strerror or ""
        ) from error
    return [f"{layout.volume_files}/{name}" for name in names if name.endswith(SUFFIX) and not name.startswith(".")]
