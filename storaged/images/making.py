"""Makes images: ``create``, and ``convert``, which makes one and fills it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import msgspec

from storaged.backends import find_backend
from storaged.errors import ErrorCode, StoragedError
from storaged.images import arguments, operand, remotecreate
from storaged.images.commands import Task, flush, opened, virtual_size
from storaged.images.newfile import is_there, new_file
from storaged.images.operand import Operand, Wish
from storaged.images.process import run
from storaged.images.provide import Provided, provided
from storaged.images.timing import trials
from storaged.images.workspace import Workspace, workspace
from storaged.model.formats import COPY_ON_WRITE, Format
from storaged.model.sizes import parse_size
from storaged.supervisor import opening

#: Options that say that an image of another format is encrypted.
_ENCRYPTED = frozenset({"encrypt", "rbd-encrypt"})


@dataclass(frozen=True)
class Backing:
    """The backing file that a new image shall name."""

    path: str
    """Absolute."""
    format: Format


@dataclass(frozen=True)
class Manner:
    """How ``convert`` shall do it."""

    into: bool = False
    """Write into an image that is there (``-n``)."""
    compress: bool = False
    snapshot: str | None = None
    """Of the source: the snapshot within the image that is read."""
    coroutines: int | None = None
    out_of_order: bool = False
    rate: str | None = None


def create(task: Task, wish: Wish, size: str | None, backing: Backing | None) -> None:
    """Make an image of ``size``, by default that of its backing file.

    Raises INVALID_ARGUMENT where something is there already.
    """
    one = operand.named(wish, writable=True)
    _refuse_backing(one, backing)
    if size is None and backing is None:
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, "an image needs a size", hint="say one: 10G")
    with workspace(task.layout) as place:
        length = parse_size(size) if size is not None else _size_of(task, _below(backing, one), place)
        with _made(task, one, length, backing, place):
            pass


def convert(task: Task, wish: Wish, target: Wish, manner: Manner, backing: Backing | None) -> bool:
    """Copy the disk in an image into another, which is made unless it is there.

    With ``backing``, what the top image of the source does not have itself is left to that file. Return whether it
    wrote into something that was there before.
    """
    source = operand.look(wish, writable=False)
    operand.refuse_creation_options(source)
    made = operand.named(target, writable=True)
    _refuse_backing(made, backing)
    with workspace(task.layout) as place:
        with opened(task, [source], place=place) as given:
            size = virtual_size(source, given)
        with _target(task, made, size, backing, place, manner, source) as (full, is_new):
            with opened(task, [source, full], place=place) as given:
                words = ["-n", "-O", str(full.spec.format), *_words(manner, backing, is_new=is_new, target=full)]
                names = [given.names[one.spec.name] for one in (source, full)]
                # A new file goes with the failure. What was made behind a server, QEMU cannot remove.
                stays = full.local_path is None or not is_new

                def spoilt() -> None:
                    if stays:
                        task.spoilt(full.shown())

                task.doing(f"converting {source.shown()}")
                run("convert", [*words, *names], given, progress=task.progress, spoilt=spoilt)
                try:
                    flush(given.nodes[full.spec.name])
                except BaseException:
                    spoilt()
                    raise
            return not is_new


def _words(manner: Manner, backing: Backing | None, *, is_new: bool, target: Operand) -> list[str]:
    words = []
    if backing is not None:
        words += ["-B", backing.path, "-F", str(backing.format)]
    elif is_new and target.spec.format is not Format.LUKS and not _ENCRYPTED & target.spec.options.keys():
        # What was just made has no other content; zeroes need not be written. (Under encryption they are not zeroes.)
        words.append("--target-is-zero")
    if manner.compress:
        words.append("-c")
    if manner.snapshot is not None:
        words += ["-l", f"snapshot.name={manner.snapshot.replace(',', ',,')}"]
    if manner.coroutines is not None:
        words += ["-m", str(manner.coroutines)]
    if manner.out_of_order:
        words.append("-W")
    if manner.rate is not None:
        words += ["-r", str(parse_size(manner.rate))]
    return words


@contextlib.contextmanager
def _target(
    task: Task, made: Operand, size: int, backing: Backing | None, place: Workspace, manner: Manner, source: Operand
) -> Iterator[tuple[Operand, bool]]:
    """Yield the image to be filled from ``source``, and whether it is a new one."""
    if manner.into:
        operand.refuse_creation_options(made)
        full = operand.looked_at(_allowing(made, backing))
        if backing is not None:
            _refuse_other_backing(full, backing)
        yield full, False
    elif _is_slot(made) and made.spec.format is Format.RAW:
        # A disk that is there, and that only its server could make.
        operand.refuse_creation_options(made)
        yield operand.looked_at(made), False
    else:
        with _made(task, made, size, backing, place, source=source) as (full, is_new):
            yield full, is_new


def _refuse_other_backing(target: Operand, backing: Backing) -> None:
    """qemu-img takes the caller's word for it, and leaves out what then is nowhere."""
    below = target.opened.node.get("backing") or {"file": {}}
    path = below["file"].get("filename")
    if path is None or not os.path.exists(backing.path) or not os.path.samefile(path, backing.path):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{backing.path} is not the backing file of {target.shown()}",
            cause=f"that is {path}" if path is not None else "it has none",
            hint="leave -B out, and all data is copied; or convert into a new image",
        )


def _is_slot(one: Operand) -> bool:
    """Whether it is something that is there in any case, and cannot be made by opening it."""
    if one.local_path is not None:
        return operand.is_block_device(one)
    return find_backend(one.spec.source).name not in remotecreate.CREATABLE


