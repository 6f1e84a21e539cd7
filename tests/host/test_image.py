"""storaged image with real images of this host, beside a real daemon."""

from __future__ import annotations

import base64
import json
import os
import pty
import re
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.images.commands import Task, opened
from storaged.images.newfile import new_file
from storaged.images.operand import Wish, look
from storaged.images.process import run as run_qemu_img
from storaged.model.config import Config
from storaged.model.formats import Format
from tests.harness import (
    Daemon,
    as_json,
    error_of,
    eventually,
    image,
    image_command,
    luks_image,
    mounted,
    run,
    with_config,
    writes,
)

MIB = 1 << 20
PASSPHRASE = b"correct horse battery"


def failure(daemon: Daemon, *words: object) -> dict[str, Any]:
    """Run a command that has to fail, and return what --json says of it."""
    done = image_command(daemon, *words, check=False)
    assert done.status == 1, done
    code = re.search(r" \[([a-z-]+)\]$", done.stderr, re.MULTILINE)
    return {"code": code and code[1], "text": done.stderr}


def data(path: Path, mib: int = 16) -> Path:
    """A raw image without zeroes."""
    path.write_bytes(os.urandom(MIB) * mib)
    return path


def qcow2(path: Path, mib: int = 16) -> Path:
    """A qcow2 image of that."""
    raw = data(path.with_suffix(".data"), mib)
    run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path)
    return path


def chain(place: Path) -> tuple[Path, Path]:
    """An image of which the first MiB is its own, and its backing file."""
    base, top = data(place / "base.raw", 4), place / "top.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", base, top)
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 7 0 1M", top)
    return top, base


def told(daemon: Daemon, *words: object) -> Any:
    """What a command prints as JSON."""
    return as_json(image_command(daemon, *words, "--json").stdout)


def nothing_left(daemon: Daemon) -> bool:
    """Whether no workspace is left."""
    return not os.listdir(f"{daemon.layout.run_dir}/images")


def converter(daemon: Daemon) -> int:
    """The pid of the qemu-img that is at work for this root, 0 if there is none."""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = entry.read_bytes().split(b"\0")
            here = os.readlink(entry.parent / "cwd").startswith(f"{daemon.layout.run_dir}/images/")
            if here and words[0].endswith(b"/qemu-img") and words[1] == b"convert":
                return int(entry.parent.name)
        except (OSError, IndexError):
            continue
    return 0


@contextmanager
def converting(daemon: Daemon, *words: object) -> Iterator[subprocess.Popen[str]]:
    """A convert that takes half a minute; it is ended if the test does not."""
    command = [*daemon.cli_command(), "image", "convert", "-r", "512K", *map(str, words)]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        eventually(lambda: converter(daemon) or process.poll() is not None, "qemu-img converts")
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        process.kill()
        process.communicate(timeout=20)
        eventually(lambda: not converter(daemon), "qemu-img is gone")


def test_the_format_is_what_the_name_or_the_option_says_and_never_the_content(root: Daemon, place: Path) -> None:
    image_command(root, "create", place / "a.qcow2", "64M", "-o", "compat=0.10")
    found = told(root, "info", place / "a.qcow2")
    assert found["filename"] == str(place / "a.qcow2")
    assert (found["format"], found["virtual-size"], found["format-specific"]["data"]["compat"]) == (
        "qcow2", 64 * MIB, "0.10"
    )
    os.rename(place / "a.qcow2", place / "a.img")
    assert told(root, "info", place / "a.img")["format"] == "raw"
    assert told(root, "info", "-f", "qcow2", place / "a.img")["format"] == "qcow2"
    data(place / "b.qcow2", 1)
    error = failure(root, "info", place / "b.qcow2")
    assert error["code"] == "wrong-format"
    assert "no --format was said" in error["text"]


def test_a_name_may_have_any_characters(root: Daemon, place: Path) -> None:
    source = data(place / 'a "b\\\n,c":d.raw', 1)
    image_command(root, "convert", source, place / 'x\n",y.qcow2')
    assert told(root, "compare", source, place / 'x\n",y.qcow2')["identical"]
    image_command(root, "check", place / "x\n\",y.qcow2", "--json")


