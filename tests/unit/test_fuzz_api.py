"""Whatever comes over the socket is answered or refused, at once, and never with a bug (Hypothesis).

test_server.py has clients that flood, never read or never end a message.
"""

from __future__ import annotations

import inspect
import json
import logging
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.api.interface import StoragedInterface
from storaged.model.spec import COMMON_OPTIONS, LONGEST_WISHES
from storaged.transports import options_of
from tests.unit.fuzzing import (
    LEAVES,
    OPTION_NAMES,
    SOURCES,
    TEXT,
    VALUES,
    answers,
    is_clean,
    tells_bugs,
    with_doorkeeper,
)

#: Without the methods of asyncvarlink's own interface, which are in METHODS_OF_THE_SERVICE.
PARAMETERS = {
    name: [key for key in inspect.signature(method).parameters if key != "self"]
    for name, method in vars(StoragedInterface).items() if name[0].isupper()
}
METHODS = [f"io.storaged.{name}" for name in PARAMETERS]
METHODS_OF_THE_SERVICE = ["org.varlink.service.GetInfo", "org.varlink.service.GetInterfaceDescription"]
FLAGS = st.dictionaries(st.sampled_from(["more", "oneway", "upgrade", "x"]), LEAVES, max_size=2)

JUNK_CALLS = st.builds(
    lambda method, parameters, flags: {"method": method, "parameters": parameters, **flags},
    st.sampled_from([*METHODS, *METHODS_OF_THE_SERVICE, "io.storaged._describe", "io.storaged.name", "x.y"]) | TEXT,
    VALUES, FLAGS,
)


def calls_of(method: str) -> st.SearchStrategy[dict[str, Any]]:
    """Calls with the parameters that the method has, of whatever type."""
    name = method.rpartition(".")[2]
    parameters = st.fixed_dictionaries({}, optional=dict.fromkeys([*PARAMETERS[name], "unknown"], VALUES))
    return st.builds(
        lambda found, flags: {"method": method, "parameters": found, **flags}, parameters,
        FLAGS if name != "Watch" else st.just({"more": True}),
    )


def encoded(message: object) -> bytes:
    return json.dumps(message).encode()


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A call with some bytes of it changed, taken out, or there twice."""
    data = bytearray(encoded(draw(JUNK_CALLS | st.sampled_from(METHODS).flatmap(calls_of))))
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(data)))
        data[at:at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(data)


MESSAGES = st.binary(max_size=200) | damaged() | VALUES.map(encoded) | JUNK_CALLS.map(encoded)


def test_whatever_bytes_come_the_server_answers_and_goes_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(path: str) -> None:
        @settings(max_examples=250, deadline=None)
        @given(st.lists(MESSAGES, max_size=6))
        def check(messages: list[bytes]) -> None:
            # The last one has no end.
            assert all(map(is_clean, answers(path, b"\0".join(messages))))
            (reply,) = answers(path, b'{"method":"io.storaged.Show","parameters":{"name":"a"}}\0')
            assert reply["parameters"]["volume"]["name"] == "a"

        check()

    with_doorkeeper(tmp_path, work)
    assert tells_bugs(caplog.records) == []


def test_whatever_is_in_the_parameters_of_a_method_it_is_refused_by_type_or_by_a_code(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def work(path: str) -> None:
        @settings(max_examples=400, deadline=None)
        @given(st.sampled_from(METHODS).flatmap(calls_of))
        def check(call: dict[str, Any]) -> None:
            replies = answers(path, encoded(call) + b"\0")
            assert all(map(is_clean, replies))
            assert replies or call.get("oneway")

        check()

    with_doorkeeper(tmp_path, work)
    assert tells_bugs(caplog.records) == []


WISHES = st.fixed_dictionaries(
    {"name": st.just("c") | TEXT, "source": SOURCES | TEXT},
    optional={
        "format": st.sampled_from(["raw", "qcow2", "vmdk", "luks", "x"]),
        "transport": st.sampled_from(["auto", "fuse", "x"]),
        "read_only": st.booleans(), "snapshot": st.booleans(), "snapshot_dir": TEXT, "persist": st.booleans(),
        "timeout": st.floats(), "secrets": st.dictionaries(st.sampled_from(OPTION_NAMES), TEXT, max_size=2),
        "options": st.dictionaries(
            st.sampled_from([*COMMON_OPTIONS, *OPTION_NAMES, *options_of("vduse"), *options_of("nbd"), "x"]),
            TEXT | SOURCES | st.sampled_from(["-", "on", "1", "allow:/", "/x", "4K", "credential:x"]), max_size=3,
        ),
    },
)


def test_whatever_is_wished_for_is_understood_or_refused(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def work(path: str) -> None:
        @settings(max_examples=600, deadline=None)
        @given(WISHES)
        def check(wishes: dict[str, Any]) -> None:
            (reply,) = answers(path, encoded({"method": "io.storaged.Attach", "parameters": wishes}) + b"\0")
            assert is_clean(reply)
            assert reply["error"] != "org.varlink.service.PermissionDenied"

        check()

    with_doorkeeper(tmp_path, work)
    assert tells_bugs(caplog.records) == []


LONG = ["[", "a", "/", ":", "%4", ",a=", "\\", "?", "&a=", "..", "{", '"', '{"a":', "é", "~", "+", "@"]


EVERY = ["ssh", "nbd", "rbd", "vitastor", "iscsi", "http", "nfs", "gluster", "tftp", "json", "file"]


@pytest.mark.parametrize(
    ("length", "schemes", "pieces"), [(LONGEST_WISHES - 100, EVERY, LONG), (900_000, ["ssh", "json"], ["[", '{"a":'])]
)
def test_a_long_source_keeps_nobody_waiting(
    tmp_path: Path, length: int, schemes: list[str], pieces: list[str]
) -> None:
    """What is read is read on the loop that serves everybody: no pattern may take long for what may be this long."""

    def work(path: str) -> None:
        for scheme in schemes:
            for piece in pieces:
                for lead in ("", "//h/"):
                    source = f"{scheme}:{lead}{piece * (length // len(json.dumps(piece)[1:-1]))}"
                    began = time.monotonic()
                    call = {"method": "io.storaged.Attach", "parameters": {"name": "c", "source": source}}
                    (reply,) = answers(path, json.dumps(call, ensure_ascii=False).encode() + b"\0")
                    assert is_clean(reply)
                    assert time.monotonic() - began < 5, f"{scheme}:{lead}, {piece!r}"

    with_doorkeeper(tmp_path, work)


def test_the_log_of_these_tests_would_have_a_bug(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("storaged.api").error("a bug in a method of the API")
    assert tells_bugs(caplog.records) == ["a bug in a method of the API"]
