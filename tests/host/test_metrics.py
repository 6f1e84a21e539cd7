"""Metrics of real volumes, and a real Prometheus that reads them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import ssl
import subprocess
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.parse import quote

import bcrypt
import pytest

from storaged.errors import StoragedError
from tests.backends.tls import Authority
from tests.backends.web_server import free_port
from tests.harness import Daemon, eventually, image, run, writes

OBSERVABILITY = Path(__file__).parents[2] / "observability"
PASSWORD = "correct horse"


class Scraped(dict[str, float]):
    """The samples of a scrape by what stands before their value."""

    def of(self, metric: str, volume: str, labels: str = "") -> float:
        """A metric of a volume."""
        return self[f'storaged_volume_{metric}{{volume="{volume}"{labels}}}']


def configure(daemon: Daemon, more: str = "") -> int:
    """Have the daemon listen on a port of its own, and return that."""
    port = free_port()
    os.makedirs(daemon.layout.config_dir)
    Path(daemon.layout.config_file).write_text(f'[metrics]\nlisten = "127.0.0.1:{port}"\n{more}')
    return port


def text_of(port: int) -> str:
    """A scrape."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        return str(answer.read().decode())


def scrape(port: int) -> Scraped:
    """A scrape, once the daemon listens."""
    text = ""

    def listens() -> bool:
        nonlocal text
        try:
            text = text_of(port)
        except URLError:
            return False
        return True

    eventually(listens, "there are metrics")
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return Scraped({series: float(value) for series, _, value in lines})


def test_what_happens_to_a_volume_is_counted_and_outlives_the_daemon(stopped: Daemon, place: Path) -> None:
    port = configure(stopped)
    stopped.start()
    # Somebody else has used the loop device before: the kernel goes on counting where it was.
    device = stopped.device("a", image(place / "a.raw", "raw"), transport="fuse")
    writes(device, 0, bytes(1 << 20))
    stopped.detach("a")
    device = stopped.device("a", place / "a.raw", transport="fuse")
    assert scrape(port).of("written_bytes_total", "a") == 0
    writes(device, 0, bytes(3 << 20))
    with pytest.raises(StoragedError):
        stopped.show("b")
    seen = scrape(port)
    assert seen.of("written_bytes_total", "a") == 3 << 20
    assert seen.of("writes_completed_total", "a") > 0
    assert seen.of("write_time_seconds_total", "a") > 0
    assert seen.of("size_bytes", "a") == 64 << 20
    assert 0 < seen.of("backend_open_seconds", "a") < 60
    assert seen.of("qsd_resident_memory_bytes", "a") > 1 << 20
    assert seen.of("state", "a", ',state="online"') == 1
    assert seen['storaged_volume_info{volume="a",transport="fuse",backend="file"}'] == 1
    assert seen['storaged_request_errors_total{code="no-such-volume"}'] == 1
    checked = run("promtool", "check", "metrics", stdin=text_of(port))
    assert checked.stdout + checked.stderr == ""

    stopped.stop()
    stopped.start()
    again = scrape(port)
    eventually(lambda: stopped.online("a"), "it is adopted")
    assert again.of("written_bytes_total", "a") == 3 << 20
    assert again['storaged_request_errors_total{code="no-such-volume"}'] == 0

    former = stopped.kill_qsd("a")
    eventually(lambda: stopped.replaced("a", former), "there is another QSD")
    seen = scrape(port)
    for metric in ("deaths_total", "recoveries_total", "recovery_pause_seconds_count"):
        assert seen.of(metric, "a") == 1, metric
    pause = seen.of("recovery_pause_seconds_sum", "a")
    assert 0 < pause == seen.of("stalled_seconds_total", "a")
    assert seen.of("waiting_seconds", "a") == 0
    assert seen['storaged_failures_total{code="qsd-died"}'] == 1
    stopped.kill()
    stopped.start()
    eventually(lambda: scrape(port).get('storaged_volume_deaths_total{volume="a"}') == 1, "the journal is read")
    assert scrape(port).of("recovery_pause_seconds_sum", "a") == pause

    stopped.detach("a")
    assert 'volume="a"' not in text_of(port)


