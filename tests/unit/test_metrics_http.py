"""The server of /metrics: who may read, and that no client costs the others or the daemon more than a moment."""

from __future__ import annotations

import base64
import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import bcrypt
import pytest

from storaged.observe import http
from storaged.observe.http import MetricsServer, Protection
from tests.backends.web_server import make_certificate
from tests.harness import eventually

PASSWORD = b"correct horse"
HASH = bcrypt.hashpw(PASSWORD, bcrypt.gensalt(4)).decode()
CONTENT = b"storaged_volumes 1\n" * 1000


def scrape(accept: str) -> tuple[str, bytes]:
    return f"text/plain; for={accept}", CONTENT


@contextmanager
def serving(
    protection: Protection | None = None, answer: Callable[[str], tuple[str, bytes]] = scrape
) -> Iterator[MetricsServer]:
    server = MetricsServer("127.0.0.1", 0, protection or Protection(None), answer)
    server.start()
    try:
        eventually(lambda: server.port, "it listens")
        yield server
    finally:
        server.stop()


def connect(server: MetricsServer) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.port), timeout=10)


def ask(server: MetricsServer, request: bytes) -> bytes:
    """Send something, and return all that comes back; nothing where the server hangs up."""
    with connect(server) as client, suppress(ConnectionResetError, BrokenPipeError):
        client.sendall(request)
        return b"".join(iter(lambda: client.recv(65536), b""))
    return b""


