"""The files behind an image: itself, its external data, its extents and its backing files, all checked.

QEMU, told to open an image, opens whatever its header names, with formats that it guesses. So the chain is
looked at first, and QEMU is then given each file explicitly: a node for each ``ImageFile`` by its ``path``,
and ``"backing": null`` where the chain ends. The exception is vmdk, whose extents QEMU can only open itself,
by the names in the descriptor: they are resolved here in the way that it will do it.

All this holds for the moment of the look only. Who can write to an image or to a directory on the way can
change it afterwards, so between the look and QEMU's open nobody else must be at work there.

This blocks, for minutes on a dead NFS server or a sick disk: call it in a thread that can be given up.
"""

from __future__ import annotations

import errno
import os
import re
import shlex
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.headers import SECTOR, ImageHeader, ImageReference, read_header
from storaged.model.sizes import MAX_SIZE

#: Images in one chain. Real ones have some tens; each costs an open file and memory in QEMU.
MAX_CHAIN = 64

#: A name that QEMU takes for one with a protocol, as its path_has_protocol() does: a colon before any slash.
_PROTOCOL = re.compile(r"[^:/]*:")
#: What programs append to the name of a descriptor for its extents: disk-flat.vmdk, disk-s001.vmdk, ...
_EXTENT_SUFFIX = r"-(?:flat|delta|[fs][0-9]{3,})"

_KINDS = {"backing": "backing file", "data-file": "external data file", "extent": "extent"}


@dataclass(frozen=True)
class ImageFile:
    """One file of a chain, as it was when it was looked at."""

    #: Absolute, without symbolic links.
    path: str
    format: Format
    device: int
    inode: int
    #: Of a vmdk descriptor.
    extents: tuple[ImageFile, ...]
    #: Of a qcow2 image with an external data file.
    data_file: ImageFile | None
    #: Size of the file or block device.
    size: int
    #: What the header says, None where it is not simply found.
    virtual_size: int | None
    #: The number of the block device that this is, 0 for a file. Two nodes may lead to the same device.
    block_device: int = 0

    def files(self) -> Iterator[ImageFile]:
        """Yield this file, its data file and its extents: all that must be locked for this image."""
        yield self
        if self.data_file is not None:
            yield self.data_file
        yield from self.extents


def _nowhere(_name: str) -> bool:
    return False


def inspect_chain(
    path: str, format: Format, allowed: Sequence[str], *, alone: bool = False, device: bool = True
) -> tuple[ImageFile, ...]:
    """Return the image at ``path`` and its backing files in order, or raise a StoragedError.

    ``alone``: the image without its backing files, of which none is looked at. ``device``: it is to become a device, so
    its size must be one that a device can have.

    ``path`` is absolute. Every other file that comes in must be one of ``allowed`` or lie in one of them
    (each an absolute path of a file or directory), after all symbolic links are resolved. The extents of a
    vmdk descriptor that bear its own name are allowed without that: they are what the user named.

    A relative name is taken relative to the directory of the image that names it, by the path that led to
    that image and not the one behind its symbolic links: so does QEMU with backing files. (It takes names of
    external data files relative to its current directory; that is never what was meant.) Extents of vmdk are
    taken relative to the directory behind the links, because QEMU will open the descriptor by that path.
    """
    return inspect_images(path, format, allowed, alone=alone, device=device)[0]


def inspect_images(
    path: str, format: Format, allowed: Sequence[str], *, named_by: Reference | None = None,
    elsewhere: Callable[[str], bool] = _nowhere, alone: bool = False, device: bool = True,
) -> tuple[tuple[ImageFile, ...], Reference | None]:
    """As :func:`inspect_chain`, for a chain that may go on elsewhere than on this host.

    ``named_by`` is what named the first image, which needs leave then as the others do. The chain ends where a backing
    file's name is ``elsewhere``; that reference is returned, too.
    """
    walk = _Walk(allowed)
    if not os.path.isabs(path):
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{_shown(path)} is not an absolute path", hint="write it from / on"
        )
    reference = named_by
    chain: list[ImageFile] = []
    while True:
        image, header = walk.image(path, format, reference)
        if reference is None and device:
            _check_size(path, image)
        chain.append(image)
        if header.backing is None or alone:
            return tuple(chain), None
        reference = Reference(path, format, header.backing)
        if len(chain) >= MAX_CHAIN:
            reference.fail(ErrorCode.WRONG_FORMAT, f"the chain has more than {MAX_CHAIN} images")
        if elsewhere(reference.name.path):
            return tuple(chain), reference
        path, format = reference.resolved(path), reference.backing_format()


