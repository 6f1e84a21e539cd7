"""Web, FTP and TFTP servers on loopback, and a file that they serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from pathlib import Path

from tests.harness import eventually, run

USER, PASSWORD = "alice", "pa ss:@/%ä"
COOKIE = "pass=let me in"
#: A filesystem and data, made without a device.
SIZE = 8 << 20

_NGINX = """
daemon off; master_process off; pid {place}/nginx.pid; error_log {place}/nginx.log;
events {{ worker_connections 128; }}
http {{
    access_log off;
    client_body_temp_path {place}/t1; proxy_temp_path {place}/t2; fastcgi_temp_path {place}/t3;
    uwsgi_temp_path {place}/t4; scgi_temp_path {place}/t5;
    server {{
        listen 127.0.0.1:{port}; root {root};
        location /norange/ {{ alias {root}/; max_ranges 0; }}
        location /slow/ {{ alias {root}/; limit_rate 3m; }}
        location /moved/ {{ rewrite ^/moved/(.*)$ http://127.0.0.1:{port}/$1 redirect; }}
        location /away/ {{ return 302 file://{root}/disk.raw; }}
        location /private/ {{ alias {root}/; auth_basic x; auth_basic_user_file {place}/htpasswd; }}
        location /cookie/ {{
            if ($http_cookie != "{cookie}") {{ return 403; }}
            rewrite ^/cookie/(.*)$ /$1 break;
        }}
        location /query/ {{
            if ($args != "a=%2f&b") {{ return 403; }}
            rewrite ^/query/(.*)$ /$1 break;
        }}
        location /proxied/ {{
            if ($host != "disk.invalid") {{ return 403; }}
            if ($http_proxy_authorization != "Basic YWxpY2U6b3Blbg==") {{ return 407; }}
            rewrite ^/proxied/(.*)$ /$1 break;
        }}
    }}
    server {{
        listen 127.0.0.1:{tls_port} ssl; root {root};
        ssl_certificate {place}/cert.pem; ssl_certificate_key {place}/key.pem;
    }}
}}
"""

#: pyftpdlib is Debian's, and so is the Python that has it. Its 1.5.7 closes data connections in mid-handshake with
#: newer clients (its pull request 612), which ``readable`` mends; TLS from the first byte on it does not know.
_FTP = """
import sys
from pyftpdlib.authorizers import DummyAuthorizer
from pyftpdlib.handlers import FTPHandler, TLS_DTPHandler, TLS_FTPHandler
from pyftpdlib.servers import FTPServer
mode, port, root, certificate, user, password = sys.argv[1:]
password = bytes.fromhex(password).decode()

class Data(TLS_DTPHandler):
    def readable(self):
        return self._ssl_accepting or super().readable()

class Explicit(TLS_FTPHandler):
    dtp_handler = Data
    tls_control_required = tls_data_required = True

class Implicit(TLS_FTPHandler):
    dtp_handler = Data
    def handle(self):
        self.secure_connection(self.ssl_context)
    def handle_ssl_established(self):
        TLS_FTPHandler.handle(self)

handler = {"plain": FTPHandler, "explicit": Explicit, "implicit": Implicit}[mode]
handler.authorizer = DummyAuthorizer()
handler.authorizer.add_user(user, password, root)
handler.authorizer.add_anonymous(root)
handler.auth_failed_timeout = 0
if mode != "plain":
    handler.certfile = certificate
FTPServer(("127.0.0.1", int(port)), handler).serve_forever()
"""


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """A port of loopback that nobody has."""
    with socket.socket(type=kind) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def make_certificate(place: Path) -> None:
    """A self-signed one for 127.0.0.1: cert.pem, key.pem, and both.pem for those who want them in one file."""
    run(
        "openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
        "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
        "-keyout", place / "key.pem", "-out", place / "cert.pem",
    )
    (place / "both.pem").write_text((place / "key.pem").read_text() + (place / "cert.pem").read_text())


class Server:
    """A program in a session of its own, which serves the directory ``root``."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.root = place / "files"
        self.root.mkdir(exist_ok=True)
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def command(self) -> list[str]:
        """What is run."""
        raise NotImplementedError

    def answers(self) -> bool:
        """Whether it accepts connections."""
        with socket.socket() as client:
            return client.connect_ex(("127.0.0.1", self.port)) == 0

    def start(self) -> None:
        """Start it, and wait until it answers."""
        command = self.command()
        with open(self.place / "server.log", "ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True, cwd=self.place,
            )
        eventually(self._ready, f"{command[0]} answers")

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, (self.place / "server.log").read_text()
        return self.answers()

    def signal(self, number: signal.Signals) -> None:
        """Send it and its children a signal."""
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        if self._process is not None:
            self.signal(signal.SIGKILL)
            self._process.wait(20)
            self._process = None


class Nginx(Server):
    """A web server: with and without ranges, TLS, a password, a cookie; elsewhere by redirection."""

    def __init__(self, place: Path) -> None:
        super().__init__(place)
        self.tls_port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.tls_url = f"https://127.0.0.1:{self.tls_port}"

    def command(self) -> list[str]:
        """Its configuration is written anew."""
        crypt = run("openssl", "passwd", "-apr1", PASSWORD).stdout.strip()
        (self.place / "htpasswd").write_text(f"{USER}:{crypt}\n")
        if not (self.place / "cert.pem").exists():
            make_certificate(self.place)
        (self.place / "nginx.conf").write_text(_NGINX.format(
            place=self.place, root=self.root, port=self.port, tls_port=self.tls_port, cookie=COOKIE,
        ))
        return ["nginx", "-c", str(self.place / "nginx.conf")]


class FtpServer(Server):
    """Plain, with TLS on request (``explicit``), or with TLS from the first byte on (``implicit``)."""

    def __init__(self, place: Path, mode: str) -> None:
        super().__init__(place)
        self.mode = mode
        self.url = f"{'ftps' if mode == 'implicit' else 'ftp'}://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """Debian's Python."""
        if self.mode != "plain":
            make_certificate(self.place)
        return [
            "/usr/bin/python3", "-c", _FTP, self.mode, str(self.port), str(self.root), str(self.place / "both.pem"),
            USER, PASSWORD.encode().hex(),  # so that who looks for it in command lines does not find this one
        ]


class TftpServer(Server):
    """tftpd-hpa."""

    def __init__(self, place: Path, *options: str) -> None:
        super().__init__(place)
        self.port = free_port(socket.SOCK_DGRAM)
        self.options = options
        self.url = f"tftp://127.0.0.1:{self.port}"

    def command(self) -> list[str]:
        """In the foreground, on IPv4."""
        return [
            "in.tftpd", "-L", "-4", "--address", f"127.0.0.1:{self.port}", *self.options, "--secure", str(self.root),
        ]

    def answers(self) -> bool:
        """A request for nothing is answered with an error."""
        with socket.socket(type=socket.SOCK_DGRAM) as client:
            client.settimeout(0.2)
            client.sendto(b"\0\1nothing\0octet\0", ("127.0.0.1", self.port))
            try:
                return client.recv(512)[:2] == b"\0\5"
            except OSError:
                return False


def make_disk(root: Path, directory: Path) -> Path:
    """disk.raw: an ext4 with a file in it, a quarter of random bytes and an end that is none of zeroes."""
    content = directory / "content"
    content.mkdir()
    (content / "file").write_bytes(os.urandom(SIZE // 4))
    disk = root / "disk.raw"
    run("mke2fs", "-q", "-t", "ext4", "-d", content, disk, f"{SIZE >> 10}k")
    # Behind the filesystem.
    with open(disk, "ab") as file:
        file.write(os.urandom(1 << 20))
    return disk
