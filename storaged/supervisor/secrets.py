"""Which secrets a volume's wishes need, and whether a request has brought them. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.secrets import GIVEN, LONGEST, check_reference
from storaged.model.spec import VolumeSpec

NO_SECRETS: Mapping[str, bytes] = MappingProxyType({})
#: Of a volume with any source: the passphrase of an encrypted image.
_OF_THE_IMAGE = ("key-file",)


def secrets_apart(spec: VolumeSpec, secrets: Mapping[str, bytes]) -> tuple[VolumeSpec, Mapping[str, bytes]]:
    """Take secrets out of the source's spelling: a spec is stored and shown.

    Raises INVALID_ARGUMENT, INVALID_SOURCE.
    """
    backend = find_backend(spec.source)
    if not isinstance(backend, NetworkBackend):
        return spec, secrets
    source, found = backend.without_secrets(spec.source)
    for option in found:
        if option in spec.options:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"the source and the option {option} both say a secret",
                volume=spec.name, hint="leave it out of the source: there everybody who can run ps sees it",
            )
    options = {**spec.options, **dict.fromkeys(found, GIVEN)}
    spelled = {option: secret.encode(errors="surrogateescape") for option, secret in found.items()}
    return msgspec.structs.replace(spec, source=source, options=options), {**secrets, **spelled}


def check_secrets(spec: VolumeSpec, secrets: Mapping[str, bytes]) -> None:
    """Raise INVALID_ARGUMENT where an option says no place of a secret, or what it says was not handed over."""
    backend = find_backend(spec.source)
    of_source = backend.secret_options if isinstance(backend, NetworkBackend) else ()
    wanted = {option: spec.options[option] for option in (*_OF_THE_IMAGE, *of_source) if option in spec.options}

    def refuse(message: str, hint: str) -> None:
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, volume=spec.name, hint=hint)

    for option, value in wanted.items():
        try:
            check_reference(option, value)
        except StoragedError as error:
            raise error.at(volume=spec.name) from error
        if value != GIVEN:
            continue
        if spec.persist:
            refuse(
                f"what option {option} is given on standard input cannot be persisted",
                "after a reboot nobody gives it again: name a file, or credential:NAME",
            )
        if not 0 < len(secrets.get(option, b"")) <= LONGEST:
            refuse(
                f"option {option} says that the secret is given, and none is",
                f"storaged attach reads it from standard input; it has 1 to {LONGEST} bytes",
            )
    for option in secrets:
        if wanted.get(option) != GIVEN:
            refuse(f"a secret is given for {option!r}, and no such option says so", f"add -o {option}=-")
