"""QEMU's ``iscsi`` driver: a LUN of an iSCSI target, by libiscsi. block/iscsi.c in QEMU, lib/init.c in libiscsi.

URIs are libiscsi's, ``iscsi://[USER[%PASSWORD]@]HOST[:PORT]/TARGET/LUN``, but for a user whose name has other
characters than letters, digits and ``.-_~``: libiscsi has no escapes there, so that one is written ``?user=``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NoReturn

from storaged.backends.base import NO_REQUIREMENTS, NetworkDefaults, Node, Requirements, Secret
from storaged.backends.cache import cache_flags
from storaged.backends.uri import authority_of, bare_host, escaped, refuse, unescaped
from storaged.backends.values import check_choices, check_numbers
from storaged.errors import ErrorCode, StoragedError

DEFAULT_PORT = 3260
#: What QEMU calls itself where no machine has a name (get_initiator_name in block/iscsi.c), as in qemu-img: a target
#: that lets that in lets us in, too. Said always, so that no version of QEMU changes it.
DEFAULT_INITIATOR = "iqn.2008-11.org.linux-kvm"
DIGESTS = ("none-crc32c", "crc32c-none", "crc32c", "none")
#: A day: of QEMU's ``timeout``, an int of seconds.
_LONGEST_TIMEOUT = 86400
_LIMITS = {"request-timeout": (0, _LONGEST_TIMEOUT)}
#: The id of the CHAP secret.
PASSWORD = "password"
#: The options that say what the source may leave out.
_PARTS = ("portal", "target", "lun", "user")

#: RFC 7143, 4.2.7: iSCSI names have at most 223 bytes. libiscsi would cut off what is behind the 255th.
_LONGEST_NAME = 223
_NAME = re.compile(r"iqn\.[A-Za-z0-9._:-]+|eui\.[0-9A-Fa-f]{16}|naa\.([0-9A-Fa-f]{16}){1,2}")
#: MAX_STRING_SIZE in libiscsi, which cuts off what is behind.
_LONGEST_USER = 255
_PLAIN_USER = re.compile(r"[A-Za-z0-9._~-]+")
#: The number goes to the target as it is, in the 16 bits of a LUN (SAM-5, 4.7): above 255 it has another addressing
#: method in its upper bits, and 257 would be LUN 1 of bus 1, for which tgtd takes LUN 1.
_FLAT = 1 << 14
_LAST_PLAIN = 255
#: Stands where a secret was that libiscsi would read in another way. No user is called that.
_UNREADABLE = "***"

_FORMS = "write iscsi://[USER@]HOST[:PORT]/TARGET/LUN"
_BY_FILE = "leave it out of the source, and say -o user=NAME and -o password-file=PATH"


@dataclass(frozen=True)
class _Unit:
    """A logical unit; what is not said is empty."""

    transport: str
    host: str = ""
    port: int = 0
    target: str = ""
    lun: str = ""
    user: str = ""

    @property
    def portal(self) -> str:
        """HOST:PORT as libiscsi takes it: an address of IPv6 in brackets, its zone with a plain %."""
        host = f"[{bare_host(self.host)}]" if self.host.startswith("[") else self.host
        return f"{host}:{self.port}"

    def __str__(self) -> str:
        scheme = "iser" if self.transport == "iser" else "iscsi"
        return _with_user(scheme, self.user, f"{self.host}:{self.port}/{self.target}/{self.lun}")


class IscsiBackend(NetworkDefaults):
    """A LUN of an iSCSI target."""

    name = "iscsi"
    schemes = ("iscsi", "iser")
    example = "iscsi://[USER@]HOST[:PORT]/TARGET/LUN"
    options: Mapping[str, str] = {
        "portal": "HOST[:PORT] of the target, where the source does not say it",
        "target": "the target's name (iqn.…), where the source does not say it",
        "lun": "the number of the LUN, where the source does not say it; there is no default",
        "user": "the CHAP user, where the source does not say it; needs password-file",
        "password-file": "where the CHAP secret comes from: a file, credential:NAME, or - (standard input)",
        "initiator-name": f"what this host calls itself to the target; default {DEFAULT_INITIATOR}",
        "header-digest": f"checksums of headers: one of {', '.join(DIGESTS)}; default {DIGESTS[0]}",
        "request-timeout": "seconds after which a request without an answer is done again, in a new session, at most "
        "7 times; 0: it waits; default 0",
    }
    defaults: Mapping[str, str] = {
        "initiator-name": DEFAULT_INITIATOR, "header-digest": DIGESTS[0], "request-timeout": "0",
    }
    secret_options = ("password-file",)

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the LUN as a URI with host, port, target, LUN and user. Raises INVALID_SOURCE, INVALID_ARGUMENT,
        UNSUPPORTED.
        """
        unit = _with_options(_read(source), source, options)
        if "password-file" in options and not unit.user:
            _refuse_option("password-file says the secret of nobody", "say whose with -o user=NAME")
        if unit.user and "password-file" not in options:
            _refuse_option(
                f"the user {unit.user!r} needs a secret", "say where it comes from with -o password-file=PATH"
            )
        return str(unit)

    def check_options(self, options: Mapping[str, str]) -> None:
        """Those that have nothing to do with the source."""
        check_numbers(options, _LIMITS)
        check_choices(options, {"header-digest": DIGESTS})
        name = options.get("initiator-name", DEFAULT_INITIATOR)
        if not _is_name(name):
            _refuse_option(f"option initiator-name={name!r} is no iSCSI name", "write iqn.YYYY-MM.DOMAIN:NAME")

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsIscsi. The number of sessions to a target of one name is not limited: each has an ISID of its
        own, a random one (iscsi_create_context).
        """
        unit = _read(location)
        chap = {"user": unit.user, "password-secret": PASSWORD} if unit.user else {}
        return {
            "driver": "iscsi",
            "transport": unit.transport,
            "portal": unit.portal,
            "target": unit.target,
            "lun": int(unit.lun),
            **chap,
            "initiator-name": options.get("initiator-name", DEFAULT_INITIATOR),
            "header-digest": options.get("header-digest", DIGESTS[0]),
            "timeout": int(options.get("request-timeout", "0")),
            "read-only": read_only,
            "discard": "unmap",
            "cache": cache_flags(options),
        }

    def without_secrets(self, source: str) -> tuple[str, dict[str, str]]:
        """Take out what stands between the first % (else the first :) and the @, as libiscsi reads it."""
        scheme, _, rest = source.partition(":")
        if scheme not in self.schemes:
            return source, {}
        if not rest.startswith("//"):
            return (f"{scheme}:{_UNREADABLE}" if "@" in rest else source), {}
        before, at, after = rest[2:].rpartition("@")
        if "?" in before:
            # libiscsi ends the address at the ?; what is behind may be a part of the secret.
            return f"{scheme}://{_UNREADABLE}", {}
        after = re.sub(r"([?&]target_password)(=[^&]*)?", rf"\1={_UNREADABLE}", after)
        found = re.fullmatch(r"([^%]*)%(.*)", before, re.DOTALL) or re.fullmatch(r"([^:]*):(.*)", before, re.DOTALL)
        if found is None:
            return f"{scheme}://{before}{at}{after}", {}
        user, password = found.groups()
        if not user or not password or "@" in before or not _is_text(before):
            return f"{scheme}://{_UNREADABLE}@{after}", {}
        return _with_user(scheme, user, after), {"password-file": password}

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """The CHAP secret of the user. Without one, QEMU uses none."""
        if not _read(location).user:
            return NO_REQUIREMENTS
        return Requirements(secrets=(Secret(PASSWORD, "password-file"),))

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Target and LUN: a target's name is unique in the world, and may be reached by several portals.

        In small letters, since targets should not tell names apart by case (RFC 3722).
        """
        unit = _read(location)
        return f"iscsi:{unit.target.lower()}/{unit.lun}"


