"""What read_header promises, with headers made here byte by byte and with bytes that mean harm."""

from __future__ import annotations

import struct
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.headers import ImageHeader, ImageReference, looks_like, read_header

MIB = 1 << 20

NAMES = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=200)
SIZES = st.integers(1, 1 << 40).map(lambda sectors: sectors * 512)


class Counted:
    """Bytes at offset 0 of a file of any size, counting what is read."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.count = 0

    def __call__(self, offset: int, length: int) -> bytes:
        assert offset >= 0
        assert length >= 0
        self.count += length
        return self.data[offset : offset + length]


def read(format: Format, data: bytes) -> ImageHeader:
    return read_header(format, Counted(data), len(data))


def refused(format: Format, data: bytes) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        read(format, data)
    return caught.value


def qcow2(
    size: int = MIB,
    backing: bytes = b"",
    extensions: tuple[tuple[int, bytes], ...] = (),
    *,
    version: int = 3,
    incompatible: int = 0,
    cluster_bits: int = 16,
    length: int | None = None,
    offset: int | None = None,
) -> bytes:
    """A qcow2 header: fixed fields, extensions, name of the backing file."""
    header_length = 104 if version == 3 else 72
    area = b"".join(
        struct.pack(">II", magic, len(content)) + content.ljust((len(content) + 7) & ~7, b"\0")
        for magic, content in (*extensions, (0, b""))
    )
    where = (header_length + len(area) if backing else 0) if offset is None else offset
    said = len(backing) if length is None else length
    fixed = struct.pack(">4sIQIIQ", b"QFI\xfb", version, where, said, cluster_bits, size).ljust(72, b"\0")
    if version == 3:
        fixed += struct.pack(">QQQII", incompatible, 0, 0, 4, header_length)
    return (fixed + area + backing).ljust(1 << 16, b"\0")


def qed(
    size: int = MIB, features: int = 0, backing: bytes = b"", length: int | None = None, offset: int = 64
) -> bytes:
    fields = struct.pack("<4sIIIQQQQ", b"QED\0", 65536, 4, 1, features, 0, 0, 65536)
    fields += struct.pack("<QII", size, offset, len(backing) if length is None else length)
    return (fields + backing).ljust(65536, b"\0")


def vmdk_sparse(capacity: int = 2048, descriptor: bytes = b"", directory: int = 21, at: int = 1) -> bytes:
    fields = struct.pack("<4sIIQQQQIQQQ", b"KDMV", 1, 3, capacity, 128, at, 20, 512, 21, directory, 128)
    return fields.ljust(512, b"\0") + descriptor.ljust(20 * 512, b"\0")


def descriptor(*extents: str, created: str = "twoGbMaxExtentSparse", extra: str = "") -> bytes:
    lines = ["# Disk DescriptorFile", "version=1", "CID=12ca7384", "parentCID=ffffffff"]
    lines += [f'createType="{created}"', extra or "# none", "# Extent description", *extents]
    lines += ["", "# The Disk Data Base", "#DDB", 'ddb.adapterType = "ide"']
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogateescape")


def paths(header: ImageHeader) -> list[str]:
    return [reference.path for reference in header.others]


# For all formats


@pytest.mark.parametrize("format", [format for format in Format if format is not Format.RAW])
def test_a_file_that_is_not_of_the_format_is_refused_with_the_option_to_say_another(format: Format) -> None:
    for data in (b"", b"\0", bytes(2 * MIB), b"\x7fELF" * 1000):
        error = refused(format, data)
        assert error.code is ErrorCode.WRONG_FORMAT
        assert error.message == f"not a {format} image"
        assert "--format" in error.hint


def test_the_cause_says_what_the_file_looks_like_but_the_hint_does_not_recommend_it() -> None:
    error = refused(Format.QCOW2, vmdk_sparse())
    assert error.cause == "the file looks like a vmdk image"
    assert "vmdk" not in error.hint


def test_a_raw_image_is_taken_as_it_is_whatever_it_looks_like() -> None:
    data = qcow2(backing=b"/etc/shadow")
    assert read(Format.RAW, data) == ImageHeader(len(data), None, ())


def test_nothing_is_read_from_a_raw_image() -> None:
    counted = Counted(b"")
    assert read_header(Format.RAW, counted, 1 << 40).virtual_size == 1 << 40
    assert counted.count == 0


@st.composite
def damaged_images(draw: st.DrawFn) -> bytes:
    """A good beginning with some bytes changed, and garbage."""
    good = draw(
        st.sampled_from(
            [
                qcow2(backing=b"base", extensions=((0xE2792ACA, b"raw"), (0x44415441, b"d")), incompatible=4),
                qcow2(version=2, backing=b"base", cluster_bits=9),
                qcow2(version=1, backing=b"base"),
                qed(features=5, backing=b"base"),
                vmdk_sparse(descriptor=descriptor(extra='parentFileNameHint="p.vmdk"')),
                vmdk_sparse(directory=(1 << 64) - 1) + vmdk_sparse() + bytes(512),
                descriptor('RW 2048 FLAT "a-flat.vmdk" 0', created="monolithicFlat"),
                descriptor('RW 2048 SPARSE "a-s001.vmdk"', extra='parentFileNameHint="p.vmdk"'),
                bytes(64) + struct.pack("<I", 0xBEDA107F) + bytes(444),
                b"conectix" + bytes(504),
                b"WithoutFreeSpace" + bytes(496),
                b"WithouFreSpacExt" + bytes(496),
                b"vhdxfile" + bytes(504),
                b"LUKS\xba\xbe\0\1" + bytes(504),
            ]
        )
    )
    data = bytearray(good)
    for _ in range(draw(st.integers(0, 6))):
        # Mostly in the fields, sometimes anywhere.
        position = draw(st.integers(0, draw(st.sampled_from([127, 700, len(data) - 1]))))
        change = draw(st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"RW ", b"\xff" * 8, bytes(8), b"\x7f"]))
        data[position : position + len(change)] = change
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


@given(st.sampled_from(Format), st.binary(max_size=2048) | damaged_images(), st.integers(0, 1 << 62))
def test_no_content_does_anything_but_succeed_or_be_refused_after_a_bounded_read(
    format: Format, data: bytes, more: int
) -> None:
    # A file system can also say a size that the file does not have when it is read.
    for size in (len(data), len(data) + more):
        counted = Counted(data)
        result: ImageHeader | StoragedError
        try:
            result = read_header(format, counted, size)
        except StoragedError as error:
            result = error
        if isinstance(result, StoragedError):
            assert result.code in (ErrorCode.WRONG_FORMAT, ErrorCode.UNSUPPORTED)
            assert all((result.message, result.cause, result.hint))
        else:
            header = result
            assert header.virtual_size is None or header.virtual_size >= 0
            for reference in (*header.others, *((header.backing,) if header.backing else ())):
                assert "\0" not in reference.path
                assert len(reference.path) <= 1023
        assert counted.count <= 4 * MIB


@given(st.binary(max_size=1024))
def test_the_guess_for_the_help_text_never_fails(data: bytes) -> None:
    looks_like(data, data)


# qcow2 and qcow


@given(SIZES, NAMES, st.sampled_from([None, "raw", "qcow2", "vmdk"]), st.sampled_from([2, 3]))
def test_the_backing_file_of_qcow2_comes_back_as_written(
    size: int, name: str, format: str | None, version: int
) -> None:
    extensions: tuple[tuple[int, bytes], ...] = ((0x6803F857, bytes(144)),)
    if format is not None:
        extensions += ((0xE2792ACA, format.encode()),)
    header = read(Format.QCOW2, qcow2(size, name.encode(), extensions, version=version))
    assert header == ImageHeader(size, ImageReference("backing", name, format), ())


@pytest.mark.parametrize(
    "name", ['json:{"driver":"nbd"}', "nbd:unix:/x", "https://example.org/x", "fat:/etc", "../../etc/shadow"]
)
def test_names_that_are_no_paths_come_back_as_written(name: str) -> None:
    header = read(Format.QCOW2, qcow2(backing=name.encode()))
    assert header.backing is not None
    assert header.backing.path == name


def test_a_name_in_no_known_encoding_survives_the_way_to_the_file_system() -> None:
    header = read(Format.QCOW2, qcow2(backing=b"b\xe4se"))
    assert header.backing is not None
    assert header.backing.path.encode("utf-8", "surrogateescape") == b"b\xe4se"


def test_a_name_ends_at_the_first_nul_as_in_c() -> None:
    header = read(Format.QCOW2, qcow2(backing=b"base\0/etc/shadow"))
    assert header.backing is not None
    assert header.backing.path == "base"


def test_an_empty_name_is_no_backing_file() -> None:
    assert read(Format.QCOW2, qcow2(backing=b"\0\0")).backing is None


@given(NAMES)
def test_the_external_data_file_of_qcow2_comes_back_as_written(name: str) -> None:
    header = read(Format.QCOW2, qcow2(extensions=((0x44415441, name.encode()),), incompatible=4))
    assert header.others == (ImageReference("data-file", name, "raw"),)


def test_a_data_file_without_the_feature_bit_is_none_and_the_bit_without_a_name_is_an_empty_name() -> None:
    assert read(Format.QCOW2, qcow2(extensions=((0x44415441, b"x"),))).others == ()
    assert paths(read(Format.QCOW2, qcow2(incompatible=4))) == [""]


def test_of_two_extensions_of_a_kind_the_last_counts_as_in_qemu() -> None:
    two = ((0x44415441, b"good"), (0x44415441, b"evil"))
    assert paths(read(Format.QCOW2, qcow2(extensions=two, incompatible=4))) == ["evil"]


@pytest.mark.parametrize(
    "data",
    [
        qcow2(backing=b"x", length=1024),
        qcow2(backing=b"x", length=0xFFFFFFFF),
        qcow2(backing=b"x", offset=1 << 63),
        qcow2(backing=b"x", offset=(1 << 16) - 1, length=2),
        qcow2(cluster_bits=8),
        qcow2(cluster_bits=22),
        qcow2(cluster_bits=0xFFFFFFFF),
        qcow2(extensions=((0x44415441, b"x" * 2000),)),
        qcow2(extensions=((0xE2792ACA, b"x" * 16),)),
        qcow2()[:104] + struct.pack(">II", 1, 0xFFFFFFFF) + bytes(1000),
        qcow2(backing=b"base")[:100],
    ],
)
def test_nonsense_in_a_qcow2_header_is_refused_with_the_cause(data: bytes) -> None:
    error = refused(Format.QCOW2, data)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert error.cause


def test_features_and_versions_of_qcow2_from_the_future_are_refused() -> None:
    assert refused(Format.QCOW2, qcow2(incompatible=1 << 5)).code is ErrorCode.UNSUPPORTED
    assert refused(Format.QCOW2, qcow2(version=4)).code is ErrorCode.UNSUPPORTED


def test_as_many_extensions_as_fit_are_read_in_little_time() -> None:
    data = qcow2(cluster_bits=21)[:104] + struct.pack(">II", 1, 0) * 262_000
    begun = time.monotonic()
    read(Format.QCOW2, data)
    assert time.monotonic() - begun < 5


def test_qcow_and_qcow2_are_told_apart_by_the_version() -> None:
    assert refused(Format.QCOW2, qcow2(version=1)).cause == "the file looks like a qcow image"
    assert refused(Format.QCOW, qcow2()).cause == "the file looks like a qcow2 image"


@given(SIZES, NAMES)
def test_the_backing_file_of_qcow_comes_back_without_a_format(size: int, name: str) -> None:
    header = read(Format.QCOW, qcow2(size, name.encode(), version=1))
    assert header == ImageHeader(size, ImageReference("backing", name, None), ())


# qed


@given(SIZES, NAMES, st.booleans())
def test_the_backing_file_of_qed_is_raw_or_of_no_known_format(size: int, name: str, raw: bool) -> None:
    header = read(Format.QED, qed(size, 5 if raw else 1, name.encode()))
    assert header == ImageHeader(size, ImageReference("backing", name, "raw" if raw else None), ())


def test_a_name_in_qed_without_the_feature_bit_is_no_backing_file() -> None:
    assert read(Format.QED, qed(backing=b"x")).backing is None


@pytest.mark.parametrize("data", [qed(features=1, length=5000), qed(features=1, offset=65500, length=100)])
def test_nonsense_in_a_qed_header_is_refused(data: bytes) -> None:
    assert refused(Format.QED, data).code is ErrorCode.WRONG_FORMAT


# vmdk


@given(SIZES, NAMES.filter(lambda name: not set(name) & set('"\r\n')))
def test_the_extents_of_a_vmdk_descriptor_come_back_as_written(size: int, name: str) -> None:
    extent = f'RW {size // 512} FLAT "{name}" 0'
    header = read(Format.VMDK, descriptor(extent, created="monolithicFlat"))
    # QEMU reads no more of a name than 511 bytes.
    name = name.encode()[:511].decode("utf-8", "surrogateescape")
    assert header == ImageHeader(size, None, (ImageReference("extent", name, "raw"),))


def test_the_sizes_of_the_extents_add_up_and_sparse_extents_are_vmdk() -> None:
    header = read(Format.VMDK, descriptor('RW 10 SPARSE "a"', 'RW 20 SPARSE "b"', 'RW 1 VMFS "c"'))
    assert header.virtual_size == 31 * 512
    assert [(o.path, o.format) for o in header.others] == [("a", "vmdk"), ("b", "vmdk"), ("c", "raw")]


@pytest.mark.parametrize(
    "extent",
    [
        'RW\n2048\nSPARSE\n"evil"',
        'RW 2048SPARSE "evil"',
        '\t RW 2048 SPARSE "evil"',
        'RW 2048 SPARSE"evil" ',
        'RW 2048 SPARSE "evil',
        'RW +2048 SPARSE "evil"',
        'RW 2048 SPARSE "evil"\r',
    ],
)
def test_an_extent_that_only_scanf_takes_for_one_is_reported_or_refused(extent: str) -> None:
    try:
        header = read(Format.VMDK, descriptor(extent))
    except StoragedError:
        return
    assert paths(header) == ["evil"]


@pytest.mark.parametrize(
    "extent",
    [
        "RW 63 ZERO",
        'RDONLY 63 FLAT "x" 0',
        'NOACCESS 63 FLAT "x" 0',
        'RW 63 VMFSRDM "x"',
        'RW 63 SESPARSE "x"',
        'RW 63 VMFSSPARSE "x"',
        'RW 63 FLATTER "x" 0',
    ],
)
def test_extents_that_qemu_would_leave_out_or_that_are_of_esx_are_refused(extent: str) -> None:
    error = refused(Format.VMDK, descriptor('RW 2048 SPARSE "a"', extent))
    assert error.code is ErrorCode.UNSUPPORTED
    assert extent.split()[0] in error.cause


def test_a_blank_line_before_an_extent_other_than_the_first_is_refused_too() -> None:
    # QEMU 7.2 shows such a disk with twice its size.
    for between in ("", "  ", "\r"):
        error = refused(Format.VMDK, descriptor('RW 8 SPARSE "a"', between, 'RW 8 SPARSE "b"'))
        assert error.code is ErrorCode.UNSUPPORTED
        assert "blank line" in error.cause


@pytest.mark.parametrize(
    "data",
    [
        descriptor(),
        descriptor('RW 0 SPARSE "a"'),
        descriptor('RW -5 SPARSE "a"'),
        descriptor(f'RW {"9" * 5000} SPARSE "a"'),
        descriptor('RW 8 FLAT "a"'),
        descriptor('RW 8 FLAT "a" -1'),
        descriptor('RW 8 SPARSE "a" 5'),
        descriptor('RW 8 SPARSE "a"') + b'parentFileNameHint="x',
        descriptor('RW 8 SPARSE "a"', extra=f'parentFileNameHint="{"x" * 5000}"'),
        b"# Disk DescriptorFile\n",
        vmdk_sparse(directory=(1 << 64) - 1),
        vmdk_sparse()[:300],
    ],
)
def test_nonsense_in_a_vmdk_is_refused(data: bytes) -> None:
    assert refused(Format.VMDK, data).code is ErrorCode.WRONG_FORMAT


@pytest.mark.parametrize("created", ["monolithicSparse", "streamOptimized", "seSparse", "custom", ""])
def test_descriptors_of_a_type_that_qemu_does_not_open_are_refused(created: str) -> None:
    error = refused(Format.VMDK, descriptor('RW 8 SPARSE "a"', created=created))
    assert error.code is ErrorCode.UNSUPPORTED
    assert created in error.cause


def test_a_sparse_vmdk_names_no_extents_because_qemu_looks_at_none_in_it() -> None:
    embedded = descriptor('RW 2048 SPARSE "/etc/shadow"', created="monolithicSparse")
    assert read(Format.VMDK, vmdk_sparse(2048, embedded)) == ImageHeader(MIB, None, ())


def test_a_sparse_vmdk_of_capacity_zero_is_refused_because_there_qemu_does() -> None:
    assert refused(Format.VMDK, vmdk_sparse(0, descriptor('RW 8 SPARSE "/x"'))).code is ErrorCode.UNSUPPORTED


def test_the_parent_of_a_vmdk_is_vmdk_and_is_found_wherever_qemu_finds_it() -> None:
    expected = ImageReference("backing", "p.vmdk", "vmdk")
    # The CID says "no parent" here; QEMU goes by the hint.
    for before, between in (("", '="'), ("# ", '="'), ("x", "::")):
        extra = f'{before}parentFileNameHint{between}p.vmdk"'
        assert read(Format.VMDK, descriptor('RW 8 SPARSE "a"', extra=extra)).backing == expected
        assert read(Format.VMDK, vmdk_sparse(8, descriptor(extra=extra))).backing == expected
        # QEMU goes to byte 512 for it, whatever the header says of where the descriptor is.
        assert read(Format.VMDK, vmdk_sparse(8, descriptor(extra=extra), at=777)).backing == expected


def test_the_size_of_a_stream_optimized_vmdk_is_in_its_footer() -> None:
    data = vmdk_sparse(8, directory=(1 << 64) - 1) + bytes(512) + vmdk_sparse(4096)[:512] + bytes(512)
    assert read(Format.VMDK, data).virtual_size == 4096 * 512


@pytest.mark.parametrize(
    "filler", [b"\n", b" ", b"RW\n", b"RW 1", b"RW 1 SPARSE ", b"RW 1 \n", b"\n\nRW \n", b'RW 1 SPARSE "a\n']
)
def test_no_descriptor_takes_long_to_read(filler: bytes) -> None:
    data = descriptor() + filler * (MIB // len(filler))
    begun = time.monotonic()
    refused(Format.VMDK, data)
    assert time.monotonic() - begun < 5


def test_a_descriptor_with_thousands_of_extents_is_refused() -> None:
    assert refused(Format.VMDK, descriptor(*['RW 8 SPARSE "a"'] * 5000)).code is ErrorCode.UNSUPPORTED


def test_an_esx_image_is_refused() -> None:
    assert refused(Format.VMDK, b"COWD" + bytes(2000)).code is ErrorCode.UNSUPPORTED


# The others


def test_differences_to_images_that_qemu_would_not_read_are_refused() -> None:
    vpc = b"conectix" + bytes(52) + struct.pack(">I", 4) + bytes(448)
    vdi = bytes(64) + struct.pack("<I", 0xBEDA107F) + bytes(372) + b"\1" * 16 + bytes(56)
    for format, data in ((Format.VPC, vpc), (Format.VDI, vdi)):
        assert refused(format, data).code is ErrorCode.UNSUPPORTED


def test_luks2_is_refused_with_the_way_to_use_it() -> None:
    error = refused(Format.LUKS, b"LUKS\xba\xbe\0\2" + bytes(504))
    assert error.code is ErrorCode.UNSUPPORTED
    assert "cryptsetup" in error.cause