def test_a_scrape_waits_for_no_volume_that_hangs(stopped: Daemon, place: Path) -> None:
    port = configure(stopped)
    stopped.start()
    names = ["a", "b", "c", "d"]
    devices = {
        name: stopped.device(name, image(place / f"{name}.raw", "raw"), transport="fuse") for name in names
    }
    servers = [stopped.qsd(name) for name in names[:3]]
    readers = []
    for server in servers:
        os.kill(server, signal.SIGSTOP)
    try:
        for name in names[:3]:
            # Past the page cache, so that it reaches the QSD that is stopped.
            read = ("dd", f"if={devices[name]}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none")
            readers.append(subprocess.Popen(read))
        eventually(
            lambda: all(scrape(port).of("requests_in_flight", name) > 0 for name in names[:3]), "their I/O waits"
        )
        # A request that hangs as well, and a detach.
        hanging = threading.Thread(target=lambda: stopped.cli("detach", "a", "--timeout", "20", check=False))
        hanging.start()
        began = time.monotonic()
        for _ in range(5):
            assert scrape(port).of("requests_in_flight", "d") == 0
        # What hangs does so until the end; and each scrape has a deadline.
        assert time.monotonic() - began < 20
    finally:
        for server in servers:
            os.kill(server, signal.SIGCONT)
        for reader in readers:
            reader.wait(20)
    hanging.join(30)
    assert not hanging.is_alive()


def test_a_hang_is_told_while_it_lasts_and_counted_when_it_is_over(stopped: Daemon, place: Path) -> None:
    port = configure(stopped)
    stopped.start()
    device = stopped.device(
        "a", image(place / "a.raw", "raw"), transport="fuse", options={"on-hang": "restart-after:3"}
    )
    os.kill(stopped.qsd("a"), signal.SIGSTOP)
    read = ("dd", f"if={device}", "of=/dev/null", "bs=4096", "count=1", "iflag=direct", "status=none")
    with subprocess.Popen(read, stderr=subprocess.DEVNULL) as reader:
        eventually(lambda: scrape(port).of("waiting_seconds", "a") > 1, "its I/O waits")
        eventually(lambda: scrape(port).of("recoveries_total", "a") == 1, "QSD is replaced")
        assert reader.wait(20) != 0, "fuse does not bridge that"
    seen = scrape(port)
    assert seen.of("hangs_total", "a") + seen.of("stalls_total", "a") >= 1
    assert seen.of("stalled_seconds_total", "a") >= 3
    assert seen.of("recovery_pause_seconds_bucket", "a", ',le="2.5"') == 0
    assert seen.of("recovery_pause_seconds_bucket", "a", ',le="+Inf"') == 1
    assert seen.of("waiting_seconds", "a") == 0


def test_without_an_address_nothing_listens_and_nothing_is_loaded(daemon: Daemon) -> None:
    assert daemon.process is not None
    libraries = Path(f"/proc/{daemon.process.pid}/maps").read_text()
    assert "/msgspec/" in libraries
    assert "/_yaml" not in libraries
    assert "/bcrypt/" not in libraries
    sockets = run("ss", "-Hltnp").stdout
    assert f"pid={daemon.process.pid}," not in sockets


def test_an_address_that_cannot_be_had_keeps_no_volume_from_working(stopped: Daemon, place: Path) -> None:
    os.makedirs(stopped.layout.config_dir)
    Path(stopped.layout.config_file).write_text(
        f'[metrics]\nlisten = "192.0.2.1:9929"\nweb_config = "{place}/web.yml"\n'
    )
    stopped.start()
    eventually(lambda: "cannot listen on 192.0.2.1" in stopped.log.read_text(), "it is said")
    stopped.device("a", image(place / "a.raw", "raw"), transport="fuse")
    assert stopped.online("a")


# Prometheus ------------------------------------------------------------------------------------------------------