def test_what_is_there_is_not_overwritten_but_written_into_with_n(root: Daemon, place: Path) -> None:
    source, target = data(place / "a.raw", 2), data(place / "b.raw", 3)
    before = target.read_bytes()
    for command in (["create", target, "1M"], ["convert", source, target]):
        assert failure(root, *command)["code"] == "invalid-argument"
        assert target.read_bytes() == before
    image_command(root, "convert", "-n", source, target)
    assert target.read_bytes() == source.read_bytes() + before[2 * MIB:]
    error = failure(root, "create", "-o", "foo=1", place / "d.qcow2", "1M")
    assert error["code"] == "image-failed"
    assert f"{place}/d.qcow2: Invalid parameter 'foo'" in error["text"]
    assert sorted(path.name for path in place.glob("*d*")) == []
    small = data(place / "c.raw", 1)
    error = failure(root, "convert", "-n", source, small)
    assert error["code"] == "image-failed"
    assert "smaller than input" in error["text"]


@pytest.mark.parametrize("format", ["qcow2", "vmdk", "luks"])
def test_convert_there_and_back(root: Daemon, place: Path, format: str) -> None:
    source = data(place / "a.raw", 4)
    key = place / "key"
    key.write_bytes(PASSPHRASE)
    secret = ["-o", f"key-file={key}"] if format == "luks" else []
    there = ["-O", format] + (
        ["--target-option", f"key-file={key}", "-o", "iter-time=10"] if format == "luks" else []
    )
    image_command(root, "convert", *there, source, place / "b")
    image_command(root, "convert", "-f", format, *secret, place / "b", place / "c.raw")
    assert (place / "c.raw").read_bytes()[:4 * MIB] == source.read_bytes()
    image_command(root, "compare", "-f", format, *secret, place / "b", source)
    assert nothing_left(root)
    assert not list(place.glob(".*"))


def test_a_file_that_an_image_names_needs_leave(daemon: Daemon, place: Path) -> None:
    top, base = chain(place)
    assert told(daemon, "info", top)["backing-filename"] == str(base)
    for command in (["convert", top, place / "out.raw"], ["map", top], ["info", "--backing-chain", top],
                    ["resize", top, "+1M"], ["commit", top]):
        assert failure(daemon, *command)["code"] == "backing-not-allowed"
    assert not (place / "out.raw").exists()
    allow = ("-o", f"backing=allow:{place}")
    image_command(daemon, "convert", *allow, top, place / "out.raw")
    assert (place / "out.raw").read_bytes() == bytes([7]) * MIB + base.read_bytes()[MIB:]
    found = told(daemon, "info", "--backing-chain", *allow, top)
    assert [one["filename"] for one in found] == [str(top), str(base)]
    # It does not matter how the option is spelled: it is as that of attach.
    assert daemon.device("a", top, format="qcow2", read_only=True, options={"backing": f"allow:{place}"})


def test_one_layer_is_exported_over_a_backing_file_and_cut_off(root: Daemon, place: Path) -> None:
    top, base = chain(place)
    layer = place / "layer.qcow2"
    image_command(root, "convert", "-o", f"backing=allow:{base}", "-o", "cluster_size=4k", "-B", base, top,
        str(layer),
    )
    found = told(root, "info", layer)
    assert (found["backing-filename"], found["backing-filename-format"]) == (str(base), "raw")
    own = [part for part in told(root, "map", "-o", f"backing=allow:{base}", layer) if part["depth"] == 0]
    assert [(part["start"], part["length"]) for part in own] == [(0, MIB)]
    allowed = ("-o", f"backing=allow:{base}", "--other-option", f"backing=allow:{base}")
    assert told(root, "compare", *allowed, top, layer)["identical"]
    image_command(root, "rebase", "-u", "-b", "", layer)
    assert "backing-filename" not in told(root, "info", layer)
    assert failure(root, "compare", "--other-option", f"backing=allow:{base}", layer, top)["text"] == ""


def test_a_layer_goes_into_an_image_over_that_backing_file_and_no_other(root: Daemon, place: Path) -> None:
    top, base = chain(place)
    other, flat, right = data(place / "other.raw", 4), place / "flat.qcow2", place / "right.qcow2"
    image_command(root, "create", flat, "4M")
    image_command(root, "create", "-b", base, right)
    words = ["convert", "-n", "-o", f"backing=allow:{base}", top]
    assert failure(root, *words, "-B", base, flat)["code"] == "invalid-argument"
    assert failure(root, *words, "-B", other, right)["code"] in ("invalid-argument", "backing-not-allowed")
    image_command(root, *words, "-B", base, right)
    allow = ["-o", f"backing=allow:{base}", "--other-option", f"backing=allow:{base}"]
    assert told(root, "compare", *allow, top, right)["identical"]


