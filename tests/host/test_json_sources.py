"""A source that is a tree of block nodes (json:), on files of this host."""

from __future__ import annotations

import json
from pathlib import Path

from storaged.errors import ErrorCode
from tests.harness import Daemon, as_json, image, reads, refuses, run, writes

PATTERN = bytes(range(256)) * 16


def of(tree: object) -> str:
    """The source."""
    return "json:" + json.dumps(tree)


def test_a_qcow2_image_is_the_same_volume_in_each_spelling(daemon: Daemon, place: Path) -> None:
    source = image(place / "a b.qcow2")
    tree = of({"driver": "qcow2", "cache": {"direct": True}, "file": {"driver": "file", "filename": str(source)}})
    writes(daemon.device("a", tree), 0, PATTERN)
    shown = daemon.show("a")
    assert (shown["source"], shown["format"], shown["options"]) == (str(source), "qcow2", {"cache": "none"})
    again = daemon.attach("a", source, format="qcow2", options={"cache": "none"})
    assert again["device"] == shown["device"]
    refuses(daemon, ErrorCode.SOURCE_IN_USE, of({"driver": "qcow2", "file.filename": str(source)}), "b")
    daemon.detach("a")
    assert reads(daemon.device("a", source, format="qcow2"), 0, len(PATTERN)) == PATTERN


def test_the_command_line_takes_a_tree_with_a_relative_path(daemon: Daemon, place: Path) -> None:
    image(place / "a.qcow2")
    done = run(
        "sh", "-c", 'cd "$1" && shift && exec "$@"', "sh", place, *daemon.cli_command(), "attach", "a", "--json",
        'json:{"driver":"qcow2","file.driver":"file","file.filename":"./a.qcow2","read-only":true}',
    )
    volume = as_json(done.stdout)
    assert volume["source"] == str(place / "a.qcow2")
    assert volume["read_only"]


def test_a_tree_opens_nothing_that_an_image_names_without_leave(daemon: Daemon, place: Path) -> None:
    base = image(place / "base.qcow2")
    source = image(place / "a.qcow2", "qcow2", "64M", "-b", str(base), "-F", "qcow2")
    tree = {"driver": "qcow2", "file": {"driver": "file", "filename": str(source)}}
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, of(tree))
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, of({**tree, "backing": None}))
    refuses(daemon, ErrorCode.UNSUPPORTED, of({**tree, "backing": {"driver": "qcow2", "file.filename": str(base)}}))
    refuses(daemon, ErrorCode.WRONG_FORMAT, of({**tree, "driver": "vmdk"}))
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, of(tree), format="raw")
    assert daemon.attach("a", of(tree), options={"backing": f"allow:{base}"})["state"] == "online"


def test_what_is_refused_is_neither_logged_nor_stored_with_its_secret(daemon: Daemon, place: Path) -> None:
    tree = {"driver": "rbd", "pool": "p", "image": "i", "key-secret": "hunter2-of-the-tree"}
    error = refuses(daemon, ErrorCode.INVALID_SOURCE, of(tree))
    assert "cephx-key-file" in error.hint
    done = daemon.cli("attach", "a", of(tree), check=False)
    assert "hunter2" not in f"{error} {error.cause}{error.hint}{done.stderr}{daemon.log.read_text()}"