@dataclass(frozen=True)
class Reference:
    """A name in an image and all that an error needs to say about it."""

    image: str
    image_format: Format
    name: ImageReference

    def resolved(self, base: str) -> str:
        """Return the path that the name means beside the file ``base``, after refusing what is no path."""
        name = self.name.path
        if not name:
            self.fail(ErrorCode.BACKING_MISSING, "the image does not say where its data is")
        if _PROTOCOL.match(name):
            self.fail(
                ErrorCode.BACKING_NOT_ALLOWED,
                "only files and block devices can be used, given by their path" + (
                    "; by an attach also the sources that -o backing-sources= allows"
                    if self.name.kind == "backing" else ""
                ),
                "if that is a file, write its name with ./ before it: " + self._rebase(),
            )
        return os.path.join(os.path.dirname(base), name)

    def backing_format(self) -> Format:
        """Return the format that the header gives for the backing file. It is never guessed."""
        if self.name.format is None:
            convert = (
                f"this format cannot name it; if you trust the image, convert it to qcow2: "
                f"qemu-img convert -f {self.image_format} -O qcow2 {_shown(self.image)} NEW"
            )
            raise StoragedError(
                ErrorCode.WRONG_FORMAT,
                f"{_shown(self.image)} names no format for its backing file {_shown(self.name.path)}",
                cause="formats are never guessed: a guest could write any header into a raw disk",
                hint=self._rebase() if self.image_format is Format.QCOW2 else convert,
            )
        try:
            return Format(self.name.format)
        except ValueError:
            self.fail(
                ErrorCode.WRONG_FORMAT, f"its format {self.name.format!r} is not known here", self._rebase()
            )

    def fail(self, code: ErrorCode, cause: str, hint: str = "") -> NoReturn:
        name = _shown(self.name.path) if self.name.path else "(without a name)"
        raise StoragedError(
            code, f"{_shown(self.image)} needs its {self.kind} {name}", cause=cause, hint=hint
        )

    @property
    def kind(self) -> str:
        return _KINDS[self.name.kind]

    def missing_hint(self) -> str:
        if self.name.kind == "backing" and self.image_format is Format.QCOW2:
            return f"put it back; or, if it is elsewhere now: {self._rebase()}"
        return "put it back"

    def _rebase(self) -> str:
        return f"qemu-img rebase -u -f {self.image_format} -b BACKING -F FORMAT {_shown(self.image)}"


class _Walk:
    """What is known on the way down one chain."""

    def __init__(self, allowed: Sequence[str]) -> None:
        for place in allowed:
            # realpath("") would be the current directory.
            if not os.path.isabs(place) or "\0" in place:
                raise StoragedError(
                    ErrorCode.INVALID_ARGUMENT,
                    f"{_shown(place)} is not an absolute path",
                    hint="write -o backing=allow:/DIRECTORY",
                )
        self._allowed = [_real(place) for place in allowed]
        self._seen: set[tuple[int, ...]] = set()

    def image(
        self, path: str, format: Format, reference: Reference | None, *, nested: bool = False
    ) -> tuple[ImageFile, ImageHeader]:
        """Look at one file and those that belong to it, without its backing file.

        ``nested`` marks files that belong to another one: they must have no such files of their own.
        """
        real = self._permitted(path, reference)
        with _opened(path, real, reference) as (fd, status, size):
            is_block = stat.S_ISBLK(status.st_mode)
            identity = (status.st_rdev,) if is_block else (status.st_dev, status.st_ino)
            if reference is not None and identity in self._seen:
                reference.fail(ErrorCode.WRONG_FORMAT, "it is in this chain already: a loop")
            self._seen.add(identity)
            try:
                header = read_header(format, lambda offset, length: _pread(fd, offset, length), size)
            except StoragedError as error:
                raise _about(error, path, format, reference) from None
            except OSError as error:
                _refuse(error, path, reference)
        data_file: ImageFile | None = None
        extents: list[ImageFile] = []
        for name in header.others:
            own = Reference(path, format, name)
            if nested:
                own.fail(ErrorCode.WRONG_FORMAT, "an extent of vmdk has no extents of its own")
            if name.kind == "data-file":
                data_file, _ = self.image(own.resolved(path), Format.RAW, own, nested=True)
            else:
                # The header gives raw or vmdk for extents.
                part = Format(name.format or Format.RAW)
                extents.append(self.image(own.resolved(real), part, own, nested=True)[0])
        image = ImageFile(
            path=real,
            format=format,
            device=status.st_dev,
            inode=status.st_ino,
            extents=tuple(extents),
            data_file=data_file,
            size=size,
            virtual_size=_virtual_size(header, extents),
            block_device=status.st_rdev if is_block else 0,
        )
        return image, header

    def _permitted(self, path: str, reference: Reference | None) -> str:
        """Return the real path if this file may be used. Asked before it is known whether it exists.

        Otherwise the difference between the errors would tell the maker of an image what this host has.
        """
        if "\0" in path:
            raise StoragedError(ErrorCode.INVALID_SOURCE, f"{_shown(path)} has a NUL in it")
        real = _real(path)
        if reference is None or any(_inside(real, place) for place in self._allowed):
            return real
        if reference.name.kind == "extent" and _is_own_extent(_real(reference.image), path, real):
            return real
        place = os.path.dirname(real)
        if place in ("/", "/dev"):
            place = real  # The whole would be more than anybody means.
        there = "" if real == path else f", which is {_shown(real)}"
        raise StoragedError(
            ErrorCode.BACKING_NOT_ALLOWED,
            f"{_shown(reference.image)} needs its {reference.kind} {_shown(reference.name.path)}{there}; "
            "that is not in a directory that you allowed",
            cause="an image can name any file of this host, so each needs leave",
            hint=f"if you trust the image, allow it: -o backing=allow:{_shown(place)}",
        )


