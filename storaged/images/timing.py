"""Says when QEMU could not time the derivation of a new key, and is to be asked again.

Before it makes a key it computes how many rounds take as long as they shall, from the CPU time that its thread has used
(qcrypto_pbkdf_count_iters in crypto/pbkdf.c). Where the kernel counts that by its ticks, a short trial takes no time
at all, and QEMU gives up, before it has written a key: with one create in four on a virtual machine.
"""

from __future__ import annotations

from collections.abc import Iterator

from storaged.errors import ErrorCode, StoragedError

#: Of 20 in a row all fail once in a million times even where every second one does.
_TRIES = 20
_WORDS = ("Unable to get accurate CPU usage", "Unable to calculate thread CPU usage")


class Trial:
    """One try: ``with`` it around what makes a key; ``again`` tells whether another is due."""

    def __init__(self, *, last: bool) -> None:
        """``last``: then whatever fails is raised."""
        self._last = last
        self.again = False

    def __enter__(self) -> Trial:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        """Hold back the one failure that is worth another try."""
        self.again = not self._last and isinstance(error, StoragedError) and (
            error.code in (ErrorCode.IMAGE_FAILED, ErrorCode.QSD_REFUSED) and error.cause.endswith(_WORDS)
        )
        return self.again


def trials() -> Iterator[Trial]:
    """Yield tries until one needs no other."""
    for number in range(_TRIES):
        trial = Trial(last=number == _TRIES - 1)
        yield trial
        if not trial.again:
            return