def test_rebase_commit_snapshot_amend_resize(root: Daemon, place: Path) -> None:
    top, base = chain(place)
    allow = ("-o", f"backing=allow:{place}")
    expected = bytes([7]) * MIB + base.read_bytes()[MIB:]

    def content(path: Path) -> bytes:
        (place / "out.raw").unlink(missing_ok=True)
        image_command(root, "convert", *allow, path, place / "out.raw")
        return (place / "out.raw").read_bytes()

    other = data(place / "other.raw", 4)
    image_command(root, "rebase", *allow, "-b", other, top)
    assert told(root, "info", top)["backing-filename"] == str(other)
    assert content(top) == expected
    image_command(root, "snapshot", *allow, "-c", "before", top)
    assert "before" in image_command(root, "snapshot", *allow, "-l", top).stdout
    image_command(root, "commit", *allow, top)
    assert other.read_bytes() == expected
    image_command(root, "snapshot", *allow, "-d", "before", top)
    image_command(root, "resize", *allow, top, "6M")
    assert failure(root, "resize", *allow, top, "5M")["code"] == "image-failed"
    image_command(root, "resize", *allow, "--shrink", top, "-1M")
    assert content(top) == expected + bytes(MIB)
    image_command(root, "amend", *allow, "-o", "lazy_refcounts=on", top)
    assert told(root, "info", top)["format-specific"]["data"]["lazy-refcounts"]
    image_command(root, "rebase", *allow, "-b", "", top)
    assert content(top) == expected + bytes(MIB)
    assert told(root, "check", top)["check-errors"] == 0


def test_a_vmdk_of_several_files_overwrites_none_and_leaves_none(root: Daemon, place: Path) -> None:
    mine = data(place / "a-flat.vmdk", 1)
    before = mine.read_bytes()
    assert failure(root, "create", "-o", "subformat=monolithicFlat", place / "a.vmdk", "2M")["code"] == (
        "invalid-argument"
    )
    assert mine.read_bytes() == before
    assert not (place / "a.vmdk").exists()
    source, small = data(place / "b.raw", 2), ("-o", "subformat=monolithicFlat", "-o", "backing=allow:/none")
    image_command(root, "convert", "-o", "subformat=monolithicFlat", source, place / "c.vmdk")
    image_command(root, "compare", source, place / "c.vmdk")
    assert failure(root, "convert", *small, "-c", source, place / "d.vmdk")["code"] == "image-failed"
    assert list(place.glob("d*")) == []


def test_a_damaged_image_makes_check_fail_and_is_repaired(root: Daemon, place: Path) -> None:
    top = qcow2(place / "a.qcow2", 1)
    with open(top, "r+b") as file:
        file.seek(2 * 65536)  # the first block of references
        file.write(bytes(64))
    done = image_command(root, "check", top, check=False)
    assert done.status == 1
    assert "ERROR" in done.stdout
    image_command(root, "check", "-r", "all", top)
    image_command(root, "check", top)


REFUSED_WHERE_WRITTEN = (
    ["info"], ["check"], ["check", "-r", "all"], ["map"], ["resize"], ["snapshot", "-l"], ["snapshot", "-c", "x"],
    ["rebase", "-u", "-b", ""], ["amend", "-o", "compat=1.1"], ["convert"], ["compare"],
)


def test_an_image_that_is_attached_writable_is_refused_to_everybody(daemon: Daemon, place: Path) -> None:
    disk, other = qcow2(place / "a.qcow2", 1), data(place / "b.raw", 1)
    daemon.attach("a", disk, format="qcow2")
    (place / "link.qcow2").symlink_to(disk)
    more: dict[str, list[object]] = {"resize": ["+1M"], "convert": [place / "out.raw"], "compare": [other]}
    for command in REFUSED_WHERE_WRITTEN:
        error = failure(daemon, *command, place / "link.qcow2", *more.get(command[0], []))
        assert error["code"] == "source-in-use", command
        assert "volume a" in error["text"]
    assert failure(daemon, "convert", "-n", other, disk)["code"] == "source-in-use"
    assert not (place / "out.raw").exists()
    assert told(daemon, "info", "--force-share", disk)["format"] == "qcow2"
    assert nothing_left(daemon)
    daemon.detach("a")
    image_command(daemon, "check", disk)