def _refuse_option(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)


def _is_text(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in text


def _is_name(text: str) -> bool:
    return _NAME.fullmatch(text) is not None and len(text) <= _LONGEST_NAME


def _with_user(scheme: str, user: str, rest: str) -> str:
    """Return the source of a user; ``rest`` is what stands behind the @, and may have a query."""
    if not user:
        return f"{scheme}://{rest}"
    if _PLAIN_USER.fullmatch(user):
        return f"{scheme}://{user}@{rest}"
    return f"{scheme}://{rest}{'&' if '?' in rest else '?'}user={escaped(user, safe='')}"


def _read(source: str) -> _Unit:
    """Read a source, and leave out what it leaves out."""
    clean, _ = BACKEND.without_secrets(source)
    if clean != source:
        refuse(clean, "there is a secret in it", _BY_FILE)
    scheme, _, rest = source.partition(":")
    transport = "iser" if scheme == "iser" else "tcp"
    if not rest:
        return _Unit(transport)
    if rest.lstrip("/").startswith(_UNREADABLE):
        refuse(
            source, "libiscsi would read the user and the secret in it in another way, or not at all", _BY_FILE
        )
    if not rest.startswith("//"):
        refuse(source, "there is no // after the scheme", _FORMS)
    if "#" in rest:
        refuse(source, "there is a # in it", "a source of iSCSI has no fragment")
    before, question, query = rest[2:].partition("?")
    user_before, at, before = before.rpartition("@")
    if at and not _PLAIN_USER.fullmatch(user_before):
        refuse(source, "what stands before the @ is no user", "say another name with -o user=NAME")
    user = _user_of(query, source) if question else ""
    if user and user_before:
        refuse(source, "it names the user twice", "leave one of them out")
    authority, *path = before.split("/")
    host, port = authority_of(authority, source, DEFAULT_PORT)
    if len(path) > 2:
        refuse(source, "there is more in it than a target and a LUN", _FORMS)
    target, lun = (*path, "", "")[:2]
    return _Unit(
        transport, host, port, _target_of(unescaped(target, source), source) if target else "",
        _lun_of(lun, source) if lun else "", user or user_before,
    )


def _user_of(query: str, source: str) -> str:
    """Return the user that the query names; libiscsi has other words there, which QEMU ignores or dies of."""
    key, _, value = query.partition("=")
    if key in ("target_user", "target_password") or "target_user=" in query or "target_password=" in query:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "QEMU cannot ask a target for a secret of its own (mutual CHAP)",
            hint="leave target_user and target_password out",
        )
    if key == "header_digest":
        refuse(source, "QEMU does not read header_digest in a source", "say it with -o header-digest=")
    if key == "iser":
        refuse(source, "QEMU does not read iser in a query", "write iser:// instead of iscsi://")
    if key != "user" or not value or "&" in value or ";" in value:
        refuse(source, f"{query!r} means nothing here", "nothing but ?user=NAME may follow the LUN")
    return _checked_user(unescaped(value, source), source)


