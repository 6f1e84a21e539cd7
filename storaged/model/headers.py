"""What the header of an image says: its virtual size and the other files that it makes QEMU open.

``qemu-img info`` would tell the same, but it needs 15 ms or more and opens what a hostile image names. Here
nothing is opened: the caller hands in a function that reads the one file, and decides about every name that
comes back (see ``storaged.host.chain``).

The rule is: report each name that QEMU would open, or refuse the image. So the fields are read where and how
QEMU reads them, not where a specification would like them, and what QEMU itself would refuse or misread is
refused. Sources: docs/interop/{qcow2,qed_spec,parallels}.txt of QEMU, and for what it makes of the files
block/{qcow,qcow2,qed,vmdk,vdi,vpc,parallels}.c of QEMU up to 8.2, tried with QEMU 7.2.

Each number in a header is hostile. Reads are bounded (the largest is 2 MiB, the largest cluster of qcow2),
and so is the time: every loop moves on by at least one byte of what was read.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NoReturn

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format

Kind = Literal["backing", "data-file", "extent"]
#: read(offset, length): the bytes of the file there, fewer only at its end.
Read = Callable[[int, int], bytes]

SECTOR = 512


@dataclass(frozen=True)
class ImageReference:
    """Another file, as the header writes it: ``path`` may be relative, absolute, a URL or json:{...}.

    ``format`` is None if the header does not say it. An extent's is raw or vmdk (a sparse extent).
    """

    kind: Kind
    path: str
    format: str | None


@dataclass(frozen=True)
class ImageHeader:
    """``virtual_size`` is None where the format hides it too well; ``others`` are data file and extents."""

    virtual_size: int | None
    backing: ImageReference | None
    others: tuple[ImageReference, ...]


def read_header(format: Format, read: Read, size: int) -> ImageHeader:
    """Return what the header of an image of this format says. ``size`` is the size of the file.

    The content never chooses the format: if it is not of the given one, WRONG_FORMAT is raised, and so it is
    for a header that makes no sense. UNSUPPORTED is raised for what QEMU cannot do or would get wrong.
    """
    return _PARSERS[format](_File(format, read, size))


def looks_like(begin: bytes, end: bytes = b"") -> Format | None:
    """Return the format that the first and the last 512 bytes of a file look like, None if like none.

    For the help text in an error only. Whoever chose a driver by it would let a guest choose: a guest can
    write any header into its raw disk.
    """
    for format, offset, magic in _MAGICS:
        if begin[offset : offset + len(magic)] == magic:
            return format
    return Format.VPC if end.startswith(_VPC_MAGIC) else None


class _File:
    """The file being read, with bounds: nothing that a header says reaches ``read`` unchecked."""

    def __init__(self, format: Format, read: Read, size: int) -> None:
        self.format = format
        self.size = size
        self._read = read

    def upto(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes, fewer at the end of the file."""
        length = min(length, self.size - offset)
        return self._read(offset, length) if length > 0 else b""

    def padded(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes, zeros after the end of the file, as QEMU's block layer reads."""
        return self.upto(offset, length).ljust(length, b"\0")

    def exactly(self, offset: int, length: int, what: str) -> bytes:
        data = self.upto(offset, length)
        if len(data) < length:
            self.damaged(f"{what} lies beyond the end of the file")
        return data

    def require_magic(self, magic: bool) -> None:
        """Refuse the file if it does not begin as its format does, and say what it looks like."""
        if magic:
            return
        guess = looks_like(self.upto(0, SECTOR), self.upto(max(0, self.size - SECTOR), SECTOR))
        cause = f"the file looks like a {guess} image" if guess else "nothing marks the file as an image"
        raise StoragedError(
            ErrorCode.WRONG_FORMAT,
            f"not a {self.format} image",
            cause=cause,
            hint="say the format that the image was made with: --format FORMAT (without it: raw)",
        )

    def damaged(self, cause: str) -> NoReturn:
        raise StoragedError(
            ErrorCode.WRONG_FORMAT,
            f"the {self.format} header makes no sense",
            cause=cause,
            hint="the image is damaged or was made to do harm; restore it from a copy that you trust",
        )

    def unsupported(self, cause: str) -> NoReturn:
        raise StoragedError(
            ErrorCode.UNSUPPORTED,
            f"this kind of {self.format} image cannot be used",
            cause=cause,
            hint="convert it with the program that made it to a format without this, such as qcow2 or raw",
        )


def _text(name: bytes) -> str:
    """Return a name as QEMU sees it, a C string: it ends at the first NUL. Bytes survive the way back."""
    return name.partition(b"\0")[0].decode("utf-8", "surrogateescape")


def _raw(file: _File) -> ImageHeader:
    return ImageHeader(file.size, None, ())


# qcow and qcow2 -----------------------------------------------------------------------------------

_QCOW_MAGIC = b"QFI\xfb"
_QCOW2_BACKING_FORMAT = 0xE2792ACA
_QCOW2_DATA_FILE = 0x44415441
_QCOW2_INCOMPATIBLE_DATA_FILE = 1 << 2
#: dirty, corrupt, data file, compression type, extended L2 entries.
_QCOW2_INCOMPATIBLE_KNOWN = 0b11111
#: QEMU refuses longer ones in both formats.
_QCOW_NAME_MAX = 1023


def _is_qcow(begin: bytes, versions: range) -> bool:
    return begin[:4] == _QCOW_MAGIC and int.from_bytes(begin[4:8]) in versions


def _qcow(file: _File) -> ImageHeader:
    """Version 1. It has no place for the format of its backing file."""
    begin = file.upto(0, 48)
    file.require_magic(_is_qcow(begin, range(1, 2)))
    if len(begin) < 48:
        file.damaged("the file ends within the header")
    offset, length, _mtime, size = struct.unpack_from(">QIIQ", begin, 8)
    backing = None
    if offset:
        if length > _QCOW_NAME_MAX:
            file.damaged("the name of the backing file is too long")
        if name := _text(file.exactly(offset, length, "the name of the backing file")):
            backing = ImageReference("backing", name, None)
    return ImageHeader(size // SECTOR * SECTOR, backing, ())


def _qcow2(file: _File) -> ImageHeader:
    begin = file.upto(0, 104)
    # A version after 3 is still qcow2, one that nobody can read yet.
    file.require_magic(_is_qcow(begin, range(2, 1 << 32)))
    version = int.from_bytes(begin[4:8])
    if version > 3:
        file.unsupported(f"version {version} of qcow2 is not known")
    if len(begin) < (72 if version == 2 else 104):
        file.damaged("the file ends within the header")
    offset, length, cluster_bits, size = struct.unpack_from(">QIIQ", begin, 8)
    if not 9 <= cluster_bits <= 21:
        file.damaged(f"the cluster size is 2^{cluster_bits}")
    cluster = 1 << cluster_bits
    incompatible, header_length = 0, 72
    if version == 3:
        incompatible = int.from_bytes(begin[72:80])
        header_length = int.from_bytes(begin[100:104])
        if not 104 <= header_length <= cluster:
            file.damaged(f"the header length is {header_length}")
    if incompatible & ~_QCOW2_INCOMPATIBLE_KNOWN:
        # One of them could mean yet another file to open.
        file.unsupported(f"it has unknown incompatible features ({incompatible:#x})")
    if offset > cluster:
        file.damaged("the name of the backing file is not in the first cluster")

    backing_format, data_file = _qcow2_extensions(file, header_length, offset or cluster)
    backing = None
    if offset:
        if length > min(_QCOW_NAME_MAX, cluster - offset):
            file.damaged("the name of the backing file is too long")
        if name := _text(file.exactly(offset, length, "the name of the backing file")):
            backing = ImageReference("backing", name, backing_format)
    others: tuple[ImageReference, ...] = ()
    if incompatible & _QCOW2_INCOMPATIBLE_DATA_FILE:
        # Without the name it is still a reference: the data is elsewhere, and nobody knows where.
        others = (ImageReference("data-file", data_file or "", "raw"),)
    return ImageHeader(size // SECTOR * SECTOR, backing, others)


def _qcow2_extensions(file: _File, start: int, end: int) -> tuple[str | None, str | None]:
    """Return the backing file's format and the data file's name. Of two of a kind the last counts."""
    backing_format: str | None = None
    data_file: str | None = None
    area = file.upto(start, end - start)
    position = 0
    while start + position < end:
        magic, length = struct.unpack(">II", area[position : position + 8].ljust(8, b"\0"))
        position += 8
        if magic == 0:
            break
        if start + position + length > end or position + length > len(area):
            file.damaged("a header extension is longer than the header")
        content = area[position : position + length]
        if magic == _QCOW2_BACKING_FORMAT:
            if length > 15:
                file.damaged("the name of the backing file's format is too long")
            backing_format = _text(content) or None
        elif magic == _QCOW2_DATA_FILE:
            if length > _QCOW_NAME_MAX:
                file.damaged("the name of the data file is too long")
            data_file = _text(content)
        position += (length + 7) & ~7
    return backing_format, data_file


# qed ----------------------------------------------------------------------------------------------

_QED_MAGIC = b"QED\0"
_QED_BACKING = 1
_QED_BACKING_RAW = 4
#: backing file, needs a check, backing file is not to be probed.
_QED_KNOWN = 0b111


def _qed(file: _File) -> ImageHeader:
    begin = file.upto(0, 64)
    file.require_magic(begin[:4] == _QED_MAGIC)
    if len(begin) < 64:
        file.damaged("the file ends within the header")
    cluster, _table, header_clusters, features = struct.unpack_from("<IIIQ", begin, 4)
    size, offset, length = struct.unpack_from("<QII", begin, 48)
    if features & ~_QED_KNOWN:
        file.unsupported(f"it has unknown features ({features:#x})")
    backing = None
    if features & _QED_BACKING:
        if length > _QCOW_NAME_MAX or offset + length > cluster * header_clusters:
            file.damaged("the name of the backing file is too long or not in the header")
        if name := _text(file.exactly(offset, length, "the name of the backing file")):
            # "Do not probe" is all that qed can say of the format, and it means raw.
            backing = ImageReference("backing", name, "raw" if features & _QED_BACKING_RAW else None)
    return ImageHeader(size, backing, ())


# vmdk ---------------------------------------------------------------------------------------------

_VMDK_SPARSE = b"KDMV"
_VMDK_ESX = b"COWD"
_VMDK_TEXT = b"# Disk DescriptorFile"
#: QEMU reads so much of a descriptor for the extents, and so much for the parent.
_VMDK_DESCRIPTOR_MAX = (1 << 20) - 1
_VMDK_PARENT_MAX = 20 * SECTOR
#: It looks for the parent's name here in a sparse image, wherever the header says that the descriptor is.
_VMDK_EMBEDDED = 0x200
_VMDK_FOOTER = (1 << 64) - 1
_VMDK_PATH_MAX = 1023
#: 8 TiB in pieces of 2 GiB. A descriptor of 1 MiB could name 50,000, and each is opened.
_VMDK_EXTENTS_MAX = 4096
#: Descriptors of these types QEMU opens. (seSparse and vmfsSparse have extents that are refused below.)
_VMDK_TYPES = frozenset({b"monolithicFlat", b"vmfs", b"twoGbMaxExtentSparse", b"twoGbMaxExtentFlat"})
_VMDK_ACCESS = frozenset({b"RW", b"RDONLY", b"NOACCESS"})
#: The extent line as QEMU's sscanf() takes it apart: spaces may be left out or be line ends, the closing
#: quote may be missing. Possessive repeats, because scanf never tries again either.
_VMDK_EXTENT = re.compile(rb'RW\s++([+-]?+\d++)\s*+(\S{1,10}+)\s*+"([^\n\r"]{1,511}+)(?:"\s*+([+-]?+\d++))?+')


def _vmdk(file: _File) -> ImageHeader:
    begin = file.upto(0, SECTOR)
    if begin.startswith(_VMDK_ESX):
        file.unsupported("it is a COWD (ESX) image")
    if begin.startswith(_VMDK_SPARSE):
        return _vmdk_sparse(file, begin)
    file.require_magic(begin.startswith(_VMDK_TEXT))
    text = file.upto(0, _VMDK_DESCRIPTOR_MAX).partition(b"\0")[0]
    sectors, extents = _vmdk_extents(file, text)
    return ImageHeader(sectors * SECTOR, _vmdk_parent(file, 0), extents)


def _vmdk_sparse(file: _File, begin: bytes) -> ImageHeader:
    """One file with header, data and a descriptor. The extent in that descriptor QEMU does not look at."""
    if len(begin) < SECTOR:
        file.damaged("the file ends within the header")
    (capacity,) = struct.unpack_from("<Q", begin, 12)
    (directory,) = struct.unpack_from("<Q", begin, 56)
    if capacity == 0:
        # With a capacity of 0 QEMU takes the descriptor, wherever the header says it is, for one of a file of
        # its own, and opens all extents in it. Nobody makes such images.
        file.unsupported("its capacity is 0, by which QEMU opens the extents of a descriptor within it")
    if directory == _VMDK_FOOTER:
        # A stream-optimized image: a second header at the end takes precedence.
        sectors = -(-file.size // SECTOR)
        footer = file.padded(max(0, sectors * SECTOR - 2 * SECTOR), SECTOR)
        if not footer.startswith(_VMDK_SPARSE):
            file.damaged("it has no footer, though the header says so")
        (capacity,) = struct.unpack_from("<Q", footer, 12)
    return ImageHeader(capacity * SECTOR, _vmdk_parent(file, _VMDK_EMBEDDED), ())


def _vmdk_parent(file: _File, offset: int) -> ImageReference | None:
    """Return the parent as QEMU finds it: the first parentFileNameHint, even in a comment.

    A parentCID of ffffffff means "no parent" to VMware, but QEMU opens what the hint names all the same.
    """
    area = file.padded(offset, _VMDK_PARENT_MAX)
    key = b"parentFileNameHint"
    found = area.partition(b"\0")[0].find(key)
    if found < 0:
        return None
    # QEMU steps over '="' without a look at it, also over a NUL.
    value = area[found + len(key) + 2 :].partition(b"\0")[0]
    name, quote, _rest = value.partition(b'"')
    if not quote or len(name) > _VMDK_PATH_MAX:
        file.damaged("the name of the parent has no end")
    # Parents of vmdk are vmdk, so QEMU holds, and there is no place to say otherwise.
    return ImageReference("backing", _text(name), "vmdk") if name else None


def _vmdk_extents(file: _File, text: bytes) -> tuple[int, tuple[ImageReference, ...]]:
    """Return the sectors and the extents of a descriptor, refusing what QEMU would read in another way."""
    _before, found, after = text.partition(b"createType")
    created, quote, _after = after[2:].partition(b'"')
    if not found or not quote:
        file.damaged("the descriptor has no createType")
    if created not in _VMDK_TYPES:
        file.unsupported(f"its createType is {_text(created[:40])!r}")

    sectors = 0
    extents: list[ImageReference] = []
    position = 0
    after_blank = False
    for line in text.split(b"\n"):
        content = line.lstrip()
        start = position + len(line) - len(content)
        position += len(line) + 1
        if content and content.split(None, 1)[0] in _VMDK_ACCESS:
            if after_blank:
                # sscanf() goes over line ends: from the blank line, too, it finds the extent.
                file.unsupported("a blank line before an extent, by which QEMU takes the extent twice")
            if len(extents) >= _VMDK_EXTENTS_MAX:
                file.unsupported(f"it has more than {_VMDK_EXTENTS_MAX} extents")
            count, extent = _vmdk_extent(file, text, start)
            sectors += count
            extents.append(extent)
        after_blank = not content
    if not extents:
        file.damaged("the descriptor names no extents")
    return sectors, tuple(extents)


def _vmdk_extent(file: _File, text: bytes, start: int) -> tuple[int, ImageReference]:
    match = _VMDK_EXTENT.match(text, start)
    kind = match[2] if match else b""
    if match is None or kind not in (b"FLAT", b"VMFS", b"SPARSE"):
        # QEMU passes over read-only, ZERO and other extents that it does not know, and all data behind such a
        # hole moves down. (VMFSSPARSE and SESPARSE it knows; they are of ESX only and not worth the risk.)
        shown = _text(text[start : start + 60].splitlines()[0])
        file.unsupported(f"it has an extent that QEMU does not read or skips: {shown!r}")
    if len(match[1]) > 19 or not 0 < (count := int(match[1])) < 1 << 54:
        file.damaged("the size of an extent makes no sense")
    if (match[4] is not None) != (kind == b"FLAT") or (match[4] or b"").startswith(b"-"):
        file.damaged("an extent has no offset, or one that it must not have")
    return count, ImageReference("extent", _text(match[3]), "vmdk" if kind == b"SPARSE" else "raw")


# The others name no other files -------------------------------------------------------------------

_VDI_MAGIC = struct.pack("<I", 0xBEDA107F)
_VPC_MAGIC = b"conectix"
_VPC_DIFFERENCING = 4
#: Programs whose images have the size in the footer; with others the geometry counts (as Virtual PC has it).
_VPC_SIZE_IN_FOOTER = frozenset({b"win ", b"qem2", b"d2v ", b"tap\0", b"CTXS"})
_VPC_MAX_GEOMETRY = 65535 * 16 * 255
_PARALLELS_OLD = b"WithoutFreeSpace"
_PARALLELS_NEW = b"WithouFreSpacExt"
_LUKS_MAGIC = b"LUKS\xba\xbe"
_VHDX_MAGIC = b"vhdxfile"


def _vdi(file: _File) -> ImageHeader:
    begin = file.upto(0, SECTOR)
    file.require_magic(begin[64:68] == _VDI_MAGIC)
    if len(begin) < SECTOR:
        file.damaged("the file ends within the header")
    if any(begin[424:456]):
        # By UUID, not by name. QEMU refuses it, too.
        file.unsupported("it is a difference to another image (a snapshot of VirtualBox)")
    (size,) = struct.unpack_from("<Q", begin, 368)
    return ImageHeader(-(-size // SECTOR) * SECTOR, None, ())


def _vpc(file: _File) -> ImageHeader:
    """Also called VHD. The footer is at the end; in images that grow a copy is at the beginning."""
    footer = file.upto(0, SECTOR)
    if not footer.startswith(_VPC_MAGIC):
        footer = file.upto(max(0, file.size - SECTOR), SECTOR)
    file.require_magic(footer.startswith(_VPC_MAGIC))
    if len(footer) < SECTOR:
        file.damaged("the file ends within the header")
    size, cylinders, heads, sectors, kind = struct.unpack_from(">QHBBI", footer, 48)
    if kind == _VPC_DIFFERENCING:
        # QEMU does not know of parents: what is in the parent would read as zeros.
        file.unsupported("it is a difference to another image, which QEMU does not read")
    if footer[28:32] == b"\0\0\0\0":
        # Azure's. Old versions of QEMU go by the geometry, new ones by the footer.
        return ImageHeader(None, None, ())
    geometry = cylinders * heads * sectors
    if footer[28:32] in _VPC_SIZE_IN_FOOTER or geometry == _VPC_MAX_GEOMETRY:
        return ImageHeader(size // SECTOR * SECTOR, None, ())
    return ImageHeader(geometry * SECTOR, None, ())


def _parallels(file: _File) -> ImageHeader:
    begin = file.upto(0, 64)
    file.require_magic(begin[:16] in (_PARALLELS_OLD, _PARALLELS_NEW))
    if len(begin) < 64:
        file.damaged("the file ends within the header")
    (sectors,) = struct.unpack_from("<Q", begin, 36)
    if begin.startswith(_PARALLELS_OLD):
        sectors &= 0xFFFFFFFF
    return ImageHeader(sectors * SECTOR, None, ())


def _vhdx(file: _File) -> ImageHeader:
    """The size is behind a log that may have to be replayed first. QEMU refuses an image with a parent."""
    file.require_magic(file.upto(0, 8) == _VHDX_MAGIC)
    return ImageHeader(None, None, ())


def _luks(file: _File) -> ImageHeader:
    """The size depends on where the payload begins, and a header may also be detached: left to QEMU."""
    begin = file.upto(0, 8)
    file.require_magic(begin[:6] == _LUKS_MAGIC)
    if begin[6:8] != b"\0\1":
        file.unsupported("QEMU reads version 1 of LUKS only; use cryptsetup on the exported raw device")
    return ImageHeader(None, None, ())


_MAGICS: tuple[tuple[Format, int, bytes], ...] = (
    (Format.QCOW, 0, _QCOW_MAGIC + b"\0\0\0\1"),
    (Format.QCOW2, 0, _QCOW_MAGIC),
    (Format.QED, 0, _QED_MAGIC),
    (Format.VMDK, 0, _VMDK_SPARSE),
    (Format.VMDK, 0, _VMDK_ESX),
    (Format.VMDK, 0, _VMDK_TEXT),
    (Format.VDI, 64, _VDI_MAGIC),
    (Format.VHDX, 0, _VHDX_MAGIC),
    (Format.VPC, 0, _VPC_MAGIC),
    (Format.PARALLELS, 0, _PARALLELS_OLD),
    (Format.PARALLELS, 0, _PARALLELS_NEW),
    (Format.LUKS, 0, _LUKS_MAGIC),
)

_PARSERS: dict[Format, Callable[[_File], ImageHeader]] = {
    Format.RAW: _raw,
    Format.QCOW2: _qcow2,
    Format.QED: _qed,
    Format.VMDK: _vmdk,
    Format.VDI: _vdi,
    Format.VHDX: _vhdx,
    Format.VPC: _vpc,
    Format.PARALLELS: _parallels,
    Format.LUKS: _luks,
    Format.QCOW: _qcow,
}
