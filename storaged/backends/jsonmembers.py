"""The members of one node of a json: tree, taken one by one; what nobody has taken is refused. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NoReturn

from storaged.errors import ErrorCode, StoragedError

Value = object
"""A value of JSON; an object is a dict."""

_SWITCH = {"on": True, "off": False, True: True, False: False}
#: Members that hold a secret or name an object that does, of whatever driver.
_SECRET = re.compile(r"secret|passw|cookie|credential|tls-creds|(^|-)key$", re.IGNORECASE)


class Members:
    """The members of an object, by name. Each is taken once."""

    def __init__(self, values: dict[str, Value], path: str = "") -> None:
        self.path = path
        """Where in the tree it is, with dots; empty for the top."""
        self._left = dict(values)

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def path_of(self, key: str) -> str:
        """The path of a member, for errors."""
        return f"{self.path}.{key}" if self.path else key

    def text(self, key: str) -> str | None:
        """Take a text, None where it is not there. Raises INVALID_SOURCE for another type, as the others do."""
        value = self._left.pop(key, None)
        if value is not None and not isinstance(value, str):
            refuse(f"{self.path_of(key)} is no text", "write it in double quotes")
        if value is not None and ("\0" in value or any("\ud800" <= letter <= "\udfff" for letter in value)):
            refuse(f"{self.path_of(key)} holds a NUL character, or is no UTF-8", "QMP carries nothing else: rename it")
        return value

    def needed(self, key: str) -> str:
        """Take a text that must be there, and have at least a character."""
        value = self.text(key)
        if not value:
            refuse(f"{self.path_of(key)} is missing or empty", "the source does not say where the data is without it")
        return value

    def number(self, key: str) -> str | None:
        """Take a whole number, or the text of one: QEMU takes both. Returns it as options are written."""
        value = self._left.pop(key, None)
        if value is None:
            return None
        if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return str(value)
        if isinstance(value, str) and re.fullmatch(r"0|[1-9][0-9]{0,19}", value):
            return value
        refuse(f"{self.path_of(key)} is no number", "write it as a whole number, 0 or more")

    def switch(self, key: str) -> bool | None:
        """Take true or false, or the text on or off."""
        value = self._left.pop(key, None)
        if value is None:
            return None
        if isinstance(value, bool | str) and value in _SWITCH:
            return _SWITCH[value]
        refuse(f"{self.path_of(key)} is neither true nor false", "write true or false")

    def choice(self, key: str, choices: Mapping[str, str]) -> str | None:
        """Take one of some words, and return what it means."""
        value = self.text(key)
        if value is not None and value not in choices:
            refuse(f"{self.path_of(key)} has a value that is not known", f"use one of {', '.join(choices)}")
        return None if value is None else choices[value]

    def null(self, key: str) -> bool:
        """Whether a member is null; then it is taken."""
        if self._left.get(key, "") is not None:
            return False
        del self._left[key]
        return True

    def child(self, key: str) -> Members | None:
        """Take an object."""
        if key not in self._left:
            return None
        value = self._left.pop(key)
        if not isinstance(value, dict):
            refuse(
                f"{self.path_of(key)} is no object",
                "a node or an object that is made elsewhere cannot be named: write the whole of it there",
                ErrorCode.UNSUPPORTED,
            )
        return Members(value, self.path_of(key))

    def needed_child(self, key: str) -> Members:
        """Take an object that must be there."""
        found = self.child(key)
        if found is None:
            refuse(f"{self.path_of(key)} is missing", "the source does not say where the data is without it")
        return found

    def objects(self, key: str) -> list[Members]:
        """Take a list of objects: the whole of it is an object with the keys 0, 1, …"""
        found = self.child(key)
        if found is None:
            return []
        entries = [found.needed_child(str(number)) for number in range(len(found._left))]
        found.end()
        return entries

    def texts(self, key: str) -> list[str]:
        """Take a list of texts."""
        found = self.child(key)
        if found is None:
            return []
        entries = [found.needed(str(number)) for number in range(len(found._left))]
        found.end()
        return entries

    def end(self) -> None:
        """Refuse what nobody has taken."""
        for key in self._left:
            if _SECRET.search(key):
                refuse(
                    f"{self.path_of(_shown(key))} holds a secret, or names one",
                    "leave it out: secrets are said by options that name their place, such as -o password-file=PATH",
                )
            refuse(
                f"{self.path_of(_shown(key))} is not known here, or cannot be said for a volume",
                "leave it out; what a volume can have beyond its source is said by options (-o)", ErrorCode.UNSUPPORTED,
            )


def refuse(cause: str, hint: str, code: ErrorCode = ErrorCode.INVALID_SOURCE) -> NoReturn:
    """Raise a failure about a tree. ``cause`` holds nothing of its values."""
    raise StoragedError(code, "the json: source cannot be used", cause=cause, hint=hint)


def refuse_secret(node: Members, options: Mapping[str, str]) -> None:
    """Refuse members that hold a secret or name one; ``options``: member → the option that says where it is."""
    for key, option in options.items():
        if key in node:
            refuse(
                f"{node.path_of(key)} holds a secret, or names one",
                f"leave it out, and say where the secret is: -o {option}=PATH",
            )


def is_switched_on(node: Members, key: str) -> bool:
    """Take a switch that is off where it is not said."""
    return bool(node.switch(key))


def _shown(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", key) else ascii(key[:60])
