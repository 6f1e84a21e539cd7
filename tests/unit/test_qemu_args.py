"""The arguments for a virtual machine's QEMU, from every kind of tree. tests/host/test_qemu_args.py starts QEMU."""

from __future__ import annotations

import json
import shlex
import subprocess
from collections.abc import Sequence
from typing import Any

import pytest

from storaged.backends import BACKENDS
from storaged.cli.render import qemu_arguments as rendered
from storaged.model.blockdev import BASE, DISK, PASSPHRASE, Image, image_tree
from storaged.model.formats import Format
from storaged.model.names import check_name
from storaged.model.qemu_args import QemuArguments, qemu_arguments
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec

CACHE = {"direct": False, "no-flush": False}


def passphrase(path: str) -> list[dict[str, str]]:
    """The object that a luks image needs."""
    return [{"qom-type": "secret", "id": PASSPHRASE, "file": path}]


def arguments(
    *paths: str, record: Record | None = None, objects: Sequence[dict[str, str]] = (), **wishes: Any
) -> QemuArguments:
    """Those of a volume over a chain of images, the lowest at the end."""
    wishes = {"name": "web1", "source": paths[0], "format": Format.QCOW2, **wishes}
    spec = VolumeSpec(**wishes)
    images = [
        Image(spec.format, BACKENDS["file"].node(path, read_only=number > 0, options=spec.options))
        for number, path in enumerate(paths)
    ]
    node = image_tree(
        images, read_only=not spec.writes_source, node_name=BASE if spec.snapshot else DISK, cache=CACHE
    )
    return qemu_arguments(node, spec, record, objects)


def attached(spec: VolumeSpec, **more: Any) -> Record:
    """A record of that volume."""
    return Record(spec=spec, transport="vhost-user", transport_reason="", binary="", **more)


def options_of(argument: str) -> dict[str, str]:
    """What QEMU reads out of key=value,key=value."""
    parts = argument.replace(",,", "\0").split(",")
    return {key: value.replace("\0", ",") for key, _, value in (part.partition("=") for part in parts)}


def test_blockdev_has_the_whole_tree_with_names_of_the_volume() -> None:
    words = arguments("/a.qcow2", "/b.qcow2").blockdev
    assert words[::2] == ["-blockdev", "-device"]
    node = json.loads(words[1])
    assert (node["node-name"], node["read-only"], node["file"]["filename"]) == ("sd-web1", False, "/a.qcow2")
    assert (node["backing"]["node-name"], node["backing"]["read-only"]) == ("sd-web1-1", True)
    assert node["backing"]["backing"] is None
    device = options_of(words[3])
    assert "virtio-blk-pci" in device
    assert (device["drive"], device["serial"], device["logical_block_size"]) == ("sd-web1", "web1", "512")


def test_drive_has_the_same_tree_with_dots() -> None:
    words = arguments("/a,b.qcow2", "/b.qcow2").drive
    assert words[::2] == ["-drive", "-device"]
    options = options_of(words[1])
    assert (options["if"], options["id"], options["driver"]) == ("none", "sd-web1", "qcow2")
    assert options["file.filename"] == "/a,b.qcow2"
    assert (options["backing.file.filename"], options["backing.read-only"]) == ("/b.qcow2", "on")
    assert not any("node-name" in key for key in options)
    assert "backing.backing" not in options


@pytest.mark.parametrize("name", ["a", "1", "x" * 63, "A.b_c-d", "x" * 26, "x" * 22, "x" * 23 + "-0"])
def test_names_are_what_qemu_takes(name: str) -> None:
    check_name(name)
    found = json.loads(arguments("/a", "/b", name=name).blockdev[1])
    for node in (found, found["backing"]):
        assert len(node["node-name"]) <= 31
        assert node["node-name"][0].isalpha()


def test_long_names_stay_different() -> None:
    one, other = (arguments("/a", name="x" * 60 + end).drive[1] for end in "ab")
    assert options_of(one)["id"] != options_of(other)["id"]


