"""What inspect_chain promises, with images that the qemu-img of this host makes."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.chain import MAX_CHAIN, ImageFile, inspect_chain
from storaged.model.formats import Format
from tests.harness import luks_image, run

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

MIB = 1 << 20


def create(path: Path, format: str, *options: str, size: str | None = "8M") -> Path:
    """Make an image with qemu-img, in its own directory so that relative names work."""
    command = ["qemu-img", "create", "-q", "-f", format, *options, path.name, *([size] if size else [])]
    subprocess.run(command, cwd=path.parent, check=True, capture_output=True, timeout=60)
    return path


def overlay(path: Path, backing: str, format: str = "qcow2") -> Path:
    """Make a qcow2 image over a name, whether that exists or not (-u)."""
    return create(path, "qcow2", "-u", "-b", backing, "-F", format)


def qemu_size(path: Path, format: str) -> int:
    """What QEMU takes for the virtual size."""
    command = ["qemu-img", "info", "--output=json", "-f", format, str(path)]
    done = subprocess.run(command, check=True, capture_output=True, timeout=60)
    return int(json.loads(done.stdout)["virtual-size"])


def inspect(path: Path, format: str = "qcow2", *allowed: Path) -> tuple[ImageFile, ...]:
    return inspect_chain(str(path), Format(format), [str(place) for place in allowed])


def refused(path: Path, format: str = "qcow2", *allowed: Path) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        inspect(path, format, *allowed)
    return caught.value


# One image


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", ()),
        ("qcow2", ()),
        ("qcow2", ("-o", "compat=0.10")),
        ("qcow2", ("-o", "extended_l2=on,compression_type=zstd,cluster_size=128k")),
        ("qcow2", ("-o", "cluster_size=512")),
        ("qcow", ()),
        ("qed", ()),
        ("vmdk", ("-o", "subformat=monolithicSparse")),
        ("vmdk", ("-o", "subformat=streamOptimized")),
        ("vdi", ()),
        ("vdi", ("-o", "static=on")),
        ("vpc", ()),
        ("vpc", ("-o", "subformat=fixed")),
        ("vpc", ("-o", "subformat=fixed,force_size=on")),
        ("parallels", ()),
    ],
)
def test_an_image_has_the_virtual_size_that_qemu_sees_and_no_other_files(
    tmp_path: Path, format: str, options: tuple[str, ...]
) -> None:
    path = create(tmp_path / "disk", format, *options)
    (image,) = inspect(path, format)
    status = path.stat()
    assert image == ImageFile(
        path=str(path),
        format=Format(format),
        device=status.st_dev,
        inode=status.st_ino,
        extents=(),
        data_file=None,
        size=status.st_size,
        virtual_size=qemu_size(path, format),
    )
    assert list(image.files()) == [image]


def test_a_vhdx_image_is_taken_without_its_size(tmp_path: Path) -> None:
    (image,) = inspect(create(tmp_path / "disk", "vhdx"), "vhdx")
    assert image.virtual_size is None


def test_a_luks_image_is_taken_without_its_size(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("geheim")
    (image,) = inspect(luks_image(tmp_path / "disk", tmp_path / "key"), "luks")
    assert image.virtual_size is None


def test_a_full_stream_optimized_vmdk_has_its_size_in_the_footer(tmp_path: Path) -> None:
    raw = create(tmp_path / "raw", "raw")
    path = tmp_path / "disk.vmdk"
    command = ["qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*command, raw, path], check=True, timeout=60)
    assert inspect(path, "vmdk")[0].virtual_size == 8 * MIB


@pytest.mark.parametrize(
    ("subformat", "extents", "extent_format"),
    [
        ("monolithicFlat", ["disk-flat.vmdk"], Format.RAW),
        ("twoGbMaxExtentFlat", ["disk-f001.vmdk", "disk-f002.vmdk"], Format.RAW),
        ("twoGbMaxExtentSparse", ["disk-s001.vmdk", "disk-s002.vmdk"], Format.VMDK),
    ],
)
def test_the_extents_of_a_vmdk_that_bear_its_name_need_no_leave(
    tmp_path: Path, subformat: str, extents: list[str], extent_format: Format
) -> None:
    size = "8M" if subformat == "monolithicFlat" else "3G"
    path = create(tmp_path / "disk.vmdk", "vmdk", "-o", f"subformat={subformat}", size=size)
    (image,) = inspect(path, "vmdk")
    assert [extent.path for extent in image.extents] == [str(tmp_path / name) for name in extents]
    assert {extent.format for extent in image.extents} == {extent_format}
    assert image.virtual_size == qemu_size(path, "vmdk")
    assert len(list(image.files())) == 1 + len(extents)


def test_an_image_is_found_through_a_symbolic_link_under_its_real_path(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2")
    (tmp_path / "link").symlink_to("disk")
    assert inspect(tmp_path / "link")[0].path == str(path)
    assert inspect_chain("//" + str(path), Format.QCOW2, [])[0].path == str(path)


# Sources that are none


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    assert refused(tmp_path / "none").code is ErrorCode.SOURCE_MISSING
    (tmp_path / "dangling").symlink_to("none")
    assert refused(tmp_path / "dangling").code is ErrorCode.SOURCE_MISSING
    create(tmp_path / "file", "raw")
    assert refused(tmp_path / "file" / "x").code is ErrorCode.SOURCE_MISSING


def test_what_is_no_disk_is_refused_by_what_it_is_and_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as listener:
        # Bound by a short name: pytest's paths may be too long for a socket.
        before = Path.cwd()
        os.chdir(tmp_path)
        try:
            listener.bind("socket")
        finally:
            os.chdir(before)
    for path, what in (
        (tmp_path, "a directory"),
        (tmp_path / "fifo", "a FIFO"),
        (tmp_path / "socket", "a socket"),
        (Path("/dev/null"), "a character device"),
        (tmp_path / "loop", "a loop of symbolic links"),
    ):
        error = refused(path, "raw")
        assert error.code is ErrorCode.INVALID_SOURCE
        assert what in error.message


def test_paths_that_are_not_absolute_or_no_paths_are_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2")
    for bad in ("disk", "", "/a\0b", "/" + "x" * 300):
        with pytest.raises(StoragedError) as caught:
            inspect_chain(bad, Format.RAW, [])
        assert caught.value.code is ErrorCode.INVALID_SOURCE
    for bad in ("", "relative", "/a\0b"):
        with pytest.raises(StoragedError) as caught:
            inspect_chain(str(path), Format.QCOW2, [bad])
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT


def test_an_image_of_another_format_is_refused_and_never_taken_for_what_it_looks_like(tmp_path: Path) -> None:
    error = refused(create(tmp_path / "disk", "vmdk"), "qcow2")
    assert error.code is ErrorCode.WRONG_FORMAT
    assert str(tmp_path / "disk") in error.message
    assert "vmdk" in error.cause
    assert "--format" in error.hint




# Sizes


def test_an_image_without_size_is_refused(tmp_path: Path) -> None:
    for format in ("raw", "qcow2"):
        error = refused(create(tmp_path / format, format, size="0"), format)
        assert error.code is ErrorCode.INVALID_SIZE


def test_a_raw_image_with_half_a_sector_is_refused_and_the_hint_rounds_it_up(tmp_path: Path) -> None:
    path = tmp_path / "my disk"
    path.write_bytes(bytes(1000))
    error = refused(path, "raw")
    assert error.code is ErrorCode.INVALID_SIZE
    subprocess.run(["sh", "-c", error.hint.removeprefix("round it up: ")], check=True)
    assert path.stat().st_size == 1024
    assert inspect(path, "raw")[0].virtual_size == 1024


def test_an_image_larger_than_the_kernel_can_address_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2")
    with path.open("r+b") as file:
        os.pwrite(file.fileno(), struct.pack(">Q", 1 << 63), 24)
    assert refused(path).code is ErrorCode.INVALID_SIZE


def test_a_block_device_is_measured_and_known_by_its_number(tmp_path: Path) -> None:
    raw = create(tmp_path / "raw", "raw")
    device = run("losetup", "--find", "--show", raw).stdout.strip()
    try:
        (image,) = inspect(Path(device), "raw")
        assert image.size == image.virtual_size == 8 * MIB
        assert image.block_device == os.stat(device).st_rdev
    finally:
        run("losetup", "--detach", device)


# Backing files


def test_a_chain_comes_back_from_the_image_down_to_its_base(tmp_path: Path) -> None:
    bases = tmp_path / "bases"
    bases.mkdir()
    base = create(bases / "base.raw", "raw")
    middle = create(bases / "middle.qcow2", "qcow2", "-b", "base.raw", "-F", "raw")
    top = create(tmp_path / "top.qcow2", "qcow2", "-b", "bases/middle.qcow2", "-F", "qcow2")
    chain = inspect(top, "qcow2", bases)
    assert [image.path for image in chain] == [str(top), str(middle), str(base)]
    assert [image.format for image in chain] == [Format.QCOW2, Format.QCOW2, Format.RAW]
    # Exact files serve as well as a directory.
    assert inspect(top, "qcow2", base, middle) == chain


def test_a_vmdk_chain_needs_no_format_in_the_header(tmp_path: Path) -> None:
    base = create(tmp_path / "base.vmdk", "vmdk")
    top = create(tmp_path / "top.vmdk", "vmdk", "-b", "base.vmdk", "-F", "vmdk", size=None)
    assert [image.path for image in inspect(top, "vmdk", base)] == [str(top), str(base)]


def test_a_qed_image_over_raw_says_so_and_over_anything_else_is_refused(tmp_path: Path) -> None:
    base = create(tmp_path / "base", "raw")
    top = create(tmp_path / "top", "qed", "-b", "base", "-F", "raw")
    assert [image.format for image in inspect(top, "qed", base)] == [Format.QED, Format.RAW]
    create(tmp_path / "base2", "qcow2")
    error = refused(create(tmp_path / "top2", "qed", "-b", "base2", "-F", "qcow2"), "qed", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert "names no format for its backing file" in error.message
    assert "qemu-img convert -f qed" in error.hint


def test_a_backing_file_that_nobody_allowed_is_refused_with_the_very_option_that_allows_it(
    tmp_path: Path,
) -> None:
    base = create(tmp_path / "base", "raw")
    top = overlay(tmp_path / "top", "base", "raw")
    error = refused(top)
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED
    assert str(top) in error.message
    assert "base" in error.message
    assert error.hint.endswith(f"-o backing=allow:{tmp_path}")
    allowed = Path(error.hint.rpartition("allow:")[2])
    assert inspect(top, "qcow2", allowed)[1].path == str(base)


def test_a_directory_is_not_allowed_by_one_whose_name_it_begins_with(tmp_path: Path) -> None:
    for name in ("pool", "pool2"):
        (tmp_path / name).mkdir()
    create(tmp_path / "pool2" / "base", "raw")
    top = overlay(tmp_path / "top", "pool2/base", "raw")
    assert refused(top, "qcow2", tmp_path / "pool").code is ErrorCode.BACKING_NOT_ALLOWED


@pytest.mark.parametrize("name", ["link", "../secret", "dirlink/secret", "dirlink/../secret"])
def test_no_way_of_writing_a_name_leads_out_of_what_was_allowed(tmp_path: Path, name: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    create(tmp_path / "secret", "raw")
    (pool / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "other").mkdir()
    create(tmp_path / "other" / "secret", "raw")
    (pool / "dirlink").symlink_to(tmp_path / "other")
    error = refused(overlay(pool / "top", name, "raw"), "qcow2", pool)
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED
    assert "secret" in error.message


def test_a_link_to_an_allowed_directory_allows_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    base = create(tmp_path / "real" / "base", "raw")
    (tmp_path / "pool").symlink_to("real")
    top = overlay(tmp_path / "top", "pool/base", "raw")
    assert inspect(top, "qcow2", tmp_path / "pool")[1].path == str(base)


def test_a_relative_name_is_taken_from_the_directory_that_the_user_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        create(tmp_path / name / "base", "raw")
    overlay(tmp_path / "b" / "top", "base", "raw")
    (tmp_path / "a" / "top").symlink_to("../b/top")
    assert inspect(tmp_path / "a" / "top", "qcow2", tmp_path)[1].path == str(tmp_path / "a" / "base")


def test_whether_a_file_exists_is_not_told_where_nothing_was_allowed(tmp_path: Path) -> None:
    create(tmp_path / "there", "raw")
    errors = [refused(overlay(tmp_path / "top", name, "raw")) for name in ("there", "absent")]
    assert {error.code for error in errors} == {ErrorCode.BACKING_NOT_ALLOWED}
    assert errors[0].message.replace("there", "absent") == errors[1].message.replace("there", "absent")


def test_a_missing_backing_file_is_named_together_with_the_image_that_needs_it(tmp_path: Path) -> None:
    error = refused(overlay(tmp_path / "top", "gone", "raw"), "qcow2", tmp_path)
    assert error.code is ErrorCode.BACKING_MISSING
    assert "gone" in error.message
    assert str(tmp_path / "top") in error.message
    assert "qemu-img rebase -u" in error.hint


def test_a_backing_file_that_is_no_file_is_refused_without_blocking(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name, what in (("fifo", "FIFO"), (".", "directory")):
        error = refused(overlay(tmp_path / "top", name, "raw"), "qcow2", tmp_path)
        assert error.code is ErrorCode.INVALID_SOURCE
        assert what in error.cause


@pytest.mark.parametrize(
    "name",
    [
        "nbd:localhost:10809",
        "nbd+unix:///x?socket=/y",
        "https://example.org/x",
        "json:{}",
        "fat:/etc",
        "file:base",
        "host_device:/dev/sda",
    ],
)
def test_a_backing_file_that_is_no_path_is_refused_whatever_was_allowed(tmp_path: Path, name: str) -> None:
    path = overlay(tmp_path / "top", "x" * len(name), "raw")
    path.write_bytes(path.read_bytes().replace(b"x" * len(name), name.encode()))
    error = refused(path, "qcow2", Path("/"))
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED


def test_a_backing_file_without_a_format_is_refused_and_the_hint_is_the_command_to_say_it(
    tmp_path: Path,
) -> None:
    create(tmp_path / "base", "raw")
    path = overlay(tmp_path / "top", "base", "raw")
    content = path.read_bytes()
    # The magic of an extension that nobody knows takes the place of that of the format.
    path.write_bytes(content.replace(b"\xe2\x79\x2a\xca", b"\x01\x02\x03\x04"))
    error = refused(path, "qcow2", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert "names no format for its backing file" in error.message
    command = error.hint.replace("BACKING", "base").replace("FORMAT", "raw")
    subprocess.run(["sh", "-c", command], check=True, cwd=tmp_path, timeout=60)
    assert len(inspect(path, "qcow2", tmp_path)) == 2


def test_a_qcow_image_with_a_backing_file_is_refused_because_it_cannot_say_the_format(tmp_path: Path) -> None:
    create(tmp_path / "base", "raw")
    error = refused(create(tmp_path / "top", "qcow", "-b", "base", "-F", "raw"), "qcow", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert "qemu-img convert -f qcow " in error.hint


def test_a_backing_file_of_an_unknown_format_or_of_another_than_said_is_refused(tmp_path: Path) -> None:
    create(tmp_path / "base", "raw")
    path = overlay(tmp_path / "top", "base", "bochs")
    error = refused(path, "qcow2", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert "'bochs' is not known" in error.cause
    error = refused(overlay(tmp_path / "top", "base", "qcow2"), "qcow2", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert str(tmp_path / "base") in error.message
    assert "qemu-img rebase -u" in error.hint


def test_a_chain_that_is_a_loop_is_refused(tmp_path: Path) -> None:
    overlay(tmp_path / "a", "b")
    overlay(tmp_path / "b", "a")
    for start in ("a", "b"):
        error = refused(tmp_path / start, "qcow2", tmp_path)
        assert error.code is ErrorCode.WRONG_FORMAT
        assert "loop" in error.cause
    os.link(tmp_path / "a", tmp_path / "hard")
    overlay(tmp_path / "b", "hard")
    assert "loop" in refused(tmp_path / "a", "qcow2", tmp_path).cause


def test_a_chain_may_be_long_but_not_endless(tmp_path: Path) -> None:
    template = overlay(tmp_path / "0", "base001").read_bytes()
    create(tmp_path / "base000", "raw")
    for number in range(1, MAX_CHAIN + 1):
        content = template.replace(b"base001", b"base%03d" % (number - 1))
        if number == 1:
            content = content.replace(b"\0\0\0\5qcow2", b"\0\0\0\3raw\0\0")
        (tmp_path / f"base{number:03}").write_bytes(content)
    assert len(inspect(tmp_path / f"base{MAX_CHAIN - 1:03}", "qcow2", tmp_path)) == MAX_CHAIN
    error = refused(tmp_path / f"base{MAX_CHAIN:03}", "qcow2", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert str(MAX_CHAIN) in error.cause


# External data files


def test_an_external_data_file_needs_leave_too(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2", "-o", f"data_file={tmp_path}/data")
    error = refused(path)
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED
    assert "external data file" in error.message
    (image,) = inspect(path, "qcow2", tmp_path / "data")
    assert image.data_file is not None
    assert image.data_file.path == str(tmp_path / "data")
    assert image.data_file.format is Format.RAW
    assert [file.path for file in image.files()] == [str(path), str(tmp_path / "data")]


def test_a_relative_data_file_is_beside_its_image(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2", "-o", "data_file=data,data_file_raw=on")
    (image,) = inspect(path, "qcow2", tmp_path)
    assert image.data_file is not None
    assert image.data_file.path == str(tmp_path / "data")


def test_an_image_that_hides_the_name_of_its_data_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2", "-o", "data_file=data")
    path.write_bytes(path.read_bytes().replace(b"DATA\0\0\0\4data", b"DATB\0\0\0\4data"))
    error = refused(path, "qcow2", tmp_path)
    assert error.code is ErrorCode.BACKING_MISSING


def test_a_data_file_that_is_the_image_itself_is_refused(tmp_path: Path) -> None:
    path = create(tmp_path / "disk", "qcow2", "-o", "data_file=data")
    (tmp_path / "data").unlink()
    os.link(path, tmp_path / "data")
    assert "loop" in refused(path, "qcow2", tmp_path).cause


# Extents of vmdk


def vmdk(path: Path, extent: str) -> Path:
    """A descriptor that names a flat extent."""
    create(path, "vmdk", "-o", "subformat=monolithicFlat")
    path.write_text(path.read_text().replace(f"{path.stem}-flat.vmdk", extent))
    return path


@pytest.mark.parametrize("extent", ["/etc/passwd", "../secret", "db-flat.vmdk", "disk2-flat.vmdk", "disk"])
def test_a_descriptor_that_names_the_files_of_others_is_refused(tmp_path: Path, extent: str) -> None:
    pool = tmp_path / "pool"
    pool.mkdir()
    for name in ("../secret", "db-flat.vmdk", "disk2-flat.vmdk", "disk"):
        create((pool / name).resolve(), "raw")
    error = refused(vmdk(pool / "disk.vmdk", extent), "vmdk")
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED


def test_an_extent_with_the_right_name_that_is_a_link_is_refused(tmp_path: Path) -> None:
    path = vmdk(tmp_path / "disk.vmdk", "disk-flat.vmdk")
    (tmp_path / "disk-flat.vmdk").unlink()
    (tmp_path / "disk-flat.vmdk").symlink_to("/etc/passwd")
    assert refused(path, "vmdk").code is ErrorCode.BACKING_NOT_ALLOWED


def test_an_extent_elsewhere_can_be_allowed(tmp_path: Path) -> None:
    create(tmp_path / "other", "raw")
    (image,) = inspect(vmdk(tmp_path / "disk.vmdk", "other"), "vmdk", tmp_path / "other")
    assert [extent.path for extent in image.extents] == [str(tmp_path / "other")]


def test_extents_are_looked_for_where_qemu_will_look_for_them(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    vmdk(tmp_path / "real" / "disk.vmdk", "disk-flat.vmdk")
    # QEMU gets the real path of the descriptor, so the file beside the link must not count.
    (tmp_path / "disk.vmdk").symlink_to("real/disk.vmdk")
    create(tmp_path / "disk-flat.vmdk", "raw")
    (image,) = inspect(tmp_path / "disk.vmdk", "vmdk")
    assert [extent.path for extent in image.extents] == [str(tmp_path / "real" / "disk-flat.vmdk")]


def test_an_extent_with_extents_of_its_own_is_refused(tmp_path: Path) -> None:
    outer = create(tmp_path / "disk.vmdk", "vmdk", "-o", "subformat=twoGbMaxExtentSparse")
    vmdk(tmp_path / "inner.vmdk", "inner-flat.vmdk").rename(tmp_path / "disk-s001.vmdk")
    error = refused(outer, "vmdk", tmp_path)
    assert error.code is ErrorCode.WRONG_FORMAT
    assert "no extents of its own" in error.cause


def test_the_size_of_a_sparse_extent_is_the_one_in_its_header_as_in_qemu(tmp_path: Path) -> None:
    path = create(tmp_path / "disk.vmdk", "vmdk", "-o", "subformat=twoGbMaxExtentSparse")
    path.write_text(path.read_text().replace("RW 16384 ", "RW 8 "))
    assert inspect(path, "vmdk")[0].virtual_size == qemu_size(path, "vmdk") == 8 * MIB


def test_a_missing_extent_is_named(tmp_path: Path) -> None:
    path = vmdk(tmp_path / "disk.vmdk", "disk-flat.vmdk")
    (tmp_path / "disk-flat.vmdk").unlink()
    error = refused(path, "vmdk")
    assert error.code is ErrorCode.BACKING_MISSING
    assert "disk-flat.vmdk" in error.message


# Hygiene


def test_no_descriptor_is_left_open_by_success_or_failure(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    create(tmp_path / "base", "raw")
    path = overlay(tmp_path / "top", "base", "raw")
    before = len(os.listdir("/proc/self/fd"))
    inspect(path, "qcow2", tmp_path)
    for bad in (path, tmp_path / "fifo", tmp_path / "none", tmp_path):
        refused(bad, "qed")
    assert len(os.listdir("/proc/self/fd")) == before


def test_names_made_to_confuse_a_terminal_are_shown_harmless(tmp_path: Path) -> None:
    path = overlay(tmp_path / "top", "e" * 12, "raw")
    path.write_bytes(path.read_bytes().replace(b"e" * 12, b"\x1b[2Jhide\xff\n\x07."))
    error = refused(path)
    assert error.code is ErrorCode.BACKING_NOT_ALLOWED
    for text in (error.message, error.cause, error.hint):
        assert text.isprintable()
        text.encode()
