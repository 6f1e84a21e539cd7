"""A picture as PNG, for documents that take no SVG: drawn by rsvg-convert(1). Blocks."""

from __future__ import annotations

import shutil
import subprocess

from storaged.errors import ErrorCode, StoragedError

_CONVERTER = "rsvg-convert"
#: Pixels for each of the picture's own: it is printed, or shown on a fine screen.
_ZOOM = 2
#: Seconds; it takes less than one.
_PATIENCE = 60.0
_HINT = "apt install librsvg2-bin; or write the picture with --svg"


def find_converter() -> str:
    """Return where the program is. Raises UNSUPPORTED where it is missing."""
    path = shutil.which(_CONVERTER)
    if path is None:
        raise StoragedError(ErrorCode.UNSUPPORTED, f"the program {_CONVERTER} is not there", hint=_HINT)
    return path


def png(svg: str) -> bytes:
    """Return a picture as PNG. Raises UNSUPPORTED where that fails, with the program's words."""
    try:
        done = subprocess.run(
            [find_converter(), "--format", "png", "--zoom", str(_ZOOM)], input=svg.encode(), capture_output=True,
            check=False, timeout=_PATIENCE, cwd="/",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "the picture could not be made", cause=str(error), hint=_HINT
        ) from error
    if done.returncode or not done.stdout:
        said = done.stderr.decode(errors="replace").strip()[-300:]
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "the picture could not be made",
            cause=said or f"{_CONVERTER} ended with status {done.returncode}", hint=_HINT,
        )
    return done.stdout
