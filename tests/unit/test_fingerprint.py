"""How a program is asked which disk this is: what it gets, and what becomes of one that does not answer."""

from __future__ import annotations

import json
import os
import resource
import time
from pathlib import Path

import pytest

from storaged.errors import ErrorCode, StoragedError
from storaged.model.record import Record
from storaged.model.spec import VolumeSpec
from storaged.supervisor import fingerprint

SECRET = "QVFEbm90YWtleQ=="
INFO = json.dumps({"name": "x", "id": "1f", "block_name_prefix": "rbd_data.1f"})


@pytest.fixture
def rbd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program rbd that the test writes."""
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin/rbd"


def does(rbd: Path, script: str) -> None:
    rbd.write_text(f"#!/bin/sh\n{script}\n")
    rbd.chmod(0o755)


def spec(**options: str) -> VolumeSpec:
    return VolumeSpec(name="a", source="rbd:rbd/x", options=options)


def refused(of: VolumeSpec, directory: Path, timeout: float = 5) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        fingerprint.ask(of, str(directory), timeout)
    return caught.value


def test_the_key_reaches_the_program_by_a_file_and_it_writes_no_core(rbd: Path, tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_text(SECRET)
    # Its limits are set a moment after it was started.
    does(rbd, f"sleep 0.3; echo \"$*\" >{tmp_path}/words; env >{tmp_path}/env; "
         f"cat /proc/self/limits >{tmp_path}/limits; echo '{INFO}'")
    found = fingerprint.ask(spec(**{"cephx-key-file": str(key), "user": "bob", "conf": "/dev/null"}), str(tmp_path))
    assert found == "rbd_data.1f"
    words = (tmp_path / "words").read_text()
    assert f"--keyfile {key}" in words
    assert "info --format json --conf /dev/null --id bob --pool rbd --image x" in words
    assert SECRET not in words + (tmp_path / "env").read_text()
    assert "--rados_osd_op_timeout=10" in (tmp_path / "env").read_text()
    limit = next(line for line in (tmp_path / "limits").read_text().splitlines() if line.startswith("Max core"))
    assert limit.split()[4:6] == ["1", "1"]
    assert resource.getrlimit(resource.RLIMIT_CORE) != (1, 1)


def test_a_snapshot_is_told_by_its_number_too(rbd: Path, tmp_path: Path) -> None:
    snapshots = json.dumps([{"id": 3, "name": "r"}, {"id": 4, "name": "s"}])
    does(rbd, f"if [ $1 = snap ]; then echo '{snapshots}'; else echo '{INFO}'; fi")
    wanted = VolumeSpec(name="a", source="rbd:rbd/x@s", read_only=True)
    assert fingerprint.ask(wanted, str(tmp_path)) == "rbd_data.1f@4"


@pytest.mark.parametrize(
    ("script", "cause"), [
        ("echo no such thing >&2; exit 2", "no such thing"), ("exit 3", "status 3"), ("echo nonsense", "understood"),
        ("echo '{}'", "understood"), ("echo '[]'", "understood"), ("exec sleep 60", "in time"),
    ],
)
def test_one_that_does_not_tell_is_an_error_in_time(rbd: Path, tmp_path: Path, script: str, cause: str) -> None:
    does(rbd, script)
    begin = time.monotonic()
    error = refused(spec(), tmp_path, 1)
    assert error.code is ErrorCode.OPEN_FAILED
    assert cause in error.cause
    assert error.hint
    assert time.monotonic() - begin < 10


def test_one_that_is_not_installed_is_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    error = refused(spec(), tmp_path)
    assert error.code is ErrorCode.UNSUPPORTED
    assert "ceph-common" in error.hint


def test_others_are_not_asked(tmp_path: Path) -> None:
    for source in ("/a.raw", "nbd://h/x", "nfs://h/a"):
        assert fingerprint.ask(VolumeSpec(name="a", source=source), str(tmp_path)) == ""


def test_another_answer_is_another_disk() -> None:
    record = Record(spec=spec(), transport="fuse", transport_reason="", binary="/qsd", fingerprint="rbd_data.1f")
    fingerprint.compare(record, "rbd_data.1f")
    with pytest.raises(StoragedError) as caught:
        fingerprint.compare(record, "rbd_data.20")
    assert caught.value.code is ErrorCode.SOURCE_CHANGED
