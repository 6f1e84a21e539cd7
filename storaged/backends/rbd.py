"""QEMU's ``rbd`` driver: an image of a Ceph cluster, by librbd. block/rbd.c in QEMU, doc/rbd/qemu-rbd.rst in Ceph.

The spelling is QEMU's (qemu_rbd_parse_filename), ``rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:OPTION=VALUE…]``, where a
backslash takes the meaning from the character behind it. QEMU gave every option to Ceph; QMP has few of them. The
others, and what bounds the opening, reach librados by CEPH_ARGS in QSD's environment, which it reads when it is
initialized (rados_create_cct in src/librados/librados_c.cc, md_config_t::parse_env): it counts more than the
configuration file. Ceph ignores there what it does not know, so only known options with good values are passed on.
"""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

from storaged.backends.base import Inquiry, NetworkDefaults, Node, Requirements, Secret
from storaged.backends.cache import cache_flags
from storaged.backends.uri import authority_of, bare_host, refuse
from storaged.backends.values import check_choices, check_numbers
from storaged.errors import ErrorCode, StoragedError
from storaged.model.powers import Powers

DEFAULT_USER = "admin"
#: Where Ceph looks for its configuration and its keyrings.
_CEPH, _CEPH_DATA = "/etc/ceph", "/var/lib/ceph"
OPEN_TIMEOUT = 10
#: Seconds after which a request of the program rbd fails.
_INQUIRY = "10"
#: QSD's monitor stands still while it opens: not for longer than a user would wait.
_LONGEST_OPEN = 60
_LONGEST_REQUEST = 86400
_LIMITS = {"open-timeout": (1, _LONGEST_OPEN), "request-timeout": (0, _LONGEST_REQUEST)}
ENCRYPTIONS = ("luks", "luks2")
#: The ids of the secrets.
CEPHX_KEY = "cephx-key"
PASSPHRASE = "rbd-passphrase"
#: Ports of monitors: msgr2, and the protocol before it. Without a port Ceph tries both (MonMap::_add_ambiguous_addr).
_PORTS = {"v2": 3300, "v1": 6789}

#: The cache modes in which a flush of the user reaches librbd: the others must not have its cache.
_FLUSHED = ("writeback", "writethrough")
_TRUE, _FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")
_NUMBER = r"[0-9]{1,18}"
_BOOLEAN = "|".join((*_TRUE, *_FALSE))
#: Options of Ceph that a source may have, and their values. None that says what the data is.
_SETTINGS = {
    "client_mount_timeout": _NUMBER,
    "keyring": r"/[A-Za-z0-9_./@+-]+",
    "objecter_inflight_op_bytes": _NUMBER,
    "objecter_inflight_ops": _NUMBER,
    "rados_osd_op_timeout": _NUMBER,
    "rbd_cache_max_dirty": _NUMBER,
    "rbd_cache_max_dirty_age": r"[0-9]{1,9}(\.[0-9]{1,6})?",
    "rbd_cache_max_dirty_object": _NUMBER,
    "rbd_cache_policy": "writethrough|writeback|writearound",
    "rbd_cache_size": _NUMBER,
    "rbd_cache_target_dirty": _NUMBER,
    "rbd_cache_writethrough_until_flush": _BOOLEAN,
    "rbd_concurrent_management_ops": _NUMBER,
    "rbd_read_from_replica_policy": "default|balance|localize",
    "rbd_readahead_disable_after_bytes": _NUMBER,
    "rbd_readahead_max_bytes": _NUMBER,
    "rbd_readahead_trigger_requests": _NUMBER,
    "rbd_skip_partial_discard": _BOOLEAN,
}
#: Those of them that are options (-o) as well.
_SAME = {"open-timeout": "client_mount_timeout", "request-timeout": "rados_osd_op_timeout"}
#: Names of one thing: Ceph took the second for the first long ago, and libvirt still writes it.
_AUTH = ("auth_client_required", "auth_supported")
_AUTH_MODES = ("cephx", "none")
#: Ceph splits the name of a configuration file at the first five, and replaces what begins with the last.
_BAD_IN_CONF = ";,= \t$"

_FORMS = "write rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT][:id=USER][:conf=FILE]"
_ESCAPE = "a \\ before : @ = / takes their meaning away"


