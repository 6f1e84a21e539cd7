"""What a user asks for: the desired state, the only thing that is stored for good."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Literal

import msgspec

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.health import Policy, parse_policy
from storaged.model.names import check_name

#: Options of the volume itself; a backend adds its own (see storaged/backends).
COMMON_OPTIONS = {
    "backing": "allow:PATH[:PATH…], the images and directories that backing files may come from",
    "backing-sources": "SOURCE[ SOURCE…], the sources on the network that backing files may be; one that ends in / "
    "stands for all below it",
    "cache": "none, writeback, writethrough, directsync or unsafe, as for QEMU; default writeback",
    "detect-zeroes": "off, on or unmap: what becomes of blocks of zeroes that are written; default off",
    "discard": "unmap, or ignore: what is discarded stays where it is; default unmap",
    "encrypt": "luks: the image of the format qcow2 is encrypted; needs key-file",
    "key-file": "where the passphrase of an encrypted image comes from: a file, credential:NAME, or - (standard input)",
    "logical-block-size": "512 or 4096; default 512",
    "on-hang": "what to do when QSD hangs: wait, restart-after:SECONDS or fail-after:SECONDS; default "
    "restart-after:30 where that loses nothing, else wait",
    "on-stall": "what to do when the storage below does not answer: wait, restart-after:SECONDS or "
    "fail-after:SECONDS; default wait",
    "snapshot-size": "the size that the overlay of --snapshot may grow to; default 10G",
}
#: Of those; a backend tells its own.
DEFAULTS = {
    "cache": "writeback", "detect-zeroes": "off", "discard": "unmap", "logical-block-size": "512", "on-stall": "wait",
}
#: Characters that source and options may have together. Some are read by patterns whose time grows with the square.
LONGEST_WISHES = 32 * 1024
CACHE_MODES = ("none", "writeback", "writethrough", "directsync", "unsafe")


class VolumeSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """One volume as wished for. Two attach requests mean the same when their specs are equal.

    What is as by default is not stored, so that an older daemon, which forbids what it does not know, reads all volumes
    that have nothing new. So no default may ever change.
    """

    name: str
    source: str
    format: Format = Format.RAW
    transport: str = "auto"
    read_only: bool = False
    snapshot: bool = False
    snapshot_dir: str | None = None
    options: dict[str, str] = {}
    persist: bool = False
    profile: str | None = None
    """Where some of the options came from: they are among ``options``, so that nothing is looked up again."""

    @property
    def writes_source(self) -> bool:
        """Whether the source itself is written to (a snapshot writes to its overlay only)."""
        return not (self.read_only or self.snapshot)

    @property
    def keeps_writes_in_memory(self) -> bool:
        """Whether QSD may hold what it has acknowledged in its own memory until the next flush.

        qcow2 does so with the table that says where a cluster is (block/qcow2-cache.c in QEMU); of the other formats
        it is not known that they do not. When QSD dies these writes are gone, and a later flush would not tell.
        """
        cache = self.options.get("cache", DEFAULTS["cache"])
        if self.read_only or cache in ("writethrough", "directsync"):
            return False
        if self.snapshot or self.format not in (Format.RAW, Format.LUKS):
            return True
        return caches_writes(self.source, direct=cache == "none")

    @property
    def allowed_backing(self) -> list[str]:
        """The files and directories that the user allows backing files to come from."""
        value = self.options.get("backing", "")
        return [path for path in value.removeprefix("allow:").split(":") if path]

    @property
    def logical_block_size(self) -> int:
        """Bytes."""
        return int(self.options.get("logical-block-size", "512"))

    @property
    def on_hang(self) -> Policy | None:
        """What the user wants done when QSD hangs, None where nothing was said."""
        return self._policy("on-hang")

    @property
    def on_stall(self) -> Policy | None:
        """What the user wants done when the storage below does not answer, None where nothing was said."""
        return self._policy("on-stall")

    def _policy(self, option: str) -> Policy | None:
        text = self.options.get(option)
        return None if text is None else parse_policy(text)


class Desired(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A spec and what shall become of it (storaged.model.plan.Goal).

    ``absent`` is stored while a detach is on its way; ``failing`` and ``released`` are what a rescue leads to.
    """

    version: Literal[1] = 1
    spec: VolumeSpec
    wanted: Literal["attached", "absent", "failing", "released"] = "attached"
    boot: str = ""
    """In which boot it was rescued (random(4), boot_id): after another there is nothing that could fail."""


#: Made here, once: see RECORDS in model/record.py.
DESIRES = msgspec.json.Decoder(Desired)


def caches_writes(source: str, *, direct: bool) -> bool:
    """Whether QEMU's driver for a source keeps acknowledged writes in memory; ``direct``: with cache=none."""
    try:
        backend = find_backend(source)
    except StoragedError:
        return False  # what is left of a volume of which nothing is known
    if not isinstance(backend, NetworkBackend):
        return False
    return backend.caches_direct or (backend.caches_writes and not direct)


