"""From the text of storaged.toml and its drop-ins to a configuration, or to everything that is wrong with them. Pure.

Each file is checked by itself, so that a wrong value is found also where another file has a right one for it. Then they
are merged: a table key by key, and of anything else the file that comes later wins.
"""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from storaged.errors import ErrorCode, StoragedError
from storaged.model.config import ABSOLUTE, Config, Key, keys, tables

_PLACE = re.compile(r" \(at (?:line (\d+), column \d+|end of document)\)$")
_TABLE = re.compile(r"""^\s*\[\[?\s*([\w."'-]+)\s*\]\]?\s*(?:#.*)?$""")
_KEY = re.compile(r"""^\s*([\w."'-]+)\s*=""")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong in a file; the line counts from 1, and is None where it is not known."""

    file: str
    line: int | None
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        line = "" if self.line is None else f":{self.line}"
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.file}{line}: {self.message}{hint}"


def parse_config(text: bytes, path: str) -> Config:
    """Parse one file. Raises INVALID_ARGUMENT that says everything that is wrong, and where."""
    return parse_files([(path, text)])


def parse_files(files: Sequence[tuple[str, bytes]]) -> Config:
    """Parse the files (path and content, the one that wins last). Raises INVALID_ARGUMENT with all that is wrong."""
    config, problems = check_files(files)
    if config is None:
        raise refusal(problems)
    return config


def refusal(problems: Sequence[Problem]) -> StoragedError:
    """The failure of a configuration with these problems."""
    return StoragedError(
        ErrorCode.INVALID_ARGUMENT, "the configuration cannot be used",
        cause="; ".join(map(str, problems)),
        hint="correct it, and look at it with: storaged config check; storaged.toml(5) has all keys",
    )


def check_files(files: Sequence[tuple[str, bytes]]) -> tuple[Config | None, list[Problem]]:
    """Return the configuration, or None and all that is wrong."""
    merged: dict[str, Any] = {}
    problems: list[Problem] = []
    for path, text in files:
        values, wrong = check_file(path, text)
        problems += wrong
        merged = _merge(merged, values)
    if problems:
        return None, problems
    config = msgspec.convert(merged, Config)
    if (said := config.metrics.problem()) is not None:
        where = ("metrics", "listen")
        path, line = _said_last(files, where)
        return None, [Problem(path, line, ".".join(where), f"metrics.listen: {said[0]}", said[1])]
    return config, []


def _said_last(files: Sequence[tuple[str, bytes]], where: tuple[str, ...]) -> tuple[str, int | None]:
    """The file, and the line in it, whose word counts for a key."""
    for path, text in reversed(files):
        lines = _lines_of_keys(text.decode())
        if where in lines:
            return path, lines[where]
    return files[-1][0], None


def check_file(
    path: str, data: bytes, struct: type[msgspec.Struct] = Config
) -> tuple[dict[str, Any], list[Problem]]:
    """Return what one file says, and all that is wrong in it; ``struct`` has the keys that it may have."""
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        return {}, [Problem(path, data.count(b"\n", 0, error.start) + 1, "", "this is no UTF-8")]
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _PLACE.search(str(error))
        line = None if place is None else int(place[1]) if place[1] else len(text.splitlines())
        return {}, [Problem(path, line, "", f"this is no TOML: {_PLACE.sub('', str(error))}")]
    except RecursionError:
        return {}, [Problem(path, None, "", "this is no TOML: it is nested too deeply")]
    lines = _lines_of_keys(text)
    found = list(_check_table(values, (), struct))
    return values, [Problem(path, _line_of(lines, where), ".".join(where), *said) for where, *said in found]


def _check_table(
    values: Mapping[str, Any], table: tuple[str, ...], struct: type[msgspec.Struct]
) -> Iterable[tuple[Any, ...]]:
    """Yield (path of the key, message, hint) for all that is wrong in a table."""
    known = {key.name: key for key in keys(struct) if key.table == table}
    below = {path[-1] for path in tables(struct) if path and path[:-1] == table}
    for name, value in values.items():
        where = (*table, name)
        if name in below:
            if isinstance(value, dict):
                yield from _check_table(value, where, struct)
            else:
                heading = f"[{'.'.join(where)}]"
                yield where, f"{name} is a table, and this is not one", f"write {heading} on a line of its own"
        elif name not in known:
            what = f"unknown key {name!r}" + (f" in [{'.'.join(table)}]" if table else "")
            yield where, what, _nearest(name, table, known.keys() | below, struct)
        elif message := _wrong_value(known[name], value):
            yield where, f"{known[name]}: {message}", f"one of {choices}" if (choices := known[name].choices) else ""


def _wrong_value(key: Key, value: object) -> str:
    if isinstance(value, float) and math.isnan(value):
        return "this is not a number"
    try:
        msgspec.convert(value, key.type)
    except msgspec.ValidationError as error:
        message = str(error).replace(f"`str` matching regex {ABSOLUTE!r}", "an absolute path")
        # "at `$[...]`" tells nothing where the line is known; what is inside a table's value does.
        return message[0].lower() + re.sub(r" - at `(key in )?\$\[\.\.\.\]`", "", message)[1:]
    return ""


def _nearest(name: str, table: tuple[str, ...], known: Iterable[str], struct: type[msgspec.Struct]) -> str:
    """A hint: the key that was probably meant."""
    for key in keys(struct):
        if key.name == name and key.table != table:
            place = f"in [{'.'.join(key.table)}]" if key.table else "before the first [table]"
            return f"{name} stands {place}"
    close = difflib.get_close_matches(name.replace("-", "_").lower(), sorted(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else f"known here: {', '.join(sorted(known))}"


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        present = merged.get(key)
        merged[key] = _merge(present, value) if isinstance(present, dict) and isinstance(value, dict) else value
    return merged


def _line_of(lines: Mapping[tuple[str, ...], int], where: tuple[str, ...]) -> int | None:
    """The line of a key, or of the table that it is in."""
    while where:
        if where in lines:
            return lines[where]
        where = where[:-1]
    return None


def _lines_of_keys(text: str) -> dict[tuple[str, ...], int]:
    """Where keys and tables stand, of TOML that was parsed. tomllib does not tell, so this looks for plain ones."""
    found: dict[tuple[str, ...], int] = {}
    table: tuple[str, ...] = ()
    inside = ""  # the quotes of a string over several lines
    for number, line in enumerate(text.splitlines(), 1):
        if not inside:
            if match := _TABLE.match(line):
                table = _names(match[1])
                found.setdefault(table, number)
            elif match := _KEY.match(line):
                found.setdefault((*table, *_names(match[1])), number)
        for quotes in re.findall(r"'''|\"\"\"", line):
            inside = quotes if not inside else "" if quotes == inside else inside
    return found


def _names(dotted: str) -> tuple[str, ...]:
    return tuple(part.strip("\"'") for part in dotted.split("."))
