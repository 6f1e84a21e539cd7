"""D-Bus as far as it is needed: what is written can be read by others, and a bus that misbehaves ends in an error."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.host.dbus import CALL, BusError, Connection, Message, Variant, decode, encode, split
from tests.unit.fake_bus import fails, fake_bus, returns, signals

WHERE = ("org.example", "/org/example", "org.example.Some")

texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20)
basic = st.sampled_from([
    ("y", st.integers(0, 255)), ("b", st.booleans()), ("u", st.integers(0, 2**32 - 1)),
    ("i", st.integers(-2**31, 2**31 - 1)), ("t", st.integers(0, 2**64 - 1)), ("s", texts),
    ("g", st.sampled_from(["", "s", "a(sv)"])),
])


def compound(inner: Any) -> Any:
    array = inner.map(lambda one: (f"a{one[0]}", st.lists(one[1], max_size=3)))
    struct = st.lists(inner, min_size=1, max_size=3).map(
        lambda parts: (f"({''.join(part[0] for part in parts)})", st.tuples(*(part[1] for part in parts)))
    )
    variant = inner.map(lambda one: ("v", one[1].map(lambda value: Variant(one[0], value))))
    return array | struct | variant


@given(st.data())
def test_what_is_written_is_what_is_read(data: st.DataObject) -> None:
    parts = data.draw(st.lists(st.recursive(basic, compound, max_leaves=6), max_size=4))
    values = [data.draw(strategy) for _, strategy in parts]
    signature = "".join(part[0] for part in parts)
    message = decode(encode(CALL, 7, {3: Variant("s", "Do")}, signature, *values))
    assert (message.kind, message.serial, message.member) == (CALL, 7, "Do")
    assert message.body == values
    assert split(signature) == [part[0] for part in parts]


def test_a_message_is_laid_out_as_the_specification_says() -> None:
    assert encode(CALL, 1, {3: Variant("s", "Hi")}, "ya(st)", 5, [("a", 2)]) == bytes.fromhex(
        "6c 01 00 01 18 00 00 00 01 00 00 00 1c 00 00 00"  # little-endian, a call, no flags, version 1; body, serial
        "03 01 73 00 02 00 00 00 48 69 00 00 00 00 00 00"  # field 3, the member: a string
        "08 01 67 00 06 79 61 28 73 74 29 00 00 00 00 00"  # field 8, the body's signature
        "05 00 00 00 10 00 00 00"  # the byte; the array's length, without what is before its first element
        "01 00 00 00 61 00 00 00 02 00 00 00 00 00 00 00"
    )


@given(st.binary(max_size=200))
def test_what_is_no_message_is_a_connection_error(data: bytes) -> None:
    with contextlib.suppress(ConnectionError):
        decode(b"l" + data)


def test_a_call_returns_what_the_reply_holds_and_keeps_signals_that_come_before_it(tmp_path: Path) -> None:
    def answer(call: Message) -> list[bytes]:
        return [signals("First", "u", 1), returns(call, "su", "x", 3), signals("Second", "")]

    with fake_bus(tmp_path / "bus", answer) as calls, Connection(10, str(tmp_path / "bus")) as bus:
        assert bus.call(WHERE, "Do", "sat", "in", [1, 2]) == ["x", 3]
        came = bus.signals()
        assert [next(came).member, next(came).member] == ["First", "Second"]
    assert [(call.member, call.body, call.fields[1], call.fields[6]) for call in calls] == [
        ("Do", ["in", [1, 2]], "/org/example", "org.example")
    ]


def test_an_error_reply_is_an_error_with_its_name(tmp_path: Path) -> None:
    with (
        fake_bus(tmp_path / "bus", lambda call: [fails(call, "org.example.No", "not now")]),
        Connection(10, str(tmp_path / "bus")) as bus,
        pytest.raises(BusError, match="not now") as caught,
    ):
        bus.call(WHERE, "Do")
    assert caught.value.name == "org.example.No"


def test_a_bus_that_does_not_answer_is_waited_for_until_the_deadline_and_no_longer(tmp_path: Path) -> None:
    # Signals that keep coming do not move it.
    begin = time.monotonic()
    with (
        fake_bus(tmp_path / "bus", lambda call: [signals("Chatter", "")] * 3),
        Connection(0.3, str(tmp_path / "bus")) as bus,
        pytest.raises(TimeoutError),
    ):
        bus.call(WHERE, "Do")
    assert 0.25 < time.monotonic() - begin < 5


@pytest.mark.parametrize("reply", [b"", b"B" + bytes(15), b"l\1\0\1" + b"\xff" * 12, b"l\2\0\1" + bytes(4) + b"\1" * 4
                                   + b"\x08\0\0\0" + b"\xff" * 8])
def test_a_bus_that_ends_or_sends_garbage_is_a_connection_error(tmp_path: Path, reply: bytes) -> None:
    with (
        fake_bus(tmp_path / "bus", lambda call: [reply]),
        Connection(5, str(tmp_path / "bus")) as bus,
        pytest.raises(ConnectionError),
    ):
        bus.call(WHERE, "Do")


def test_a_bus_that_refuses_us_says_so(tmp_path: Path) -> None:
    with (
        fake_bus(tmp_path / "bus", lambda call: [], greeting=b"REJECTED EXTERNAL\r\n"),
        pytest.raises(ConnectionError, match="REJECTED"),
    ):
        Connection(5, str(tmp_path / "bus"))


def test_no_bus_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Connection(5, str(tmp_path / "bus"))