def check_length(spec: VolumeSpec) -> None:
    """Raise INVALID_ARGUMENT where the wishes are too long for anything; before anybody reads them."""
    texts = [spec.source, spec.snapshot_dir or "", *spec.options.keys(), *spec.options.values()]
    if sum(map(len, texts)) > LONGEST_WISHES:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, "source and options are too long", volume=spec.name[:64],
            cause=f"they have more than {LONGEST_WISHES} characters together",
            hint="was the content of a file given for its name?",
        )


def check_spec(spec: VolumeSpec, further_options: Set[str]) -> None:
    """Raise INVALID_NAME or INVALID_ARGUMENT where the wishes make no sense together."""

    def refuse(message: str, hint: str) -> None:
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, message, volume=spec.name, hint=hint)

    check_name(spec.name)
    options = spec.options
    known = COMMON_OPTIONS.keys() | further_options
    for key in options:
        if key not in known:
            refuse(f"unknown option {key!r}", f"known here: {', '.join(sorted(known))}")
    backing = options.get("backing")
    if backing is not None:
        if not backing.startswith("allow:") or not spec.allowed_backing:
            refuse(f"option backing={backing!r} says nothing", "write backing=allow:/directory[:/another]")
        for path in spec.allowed_backing:
            if not path.startswith("/"):
                refuse(f"option backing: {path!r} is not an absolute path", "write the whole path")
    if options.get("cache", "writeback") not in CACHE_MODES:
        refuse(f"option cache={options['cache']!r} is unknown", f"use one of {', '.join(CACHE_MODES)}")
    for key, choices in (("discard", ("unmap", "ignore")), ("detect-zeroes", ("off", "on", "unmap"))):
        if options.get(key, choices[0]) not in choices:
            refuse(f"option {key}={options[key]!r} is unknown", f"use one of {', '.join(choices)}")
    if options.get("detect-zeroes") == "unmap" and options.get("discard") == "ignore":
        refuse("option detect-zeroes=unmap and discard=ignore exclude each other", "leave one of them out")
    if options.get("logical-block-size", "512") not in ("512", "4096"):
        refuse(f"option logical-block-size={options['logical-block-size']!r}", "use 512 or 4096")
    for key in ("on-hang", "on-stall"):
        try:
            parse_policy(options.get(key, "wait"))
        except StoragedError as error:
            refuse(f"option {key}={options[key]!r} is unknown", error.hint)
    key_file = options.get("key-file")
    if spec.format is Format.LUKS and key_file is None:
        refuse("a luks image needs its passphrase", "say -o key-file=PATH")
    encrypt = options.get("encrypt")
    if encrypt is not None and (encrypt, spec.format) != ("luks", Format.QCOW2):
        refuse(
            f"option encrypt={encrypt!r} with the format {spec.format}",
            "say encrypt=luks and --format qcow2; an encrypted raw image is --format luks",
        )
    if encrypt is not None and key_file is None:
        refuse("an encrypted image needs its passphrase", "say -o key-file=PATH")
    if key_file is not None and spec.format is not Format.LUKS and encrypt is None:
        refuse(f"a {spec.format} image takes no key-file", "leave it out, or say --format luks, or --encrypt luks")
    if spec.snapshot and spec.read_only:
        refuse("--snapshot and --read-only exclude each other", "a snapshot is writable, its source never is")
    if not spec.snapshot and (spec.snapshot_dir is not None or "snapshot-size" in options):
        refuse("a snapshot directory or size without --snapshot", "add --snapshot or leave them out")
    if spec.snapshot_dir is not None and not spec.snapshot_dir.startswith("/"):
        refuse(f"snapshot directory {spec.snapshot_dir!r} is not an absolute path", "write the whole path")
    texts = [spec.source, spec.snapshot_dir or "", *options.keys(), *options.values()]
    if any(not _is_utf8(text) for text in texts):
        refuse("a source or option is no UTF-8", "QMP and JSON can carry nothing else: rename it")
    if any("\0" in text for text in texts):
        refuse("a source or option holds a NUL character", "leave it out")


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def without_defaults(spec: VolumeSpec, further: Mapping[str, str]) -> VolumeSpec:
    """Return the spec without options that only repeat their default: the same wish, said in one way.

    ``further`` are the defaults of the backend. With a profile a default is what keeps the profile's value away, also
    where a client attaches what it was shown.
    """
    if spec.profile is not None:
        return spec
    defaults = {**DEFAULTS, **further}
    options = {key: value for key, value in spec.options.items() if defaults.get(key) != value}
    return msgspec.structs.replace(spec, options=options)


def difference(present: VolumeSpec, wanted: VolumeSpec) -> str:
    """Say in which wishes two specs differ."""
    fields = [field for field in VolumeSpec.__struct_fields__ if getattr(present, field) != getattr(wanted, field)]
    return "; ".join(f"{field} is {getattr(present, field)!r}, not {getattr(wanted, field)!r}" for field in fields)
