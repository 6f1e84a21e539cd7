"""Log records arrive in the journal as entries with fields, and each kind of entry is explained in the catalog."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.model.history import Happening
from storaged.observe.journald import MESSAGE_IDS, JournalHandler, about, encoded, is_the_journals

CATALOG = Path(__file__).parents[2] / "systemd" / "storaged.catalog"


def decoded(entry: bytes) -> dict[str, str]:
    """As https://systemd.io/JOURNAL_NATIVE_PROTOCOL/ says."""
    fields = {}
    while entry:
        line, _, rest = entry.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            size = int.from_bytes(rest[:8], "little")
            value, entry = rest[8:8 + size], rest[8 + size + 1:]
            assert rest[8 + size:8 + size + 1] == b"\n"
        else:
            entry = rest
        fields[name.decode()] = value.decode(errors="surrogateescape")
    return fields


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "socket"))
        server.settimeout(10)
        yield server


@pytest.fixture
def logger(journal: socket.socket) -> Iterator[logging.Logger]:
    handler = JournalHandler(journal.getsockname())
    logger = logging.getLogger("test_journald")
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    logger.addHandler(handler)
    yield logger
    logger.removeHandler(handler)
    handler.close()


def entry(journal: socket.socket) -> dict[str, str]:
    return decoded(journal.recv(1 << 20))


def test_an_entry_says_which_volume_it_is_about_and_what_happened(
    journal: socket.socket, logger: logging.Logger
) -> None:
    logger.warning("volume %s: gone", "a", extra=about("a", Happening.DEATH, code="qsd-died"))
    told = entry(journal)
    assert told["MESSAGE"] == "volume a: gone"
    assert told["PRIORITY"] == "4"
    assert told["SYSLOG_IDENTIFIER"] == "storaged"
    assert (told["STORAGED_VOLUME"], told["STORAGED_CODE"]) == ("a", "qsd-died")
    assert told["MESSAGE_ID"] == MESSAGE_IDS["death"]


def test_an_entry_about_nothing_in_particular_has_no_empty_fields(
    journal: socket.socket, logger: logging.Logger
) -> None:
    logger.debug("two\nlines")
    told = entry(journal)
    assert told["MESSAGE"] == "two\nlines"
    assert told["PRIORITY"] == "7"
    assert not [name for name in told if name.startswith(("STORAGED", "MESSAGE_"))]


def test_a_bug_is_told_with_its_traceback(journal: socket.socket, logger: logging.Logger) -> None:
    try:
        raise ValueError("a bug")
    except ValueError:
        logger.exception("it failed")
    assert re.search(r"(?s)^it failed\nTraceback.*ValueError: a bug$", entry(journal)["MESSAGE"])


def test_a_message_that_fits_into_no_datagram_is_cut(journal: socket.socket, logger: logging.Logger) -> None:
    logger.error("x" * (1 << 20))
    assert 60_000 < len(entry(journal)["MESSAGE"]) < 70_000


def test_a_journal_that_is_gone_or_full_holds_nobody_up_and_the_text_is_not_lost(
    journal: socket.socket, logger: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    for number in range(100_000):
        logger.info("line %d", number)
        if text := capsys.readouterr().err:
            break
    assert text == f"INFO test_journald: line {number}\n"
    path = journal.getsockname()
    journal.close()
    logger.info("nobody listens")
    assert "nobody listens" in capsys.readouterr().err
    os.unlink(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as another:
        another.bind(path)
        another.settimeout(10)
        logger.info("it was restarted")
        assert entry(another)["MESSAGE"] == "it was restarted"


@given(st.dictionaries(st.sampled_from(["MESSAGE", "STORAGED_VOLUME", "X"]), st.text(max_size=50)))
def test_whatever_a_field_holds_it_is_one_field(fields: dict[str, str]) -> None:
    fields = {name: value.encode(errors="ignore").decode() for name, value in fields.items()}
    assert decoded(encoded(fields)) == fields


def test_standard_error_is_the_journals_only_where_systemd_says_so(tmp_path: Path) -> None:
    with open(tmp_path / "x", "w") as file:
        status = os.fstat(file.fileno())
        assert is_the_journals(file.fileno(), f"{status.st_dev}:{status.st_ino}")
        assert not is_the_journals(file.fileno(), "1:2")
        assert not is_the_journals(file.fileno(), "")


def test_all_that_can_happen_has_an_id_of_its_own_and_an_explanation() -> None:
    assert set(Happening) <= set(MESSAGE_IDS)
    entries = re.findall(r"(?m)^-- ([0-9a-f]{32})\nSubject: .+\nDefined-By: storaged\n", CATALOG.read_text())
    assert sorted(entries) == sorted(MESSAGE_IDS.values())
    assert len(set(entries)) == len(entries)
