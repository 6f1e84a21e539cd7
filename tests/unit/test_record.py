"""What is stored comes back as it was."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.formats import Format
from storaged.model.record import ProcessIdentity, Record
from storaged.model.spec import Desired, VolumeSpec

TEXT = st.text(st.characters(exclude_categories=["Cs"]))
NUMBERS = st.integers(0, 2**63)
SPECS = st.builds(
    VolumeSpec, name=TEXT, source=TEXT, format=st.sampled_from(Format), transport=TEXT, read_only=st.booleans(),
    snapshot=st.booleans(), snapshot_dir=st.none() | TEXT, options=st.dictionaries(TEXT, TEXT), persist=st.booleans(),
)
PROCESSES = st.builds(ProcessIdentity, pid=NUMBERS, start_time=NUMBERS, exe_device=NUMBERS, exe_inode=NUMBERS)
RECORDS = st.builds(
    Record, spec=SPECS, transport=TEXT, transport_reason=TEXT, binary=TEXT, qsd_version=TEXT,
    process=st.none() | PROCESSES, sources=st.dictionaries(TEXT, st.booleans()), size=NUMBERS,
    device=st.none() | TEXT, diskseq=NUMBERS, direct_io=st.booleans(), overlay=st.none() | TEXT,
)
DESIRED = st.builds(Desired, spec=SPECS, wanted=st.sampled_from(["attached", "absent"]))


@given(SPECS)
def test_a_spec_comes_back_as_it_was(spec: VolumeSpec) -> None:
    assert msgspec.json.decode(msgspec.json.encode(spec), type=VolumeSpec) == spec


@given(DESIRED)
def test_a_wish_comes_back_as_it_was(desired: Desired) -> None:
    assert msgspec.json.decode(msgspec.json.format(msgspec.json.encode(desired)), type=Desired) == desired


@given(RECORDS)
def test_a_record_comes_back_as_it_was(record: Record) -> None:
    assert msgspec.json.decode(msgspec.json.encode(record), type=Record) == record


GOOD: dict[str, Any] = {"version": 1, "spec": {"name": "a", "source": "/a"}, "wanted": "attached"}


def decode(value: Any) -> Desired:
    return msgspec.json.decode(json.dumps(value), type=Desired)


def test_a_short_wish_has_the_defaults() -> None:
    assert decode({"spec": GOOD["spec"]}) == decode(GOOD) == Desired(spec=VolumeSpec(name="a", source="/a"))


@pytest.mark.parametrize(
    "change",
    [
        {"newer": 1},
        {"version": 2},
        {"wanted": "gone"},
        {"spec": {"name": "a"}},
        {"spec": {"name": "a", "source": "/a", "newer": 1}},
        {"spec": {"name": "a", "source": "/a", "format": "iso"}},
        {"spec": {"name": "a", "source": "/a", "read_only": "yes"}},
        {"spec": {"name": "a", "source": "/a", "options": {"cache": 1}}},
        {"spec": None},
    ],
    ids=str,
)
def test_a_wish_that_is_not_understood_in_full_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(msgspec.ValidationError):
        decode({**GOOD, **change})


def test_a_record_of_another_version_is_refused() -> None:
    record = Record(spec=VolumeSpec(name="a", source="/a"), transport="fuse", transport_reason="", binary="")
    text = msgspec.json.encode(record).replace(b'"version":1', b'"version":2')
    with pytest.raises(msgspec.ValidationError):
        msgspec.json.decode(text, type=Record)