def get(server: MetricsServer, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, bytes, bytes]:
    """Status, headers and content."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head, _, content = ask(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n{lines}\r\n".encode()).partition(
        b"\r\n\r\n"
    )
    return int(head.split()[1]) if head else 0, head, content


def credentials(user: str, password: bytes) -> str:
    return "Basic " + base64.b64encode(user.encode() + b":" + password).decode()


def test_a_scrape_is_answered_in_the_format_that_it_asks_for() -> None:
    with serving() as server:
        status, head, content = get(server, accept="application/x")
        assert (status, content) == (200, CONTENT)
        assert b"Content-Type: text/plain; for=application/x" in head
        assert get(server, method="HEAD")[::2] == (200, b"")
        assert get(server, "/metrics?name[]=x")[0] == 200


def test_a_daemon_with_more_than_1024_descriptors_is_scraped_too() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 2048)), hard))
    taken = [os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)]
    try:
        while taken[-1] < 1024:
            taken.append(os.dup(taken[0]))
        with serving() as server:
            assert get(server)[0] == 200
    finally:
        for descriptor in taken:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_everything_else_is_refused_by_its_name() -> None:
    with serving() as server:
        assert get(server, "/")[0] == 404
        assert get(server, "/metrics/../../etc/passwd")[0] == 404
        assert get(server, method="POST")[0] == 405
        assert b" 400 " in ask(server, b"what?\r\n\r\n")
        assert b" 400 " in ask(server, b"GET /metrics HTTP/1.1\r\nno header\r\n\r\n")
        assert b" 400 " in ask(server, b"GET /" + b"x" * 20000)
        assert ask(server, b"\x16\x03\x01\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_daemon_that_stands_still_is_said() -> None:
    def fail(_accept: str) -> tuple[str, bytes]:
        raise TimeoutError

    with serving(answer=fail) as server:
        assert get(server)[0] == 503


def test_a_bug_in_one_answer_leaves_the_next_alone(caplog: pytest.LogCaptureFixture) -> None:
    failures = [RuntimeError("a bug")]

    def answer(accept: str) -> tuple[str, bytes]:
        if failures:
            raise failures.pop()
        return scrape(accept)

    with serving(answer=answer) as server:
        assert get(server)[0] == 0
        assert "a bug" in caplog.text
        assert get(server)[0] == 200


def test_a_client_that_sends_slowly_is_dropped_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIME", 0.4)
    with serving() as server, connect(server) as slow:
        began, sent = time.monotonic(), 0
        with suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() < began + 10:
                sent += slow.send(b"G")  # each byte in time, but never a request
                time.sleep(0.05)
        assert 1 < sent < 100
        assert get(server)[0] == 200


def test_a_client_that_takes_its_answer_slowly_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ANSWER_TIME", 0.4)
    with serving(answer=lambda _: ("text/plain", bytes(64 << 20))) as server, connect(server) as slow:
        slow.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
        received = 0
        with suppress(ConnectionResetError):
            while piece := slow.recv(4096):
                received += len(piece)
                time.sleep(0.001)
        assert 0 < received < 64 << 20


def test_when_there_are_too_many_clients_the_slowest_makes_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "REQUEST_TIME", 60)
    with serving() as server:
        idle = [connect(server) for _ in range(http.MOST_CLIENTS)]
        try:
            eventually(lambda: len(server._clients) == http.MOST_CLIENTS, "all are taken in")
            assert get(server)[0] == 200
            assert idle[0].recv(1) == b""
            idle[1].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert idle[1].recv(4) == b"HTTP"
        finally:
            for client in idle:
                client.close()


def test_after_a_stop_nobody_listens_and_nobody_is_served() -> None:
    with serving() as server, connect(server) as client:
        eventually(lambda: server._clients, "the client is taken in")
        server.stop()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            connect(server)


def test_an_address_that_is_taken_is_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(http, "_RETRY", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        server = MetricsServer("127.0.0.1", port, Protection(None), scrape)
        server.start()
        eventually(lambda: "goes on trying" in caplog.text, "it says so")
    try:
        eventually(lambda: server.port == port, "it listens once it can")
        assert caplog.text.count("goes on trying") == 1
        assert get(server)[0] == 200
    finally:
        server.stop()


# Passwords -------------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[MetricsServer]:
    config = tmp_path / "web.yml"
    config.write_text(
        f"basic_auth_users: {{prometheus: {HASH}}}\nhttp_server_config: {{headers: {{X-Frame-Options: deny}}}}\n"
    )
    with serving(Protection(str(config))) as server:
        yield server


def test_who_has_the_password_is_served(guarded: MetricsServer) -> None:
    for _ in range(2):  # compared, and remembered
        status, head, content = get(guarded, authorization=credentials("prometheus", PASSWORD))
        assert (status, content) == (200, CONTENT)
        assert b"X-Frame-Options: deny" in head


@pytest.mark.parametrize(
    "authorization",
    [
        "", "Basic", "Basic !", "Bearer x", credentials("prometheus", b"wrong"), credentials("prometheus", b""),
        credentials("prometheus", HASH.encode()), credentials("nobody", b"nobody"), credentials("", PASSWORD),
        credentials("prometheus", PASSWORD + b"\0"), credentials("prometheus", b"x" * 100),
        "Basic " + base64.b64encode(b"prometheus").decode(), "Basic " + base64.b64encode(b"\xff:x").decode(),
    ],
)
def test_nobody_else_is_served_and_nothing_of_it_is_logged(
    guarded: MetricsServer, authorization: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    for path in ("/metrics", "/"):
        status, head, content = get(guarded, path, authorization=authorization)
        assert status == 401
        assert b"WWW-Authenticate: Basic" in head
        assert CONTENT not in content
    assert caplog.text == ""


def test_a_change_of_the_file_holds_from_the_next_client_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tmp_path / "web.yml"
    config.write_text("")
    with serving(Protection(str(config))) as server:
        assert get(server)[0] == 200
        config.write_text(f"basic_auth_users: {{a: {HASH}}}\n")
        assert get(server)[0] == 401
        config.write_text(f"basic_auth_users: {{a: not {HASH}}}\n")
        assert [get(server)[0] for _ in range(3)] == [0, 0, 0]
        assert caplog.text.count("until this is mended") == 1
        assert HASH not in caplog.text
        config.unlink()
        assert get(server)[0] == 0
        config.write_text("")
        assert get(server)[0] == 200


def test_a_certificate_that_comes_late_is_found(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = tmp_path / "web.yml"
    config.write_text("tls_server_config: {cert_file: cert.pem, key_file: key.pem}\n")
    protection = Protection(str(config))
    assert protection.now() is None
    make_certificate(tmp_path)
    late = protection.now()
    assert late is not None
    assert late.tls is not None
    assert protection.now() is late
    (tmp_path / "key.pem").write_text("no PEM")
    assert protection.now() is None
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
