"""What every store promises, and how the local one deals with damage."""

from __future__ import annotations

import errno
import os
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import Desired, VolumeSpec
from storaged.store.base import Loaded, Store
from storaged.store.local import LocalStore
from tests.contract.memory_store import MemoryStore

STORES: dict[str, Callable[[str], Store]] = {
    "local": lambda directory: LocalStore(os.path.join(directory, "state", "volumes")),
    "memory": lambda _: MemoryStore(),
}


@pytest.fixture(params=list(STORES.values()), ids=list(STORES))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    made: Store = request.param(str(tmp_path))
    made.load()
    return made


def wish(name: str = "a", source: str = "/a") -> Desired:
    return Desired(spec=VolumeSpec(name=name, source=source))


def test_a_new_store_is_empty(store: Store) -> None:
    assert store.load().volumes == {}
    assert store.load().damaged == ()


def test_what_is_put_is_loaded_as_often_as_asked(store: Store) -> None:
    full = Desired(
        spec=VolumeSpec(
            name="b", source="host_device:/dev/ä \n\"", format=Format.LUKS, transport="fuse", read_only=True,
            snapshot=True, snapshot_dir="/s", options={"key-file": "/k", "": ""}, persist=True,
        ),
        wanted="absent",
    )
    store.put(wish())
    store.put(full)
    for _ in range(2):
        assert store.load().volumes == {"a": wish(), "b": full}


def test_a_put_replaces_and_leaves_the_others(store: Store) -> None:
    for desired in (wish("a"), wish("b"), wish("a", "/other")):
        store.put(desired)
    assert store.load().volumes == {"a": wish("a", "/other"), "b": wish("b")}


def test_a_delete_removes_one_and_is_no_error_when_there_is_none(store: Store) -> None:
    store.put(wish("a"))
    store.put(wish("b"))
    for _ in range(2):
        store.delete("a")
        assert store.load().volumes == {"b": wish("b")}


def test_what_was_loaded_does_not_change_afterwards(store: Store) -> None:
    store.put(wish("a"))
    loaded = store.load()
    store.delete("a")
    assert loaded.volumes == {"a": wish("a")}


@pytest.mark.parametrize("name", ["", ".", "..", "../a", "a/b", "a-part1", "a\0", "a" * 64])
def test_a_name_that_is_none_is_refused(store: Store, name: str) -> None:
    with pytest.raises(StoragedError) as caught:
        store.put(wish(name))
    assert caught.value.code is ErrorCode.INVALID_NAME
    with pytest.raises(StoragedError) as caught:
        store.delete(name)
    assert caught.value.code is ErrorCode.INVALID_NAME
    assert store.load().volumes == {}


NAMES = st.sampled_from(["a", "A", "a.json", "a.json.damaged", "a.tmp", "0", "x" * 63])


@pytest.mark.parametrize("make", STORES.values(), ids=STORES.keys())
@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(NAMES, st.none() | st.text(st.characters(exclude_categories=["Cs"])))))
def test_it_behaves_like_a_dictionary(make: Callable[[str], Store], changes: list[tuple[str, str | None]]) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store, expected = make(directory), dict[str, Desired]()
        store.load()
        for name, source in changes:
            if source is None:
                store.delete(name)
                expected.pop(name, None)
            else:
                expected[name] = wish(name, source)
                store.put(expected[name])
        assert store.load().volumes == expected
        assert store.load().damaged == ()


# The local store


@pytest.fixture
def place(tmp_path: Path) -> Path:
    LocalStore(str(tmp_path / "volumes")).load()
    LocalStore(str(tmp_path / "volumes")).put(wish("good"))
    return tmp_path / "volumes"


