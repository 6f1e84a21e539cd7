"""What is fuzzed, each with good input to begin with.

A target is given bytes. What it may raise for bad ones it takes; anything else that it raises is a bug. It is as in
tests/unit/test_fuzz_*.py, but there inputs are made from what Hypothesis knows of them, and here from which lines of
the program they reach.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from storaged.backends import find_backend
from storaged.backends.base import NetworkBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.host.blocking import BlockingCalls
from storaged.model.configcheck import parse_config
from storaged.model.formats import Format
from storaged.model.headers import read_header
from storaged.model.history import Happening, History
from storaged.model.profile import parse_profile
from storaged.model.spec import VolumeSpec, check_spec
from storaged.model.treespec import spelled_out
from storaged.model.volumefile import parse_volume_file
from storaged.observe import webconfig
from storaged.store.local import LocalStore
from storaged.supervisor import adoption, opening, overlay
from storaged.supervisor.records import record_path
from storaged.transports import options_of
from storaged.transports.base import Site
from tests.unit.fuzzing import DESIRED, HISTORY, MARK, RECORD, answers, is_clean, with_doorkeeper

Check = Callable[[bytes], None]


@dataclass(frozen=True)
class Target:
    """One thing to be fuzzed."""

    seeds: Sequence[bytes]
    ready: Callable[[], contextlib.AbstractContextManager[Check]]
    """Makes what it needs, and yields what is called with each input."""


def _plain(check: Check) -> Callable[[], contextlib.AbstractContextManager[Check]]:
    return lambda: contextlib.nullcontext(check)


def _in_directory(check: Callable[[Path, bytes], None]) -> Callable[[], contextlib.AbstractContextManager[Check]]:
    @contextlib.contextmanager
    def ready() -> Iterator[Check]:
        with tempfile.TemporaryDirectory() as name:
            yield lambda data: check(Path(name), data)

    return ready


@contextlib.contextmanager
def _refusals() -> Iterator[None]:
    """Take a refusal that somebody has thought of."""
    try:
        yield
    except StoragedError as error:
        if error.code is ErrorCode.INTERNAL or not error.message:
            raise AssertionError("a refusal that nobody has thought of") from error


def _source(data: bytes) -> None:
    """The source, then the format, then options, a line each."""
    source, *rest = data.decode(errors="surrogateescape").split("\n")
    options = dict(line.partition("=")[::2] for line in rest)
    with _refusals():
        spec = spelled_out(VolumeSpec(name="a", source=source, options=options), None)
        backend = find_backend(spec.source)
        check_spec(spec, backend.options.keys() | options_of("auto").keys())
        backend.check_options(spec.options)
        backend.parse(spec.source, spec.options)
        if isinstance(backend, NetworkBackend):  # of others the host's files would be opened
            opening.inspect(spec)


def _header(data: bytes) -> None:
    """The first byte chooses the format: the content never does."""
    formats = list(Format)
    format, content = formats[data[0] % len(formats) if data else 0], data[1:]
    with _refusals():
        read_header(format, lambda offset, length: content[offset:offset + length], len(content))


def _config(data: bytes) -> None:
    with _refusals():
        parse_config(data, "/f")


def _volume_file(data: bytes) -> None:
    with _refusals():
        parse_volume_file(data, "/f", "a")


def _profile(data: bytes) -> None:
    with _refusals():
        parse_profile(data, "/f", ["queues"])


def _history(data: bytes) -> None:
    history = History.decode(data)
    history.add(Happening.DEATH, "x", now=2e9)
    assert History.decode(history.encode()).entries == history.entries


def _record(place: Path, data: bytes) -> None:
    Path(record_path(str(place))).write_bytes(data)
    site = Site(name="a", directory=str(place), blocking=BlockingCalls("a test"), socket_directory="")
    record, damage = adoption.read_record(site)
    assert bool(damage) is (record is None)


def _wish(place: Path, data: bytes) -> None:
    (place / "a.json").write_bytes(data)
    loaded = LocalStore(str(place)).load()
    assert len(loaded.volumes) + len(loaded.damaged) == 1
    for entry in os.listdir(place):
        os.unlink(place / entry)


def _mark(place: Path, data: bytes) -> None:
    (place / "a.json").write_bytes(data)
    with _refusals():
        assert overlay.locate(str(place), "a") is not None


def _web_config(place: Path, data: bytes) -> None:
    (place / "web.yml").write_bytes(data)
    with contextlib.suppress(webconfig.WebConfigError):
        webconfig.load(str(place / "web.yml"))


class _Keeper(logging.Handler):
    """Keeps the errors that are logged."""

    def __init__(self, kept: list[str]) -> None:
        super().__init__(logging.ERROR)
        self._kept = kept

    def emit(self, record: logging.LogRecord) -> None:
        """As logging.Handler."""
        self._kept.append(record.getMessage())


@contextlib.contextmanager
def _server() -> Iterator[Check]:
    """A server that does nothing real, in a thread: libFuzzer wants to be called in the first one."""
    path: list[str] = []
    ready, done = threading.Event(), threading.Event()

    def work(at: str) -> None:
        path.append(at)
        ready.set()
        done.wait()

    def check(data: bytes) -> None:
        replies = answers(path[0], data)
        assert all(map(is_clean, replies)), replies
        (reply,) = answers(path[0], b'{"method":"io.storaged.Show","parameters":{"name":"a"}}\0')
        assert reply["parameters"]["volume"]["name"] == "a", reply
        assert not bugs, bugs

    bugs: list[str] = []
    logging.getLogger().addHandler(_Keeper(bugs))
    with tempfile.TemporaryDirectory() as name:
        thread = threading.Thread(target=with_doorkeeper, args=(Path(name), work), daemon=True)
        thread.start()
        assert ready.wait(60)
        try:
            yield check
        finally:
            done.set()
            thread.join(60)


def _call(method: str, **parameters: object) -> bytes:
    return json.dumps({"method": f"io.storaged.{method}", "parameters": parameters}).encode() + b"\0"


_SOURCES = [
    b"/x", b"file:/x", b"host_device:/dev/sdx", b"rbd:pool/ns/image@snap:id=a:conf=/c", b"nfs://h/e/f?uid=1",
    b"nbd://h:1/e", b"nbd+unix:///e?socket=/s", b"nbds://h/e\ntls-certs=/t", b"nbd:h:1:exportname=e",
    b"iscsi://u%p@h:3260/iqn.2026-01.test:t/1", b"ssh://u@h:22/p", b"http://u:p@h/x?y", b"https://h/x\ntimeout=5",
    b"ftp://h/x", b"tftp://h/x", b"gluster+tcp://h:1/v/p?logfile=/l", b"vitastor:image=x:etcd_host=h",
    b'json:{"driver":"qcow2","file":{"driver":"nbd","server":{"type":"inet","host":"h","port":"1"}}}',
    b"json:{\"driver\":\"raw\",\"file.driver\":\"rbd\",\"file.pool\":\"p\",\"file.image\":\"i\"}\ncache=none",
]
_CALLS = [
    _call("Attach", name="c", source="rbd:a/b", format="qcow2", options={"cache": "none"}), _call("List"),
    _call("Show", name="a"), _call("Detach", name="a", force=True), _call("Persist", name="a", on=True),
    b'{"method":"org.varlink.service.GetInfo"}\0', _call("List") + _call("Show", name="b"),
]

#: By the name that ``python -m tests.fuzz`` takes.
TARGETS = {
    "call": Target(_CALLS, _server),
    "config": Target([b'log_level = "info"\n[qsd]\nbinary = "/x"\n[access]\nread_only = ["*"]\n'], _plain(_config)),
    "header": Target([
        bytes([number]) + magic.ljust(600, b"\0")
        for number in range(len(Format)) for magic in (b"QFI\xfb\0\0\0\3", b"KDMV\1", b"QED\0", b"LUKS\xba\xbe\0\1")
    ], _plain(_header)),
    "history": Target([HISTORY], _plain(_history)),
    "mark": Target([MARK], _in_directory(_mark)),
    "profile": Target([b'transport = "nbd"\n[options]\ncache = "none"\nqueues = 4\n'], _plain(_profile)),
    "record": Target([RECORD], _in_directory(_record)),
    "source": Target(_SOURCES, _plain(_source)),
    "volume-file": Target([b'source = "rbd:a/b"\nformat = "raw"\n[options]\ncache = "none"\n'], _plain(_volume_file)),
    "web-config": Target([b"basic_auth_users:\n  a: $2b$12$x\n"], _in_directory(_web_config)),
    "wish": Target([DESIRED], _in_directory(_wish)),
}
