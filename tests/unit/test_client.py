"""The blocking Varlink client against a real socket."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.api import client as client_module
from storaged.api.client import Client
from storaged.errors import ErrorCode, StoragedError
from tests.unit.fake_daemon import JSON, FakeDaemon, Hangup, event, failure, volume


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[FakeDaemon]:
    with FakeDaemon(tmp_path / "socket") as daemon:
        yield daemon


def refused(
    path: Path, method: str = "Attach", parameters: JSON | None = None, timeout: float = 10
) -> StoragedError:
    """Call and return the error that it must raise."""
    with Client(str(path)) as client, pytest.raises(StoragedError) as caught:
        client.call(method, {"name": "web1"} if parameters is None else parameters, timeout)
    return caught.value


def test_the_interface_has_the_name_that_the_server_serves() -> None:
    from storaged.api.interface import INTERFACE

    assert client_module.INTERFACE == INTERFACE


def test_nothing_slow_is_imported() -> None:
    program = (
        "import sys\n"
        "before = set(sys.modules)  # what the installation itself imports is not ours\n"
        "import storaged.__main__\n"
        "slow = {'asyncio', 'asyncvarlink', 'msgspec', 'rich', 'shtab', 'subprocess', 'uvloop', 'pathlib'}\n"
        "print(*slow & (set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.split() == []


def test_a_call_sends_its_parameters_and_returns_those_of_the_answer(daemon: FakeDaemon) -> None:
    daemon.answers("Show", {"parameters": {"volume": volume("web1")}})
    with Client(str(daemon.path)) as client:
        assert client.call("Show", {"name": "web1"}, timeout=10) == {"volume": volume("web1")}
    assert daemon.requests == [{"method": "io.storaged.Show", "parameters": {"name": "web1"}}]


def test_a_connection_serves_many_calls_also_after_an_error(daemon: FakeDaemon) -> None:
    daemon.answers("List", {"parameters": {"volumes": []}}).answers("Show", failure(code="internal"))
    with Client(str(daemon.path)) as client:
        for _ in range(3):
            assert client.call("List", timeout=10) == {"volumes": []}
            with pytest.raises(StoragedError):
                client.call("Show", {"name": "web1"}, timeout=10)


def test_a_method_with_its_own_interface_is_called_as_it_is(daemon: FakeDaemon) -> None:
    daemon.answers("GetInfo", {"parameters": {"version": "1"}})
    with Client(str(daemon.path)) as client:
        assert client.call("org.varlink.service.GetInfo") == {"version": "1"}


def test_an_answer_without_parameters_is_an_empty_one(daemon: FakeDaemon) -> None:
    daemon.answers("List", {})
    with Client(str(daemon.path)) as client:
        assert client.call("List") == {}


def test_an_answer_in_many_pieces_is_put_together(daemon: FakeDaemon) -> None:
    many = [volume(f"v{number}", source="/x" * 1000) for number in range(500)]
    daemon.answers("List", {"parameters": {"volumes": many}})
    with Client(str(daemon.path)) as client:
        assert client.call("List", timeout=10) == {"volumes": many}


def test_a_stream_yields_until_the_daemon_ends_it(daemon: FakeDaemon) -> None:
    events = [event("web1", "ready"), event("web1", "step", "opening"), event("web1", "removed")]
    daemon.answers(
        "Watch",
        *({"parameters": {"event": one}, "continues": True} for one in events[:-1]),
        {"parameters": {"event": events[-1]}},
    )
    with Client(str(daemon.path)) as client:
        assert [answer["event"] for answer in client.stream("Watch", {"name": "web1"})] == events
    assert daemon.requests[0]["more"] is True


@pytest.mark.parametrize("error", ["Failed", "NoSuchVolume", "VolumeExists", "InUse", "OfTheFuture"])
def test_an_error_of_the_daemon_keeps_all_it_says(daemon: FakeDaemon, error: str) -> None:
    said = {
        "code": "open-failed",
        "message": "cannot open",
        "volume": "web1",
        "step": "open",
        "cause": "EACCES",
        "hint": "chmod",
        "users": ["mount /mnt", "pid 7"],
    }
    daemon.answers("Attach", failure(error, **said))
    seen = refused(daemon.path)
    assert seen.code is ErrorCode.OPEN_FAILED
    assert {key: getattr(seen, key) for key in said} == said | {"users": ("mount /mnt", "pid 7")}


def test_a_code_that_this_version_does_not_know_is_internal_and_still_told(daemon: FakeDaemon) -> None:
    daemon.answers("Attach", failure(code="moon-phase", message="not tonight", hint="wait"))
    error = refused(daemon.path)
    assert error.code is ErrorCode.INTERNAL
    assert "not tonight" in error.message
    assert "moon-phase" in error.message
    assert error.hint == "wait"


@pytest.mark.parametrize("parameters", [None, {}, {"code": 5, "users": "x", "message": None}])
def test_an_error_with_odd_parameters_is_still_an_error(daemon: FakeDaemon, parameters: object) -> None:
    daemon.answers("Attach", {"error": "io.storaged.Failed", "parameters": parameters})
    error = refused(daemon.path)
    assert error.code is ErrorCode.INTERNAL
    assert "io.storaged.Failed" in error.message


def test_permission_denied_by_the_service_is_permission_denied(daemon: FakeDaemon) -> None:
    daemon.answers("Attach", {"error": "org.varlink.service.PermissionDenied", "parameters": {}})
    assert refused(daemon.path).code is ErrorCode.PERMISSION_DENIED


def test_other_varlink_errors_are_internal_and_name_the_method(daemon: FakeDaemon) -> None:
    error = refused(daemon.path, "Levitate")
    assert error.code is ErrorCode.INTERNAL
    assert "io.storaged.Levitate" in error.message
    assert "MethodNotFound" in error.cause


@pytest.mark.parametrize("garbage", [b"{", b"[]", b'"x"', b"\xff\xfe", b'{"parameters": 3}', b""])
def test_garbage_is_an_internal_error(tmp_path: Path, garbage: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(garbage + b"\0")
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert refused(tmp_path / "socket").code is ErrorCode.INTERNAL
        thread.join()


def test_without_a_socket_it_says_how_to_start_the_daemon(tmp_path: Path) -> None:
    error = refused(tmp_path / "none")
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    assert str(tmp_path / "none") in error.cause
    assert "systemctl start storaged" in error.hint
    assert "storaged daemon" in error.hint


def test_with_another_root_the_hint_starts_that_daemon(tmp_path: Path) -> None:
    with pytest.raises(StoragedError) as caught:
        Client(str(tmp_path / "none"), command="storaged --root /r").call("List")
    assert caught.value.hint == "start it with: storaged --root /r daemon"


def test_a_socket_that_nobody_listens_on_is_unreachable(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(tmp_path / "socket"))
    error = refused(tmp_path / "socket")
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    assert "nothing listens" in error.cause


def test_a_daemon_that_accepts_nobody_is_unreachable_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "_CONNECT_TIMEOUT", 1)
    with socket.socket(socket.AF_UNIX) as listener, socket.socket(socket.AF_UNIX) as first:
        listener.bind(str(tmp_path / "socket"))
        listener.listen(0)
        first.connect(str(tmp_path / "socket"))
        error = refused(tmp_path / "socket")
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    assert "hangs" in error.hint


@pytest.mark.parametrize("long", [False, True])
def test_a_socket_that_may_not_be_opened_is_permission_denied(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long: bool
) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError(13, "Permission denied")

    path = tmp_path / ("d" * 120 if long else "d") / "socket"
    path.parent.mkdir()
    # Root may connect to anything; the kernel's refusal has to be played.
    monkeypatch.setattr(client_module, "_connect", refuse)
    error = refused(path)
    assert error.code is ErrorCode.PERMISSION_DENIED
    assert "root" in error.hint


def test_a_path_too_long_for_a_socket_address_is_reached(tmp_path: Path) -> None:
    path = tmp_path / ("d" * 200) / "io.storaged"
    with FakeDaemon(path).answers("List", {"parameters": {"volumes": []}}), Client(str(path)) as client:
        before = len(os.listdir("/proc/self/fd"))
        assert client.call("List", timeout=10) == {"volumes": []}
        assert len(os.listdir("/proc/self/fd")) <= before + 3  # both ends, and no directory


@pytest.mark.parametrize("length", [106, 107, 108])
def test_paths_around_the_limit_are_reached(length: int) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as directory:
        parent = f"{directory}/{'d' * 50}"
        path = Path(parent, "s" * (length - len(parent) - 1))
        assert len(str(path)) == length
        with FakeDaemon(path).answers("List", {}), Client(str(path)) as client:
            assert client.call("List", timeout=10) == {}


@pytest.mark.parametrize("method", ["Attach", "Detach", "Resize"])
def test_a_change_whose_answer_is_lost_has_an_unknown_outcome(daemon: FakeDaemon, method: str) -> None:
    daemon.hangs_up(method)
    error = refused(daemon.path, method)
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    assert "outcome is unknown" in error.message
    assert "storaged show web1" in error.hint


@pytest.mark.parametrize("method", ["List", "Show", "org.varlink.service.GetInfo"])
def test_a_question_whose_answer_is_lost_can_be_asked_again(daemon: FakeDaemon, method: str) -> None:
    daemon.hangs_up(method.rpartition(".")[2])
    error = refused(daemon.path, method)
    assert error.code is ErrorCode.DAEMON_UNREACHABLE
    assert "unknown" not in error.message


@pytest.mark.parametrize("method", ["List", "Show", "Attach", "Detach", "Park"])
def test_a_question_is_asked_once_more_where_the_daemon_went_away_with_it_and_a_change_is_not(
    daemon: FakeDaemon, method: str
) -> None:
    def goes_away_first(request: JSON) -> Iterator[JSON]:
        if len(daemon.asked(method)) == 1:
            raise Hangup
        yield {"parameters": {"told": True}}

    daemon.handlers[method] = goes_away_first
    if method in ("List", "Show"):
        with Client(str(daemon.path)) as client:
            assert client.call(method, {"name": "web1"}, timeout=10) == {"told": True}
        assert daemon.asked(method) == [{"name": "web1"}] * 2
    else:
        assert "outcome is unknown" in refused(daemon.path, method).message
        assert len(daemon.asked(method)) == 1


def test_an_answer_cut_off_in_the_middle_is_a_lost_one(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "socket"))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            connection.recv(65536)
            connection.sendall(b'{"parameters": {"vol')
            connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert "unknown" in refused(tmp_path / "socket").message
        thread.join()


def test_a_stream_that_breaks_off_says_that_the_daemon_went_away(daemon: FakeDaemon) -> None:
    def watch(request: JSON) -> Iterator[JSON]:
        yield {"parameters": {"event": event("web1", "ready")}, "continues": True}
        raise ConnectionAbortedError

    daemon.handlers["Watch"] = watch
    with Client(str(daemon.path)) as client:
        stream = client.stream("Watch")
        assert next(stream)["event"]["kind"] == "ready"
        with pytest.raises(StoragedError) as caught:
            next(stream)
    assert caught.value.code is ErrorCode.DAEMON_UNREACHABLE


def test_no_answer_in_time_is_a_timeout_that_says_how_to_look(daemon: FakeDaemon) -> None:
    def attach(request: JSON) -> Iterator[JSON]:
        daemon.pause(30)
        yield {}

    daemon.handlers["Attach"] = attach
    began = time.monotonic()
    error = refused(daemon.path, timeout=0.2)
    assert error.code is ErrorCode.TIMEOUT
    assert "storaged show web1" in error.hint
    assert time.monotonic() - began < 10


def test_a_late_answer_never_reaches_the_next_call(daemon: FakeDaemon) -> None:
    def show(request: JSON) -> Iterator[JSON]:
        name = request["parameters"]["name"]
        daemon.pause(1 if name == "slow" else 0)
        yield {"parameters": {"volume": volume(name)}}

    daemon.handlers["Show"] = show
    with Client(str(daemon.path)) as client:
        with pytest.raises(StoragedError):
            client.call("Show", {"name": "slow"}, timeout=0.1)
        assert client.call("Show", {"name": "quick"}, timeout=10)["volume"]["name"] == "quick"