WHOLE = msgspec.json.encode(wish("bad"))
DAMAGE = {
    "empty": b"",
    "truncated": WHOLE[:-1],
    "cut short in the middle": WHOLE[: len(WHOLE) // 2],
    "zeros": bytes(len(WHOLE)),
    "garbled": WHOLE.replace(b"spec", b"sp\xffc"),
    "noise": bytes(range(256)),
    "followed by something": WHOLE + b"{}",
    "deep": b"[" * 100_000,
    "of another type": b'["attached"]',
    "null": b"null",
    "of a newer version": WHOLE.replace(b'"version":1', b'"version":2'),
    "with a field of a newer version": WHOLE.replace(b"{", b'{"newer":1,', 1),
    "of another volume": msgspec.json.encode(wish("other")),
    "of a name that is none": msgspec.json.encode(wish("../bad")),
}


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_entry_is_set_aside_unchanged_and_the_others_load(place: Path, content: bytes) -> None:
    (place / "bad.json").write_bytes(content)
    loaded = LocalStore(str(place)).load()
    assert loaded.volumes == {"good": wish("good")}
    (damaged,) = loaded.damaged
    assert damaged.name == "bad"
    assert damaged.cause
    assert not (place / "bad.json").exists()
    assert Path(damaged.set_aside).read_bytes() == content
    assert Path(damaged.set_aside).parent == place


def test_what_was_set_aside_is_told_once_and_its_name_can_be_used_again(place: Path) -> None:
    (place / "bad.json").write_bytes(b"{")
    assert len(LocalStore(str(place)).load().damaged) == 1
    assert LocalStore(str(place)).load().damaged == ()
    LocalStore(str(place)).put(wish("bad"))
    assert LocalStore(str(place)).load().volumes == {"bad": wish("bad"), "good": wish("good")}


def test_damage_that_comes_again_does_not_overwrite_what_was_set_aside_before(place: Path) -> None:
    for _ in range(5):
        (place / "bad.json").write_bytes(b"{")
        LocalStore(str(place)).load()
    assert len(list(place.glob("bad.json.damaged-*"))) == 5


def test_a_name_that_is_none_is_set_aside_even_if_the_file_agrees(place: Path) -> None:
    (place / "-bad.json").write_bytes(msgspec.json.encode(wish("-bad")))
    loaded = LocalStore(str(place)).load()
    assert loaded.volumes == {"good": wish("good")}
    assert [damaged.name for damaged in loaded.damaged] == ["-bad"]


def test_a_directory_or_a_dangling_link_in_place_of_an_entry_harms_no_other(place: Path) -> None:
    (place / "dir.json").mkdir()
    (place / "link.json").symlink_to("/nosuch")
    loaded = LocalStore(str(place)).load()
    assert loaded.volumes == {"good": wish("good")}
    assert sorted(damaged.name for damaged in loaded.damaged) == ["dir", "link"]
    assert sorted(os.listdir(place)) == ["dir.json", "good.json", "link.json"]


def test_foreign_files_are_left_alone(place: Path) -> None:
    for name in ("README", "a.txt", ".hidden", "lost+found", "a.json.bak", "a.JSON"):
        (place / name).write_text("mine")
    assert LocalStore(str(place)).load().volumes == {"good": wish("good")}
    assert LocalStore(str(place)).load().damaged == ()
    assert len(os.listdir(place)) == 7


def test_what_a_crash_left_half_written_never_counts_and_goes(place: Path) -> None:
    (place / ".bad.json.x7_a3k2p.tmp").write_bytes(WHOLE)
    (place / ".good.json.0c4h_e8b.tmp").write_bytes(b"{")
    loaded = LocalStore(str(place)).load()
    assert (loaded.volumes, loaded.damaged) == ({"good": wish("good")}, ())
    assert os.listdir(place) == ["good.json"]


def test_only_root_can_look(tmp_path: Path) -> None:
    store = LocalStore(str(tmp_path / "volumes"))
    store.load()
    store.put(wish())
    assert (tmp_path / "volumes").stat().st_mode & 0o077 == 0
    assert (tmp_path / "volumes" / "a.json").stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO], ids=errno.errorcode.get)
def test_an_entry_that_cannot_be_read_at_the_moment_is_told_and_stays_where_it_is(
    place: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(*_: object) -> object:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        loaded = LocalStore(str(place)).load()
    assert loaded.volumes == {}
    (damaged,) = loaded.damaged
    assert (damaged.name, damaged.set_aside) == ("good", str(place / "good.json"))
    assert os.strerror(number) in damaged.cause
    assert LocalStore(str(place)).load() == Loaded({"good": wish("good")})


class Hanging:
    """A system call that hangs in the first thread that makes it, until that is let go."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
        self._real: Callable[..., Any] = getattr(os, call)
        self._victim: threading.Thread | None = None
        self._hangs, self._goes_on = threading.Event(), threading.Event()
        monkeypatch.setattr(os, call, self._call)

    def _call(self, *args: Any) -> Any:
        if threading.current_thread() is self._victim:
            self._hangs.set()
            assert self._goes_on.wait(10)
        return self._real(*args)

    def overtaken_by(self, first: Callable[[], None], *later: Callable[[], None]) -> None:
        """Let ``first`` hang, do ``later`` one after another meanwhile, and let ``first`` go on then.

        One of ``later`` that waits for the first is as good.
        """
        self._victim = threading.Thread(target=first)
        self._victim.start()
        assert self._hangs.wait(5)
        others = threading.Thread(target=lambda: [do() for do in later])
        others.start()
        others.join(0.5)
        self._goes_on.set()
        for thread in (self._victim, others):
            thread.join(5)
            assert not thread.is_alive()


PUT_CALLS = ["write", "fsync", "rename"]


@pytest.mark.parametrize("call", PUT_CALLS)
def test_a_put_that_hung_does_not_come_back_over_a_later_put(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(str(place))
    Hanging(monkeypatch, call).overtaken_by(
        lambda: store.put(wish("a", "/old")), lambda: store.put(wish("a", "/new")), lambda: store.put(wish("b")),
    )
    assert store.load() == Loaded({"a": wish("a", "/new"), "b": wish("b"), "good": wish("good")})
    assert sorted(os.listdir(place)) == ["a.json", "b.json", "good.json"]


@pytest.mark.parametrize("call", PUT_CALLS)
def test_a_put_that_hung_does_not_bring_back_what_was_deleted_later(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(str(place))
    Hanging(monkeypatch, call).overtaken_by(lambda: store.put(wish("good", "/old")), lambda: store.delete("good"))
    assert store.load() == Loaded()
    assert os.listdir(place) == []


@pytest.mark.parametrize("call", PUT_CALLS)
def test_a_put_that_hung_counts_when_nothing_later_was_done_to_its_volume(
    place: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(str(place))
    Hanging(monkeypatch, call).overtaken_by(lambda: store.put(wish("good", "/new")), lambda: store.put(wish("b")))
    assert store.load() == Loaded({"b": wish("b"), "good": wish("good", "/new")})


def test_a_delete_that_hung_does_not_take_away_what_was_put_later(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when the volume is detached by a second try, and attached again."""
    store = LocalStore(str(place))
    Hanging(monkeypatch, "unlink").overtaken_by(
        lambda: store.delete("good"), lambda: store.delete("good"), lambda: store.put(wish("good", "/new")),
    )
    assert store.load() == Loaded({"good": wish("good", "/new")})
