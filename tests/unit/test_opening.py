"""From a spec to what is locked, claimed and remembered of its sources. (Block devices: see tests/host.)"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.host.identity import file_identity
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec
from storaged.supervisor import opening


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "a.raw"
    path.write_bytes(bytes(1 << 20))
    return path


def spec(source: object, **wishes: Any) -> VolumeSpec:
    return VolumeSpec(**{"name": "a", "source": str(source), **wishes})


def identity(path: Path) -> str:
    seen = path.stat()
    return file_identity(seen.st_dev, seen.st_ino)


@pytest.mark.parametrize(
    ("wishes", "exclusive"), [({}, True), ({"read_only": True}, False), ({"snapshot": True}, False)]
)
def test_a_file_is_locked_as_it_is_used_and_not_claimed(image: Path, wishes: dict[str, Any], exclusive: bool) -> None:
    found = opening.inspect(spec(image, **wishes))
    assert found.sources == {identity(image): exclusive}
    assert found.files == {identity(image)}
    assert (found.claims, found.unclaimed, found.secrets) == ((), (), ())


def test_backing_files_are_only_read_and_are_files_too(tmp_path: Path, image: Path) -> None:
    top = tmp_path / "top.qcow2"
    command = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", str(image), str(top)]
    try:
        subprocess.run(command, check=True, timeout=30)
    except FileNotFoundError:
        pytest.skip("qemu-img is not installed")
    options = {"backing": f"allow:{tmp_path}"}
    found = opening.inspect(spec(top, format=Format.QCOW2, options=options))
    assert found.sources == {identity(top): True, identity(image): False}
    assert found.files == found.sources.keys()
    snapshot = opening.inspect(spec(top, format=Format.QCOW2, options=options, snapshot=True))
    assert not any(snapshot.sources.values())
    assert [part[0] for part in snapshot.fingerprint] == [top.stat().st_ino, image.stat().st_ino]


def test_only_a_snapshot_remembers_what_its_source_was(image: Path) -> None:
    assert opening.inspect(spec(image)).fingerprint == []
    seen = image.stat()
    assert opening.inspect(spec(image, snapshot=True)).fingerprint == [[seen.st_ino, 1 << 20, seen.st_mtime_ns]]


def written(image: Path) -> None:
    os.utime(image, ns=(0, image.stat().st_mtime_ns + 1))


def grown(image: Path) -> None:
    before = image.stat()
    os.truncate(image, 2 << 20)
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))


def replaced(image: Path) -> None:
    before = image.stat()
    other = image.with_suffix(".new")
    other.write_bytes(image.read_bytes())
    os.utime(other, ns=(before.st_atime_ns, before.st_mtime_ns))
    other.replace(image)


@pytest.mark.parametrize("change", [written, grown, replaced])
def test_a_source_that_changed_has_another_fingerprint(image: Path, change: Any) -> None:
    before = opening.inspect(spec(image, snapshot=True)).fingerprint
    change(image)
    assert opening.inspect(spec(image, snapshot=True)).fingerprint != before


def test_a_source_that_was_only_read_or_renamed_has_the_same(image: Path) -> None:
    before = opening.inspect(spec(image, snapshot=True)).fingerprint
    image.read_bytes()
    os.utime(image, ns=(1, image.stat().st_mtime_ns))
    moved = image.rename(image.with_name("b.raw"))
    assert opening.inspect(spec(moved, snapshot=True)).fingerprint == before


def test_a_file_of_storaged_s_own_does_not_stand_for_an_image(tmp_path: Path) -> None:
    """It may have got the inode of one that was removed after the look: here by another name of the same file."""
    (tmp_path / "images").mkdir()
    (tmp_path / "own").mkdir()
    image = tmp_path / "images" / "a"
    image.write_bytes(bytes(4096))
    found = opening.inspect(spec(image))
    os.link(image, tmp_path / "own" / "qsd.pid")
    with open(tmp_path / "own" / "qsd.pid", "rb"):
        assert opening.opened_as_wanted(found, os.getpid())
        assert not opening.opened_as_wanted(found, os.getpid(), (str(tmp_path / "own"),))
    with open(image, "rb"):
        assert opening.opened_as_wanted(found, os.getpid(), (str(tmp_path / "own"),))


def test_what_a_process_has_open_is_compared_with_what_was_looked_at(image: Path) -> None:
    found = opening.inspect(spec(image))
    assert not opening.opened_as_wanted(found, os.getpid())
    with open(image, "rb"):
        assert opening.opened_as_wanted(found, os.getpid())
        replaced(image)
        assert opening.opened_as_wanted(found, os.getpid())
        assert not opening.opened_as_wanted(opening.inspect(spec(image)), os.getpid())


def test_all_locks_are_taken_or_none(tmp_path: Path, image: Path) -> None:
    other = tmp_path / "b.raw"
    other.write_bytes(bytes(1 << 20))
    locks = str(tmp_path / "locks")
    first = opening.inspect(spec(image))
    held = opening.take(first, locks, "a")
    try:
        before = os.listdir("/proc/self/fd")
        with pytest.raises(StoragedError) as caught:
            opening.take(opening.inspect(spec(image, read_only=True)), locks, "b")
        assert caught.value.code is ErrorCode.SOURCE_IN_USE
        assert os.listdir("/proc/self/fd") == before
        for fd in opening.take(opening.inspect(spec(other)), locks, "b"):
            os.close(fd)
    finally:
        for fd in held:
            os.close(fd)


def test_a_file_is_no_block_device(image: Path) -> None:
    with pytest.raises(StoragedError) as caught:
        opening.inspect(spec(f"host_device:{image}"))
    assert caught.value.code is ErrorCode.INVALID_SOURCE


def test_a_link_to_a_name_that_qmp_cannot_carry_is_refused(tmp_path: Path, image: Path) -> None:
    odd = os.path.join(os.fsencode(tmp_path), b"\xff.raw")
    os.rename(image, odd)
    (tmp_path / "link").symlink_to(os.fsdecode(odd))
    with pytest.raises(StoragedError) as caught:
        opening.inspect(spec(tmp_path / "link"))
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    assert str(caught.value).encode()


def test_two_spellings_of_a_source_are_the_same_file(tmp_path: Path, image: Path) -> None:
    (tmp_path / "link").symlink_to(image)
    (tmp_path / "other").touch()
    assert opening.same_source(spec(str(image)), spec(f"file:{tmp_path}/link"))
    assert not opening.same_source(spec(str(image)), spec(str(tmp_path / "other")))
    with pytest.raises(OSError, match="missing"):
        opening.same_source(spec(str(image)), spec(str(tmp_path / "missing")))


def test_a_source_behind_a_server_is_locked_by_its_name_and_nothing_is_looked_at(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    found = opening.inspect(spec(f"nbd:unix:{tmp_path}/link/missing"))
    assert found.sources == {f"nbd+unix:///?socket={tmp_path}/missing": True}
    assert (found.files, found.fingerprint, found.claims, found.unclaimed) == (frozenset(), [], (), ())
    assert opening.opened_as_wanted(found, os.getpid())
    assert found.node["file"]["server"] == {"type": "unix", "path": f"{tmp_path}/link/missing"}
    assert opening.inspect(spec("nbd://a.invalid", read_only=True)).sources == {"nbd://a.invalid:10809/": False}


def test_an_image_behind_a_server_stands_on_its_bytes_and_names_nothing_else() -> None:
    found = opening.inspect(spec("nbd://a.invalid", format=Format.QCOW2))
    assert found.source is not None
    assert (found.node["file"], found.node["backing"]) == (found.source["node-name"], None)
    assert [layer.source for layer in found.layers] == ["nbd://a.invalid:10809/"]


def test_one_disk_at_two_servers_is_one_lock_and_two_wishes() -> None:
    one, other = spec("iscsi://a.invalid/iqn.2026-01.test:t/1"), spec("iscsi://b.invalid/iqn.2026-01.test:t/1")
    assert opening.inspect(one).sources == opening.inspect(other).sources
    assert not opening.same_source(one, other)


def test_spellings_of_a_source_behind_a_server_are_compared_without_asking_it(tmp_path: Path, image: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path)
    assert opening.same_source(spec("nbd:A.invalid:10809:exportname=x"), spec("nbd://a.invalid/x"))
    assert not opening.same_source(spec("nbd://a.invalid/x"), spec("nbd://a.invalid/y"))
    assert opening.same_source(spec(f"nbd:unix:{tmp_path}/s"), spec(f"nbd+unix:///?socket={tmp_path}/link/s"))
    assert not opening.same_source(spec(str(image)), spec("nbd://a.invalid/x"))
    encrypted = spec("nbds://a.invalid/x", options={"tls-certificates": "/pki"})
    assert not opening.same_source(spec("nbd://a.invalid/x"), encrypted)
    assert not opening.same_source(spec("nbd://a.invalid/x"), spec(str(image)))


def test_a_storage_that_does_not_answer_is_no_other_file(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = opening.inspect(spec(image))
    assert not opening.was_replaced(found)

    def stat(path: str) -> os.stat_result:
        raise OSError(5, os.strerror(5))

    with monkeypatch.context() as patch:
        patch.setattr(os, "stat", stat)
        assert not opening.was_replaced(found)
    image.rename(image.with_suffix(".old"))
    assert opening.was_replaced(found)
