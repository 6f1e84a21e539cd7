"""Checks of option values that several backends share."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from storaged.errors import ErrorCode, StoragedError


def check_numbers(options: Mapping[str, str], limits: Mapping[str, tuple[int, int]], unit: str = "seconds") -> None:
    """Raise INVALID_ARGUMENT where an option that is given is no whole number within its limits."""
    for key, (least, most) in limits.items():
        text = options.get(key, str(least))
        if not re.fullmatch(r"[0-9]{1,10}", text) or not least <= int(text) <= most:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {key}={text!r} is no number of {unit}",
                hint=f"use a whole number from {least} to {most}",
            )


def check_choices(options: Mapping[str, str], choices: Mapping[str, Collection[str]]) -> None:
    """Raise INVALID_ARGUMENT where an option that is given is none of its choices."""
    for key, known in choices.items():
        if key in options and options[key] not in known:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"option {key}={options[key]!r} is unknown",
                hint=f"use one of {', '.join(known)}",
            )