def test_a_passphrase_stays_in_its_file() -> None:
    found = arguments("/a", format=Format.LUKS, options={"key-file": "-"}, objects=passphrase("/keys/a,b"))
    for words in (found.blockdev, found.drive):
        assert words[:2] == ["-object", "secret,id=sd-web1-passphrase,file=/keys/a,,b"]
    assert json.loads(found.blockdev[3])["key-secret"] == "sd-web1-passphrase"
    assert options_of(found.drive[3])["key-secret"] == "sd-web1-passphrase"
    assert any("passwords and keys" in note for note in found.notes)


def test_a_snapshot_is_one_of_qemu_itself() -> None:
    found = arguments("/a", snapshot=True)
    assert json.loads(found.blockdev[1])["read-only"] is True
    options = options_of(found.drive[1])
    assert options["snapshot"] == "on"
    assert "read-only" not in options
    assert any("snapshot=on" in note for note in found.notes)


@pytest.mark.parametrize(("cache", "off"), [("writethrough", True), ("directsync", True), ("none", False)])
def test_a_write_cache_that_is_off_is_off_in_the_machine(cache: str, off: bool) -> None:
    found = arguments("/a", options={"cache": cache})
    assert ("write-cache=off" in found.blockdev[3]) is ("write-cache=off" in found.drive[3]) is off


def test_blocks_of_4096_bytes_are_physical_too() -> None:
    device = options_of(arguments("/a", options={"logical-block-size": "4096"}).blockdev[3])
    assert device["logical_block_size"] == device["physical_block_size"] == "4096"


def test_a_socket_gives_the_vhost_user_form() -> None:
    spec = VolumeSpec(name="web1", source="/a")
    record = attached(spec, socket="/run/a,b.sock", settings={"queues": 4})
    words = arguments("/a", record=record).vhost_user
    assert words is not None
    found = dict(zip(words[::2], words[1::2], strict=True))
    assert options_of(found["-object"])["size"] == found["-m"]
    assert options_of(found["-object"])["share"] == "on"
    assert options_of(found["-chardev"])["path"] == "/run/a,b.sock"
    # A successor of a dead QSD would do again what the guest takes for done: the disk rather stands still.
    assert "reconnect" not in found["-chardev"]
    assert options_of(found["-device"])["num-queues"] == "4"


def test_without_a_socket_there_is_no_vhost_user_form() -> None:
    spec = VolumeSpec(name="web1", source="/a")
    assert arguments("/a").vhost_user is None
    assert arguments("/a", record=attached(spec, device="/dev/loop1")).vhost_user is None


def test_the_notes_say_whether_the_source_is_locked() -> None:
    spec = VolumeSpec(name="web1", source="/a")
    assert not any("attached" in note for note in arguments("/a").notes)
    assert any("storaged detach web1" in note for note in arguments("/a", record=attached(spec)).notes)
    shared = arguments("/a", read_only=True, record=attached(spec)).notes
    assert any("while the volume is attached" in note for note in shared)
    assert not any("storaged detach" in note for note in shared)


@pytest.mark.parametrize("path", ["/a b", "/a'b\"c", "/$HOME", "/a\nb", "/\x1b[2Jä", "/a\\b", "/\x9b!"])
def test_a_shell_reads_the_same_words_from_what_is_printed(path: str) -> None:
    found = arguments(path)
    text = rendered({"drive": found.drive, "blockdev": found.blockdev, "vhost_user": None, "notes": ["a\nb"]})
    assert all(line.isprintable() for line in text.splitlines())
    form = text.partition("with -drive\n")[2]
    done = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {form}"], check=True, capture_output=True, timeout=10
    )
    assert done.stdout.decode().split("\0")[:-1] == found.drive


def test_each_form_has_a_heading_and_one_pair_a_line() -> None:
    found = arguments("/a", format=Format.LUKS, objects=passphrase("/k"))
    text = rendered({"drive": found.drive, "blockdev": found.blockdev, "vhost_user": None, "notes": found.notes})
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line.split()[0] for line in lines] == ["-object", "-blockdev", "-device", "-object", "-drive", "-device"]
    assert [line.endswith(" \\") for line in lines] == [True, True, False] * 2
    assert all(len(shlex.split(line.removesuffix("\\"))) == 2 for line in lines)