def test_an_image_that_is_attached_read_only_is_read_and_not_written(daemon: Daemon, place: Path) -> None:
    disk = qcow2(place / "a.qcow2", 1)
    daemon.attach("a", disk, format="qcow2", read_only=True)
    image_command(daemon, "convert", disk, place / "out.raw")
    for command in (["resize", disk, "+1M"], ["rebase", "-u", "-b", "", disk]):
        assert failure(daemon, *command)["code"] == "source-in-use"
    # A base in a volume's chain is not written either.
    top, base = chain(place)
    daemon.attach("b", top, format="qcow2", options={"backing": f"allow:{place}"})
    assert failure(daemon, "resize", base, "+1M")["code"] == "source-in-use"


def test_a_volume_without_its_qsd_keeps_its_image(daemon: Daemon, place: Path) -> None:
    disk = data(place / "a.raw", 1)
    daemon.attach("a", disk)
    pid = daemon.qsd("a")
    daemon.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: not os.path.exists(f"/proc/{pid}"), "QSD is gone")
    error = failure(daemon, "resize", disk, "+1M")
    assert error["code"] == "source-in-use"
    assert "volume a" in error["text"]
    daemon.start()
    eventually(lambda: daemon.online("a"), "the volume is back")


def test_what_is_being_converted_cannot_be_attached_and_ctrl_c_leaves_nothing(daemon: Daemon, place: Path) -> None:
    source, target = data(place / "a.raw"), place / "b.qcow2"
    with converting(daemon, source, target) as process:
        error = error_of(lambda: daemon.attach("a", source))
        assert error.code == "source-in-use"
        assert "storaged image convert" in error.cause
        daemon.attach("b", source, read_only=True)
        (part,) = place.glob(".b.qcow2*")
        assert error_of(lambda: daemon.attach("c", part, read_only=True, format="qcow2")).code == "source-in-use"
        assert failure(daemon, "convert", source, target)["code"] == "source-in-use"
        assert not target.exists()
        process.send_signal(signal.SIGINT)
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert "interrupted" in process.stderr.read()
    assert sorted(place.glob("*b.qcow2*")) == []
    assert nothing_left(daemon)
    daemon.detach("b")
    daemon.attach("a", source)


def test_of_two_who_make_one_image_the_second_is_refused(place: Path) -> None:
    path = str(place / "a.raw")
    with new_file(path, Format.RAW) as part:
        with pytest.raises(StoragedError) as refused, new_file(path, Format.RAW):
            pass
        assert (refused.value.code, path in refused.value.message) == (ErrorCode.SOURCE_IN_USE, True)
        Path(part).write_bytes(b"x")
    assert Path(path).read_bytes() == b"x"
    os.rename(path, part)  # what a killed one has left
    with new_file(path, Format.RAW) as part:
        assert not Path(part).read_bytes()


def test_who_is_killed_in_the_middle_leaves_no_half_image_and_no_lock(daemon: Daemon, place: Path) -> None:
    source, target = data(place / "a.raw"), place / "b.raw"
    with converting(daemon, source, target) as process:
        process.kill()
        process.wait()
        # qemu-img dies with it.
        eventually(lambda: not converter(daemon), "qemu-img is gone")
    assert not target.exists()
    daemon.attach("a", source)
    daemon.detach("a")
    image_command(daemon, "convert", source, target)
    assert target.read_bytes() == source.read_bytes()
    assert list(place.glob(".*")) == []
    assert nothing_left(daemon)


def test_a_target_that_was_there_and_is_half_written_is_said_to_be(root: Daemon, place: Path) -> None:
    source, target = data(place / "a.raw"), data(place / "b.raw")
    with converting(root, "-n", source, target) as process:
        process.terminate()
        assert process.wait(20) == 130
        assert process.stderr is not None
        assert f"{target} is half-written" in process.stderr.read()