@dataclass(frozen=True)
class _Image:
    """An image of a cluster, and how the cluster is reached; what is not said is empty."""

    pool: str = ""
    namespace: str = ""
    image: str = ""
    snapshot: str = ""
    user: str = ""
    conf: str = ""
    monitors: tuple[str, ...] = ()
    """HOST:PORT each, an IPv6 address in brackets; sorted."""
    auth: tuple[str, ...] = ()
    settings: tuple[tuple[str, str], ...] = ()
    """Sorted by name."""

    @property
    def name(self) -> str:
        """POOL[/NAMESPACE]/IMAGE[@SNAPSHOT], escaped."""
        path = "/".join(_escaped(part, ":@=/") for part in (self.pool, self.namespace, self.image) if part)
        return f"{path}@{_escaped(self.snapshot, ':@=/')}" if self.snapshot else path

    def __str__(self) -> str:
        said = {
            "id": self.user if self.user != DEFAULT_USER else "", "conf": self.conf,
            "mon_host": ",".join(self.monitors), _AUTH[0]: ",".join(self.auth), **dict(self.settings),
        }
        return f"rbd:{self.name}" + "".join(f":{key}={_escaped(text, ':@=')}" for key, text in said.items() if text)


class RbdBackend(NetworkDefaults):
    """An image of a Ceph cluster."""

    name = "rbd"
    schemes = ("rbd",)
    example = "rbd:POOL[/NAMESPACE]/IMAGE[@SNAPSHOT]"
    options: Mapping[str, str] = {
        "pool": "the pool, where the source does not say it",
        "namespace": "the namespace of the pool, where the source does not say it",
        "image": "the image, where the source does not say it",
        "rbd-snapshot": "a snapshot of the image, where the source does not say it; needs --read-only or --snapshot",
        "user": f"the Ceph user, without client.; default {DEFAULT_USER}",
        "conf": "Ceph's configuration file; default: /etc/ceph/ceph.conf, if it is there",
        "mon-host": "HOST[:PORT][,HOST[:PORT]…] of the monitors, instead of those that the file names",
        "cephx-key-file": "where the user's cephx key (base64) comes from: a file, credential:NAME, or - (standard "
        "input); default: Ceph's keyring",
        "rbd-encrypt": "luks or luks2: the image was encrypted by rbd encryption format; needs rbd-key-file",
        "rbd-key-file": "where its passphrase comes from: a file, credential:NAME, or - (standard input)",
        "open-timeout": "seconds until monitors that do not answer are given up, 1 to "
        f"{_LONGEST_OPEN}; default {OPEN_TIMEOUT}",
        "request-timeout": "seconds until a request that no OSD answers fails, 0: it waits; default 0",
    }
    defaults: Mapping[str, str] = {"open-timeout": str(OPEN_TIMEOUT), "request-timeout": "0"}
    secret_options = ("cephx-key-file", "rbd-key-file")
    #: librbd's cache is in QSD.
    caches_writes = True
    #: All OSDs of the data have it in their journals then.
    safe_when_acknowledged = True

    def parse(self, source: str, options: Mapping[str, str]) -> str:
        """Return the image with all that says how it is reached. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
        image, rbd_cache = _read(source)
        if "cache" in options:
            _check_cache(rbd_cache, dict(image.settings).get("rbd_cache_policy"), options["cache"])
        return str(_with_options(image, source, options))

    def check_options(self, options: Mapping[str, str]) -> None:
        """Those that have nothing to do with the source."""
        check_numbers(options, _LIMITS)
        check_choices(options, {"rbd-encrypt": ENCRYPTIONS})
        if ("rbd-encrypt" in options) != ("rbd-key-file" in options):
            _refuse_option(
                "rbd-encrypt and rbd-key-file go together", "say both; for an image of the format luks it is key-file"
            )

    def node(self, location: str, *, read_only: bool, options: Mapping[str, str]) -> Node:
        """BlockdevOptionsRbd. Raises INVALID_ARGUMENT for a snapshot that shall be written to."""
        image = _image_of(location)
        if image.snapshot and not read_only:
            _refuse_option(
                "a snapshot of an rbd image can only be read",
                "attach it with --read-only, or with --snapshot: what is written is then kept here until the detach",
            )
        said: Node = {
            "namespace": image.namespace, "snapshot": image.snapshot, "conf": image.conf, "user": image.user,
            "server": [_server(monitor) for monitor in image.monitors], "auth-client-required": list(image.auth),
            "key-secret": CEPHX_KEY if "cephx-key-file" in options else "",
        }
        if "rbd-encrypt" in options:
            said["encrypt"] = {"format": options["rbd-encrypt"], "key-secret": PASSPHRASE}
        flags = cache_flags(options)
        return {
            "driver": "rbd",
            "pool": image.pool,
            "image": image.image,
            **{key: value for key, value in said.items() if value},
            "read-only": read_only,
            "discard": "unmap",
            # Not direct: QEMU switches librbd's cache on, whatever Ceph's configuration says (qemu_rbd_connect).
            "cache": {**flags, "direct": options.get("cache", "writeback") not in _FLUSHED},
        }

    def without_secrets(self, source: str) -> tuple[str, dict[str, str]]:
        """Take out ``:key=…``, the cephx key. (Of several, Ceph takes the last.)"""
        scheme, colon, rest = source.partition(":")
        kept: list[str] = []
        found: dict[str, str] = {}
        for part in _split(rest, ":"):
            key, equals, value = _setting(part)
            if key == "key" and equals and value:
                found["cephx-key-file"] = value
            else:
                kept.append(part)
        return (scheme + colon + ":".join(kept), found) if found else (source, {})

    def requirements(self, location: str, options: Mapping[str, str]) -> Requirements:
        """The secrets, and Ceph's options that QMP has not."""
        settings = {
            "client_mount_timeout": options.get("open-timeout", str(OPEN_TIMEOUT)),
            "rados_osd_op_timeout": options.get("request-timeout", "0"),
            **dict(_image_of(location).settings),
        }
        if options.get("cache") == "writethrough":
            # Each write is followed by a flush anyway (the export's writethrough), which then has nothing to do.
            settings["rbd_cache_policy"] = "writethrough"
        secrets = [
            Secret(id, option, encoded=encoded)
            for id, option, encoded in ((CEPHX_KEY, "cephx-key-file", True), (PASSPHRASE, "rbd-key-file", False))
            if option in options
        ]
        arguments = " ".join(f"--{key}={value}" for key, value in sorted(settings.items()))
        return Requirements(secrets=tuple(secrets), environment={"CEPH_ARGS": arguments})

    def powers(self, location: str, options: Mapping[str, str]) -> Powers:
        """Ceph's configuration, and its keyrings where no key is given, which are root's or ceph's."""
        conf = _image_of(location).conf
        keyrings = "cephx-key-file" not in options
        return Powers(
            capabilities=frozenset({"DAC_READ_SEARCH"} if keyrings else ()),
            reads=(_CEPH, *((conf, posixpath.dirname(conf)) if conf else ()), *((_CEPH_DATA,) if keyrings else ())),
            keyrings_of=(conf or f"{_CEPH}/ceph.conf",) if keyrings else (), files=((conf, False),) if conf else (),
        )

    def inquiries(self, location: str, options: Mapping[str, str]) -> tuple[Inquiry, ...]:
        """An image that was removed and made anew has other objects; a snapshot another number."""
        image = _image_of(location)
        said = {
            "--conf": image.conf, "--id": image.user, "--mon-host": ",".join(image.monitors),
            "--auth-client-required": ",".join(image.auth), "--pool": image.pool, "--namespace": image.namespace,
            "--image": image.image,
        }
        words = tuple(word for key, value in said.items() if value for word in (key, value))

        def asked(*command: str, understand: Callable[[bytes], str]) -> Inquiry:
            return Inquiry(
                "rbd", "ceph-common", (*command, "--format", "json", *words), understand,
                secret_files={"cephx-key-file": "--keyfile"} if "cephx-key-file" in options else {},
                # It ends by itself, even if nobody is there any more to end it.
                environment=self.requirements(location, {**options, "request-timeout": _INQUIRY}).environment,
            )

        def number_of_snapshot(text: bytes) -> str:
            return str({found["name"]: int(found["id"]) for found in json.loads(text)}[image.snapshot])

        about = asked("info", understand=lambda text: str(json.loads(text)["block_name_prefix"]))
        return (about, asked("snap", "ls", understand=number_of_snapshot)) if image.snapshot else (about,)

    def identity(self, location: str, real_path: Callable[[str], str]) -> str:
        """Pool, namespace, image and snapshot. Not the cluster: nothing says of two files or of two lists of monitors
        that they are of two clusters.
        """
        return f"rbd:{_image_of(location).name}"


