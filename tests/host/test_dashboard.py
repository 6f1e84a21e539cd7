"""Grafana's dashboard and the alerts ask a real Prometheus for what a real daemon tells."""

from __future__ import annotations

import fcntl
import json
import math
import mmap
import os
import re
import signal
import struct
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

from storaged.errors import ErrorCode
from tests.harness import Daemon, error_of, eventually, image
from tests.host.test_metrics import OBSERVABILITY, configure, prometheus, query

#: linux/fs.h
BLKDISCARD = 0x1277
DASHBOARD = json.loads((OBSERVABILITY / "grafana-dashboard.json").read_text())


def ask(port: int, what: str) -> Any:
    """What Prometheus answers."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/api/v1/{what}", timeout=20) as answer:
        return json.load(answer)["data"]


def filled_in(expression: str) -> str:
    """A query of the dashboard with its variables as Grafana fills them in."""
    return re.sub(r"\$(instance|volume)", ".*", expression).replace("$__rate_interval", "1m")


def targets() -> dict[str, dict[str, Any]]:
    """All queries of all panels, by the panel's title and the query."""
    return {
        f"{panel['title']}: {target['expr']}": target
        for panel in DASHBOARD["panels"] for target in panel.get("targets", [])
    }


def has_data(port: int, target: dict[str, Any]) -> bool:
    """Whether a query gives a number, with the labels that its legend names."""
    found = ask(port, f"query?query={quote(filled_in(target['expr']))}")["result"]
    labels = re.findall(r"\{\{(\w+)\}\}", target.get("legendFormat") or "")
    assert all(one["metric"].get(label) for one in found for label in labels), target
    return any(math.isfinite(float(one["value"][1])) for one in found)


@contextmanager
def busy(device: str) -> Iterator[None]:
    """Have reads, writes, flushes and discards going on all the time."""
    ended = threading.Event()
    done: list[int] = []

    def work() -> None:
        fd, block = os.open(device, os.O_RDWR | os.O_DIRECT), mmap.mmap(-1, 4096)
        try:
            while not ended.wait(0.05):
                os.pwrite(fd, block, 0)
                os.preadv(fd, [block], 0)
                os.fsync(fd)
                fcntl.ioctl(fd, BLKDISCARD, struct.pack("QQ", 1 << 20, 1 << 20))
                done.append(1)
        finally:
            os.close(fd)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        eventually(lambda: len(done) > 3 or not thread.is_alive(), "there is I/O")
        yield
        assert thread.is_alive(), "the I/O failed"
    finally:
        ended.set()
        thread.join(20)


@contextmanager
def hanging(daemon: Daemon, name: str) -> Iterator[None]:
    """Stop a volume's QSD, and have the daemon find out."""
    qsd, source = daemon.qsd(name), daemon.show(name)["source"]
    os.kill(qsd, signal.SIGSTOP)
    try:
        assert error_of(lambda: daemon.attach(name, source, transport="fuse")).code is ErrorCode.QSD_SILENT
        yield
    finally:
        os.kill(qsd, signal.SIGCONT)


def test_every_query_of_the_dashboard_has_data_and_the_alerts_ask_for_what_there_is(
    stopped: Daemon, place: Path
) -> None:
    port = configure(stopped)
    files = Path(stopped.layout.volume_files)
    files.mkdir(parents=True)
    (files / "failed.toml").write_text(f"source = '{place / 'none.raw'}'\ntransport = 'fuse'\n")
    stopped.start()
    for name in ("dies", "hangs"):
        stopped.attach(name, image(place / f"{name}.raw", "raw"), transport="fuse")
    config = f"""
global: {{scrape_interval: 1s, evaluation_interval: 1s}}
rule_files: [storaged.rules.yml]
scrape_configs: [{{job_name: storaged, static_configs: [{{targets: ["127.0.0.1:{port}"]}}]}}]
"""
    with prometheus(place / "tsdb", config) as there:
        # What increases is seen to do so: each of these was 0 before.
        eventually(
            lambda: query(there, "storaged_volume_deaths_total") == dict.fromkeys(("dies", "failed", "hangs"), 0.0),
            "all are there",
        )
        former = stopped.kill_qsd("dies")
        assert error_of(lambda: stopped.show("nothing")).code is ErrorCode.NO_SUCH_VOLUME
        eventually(lambda: stopped.replaced("dies", former), "there is another QSD")
        missing = targets()

        def all_have_data() -> bool:
            for name, target in list(missing.items()):
                if has_data(there, target):
                    del missing[name]
            return not missing

        with busy(stopped.show("dies")["device"]), hanging(stopped, "hangs"):
            try:
                eventually(all_have_data, "all queries have data", 60)
            except AssertionError:
                raise AssertionError(f"no data for {list(missing)}") from None
            variables = [one["query"]["query"] for one in DASHBOARD["templating"]["list"] if one["type"] == "query"]
            assert len(variables) == 2
            for variable in variables:
                selector, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable, re.DOTALL).groups()  # type: ignore[union-attr]  # or it fails
                assert ask(there, f"label/{label}/values?match[]={quote(filled_in(selector))}"), variable
        known = set(ask(there, "label/__name__/values"))
        alerts = [rule for group in ask(there, "rules")["groups"] for rule in group["rules"]]
        assert len(alerts) >= 5
        for alert in alerts:
            assert alert["health"] in ("ok", "unknown"), alert
            assert set(re.findall(r"\bstoraged_\w+", alert["query"])) <= known, alert