def test_a_target_that_qemu_img_refuses_to_write_into_is_not_half_written(root: Daemon, place: Path) -> None:
    (place / "key").write_bytes(PASSPHRASE)
    (place / "wrong").write_bytes(b"wrong")
    source, target, smaller = data(place / "a.raw", 2), data(place / "b.raw", 2), data(place / "c.raw", 1)
    encrypted = luks_image(place / "e.luks", place / "key")
    refusals: dict[str, tuple[Path, list[object]]] = {
        "smaller than input": (smaller, [source]),
        "Compression not supported": (target, ["-c", source]),
        "load snapshot": (target, ["--snapshot", "none", qcow2(place / "d.qcow2", 1)]),
        "Invalid password": (encrypted, ["--target-option", f"key-file={place / 'wrong'}", source]),
    }
    for why, (refused, words) in refusals.items():
        before = refused.read_bytes()
        said = failure(root, "convert", "-n", *words, refused)["text"]
        assert why in said
        assert "half-written" not in said
        assert refused.read_bytes() == before


def test_progress_is_a_bar_on_a_terminal(root: Daemon, place: Path) -> None:
    source = data(place / "a.raw", 48)
    parent, terminal = pty.openpty()
    process = subprocess.Popen(
        [*root.cli_command(), "image", "convert", "-r", "16M", str(source), str(place / "b.qcow2")],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=terminal, env={**os.environ, "TERM": "xterm"},
    )
    os.close(terminal)
    seen = b""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if select.select([parent], [], [], 60)[0]:
                seen += os.read(parent, 4096)
        except OSError:
            break  # the other end is closed
    os.close(parent)
    assert process.wait(20) == 0
    assert process.stdout is not None
    assert process.stdout.read() == b""
    process.stdout.close()
    percentages = [int(number) for number in re.findall(r"([0-9]+)%", seen.decode())]
    assert len(set(percentages)) > 2
    assert percentages == sorted(percentages)