@contextlib.contextmanager
def _made(
    task: Task, one: Operand, size: int, backing: Backing | None, place: Workspace, *, source: Operand | None = None
) -> Iterator[tuple[Operand, bool]]:
    """Make an image, and yield it as one that was looked at, and whether nothing was there before.

    ``source`` is what it will be filled from. Raises INVALID_ARGUMENT, with nothing written, where the image would be
    made over that, or over its own backing file.
    """
    path = one.local_path
    if path is not None and not operand.is_block_device(one):
        with new_file(path, one.spec.format) as part:
            here = replace(one, spec=msgspec.structs.replace(one.spec, source=f"file:{part}"))
            _format_file(task, here, part, size, backing, place)
            yield operand.looked_at(_allowing(here, backing)) if source is not None else here, True
        return
    if one.spec.format is Format.RAW and _is_slot(one):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{one.shown()} cannot be created here",
            hint="it is there already, or its server has to make it; say a --format to make it an image",
        )
    if path is not None:
        raw = operand.looked_at(_as_raw(one))
        below = [] if backing is None else [operand.look(_below(backing, one), writable=False, alone=True)]
        _refuse_same(raw, source, *below)
        with opened(task, [raw], place=place):
            _format_file(task, one, path, size, backing, place)
        yield operand.looked_at(_allowing(one, backing)), False
        return
    if backing is not None:
        raise StoragedError(
            ErrorCode.UNSUPPORTED, "an image behind a server can have no backing file",
            hint="make it on a file of this host, or leave -b out",
        )
    new = not _is_slot(one)
    if new and _answers(task, one, place):
        raise is_there(one.shown())
    bare = operand.looked_at(one)
    _refuse_same(bare, source)
    with _unchecked(task, bare, place) as given:
        task.doing(f"creating {one.shown()}")
        options = {**one.creation, **arguments.encryption(one.spec.format, one.spec.options, one.prefix)}
        remotecreate.create(bare, given, task.config, size, options, is_there=not new)
    yield bare, new


def _refuse_same(made: Operand, *read: Operand | None) -> None:
    """What is read must not be what a header is written to: that would be its end, before anything was read."""
    for other in read:
        if other is not None:
            operand.together([other, made])


@contextlib.contextmanager
def _unchecked(task: Task, one: Operand, place: Workspace) -> Iterator[Provided]:
    """As ``opened``, for an image of which there is no header yet."""
    with provided([one], place, task.layout, task.config, owner=task.owner, progress=task.doing) as given:
        yield given


def _answers(task: Task, one: Operand, place: Workspace) -> bool:
    """Whether there is something at a source on the network. Raises what keeps us from it."""
    try:
        probe = operand.looked_at(_as_raw(replace(one, spec=msgspec.structs.replace(one.spec, read_only=True))))
        with opened(task, [probe], place=place) as given:
            virtual_size(probe, given)
    except StoragedError as error:
        if error.code is ErrorCode.SOURCE_MISSING:
            return False
        raise
    return True


def _format_file(
    task: Task, one: Operand, path: str, size: int, backing: Backing | None, place: Workspace
) -> None:
    """``qemu-img create`` on a file or block device of this host: nothing but the path is to be said of it."""
    words = ["-q", "-f", str(one.spec.format)]
    options = {**one.creation, **arguments.encryption(one.spec.format, one.spec.options, one.prefix)}
    words += arguments.creation_words(options)
    if backing is not None:
        # -u: the backing file is not opened for that, and with it none that its header names.
        words += ["-u", "-b", backing.path, "-F", str(backing.format)]
    # Only for its secret: what shall be there is not there yet.
    nothing = opening.Opening(
        node={"file": {}}, sources={}, files=frozenset(), fingerprint=[], claims=(), unclaimed=(),
        requirements=opening.requirements_of_image(one.spec),
    )
    with _unchecked(task, replace(one, opening=nothing), place) as given:
        task.doing(f"creating {path}")
        for trial in trials():
            with trial:
                run("create", [*words, path, str(size)], given)


def _as_raw(one: Operand) -> Operand:
    """The bytes of a source, whatever they are."""
    options = {key: value for key, value in one.spec.options.items() if key not in ("key-file", "encrypt", "backing")}
    return replace(one, spec=msgspec.structs.replace(one.spec, format=Format.RAW, options=options))


def _allowing(one: Operand, backing: Backing | None) -> Operand:
    """The user has named the backing file, and so allowed it; not those that it names itself."""
    if backing is None:
        return one
    allowed = ":".join([backing.path, *one.spec.allowed_backing])
    options = {**one.spec.options, "backing": f"allow:{allowed}"}
    return replace(one, spec=msgspec.structs.replace(one.spec, options=options))


def _refuse_backing(one: Operand, backing: Backing | None) -> None:
    if backing is not None and one.spec.format not in COPY_ON_WRITE:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"an image of the format {one.spec.format} has no backing file",
            hint="say --format qcow2 (of convert: --target-format), or leave the backing file out",
        )
    if backing is not None and ":" in backing.path:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"the backing file {backing.path!r} has a colon in its path",
            hint="reach it by a path without one, such as a symbolic link",
        )


def _below(backing: Backing | None, one: Operand) -> Wish:
    assert backing is not None
    allowed = {"backing": one.spec.options["backing"]} if "backing" in one.spec.options else {}
    return Wish(backing.path, backing.format, allowed, name="backing")


def _size_of(task: Task, wish: Wish, place: Workspace) -> int:
    below = operand.look(wish, writable=False)
    with opened(task, [below], place=place) as given:
        return virtual_size(below, given)
