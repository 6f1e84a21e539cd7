"""Numbers that a transport takes as options: parsed and checked in one way. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from storaged.errors import ErrorCode, StoragedError
from storaged.model.sizes import parse_size
from storaged.model.spec import VolumeSpec


@dataclass(frozen=True)
class Number:
    """An option that is a whole number, or a size where ``size`` is set."""

    about: str
    least: int
    most: int
    size: bool = False
    power_of_two: bool = False


def number(spec: VolumeSpec, key: str, option: Number, default: int) -> int:
    """Return what the user said with -o KEY=VALUE, or the default. Raises INVALID_ARGUMENT."""
    text = spec.options.get(key)
    if text is None:
        return default
    if not option.size and not (text.isascii() and text.isdigit() and len(text) < 20):
        raise _wrong(spec, key, option, text)
    try:
        value = parse_size(text) if option.size else int(text)
    except StoragedError as error:
        raise _wrong(spec, key, option, text) from error
    if not option.least <= value <= option.most or (option.power_of_two and value & (value - 1)):
        raise _wrong(spec, key, option, text)
    return value


#: How long an I/O thread looks for work before it sleeps (iothread's poll-max-ns in QEMU's qapi/qom.json).
POLLING = "poll-max-ns"
_POLLING = Number("nanoseconds that QSD's I/O thread looks for work before it sleeps, 0: it does not", 0, 10**9)
POLLING_OPTION: Mapping[str, str] = {POLLING: f"{_POLLING.about}; default 32768"}


def polling(spec: VolumeSpec) -> dict[str, int]:
    """The setting of a transport with an I/O thread, where something was said. Raises INVALID_ARGUMENT."""
    return {POLLING: number(spec, POLLING, _POLLING, 0)} if POLLING in spec.options else {}


def _wrong(spec: VolumeSpec, key: str, option: Number, text: str) -> StoragedError:
    kind = "a power of two" if option.power_of_two else "a size" if option.size else "a number"
    return StoragedError(
        ErrorCode.INVALID_ARGUMENT, f"option {key}={text!r}", volume=spec.name,
        hint=f"it is {kind} from {option.least} to {option.most}: {option.about}",
    )