def _refuse_option(message: str, hint: str) -> NoReturn:
    raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, hint=hint)


# Backslashes, as qemu_rbd_next_tok and qemu_rbd_unescape read them: one at the very end stands for itself.


def _split(text: str, delimiter: str) -> list[str]:
    """Split at each delimiter that has its meaning; the parts keep their backslashes."""
    parts, begin, at = [], 0, 0
    while at < len(text):
        if text[at] == delimiter:
            parts.append(text[begin:at])
            begin = at + 1
        at += 2 if text[at] == "\\" else 1
    return [*parts, text[begin:]]


def _unescaped(part: str) -> str:
    return re.sub(r"\\(.)", r"\1", part, flags=re.DOTALL)


def _escaped(text: str, special: str) -> str:
    return re.sub(rf"[\\{re.escape(special)}]", r"\\\g<0>", text)


def _setting(part: str) -> tuple[str, bool, str]:
    """Return the name of an option as Ceph compares it (ConfFile::normalize_key_name), whether it has a value, and it.

    In small letters: an option that is called so is none, but what is behind it may be a secret.
    """
    name, *value = _split(part, "=")
    key = re.sub(r"[ \t_-]+", "_", _unescaped(name).strip()).lower()
    return key, bool(value), _unescaped("=".join(value))


