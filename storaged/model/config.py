"""The daemon's configuration, storaged.toml: every key with its type, its limits and what it means.

storaged.toml(5), the JSON schema, ``storaged config check`` and the reload are made from this file.
"""

from __future__ import annotations

from enum import Enum
from ipaddress import ip_address
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta

#: The key of Meta.extra that says from when on a changed value counts. Without it the daemon has to be restarted.
AT_ONCE = "at_once"
ABSOLUTE = "^/"
_REQUESTS = {AT_ONCE: "for the requests that come after it"}
_STARTS = {AT_ONCE: "for every qemu-storage-daemon that is started after it"}
#: Of a value None, the limits stand with the type inside: msgspec takes them only there.
AbsolutePath = Annotated[str, Meta(pattern=ABSOLUTE)]


class QsdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which program serves the volumes."""

    binary: Annotated[str, Meta(
        min_length=1, extra=_STARTS, description="the qemu-storage-daemon to use: a name in PATH, or a path",
    )] = "qemu-storage-daemon"
    binaries: Annotated[dict[str, str], Meta(
        extra=_STARTS,
        description='another one for the sources of some backends: a table of backend and program, as'
        ' { vitastor = "/opt/vitastor/bin/qemu-storage-daemon" }',
    )] = {}

    sandbox: Annotated[bool, Meta(
        extra=_STARTS,
        description="whether every qemu-storage-daemon is kept to what its volume needs (user, capabilities, files,"
        " system calls); without it, it may do all that the daemon may",
    )] = True

    def binary_for(self, backend: str) -> str:
        """The program that serves a backend's volumes."""
        return self.binaries.get(backend, self.binary)


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where Prometheus gets its metrics."""

    listen: Annotated[str | None, Meta(
        description="where metrics are served: ADDRESS:PORT, an IPv6 address in brackets; nowhere if it is not said",
    )] = None
    web_config: Annotated[AbsolutePath | None, Meta(
        description="the file with certificates and passwords for that address, an absolute path, in the format of"
        " Prometheus' exporters; needed beyond localhost. Its content may change at any time",
    )] = None

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``. Raises ValueError."""
        host, colon, port = (self.listen or "").rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError("it must be ADDRESS:PORT")
        bracketed = host.startswith("[") and host.endswith("]")
        found = ip_address(host[1:-1] if bracketed else host)
        if bracketed != (found.version == 6):
            raise ValueError("an IPv6 address, and no other, stands in brackets")
        return str(found), int(port)

    def problem(self) -> tuple[str, str] | None:
        """What is wrong with ``listen``, and a hint: no address, or one that all could read without being told so."""
        if self.listen is None:
            return None
        try:
            host, _ = self.address
        except ValueError as error:
            return str(error), "give an address and a port, as 127.0.0.1:9929 or [::1]:9929"
        if self.web_config is not None or ip_address(host).is_loopback:
            return None
        return (
            "whoever reaches that address could read the metrics, and web_config is missing",
            "name a file with passwords and certificates; an empty one says that everybody may",
        )


class AccessConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who may use the daemon beside root and the members of ``socket_group``."""

    read_only: Annotated[Literal["nobody", "everybody"] | list[Annotated[str, Meta(min_length=1)]], Meta(
        description="who may look at the volumes (list, show, watch) and change nothing: nobody, everybody, or a list"
        " of groups. They see where the data is, the options and all errors, and no secret",
    )] = "nobody"

    @property
    def groups(self) -> list[str]:
        """The groups whose members may look."""
        return self.read_only if isinstance(self.read_only, list) else []


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """storaged.toml. Times in seconds."""

    qsd: QsdConfig = QsdConfig()
    metrics: MetricsConfig = MetricsConfig()
    access: AccessConfig = AccessConfig()
    attach_timeout: Annotated[float, Meta(
        gt=0, le=86400, extra=_REQUESTS,
        description="seconds that an attach, a resize, a resume or an upgrade may take",
    )] = 30.0
    detach_timeout: Annotated[float, Meta(
        gt=0, le=86400, extra=_REQUESTS, description="seconds that a detach or a rescue may take",
    )] = 30.0
    snapshot_dir: Annotated[AbsolutePath | None, Meta(
        extra={AT_ONCE: "for the snapshots that are attached after it"},
        description="the directory of the overlays of --snapshot, an absolute path;"
        " where nothing is said it is below the state directory",
    )] = None
    socket_group: Annotated[Annotated[str, Meta(min_length=1)] | None, Meta(
        description="the group whose members may use the daemon, which makes them as good as root;"
        " where nothing is said, the daemon's own group",
    )] = None
    log_level: Annotated[Literal["debug", "info", "warning", "error"], Meta(
        extra={AT_ONCE: "for what is logged after it"},
        description="how much the daemon logs: debug, info, warning or error",
    )] = "info"


class Key:
    """A key of the file, by its name with that of its table (``qsd.binary``)."""

    def __init__(self, table: tuple[str, ...], name: str, annotation: Any, default: object) -> None:
        self.table = table
        self.name = name
        self.type = annotation
        self.default = default
        metas = [meta for meta in getattr(annotation, "__metadata__", ()) if isinstance(meta, Meta)]
        self.description = next((meta.description for meta in metas if meta.description), "")
        self.at_once = next((str(meta.extra[AT_ONCE]) for meta in metas if meta.extra and AT_ONCE in meta.extra), "")

    @property
    def choices(self) -> str:
        """What it may be, where that is a list."""
        inner = get_args(self.type)[0] if get_origin(self.type) is Annotated else self.type
        if isinstance(inner, type) and issubclass(inner, Enum):
            return ", ".join(inner)
        kinds = get_args(inner) if get_origin(inner) is Union else (inner,)
        words = [word for kind in kinds if get_origin(kind) is Literal for word in get_args(kind)]
        lists = ["a list"] if words and any(get_origin(kind) is list for kind in kinds) else []
        return ", ".join([*words, *lists])

    @property
    def path(self) -> tuple[str, ...]:
        """The tables, outermost first, and the name."""
        return (*self.table, self.name)

    def __str__(self) -> str:
        return ".".join(self.path)

    def value_in(self, config: Config) -> object:
        """What a configuration has for it."""
        value: object = config
        for name in self.path:
            value = getattr(value, name)
        return value


def keys(struct: type[msgspec.Struct] = Config, table: tuple[str, ...] = ()) -> list[Key]:
    """All keys, those of the tables after the others."""
    hints = get_type_hints(struct, include_extras=True)
    plain, nested = [], []
    for field in msgspec.structs.fields(struct):
        annotation = hints[field.name]
        if is_table(annotation):
            nested += keys(annotation, (*table, field.name))
        else:
            default = field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()
            plain.append(Key(table, field.name, annotation, default))
    return plain + nested


def is_table(annotation: Any) -> bool:
    """Whether a field with that type is a table of the file."""
    return isinstance(annotation, type) and issubclass(annotation, msgspec.Struct)


def tables(top: type[msgspec.Struct] = Config) -> dict[tuple[str, ...], type[msgspec.Struct]]:
    """All tables by their names; () is the file itself."""
    found: dict[tuple[str, ...], type[msgspec.Struct]] = {}

    def visit(struct: type[msgspec.Struct], path: tuple[str, ...]) -> None:
        found[path] = struct
        for name, annotation in get_type_hints(struct, include_extras=True).items():
            if is_table(annotation):
                visit(annotation, (*path, name))

    visit(top, ())
    return found


def schema() -> dict[str, Any]:
    """Return the JSON schema (draft 2020-12) of the file, as editors and configuration management check it."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "storaged.toml",
        **msgspec.json.schema(Config),
    }