@contextmanager
def prometheus(place: Path, config: str) -> Iterator[int]:
    """A Prometheus with a configuration; yields its port."""
    place.mkdir()
    (place / "prometheus.yml").write_text(config)
    shutil.copy(OBSERVABILITY / "storaged.rules.yml", place)
    port = free_port()
    with open(place / "log", "wb") as log:
        process = subprocess.Popen(
            [
                "prometheus", f"--config.file={place}/prometheus.yml", f"--storage.tsdb.path={place}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=log, stderr=log, env={**os.environ, "GOMAXPROCS": "1"},
        )

    def is_up() -> bool:
        assert process.poll() is None, (place / "log").read_text()
        return query(port, "vector(1)") == {"": 1}

    try:
        eventually(is_up, "Prometheus is up")
        yield port
    finally:
        process.terminate()
        process.wait(20)


def query(port: int, expression: str) -> dict[str, float]:
    """An instant query's results by their volume, or by nothing."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/query?query={quote(expression)}") as answer:
            found = json.load(answer)["data"]["result"]
    except URLError:
        return {}  # it is not up yet
    return {one["metric"].get("volume", ""): float(one["value"][1]) for one in found}


def test_prometheus_scrapes_it_over_tls_with_a_password_and_a_certificate(stopped: Daemon, place: Path) -> None:
    authority = Authority(place / "authority")
    authority.issue(place / "server", "server", 'ip_address = "127.0.0.1"')
    for name in ("prometheus", "stranger"):
        authority.issue(place / name, "client", f'dns_name = "{name}"')
    (place / "web.yml").write_text(
        f"""
tls_server_config:
  cert_file: server/server-cert.pem
  key_file: server/server-key.pem
  client_ca_file: authority/ca-cert.pem
  client_auth_type: RequireAndVerifyClientCert
  client_allowed_sans: [prometheus]
  min_version: TLS12
  cipher_suites: [TLS_ECDHE_ECDSA_WITH_AES_256_GCM_SHA384]
basic_auth_users:
  prometheus: {bcrypt.hashpw(PASSWORD.encode(), bcrypt.gensalt(5)).decode()}
"""
    )
    port = configure(stopped, f'web_config = "{place}/web.yml"\n')
    stopped.start()
    stopped.attach("a", image(place / "a.raw", "raw"), transport="fuse")
    config = f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [storaged.rules.yml]
scrape_configs:
  - job_name: storaged
    scheme: https
    basic_auth: {{username: prometheus, password: {PASSWORD}}}
    tls_config:
      ca_file: {place}/authority/ca-cert.pem
      cert_file: {place}/prometheus/client-cert.pem
      key_file: {place}/prometheus/client-key.pem
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""
    with prometheus(place / "tsdb", config) as there:
        eventually(lambda: query(there, "storaged_volume_state{state='online'}") == {"a": 1}, "it has the volume")
        eventually(lambda: query(there, "up") == {"": 1}, "it could scrape the last time")
        former = stopped.kill_qsd("a")
        eventually(lambda: stopped.replaced("a", former), "there is another QSD")
        eventually(lambda: query(there, "storaged_volume_deaths_total") == {"a": 1}, "it has its death")
        stopped.detach("a")
        eventually(lambda: query(there, "storaged_volume_state") == {}, "a volume that is gone is no series any more")

    context = ssl.create_default_context(cafile=str(place / "authority/ca-cert.pem"))
    url = f"https://127.0.0.1:{port}/metrics"
    with pytest.raises((URLError, ConnectionError, ssl.SSLError)):
        urllib.request.urlopen(url, timeout=10, context=context)
    for name, refused in (("stranger", True), ("prometheus", False)):
        context.load_cert_chain(place / name / "client-cert.pem", place / name / "client-key.pem")
        with pytest.raises((URLError, ConnectionError)) as caught:
            urllib.request.urlopen(url, timeout=10, context=context)
        assert refused != (isinstance(caught.value, HTTPError) and caught.value.code == 401)
    assert PASSWORD not in stopped.log.read_text()


def test_the_alert_rules_do_what_their_tests_say() -> None:
    assert "SUCCESS" in run("promtool", "check", "rules", OBSERVABILITY / "storaged.rules.yml").stdout
    assert "SUCCESS" in run("promtool", "test", "rules", OBSERVABILITY / "storaged.rules.test.yml").stdout