def _virtual_size(header: ImageHeader, extents: Sequence[ImageFile]) -> int | None:
    """Return the size as QEMU counts it: a sparse extent's from its own header, not from the descriptor."""
    if all(extent.format is Format.RAW for extent in extents):
        return header.virtual_size
    sizes = [extent.virtual_size for extent in extents if extent.format is Format.VMDK]
    if len(sizes) < len(extents) or None in sizes:
        return None
    return sum(size for size in sizes if size is not None)


def _is_own_extent(descriptor: str, path: str, real: str) -> bool:
    """Tell whether an extent is beside its descriptor, bears its name and is no symbolic link.

    disk.vmdk has disk-flat.vmdk, disk-s001.vmdk, disk-f001.vmdk or disk-delta.vmdk. More freedom would let a
    descriptor take the disks of others in the same directory.
    """
    if path != real or os.path.dirname(descriptor) != os.path.dirname(path):
        return False
    stem, extension = os.path.splitext(os.path.basename(descriptor))
    pattern = re.escape(stem) + _EXTENT_SUFFIX + re.escape(extension)
    return re.fullmatch(pattern, os.path.basename(path)) is not None


@contextmanager
def _opened(path: str, real: str, reference: Reference | None) -> Iterator[tuple[int, os.stat_result, int]]:
    """Open ``real`` for reading and yield descriptor, status and size; ``path`` is what errors call it.

    First O_PATH, which has no effect on anything: a FIFO does not wake its writer, a tape does not rewind.
    Only what turns out to be a regular file or a block device is then opened, the very same.
    """
    try:
        handle = os.open(real, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            status = os.fstat(handle)
            if (what := _unusable(status.st_mode)) is not None:
                if reference is not None:
                    reference.fail(ErrorCode.INVALID_SOURCE, f"it is {what}")
                raise StoragedError(
                    ErrorCode.INVALID_SOURCE,
                    f"{_shown(path)} is {what}",
                    hint="name a disk image or a block device",
                )
            link = f"/proc/self/fd/{handle}"
            if os.readlink(link) != real:
                # A directory on the way was replaced after its links were resolved.
                raise StoragedError(
                    ErrorCode.SOURCE_CHANGED,
                    f"{_shown(path)} was replaced while it was looked at",
                    hint="try again when nobody moves files there",
                )
            fd = os.open(link, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        finally:
            os.close(handle)
    except OSError as error:
        _refuse(error, path, reference)
    try:
        try:
            size = os.lseek(fd, 0, os.SEEK_END) if stat.S_ISBLK(status.st_mode) else os.fstat(fd).st_size
        except OSError as error:
            _refuse(error, path, reference)
        yield fd, status, size
    finally:
        os.close(fd)


def _unusable(mode: int) -> str | None:
    """Return what a file is that cannot be a disk, None if it can."""
    if stat.S_ISREG(mode) or stat.S_ISBLK(mode):
        return None
    if stat.S_ISDIR(mode):
        return "a directory"
    if stat.S_ISFIFO(mode):
        return "a FIFO"
    if stat.S_ISSOCK(mode):
        return "a socket"
    if stat.S_ISCHR(mode):
        return "a character device"
    # All links were resolved, so one that is left leads back to itself.
    return "a loop of symbolic links" if stat.S_ISLNK(mode) else "not a file"


def _refuse(error: OSError, path: str, reference: Reference | None) -> NoReturn:
    """Raise what the user is to see for an error of the system."""
    reason = os.strerror(error.errno) if error.errno else str(error)
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        if reference is not None:
            reference.fail(ErrorCode.BACKING_MISSING, "there is no such file", reference.missing_hint())
        raise StoragedError(
            ErrorCode.SOURCE_MISSING,
            f"there is no {_shown(path)}",
            hint="check the path; qemu-img create makes images",
        )
    code = ErrorCode.OPEN_FAILED
    hint = ""
    if error.errno in (errno.EACCES, errno.EPERM):
        code, hint = ErrorCode.PERMISSION_DENIED, "let the user that the daemon runs as read it"
    elif error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        code = ErrorCode.INVALID_SOURCE
    if reference is not None:
        reference.fail(code, reason, hint)
    raise StoragedError(code, f"cannot open {_shown(path)}", cause=reason, hint=hint)


def _about(error: StoragedError, path: str, format: Format, reference: Reference | None) -> StoragedError:
    """Return an error about a header with the file in it, and the hint that fits who said the format."""
    hint = error.hint
    if reference is not None and error.code is ErrorCode.WRONG_FORMAT and reference.name.kind == "backing":
        hint = (
            f"{_shown(reference.image)} says that it is {format}; if it is not: "
            f"qemu-img rebase -u -f {reference.image_format} -b BACKING -F FORMAT {_shown(reference.image)}"
        )
    return StoragedError(error.code, f"{_shown(path)}: {error.message}", cause=error.cause, hint=hint)


def _check_size(path: str, image: ImageFile) -> None:
    """Refuse the image that is to become a device if its size is none for a device."""
    size = image.virtual_size
    if size is None:
        return
    is_file = image.format is Format.RAW and not image.block_device
    if size == 0:
        grow = f"truncate -s 10G {_shown(path)}" if is_file else ""
        if image.format is not Format.RAW:
            grow = f"qemu-img resize -f {image.format} {_shown(path)} 10G"
        raise StoragedError(ErrorCode.INVALID_SIZE, f"{_shown(path)} has a virtual size of 0", hint=grow)
    if size > MAX_SIZE:
        raise StoragedError(
            ErrorCode.INVALID_SIZE,
            f"{_shown(path)} has a virtual size of {size} bytes",
            cause="the kernel cannot address so much",
        )
    if is_file and size % SECTOR:
        # QEMU would round it up and show zeros there; writes to them would make the file grow.
        raise StoragedError(
            ErrorCode.INVALID_SIZE,
            f"the size of {_shown(path)}, {size} bytes, is not a multiple of {SECTOR}",
            cause="a block device has whole sectors",
            hint=f"round it up: truncate -s %{SECTOR} {_shown(path)}",
        )


def _pread(fd: int, offset: int, length: int) -> bytes:
    """Read all of ``length`` bytes unless the file ends before."""
    parts: list[bytes] = []
    while length > 0:
        part = os.pread(fd, length, offset)
        if not part:
            break
        parts.append(part)
        offset += len(part)
        length -= len(part)
    return b"".join(parts)


def _real(path: str) -> str:
    """Return the path without links. POSIX lets two slashes at the beginning stay; to Linux they are one."""
    try:
        return "/" + os.path.realpath(path).lstrip("/")
    except OSError as error:
        # A link of /proc that leads to where even root may not.
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"{_shown(path)} cannot be followed", cause=error.strerror or "",
            hint="name the file itself",
        ) from error


def _inside(real: str, place: str) -> bool:
    return real == place or real.startswith(place.rstrip("/") + "/")


def _shown(path: str) -> str:
    """Return a path for people and shells: quoted where needed, no control characters or broken UTF-8."""
    return shlex.quote(path) if path.isprintable() else ascii(path)