def _read(source: str) -> tuple[_Image, bool | None]:
    """Read a source, without what it leaves out; and what it says of rbd_cache. Raises INVALID_SOURCE."""
    clean, secrets = BACKEND.without_secrets(source)
    if secrets:
        refuse(clean, "there was a key in it", "leave :key= out of the source, and say -o cephx-key-file=PATH")
    _check_text(source, source)
    rest = source.removeprefix("rbd:")
    if not rest:
        return _Image(), None
    path, *settings = _split(rest, ":")
    before, *snapshots = _split(path, "@")
    if len(snapshots) > 1:
        refuse(source, "there is more than one @ in the name", _ESCAPE)
    names = _split(before, "/")
    if not 2 <= len(names) <= 3:
        refuse(source, "it does not name a pool and an image", f"{_FORMS}; {_ESCAPE}")
    if any(len(_split(snapshot, "/")) > 1 for snapshot in snapshots):
        refuse(source, "there is a / in the name of the snapshot", _ESCAPE)
    parts = [_unescaped(name) for name in (*names, *snapshots)]
    if not all(parts):
        refuse(source, "one of its names is empty", _FORMS)
    image = _Image(
        pool=parts[0], namespace=parts[1] if len(names) == 3 else "", image=parts[len(names) - 1],
        snapshot=parts[-1] if snapshots else "",
    )
    return _with_settings(image, settings, source)


def _image_of(location: str) -> _Image:
    return _read(location)[0]


