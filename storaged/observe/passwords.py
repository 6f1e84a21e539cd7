"""Passwords by HTTP's basic authentication (RFC 7617), compared with bcrypt hashes."""

from __future__ import annotations

import base64
import hashlib
import threading
from collections.abc import Mapping

import bcrypt

#: Comparisons that are remembered: each new one costs some 0.1 s of a processor.
_REMEMBERED = 100


class Passwords:
    """Who may come in. For any number of threads, which compare one at a time."""

    def __init__(self) -> None:
        self._comparing = threading.Lock()
        self._known: dict[bytes, bool] = {}
        # Of a name that does not exist something is compared, too: the time must not tell names.
        self._nobody = bcrypt.hashpw(b"nobody", bcrypt.gensalt(10))

    def are_right(self, authorization: str, users: Mapping[str, bytes]) -> bool:
        """Whether the header ``Authorization`` has the name and the password of one of the users."""
        scheme, _, text = authorization.partition(" ")
        if scheme.lower() != "basic":
            return False
        try:
            name, colon, password = base64.b64decode(text.strip(), validate=True).partition(b":")
            expected = users.get(name.decode())
        except ValueError:
            return False
        word = expected or self._nobody
        key = hashlib.sha256(b"\0".join(part.hex().encode() for part in (name, word, password))).digest()
        with self._comparing:
            if key not in self._known:
                while len(self._known) >= _REMEMBERED:
                    del self._known[next(iter(self._known))]
                self._known[key] = _compare(password, word)
            same = self._known[key]
        return bool(colon) and expected is not None and same


def _compare(password: bytes, word: bytes) -> bool:
    try:
        return bcrypt.checkpw(password, word)
    except ValueError:
        return False  # a NUL in it, or (bcrypt 5) more than the 72 bytes that bcrypt can take
