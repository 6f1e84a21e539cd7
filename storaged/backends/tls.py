"""TLS as QEMU's block drivers are clients of it: which certificates or which key, and what QSD is given for it.

The objects tls-creds-x509 and tls-creds-psk (crypto/tlscredsx509.c, crypto/tlscredspsk.c in QEMU) read files when they
are made, and never again: what is in them goes over no QMP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

from storaged.backends.base import NO_REQUIREMENTS, Node, Requirements
from storaged.backends.uri import bare_host, host_of
from storaged.backends.values import check_choices
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import NO_POWERS, Powers

CERTIFICATES, VERIFY, HOSTNAME, PSK, USER = (
    "tls-certificates", "tls-verify", "tls-hostname", "tls-psk-file", "tls-user",
)
OPTIONS: Mapping[str, str] = {
    CERTIFICATES: "TLS with certificates: the directory with ca-cert.pem and, for a server that asks for it, "
    "client-cert.pem and client-key.pem",
    VERIFY: "on, or off: any server is taken for the right one, which is unsafe; default on",
    HOSTNAME: "the name that the server's certificate must bear; default the host of the source",
    PSK: "TLS with a pre-shared key: where the lines USER:HEXKEY come from: a file, credential:NAME, or - (standard "
    "input)",
    USER: "whose key is taken; default qemu",
}
DEFAULTS: Mapping[str, str] = {VERIFY: "on", USER: "qemu"}
SECRET_OPTIONS = (PSK,)
#: The name of a file with keys, in the directory that QEMU is told (QCRYPTO_TLS_CREDS_PSKFILE).
KEYS = "keys.psk"
#: Of the object that the node names.
_ID = "tls"
#: MAX_USERNAME_SIZE in GnuTLS, in bytes.
_LONGEST_USER = 128

_WAYS = f"say -o {CERTIFICATES}=DIRECTORY (with ca-cert.pem) or -o {PSK}=PATH"


def check(options: Mapping[str, str]) -> None:
    """Raise INVALID_ARGUMENT where an option has a value that it cannot have, or two exclude each other."""
    check_choices(options, {VERIFY: ("on", "off")})
    directory = options.get(CERTIFICATES, "/")
    if not directory.startswith("/"):
        _refuse(f"option {CERTIFICATES}: {directory!r} is not an absolute path", "write the whole path")
    if HOSTNAME in options:
        _hostname(options[HOSTNAME])
    user = options.get(USER, DEFAULTS[USER])
    # QEMU looks for a line that begins with it and a colon.
    if not user or not user.isprintable() or ":" in user or len(user.encode()) > _LONGEST_USER:
        _refuse(f"option {USER}={user!r} is no name of a user", "take what stands before the : in the file of keys")
    if CERTIFICATES in options and PSK in options:
        _refuse(f"options {CERTIFICATES} and {PSK} exclude each other", "leave one of them out")
    if PSK in options:
        _refuse_with(PSK, (VERIFY, HOSTNAME), options, "with a pre-shared key there is no certificate to look at")
    if CERTIFICATES in options:
        _refuse_with(CERTIFICATES, (USER,), options, f"it says whose key is taken from {PSK}")
    if options.get(VERIFY) == "off":
        _refuse_with(f"{VERIFY}=off", (HOSTNAME,), options, "no certificate is looked at")


def check_use(options: Mapping[str, str], *, tls: bool, host: bool, spelling: str) -> None:
    """Raise INVALID_ARGUMENT where a source with or without ``tls`` does not go with the options.

    ``host``: the source names a host, whose certificate it must be. ``spelling``: how a source with TLS is written.
    """
    said = sorted(OPTIONS.keys() & options.keys())
    if not tls:
        if said:
            _refuse(
                f"option {said[0]} means nothing here: this source goes without TLS",
                f"write {spelling}, or leave the option out",
            )
    elif CERTIFICATES not in options and PSK not in options:
        _refuse("TLS needs certificates or a key", _WAYS)
    elif CERTIFICATES in options and not host and HOSTNAME not in options and options.get(VERIFY) != "off":
        _refuse(
            "nothing says whose certificate the server must have",
            f"say -o {HOSTNAME}=NAME; a socket has no name of a host",
        )


def members(options: Mapping[str, str]) -> Node:
    """Return what a node with TLS has beside the others."""
    node: Node = {"tls-creds": _ID}
    if HOSTNAME in options:
        node["tls-hostname"] = _hostname(options[HOSTNAME])
    return node


def requirements(options: Mapping[str, str]) -> Requirements:
    """Return the object that ``members`` names, and the file that it reads."""
    if PSK in options:
        credentials = {
            "qom-type": "tls-creds-psk", "id": _ID, "endpoint": "client",
            # QSD's working directory is the volume's own.
            "dir": ".", "username": options.get(USER, DEFAULTS[USER]),
        }
        return Requirements(objects=(credentials,), secret_files={KEYS: PSK})
    if CERTIFICATES not in options:
        return NO_REQUIREMENTS
    return Requirements(objects=({
        "qom-type": "tls-creds-x509", "id": _ID, "endpoint": "client", "dir": options[CERTIFICATES],
        "verify-peer": options.get(VERIFY, DEFAULTS[VERIFY]) == "on",
    },))


def powers(options: Mapping[str, str]) -> Powers:
    """Return what QSD needs of the host for TLS: it reads the certificates itself."""
    directory = options.get(CERTIFICATES)
    if directory is None:
        return NO_POWERS
    files = ("ca-cert.pem", "ca-crl.pem", "client-cert.pem", "client-key.pem")
    return Powers(reads=(directory,), files=tuple((f"{directory}/{name}", False) for name in files))


def _hostname(text: str) -> str:
    try:
        return bare_host(host_of(f"[{text}]" if ":" in text and not text.startswith("[") else text, text))
    except StoragedError as error:
        _refuse(f"option {HOSTNAME}={text!r} is no name of a host", error.hint)


def _refuse_with(option: str, others: tuple[str, ...], options: Mapping[str, str], cause: str) -> None:
    for other in others:
        if other in options:
            _refuse(f"options {option} and {other} exclude each other", f"leave one of them out: {cause}")


def _refuse(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)