def _checked_user(user: str, source: str) -> str:
    if not user or not _is_text(user) or len(user.encode()) > _LONGEST_USER:
        refuse(source, "the user's name is empty, too long or no UTF-8", f"it has 1 to {_LONGEST_USER} bytes")
    return user


def _target_of(text: str, source: str) -> str:
    if not _is_name(text):
        refuse(source, f"{text!r} is no name of a target", "write it as the target tells it: iqn.YYYY-MM.DOMAIN:NAME")
    return text


def _lun_of(text: str, source: str) -> str:
    if not re.fullmatch(r"[0-9]{1,9}", text):
        refuse(source, f"{text!r} is no LUN", "a LUN is a number")
    number = int(text)
    if number <= _LAST_PLAIN or _FLAT + _LAST_PLAIN < number < 2 * _FLAT:
        return str(number)
    if number < _FLAT:
        refuse(
            source, f"LUN {number} is sent as another LUN: libiscsi knows no addressing method",
            f"write {_FLAT + number} for it ({_FLAT} + {number}, flat space addressing)",
        )
    if number <= _FLAT + _LAST_PLAIN:
        refuse(source, f"LUN {number} is another spelling of {number - _FLAT}", f"write {number - _FLAT}")
    refuse(source, f"{number} is no LUN", f"a LUN is a number up to {_LAST_PLAIN}, or from {_FLAT + 256}")


def _with_options(unit: _Unit, source: str, options: Mapping[str, str]) -> _Unit:
    """Return the LUN that source and options name together. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
    host, port = unit.host, unit.port
    if "portal" in options:
        host, port = authority_of(options["portal"], source, DEFAULT_PORT)
    read = {"target": _target_of, "lun": _lun_of, "user": _checked_user}
    found = {key: check(options[key], source) for key, check in read.items() if key in options}
    whole = _Unit(
        unit.transport, host, port, found.get("target", unit.target), found.get("lun", unit.lun),
        found.get("user", unit.user),
    )
    for key in _PARTS:
        said = {"portal": unit.host and unit.portal}.get(key, getattr(unit, key))
        if said and said != getattr(whole, key):
            _refuse_option(
                f"option {key}={options[key]!r} says another {key} than the source", "leave one of them out"
            )
    for key, what in (("host", "server"), ("target", "target"), ("lun", "LUN")):
        if not getattr(whole, key):
            refuse(
                source, f"it does not say which {what}",
                f"{_FORMS}, or say -o portal=HOST[:PORT], -o target=NAME and -o lun=NUMBER",
            )
    return whole


BACKEND = IscsiBackend()