def test_a_passphrase_is_in_no_command_line_environment_or_open_file(root: Daemon, place: Path) -> None:
    key = place / "key"
    key.write_bytes(PASSPHRASE)
    disk = luks_image(place / "a.luks", key)
    secrets = (PASSPHRASE, base64.b64encode(PASSPHRASE))
    command = [*root.cli_command(), "image", "convert", "-r", "512K", "-o", "key-file=-", str(disk), str(place / "b")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdin is not None
    process.stdin.write(PASSPHRASE)
    process.stdin.close()
    process.stdin = None
    eventually(lambda: converter(root) or process.poll() is not None, "qemu-img converts")
    for pid in (process.pid, converter(root)):
        for name in ("cmdline", "environ"):
            seen = Path(f"/proc/{pid}/{name}").read_bytes()
            assert not [secret for secret in secrets if secret in seen]
    limits = Path(f"/proc/{converter(root)}/limits").read_text()
    assert re.search(r"^Max core file size +1 ", limits, re.MULTILINE)
    for path in Path(root.layout.run_dir, "images").rglob("*"):
        if path.is_file() and any(secret in path.read_bytes() for secret in secrets):
            assert path.stat().st_mode & 0o077 == 0
    assert os.stat(f"{root.layout.run_dir}/images").st_mode & 0o077 == 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 130
    process.communicate()
    assert nothing_left(root)


def test_a_block_device_is_written_unless_somebody_uses_it(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2", "qcow2", "8M")
    daemon.attach("a", source, format="qcow2")
    writes(str(daemon.show("a")["device"]), MIB, b"x" * MIB)
    daemon.detach("a")
    target = data(place / "b.raw", 8)
    device = daemon.device("b", target)
    run("mkfs.ext4", "-q", "-F", device)
    with mounted(device, place / "mnt"):
        assert failure(daemon, "convert", source, device)["code"] == "source-in-use"
    image_command(daemon, "convert", source, device)
    run("blockdev", "--flushbufs", device)
    image_command(daemon, "compare", source, device)
    assert failure(daemon, "create", device, "8M")["code"] == "invalid-argument"
    image_command(daemon, "create", "-f", "qcow2", device, "4M")
    assert told(daemon, "info", "-f", "qcow2", device)["virtual-size"] == 4 * MIB


def test_a_format_is_not_put_on_what_is_to_be_read(daemon: Daemon, place: Path) -> None:
    device = daemon.device("a", data(place / "a.raw", 8))
    before = Path(device).read_bytes()
    (place / "link").symlink_to(device)
    assert failure(daemon, "convert", device, "-O", "qcow2", place / "link")["code"] == "invalid-argument"
    assert failure(daemon, "create", "-f", "qcow2", "-b", device, place / "link", "8M")["code"] == "invalid-argument"
    source = data(place / "b.raw", 1)
    words = ["convert", source, "-O", "qcow2", "-B", device, place / "link"]
    assert failure(daemon, *words)["code"] == "invalid-argument"
    run("blockdev", "--flushbufs", device)
    assert Path(device).read_bytes() == before


FAKE = """\
#!/usr/bin/python3
import json, os, sys
with open({log!r}, "a") as log:
    print(json.dumps([*sys.argv[1:], os.getcwd()]), file=log)
print('{{"virtual-size": 1048576}}' if sys.argv[1] == "info" else "qemu-img version 10.0.13")
"""


def test_an_image_goes_to_vitastor_by_the_qemu_img_of_its_build(root: Daemon, place: Path) -> None:
    (place / "bin").mkdir()
    log = place / "log"
    for name in ("qemu-img", "qemu-storage-daemon"):
        (place / "bin" / name).write_text(FAKE.format(log=str(log)))
        (place / "bin" / name).chmod(0o755)
    with_config(root, f'[qsd.binaries]\nvitastor = "{place}/bin/qemu-storage-daemon"\n')
    source = image(place / "debian10.qcow2", "qcow2", "1M")
    image_command(root, "convert", source, "vitastor:image=testimg")
    *_, words = (as_json(line) for line in log.read_text().splitlines())
    assert words[:5] == ["convert", "-p", "-n", "-O", "raw"]
    read, written = (as_json(word.removeprefix("json:")) for word in words[5:7])
    assert (read["driver"], read["read-only"], read["file"]["filename"][:8]) == ("qcow2", True, "/dev/fd/")
    assert read["backing"] is None
    assert written["driver"] == "raw"
    assert written["file"] == {
        "driver": "vitastor", "image": "testimg", "read-only": False, "discard": "unmap",
        "cache": {"direct": True, "no-flush": False},
    }
    # One layer, over the export of what is below it.
    base = image(place / "testimg_0.qcow2", "qcow2", "1M")
    image_command(
        root, "convert", "vitastor:image=testimg:skip_parents=1", "-B", base, "-o", "cluster_size=4k",
        place / "testimg.qcow2",
    )
    *_, words = (as_json(line) for line in log.read_text().splitlines())
    assert words[:9] == ["convert", "-p", "-n", "-O", "qcow2", "-B", str(base), "-F", "qcow2"]
    assert as_json(words[9].removeprefix("json:"))["file"]["skip-parents"] == 1
    made = told(root, "info", place / "testimg.qcow2")
    assert (made["cluster-size"], made["backing-filename"]) == (4096, str(base))


def test_a_file_that_takes_the_place_of_the_one_that_was_looked_at_is_not_opened(root: Daemon, place: Path) -> None:
    disk, other = data(place / "a.raw", 1), data(place / "b.raw", 1)
    before = other.read_bytes()
    task = Task(root.layout, Config(), "test", lambda _: None, lambda _: None, lambda _: None)
    operand = look(Wish(str(disk)), writable=True)
    with opened(task, [operand]) as given:
        # From here on it may.
        os.replace(other, disk)
        run_qemu_img("resize", [given.names["image"], "2M"], given)
    assert disk.read_bytes() == before
    assert error_of(lambda: opened(task, [operand]).__enter__()).code == "source-changed"


def test_it_works_without_a_daemon(root: Daemon, place: Path) -> None:
    image_command(root, "create", "-b", str(data(place / "base.raw", 1)), place / "a.qcow2")
    found = told(root, "info", place / "a.qcow2")
    assert (found["virtual-size"], found["backing-filename-format"]) == (MIB, "raw")


def test_who_is_not_root_is_told_so(root: Daemon, place: Path) -> None:
    disk = image(place / "a.qcow2")
    disk.chmod(0o644)
    done = subprocess.run(
        ["setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *root.cli_command(), "image", "info",
         str(disk)], capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 1
    assert "permission-denied" in done.stderr
    assert "as root" in done.stderr


def test_an_image_can_be_named_by_a_tree_of_nodes(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2", size="1M")
    tree = json.dumps({"driver": "qcow2", "file": {"driver": "file", "filename": str(source)}})
    told = as_json(image_command(daemon, "info", "--json", f"json:{tree}").stdout)
    assert (told["format"], told["virtual-size"]) == ("qcow2", MIB)
    assert failure(daemon, "info", "-f", "raw", f"json:{tree}")["code"] == "invalid-argument"
    assert failure(daemon, "info", 'json:{"driver":"throttle"}')["code"] == "unsupported"