def _check_text(text: str, source: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        refuse(source, "it is no UTF-8", "QMP can carry nothing else: rename it")
    if not text.isprintable():
        refuse(source, "it holds a character that cannot be printed", "rename it")


def _with_settings(image: _Image, parts: list[str], source: str) -> tuple[_Image, bool | None]:
    found: dict[str, str] = {}
    for part in parts:
        key, equals, value = _setting(part)
        if not equals or not key or not value:
            refuse(source, f"{part!r} is no OPTION=VALUE", f"{_FORMS}; {_ESCAPE}")
        if len(_split(part, "@")) > 1:
            # QEMU would look for the snapshot there.
            refuse(source, f"there is an @ in {part!r}", r"write \@ there")
        key = _AUTH[0] if key in _AUTH else key
        if found.setdefault(key, value) != value:
            refuse(source, f"it says {key} twice", "leave one of them out")
    rbd_cache = None
    settings: dict[str, str] = {}
    for key, value in found.items():
        if key == "id":
            image = replace(image, user=_user_of(value, source))
        elif key == "conf":
            image = replace(image, conf=_conf_of(value, source))
        elif key == "mon_host":
            image = replace(image, monitors=_monitors_of(value, source))
        elif key == _AUTH[0]:
            image = replace(image, auth=_auth_of(value, source))
        elif key == "rbd_cache":
            if value not in (*_TRUE, *_FALSE):
                refuse(source, f"rbd_cache={value!r} is neither true nor false", "leave it out: --cache decides")
            rbd_cache = value in _TRUE
        elif key not in _SETTINGS:
            refuse(
                source, f"the option {key} of Ceph is not taken from a source",
                f"write it into a configuration file for :conf=FILE; those that are: {', '.join(_SETTINGS)}",
            )
        elif not re.fullmatch(_SETTINGS[key], value):
            refuse(source, f"{key}={value!r} cannot be", f"it is one that matches {_SETTINGS[key]}")
        else:
            settings[key] = value
    for option, key in _SAME.items():
        if key in settings:
            check_numbers({option: settings[key]}, _LIMITS)
            settings[key] = str(int(settings[key]))
    return replace(image, settings=tuple(sorted(settings.items()))), rbd_cache


def _user_of(text: str, source: str) -> str:
    if text.startswith("client."):
        refuse(source, "Ceph would look for the user client." + text, f"write {text.removeprefix('client.')!r}")
    return "" if text == DEFAULT_USER else text


def _conf_of(text: str, source: str) -> str:
    if not text.startswith("/"):
        refuse(source, f"the path {text!r} of the configuration file is not absolute", "write the whole path")
    if any(character in text for character in _BAD_IN_CONF):
        refuse(
            source, f"Ceph would read the path {text!r} in another way",
            "reach the file by a path without spaces and , ; = $, such as a symbolic link",
        )
    return text


def _auth_of(text: str, source: str) -> tuple[str, ...]:
    modes = tuple(filter(None, re.split(r"[;, ]+", text)))
    if not modes or not set(modes) <= set(_AUTH_MODES):
        refuse(source, f"{text!r} is no list of {' and '.join(_AUTH_MODES)}", "Ceph knows no other ways to log in")
    return tuple(dict.fromkeys(modes))


def _monitors_of(text: str, source: str) -> tuple[str, ...]:
    """HOST[:PORT], v2:HOST:PORT, [v2:HOST:PORT,v1:HOST:PORT] as Ceph takes them (entity_addr_t::parse).

    QMP cannot say the protocol; Ceph tells it by the port, and tries both where it is neither's.
    """
    plain = re.sub(r"\[(v[12]:(?:[^\[\]]|\[[^\[\]]*\])*)\]", r"\1", text)
    found = set()
    for part in filter(None, re.split(r"[;, ]+", plain)):
        match = re.fullmatch(r"(?:(v[12]):)?(.*?)(?:/0)?", part)
        assert match is not None
        protocol, address = match.groups()
        host, port = authority_of(address, source, 0)
        ports = [port] if port else [_PORTS[protocol]] if protocol else list(_PORTS.values())
        found |= {f"{host}:{number}" for number in ports}
    if not found:
        refuse(source, "it names no monitor", "write mon_host=HOST[:PORT][,HOST[:PORT]…]")
    return tuple(sorted(found))


def _server(monitor: str) -> Node:
    host, _, port = monitor.rpartition(":")
    return {"host": bare_host(host), "port": port}


def _check_cache(rbd_cache: bool | None, policy: str | None, mode: str) -> None:
    """Ceph's rule: rbd_cache=true needs a cache mode that flushes; QEMU switches the cache as the mode says, so
    whatever else the source says would not come true.
    """
    on = mode in _FLUSHED
    if rbd_cache and not on:
        _refuse_option(
            f"rbd_cache=true and cache={mode} contradict: nothing would flush librbd's cache",
            "leave rbd_cache out, or say --cache writeback",
        )
    if rbd_cache is False and on:
        _refuse_option(
            f"rbd_cache=false and cache={mode} contradict: QEMU would switch librbd's cache on", "say --cache none"
        )
    if mode == "writethrough" and policy not in (None, "writethrough"):
        _refuse_option(f"rbd_cache_policy={policy} and cache=writethrough contradict", "leave rbd_cache_policy out")


def _with_options(image: _Image, source: str, options: Mapping[str, str]) -> _Image:
    """Return the image that source and options name together. Raises INVALID_SOURCE, INVALID_ARGUMENT."""
    for key in ("pool", "namespace", "image", "rbd-snapshot", "user", "conf", "mon-host"):
        if key in options:
            _check_text(options[key], source)
            if not options[key]:
                _refuse_option(f"option {key} is empty", "leave it out")
    whole = replace(
        image,
        pool=options.get("pool", image.pool),
        namespace=options.get("namespace", image.namespace),
        image=options.get("image", image.image),
        snapshot=options.get("rbd-snapshot", image.snapshot),
        user=_user_of(options["user"], source) if "user" in options else image.user,
        conf=_conf_of(options["conf"], source) if "conf" in options else image.conf,
        monitors=_monitors_of(options["mon-host"], source) if "mon-host" in options else image.monitors,
    )
    parts = {"rbd-snapshot": "snapshot", "mon-host": "monitors"}
    for key in ("pool", "namespace", "image", "rbd-snapshot", "user", "conf", "mon-host"):
        part = parts.get(key, key)
        said = getattr(image, part)
        if said and said != getattr(whole, part):
            _refuse_option(f"option {key}={options[key]!r} contradicts the source", "leave one of them out")
    settings = dict(image.settings)
    for option, key in _SAME.items():
        if option in options and key in settings and int(options[option]) != int(settings[key]):
            _refuse_option(f"option {option} contradicts {key} in the source", "leave one of them out")
    if not whole.pool or not whole.image:
        refuse(source, "it does not name a pool and an image", f"{_FORMS}, or say -o pool=POOL and -o image=IMAGE")
    return whole


BACKEND = RbdBackend()
