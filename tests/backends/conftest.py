"""Which of these tests this host's qemu-storage-daemon can be asked for; servers that more than one file needs."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from storaged.qsd.version import curl_loses_requests, parse_version
from tests.backends.ceph_cluster import CephCluster

_QSD = shutil.which("qemu-storage-daemon")
_VERSION = parse_version(subprocess.run([_QSD, "--version"], capture_output=True, text=True).stdout) if _QSD else None

# Debian 12's hangs, and with it whoever looks at its loop device. That it is refused is in test_http.py.
collect_ignore = ["test_http_parts.py"] if _VERSION is None or curl_loses_requests(_VERSION) else []


@pytest.fixture(scope="module")
def cluster() -> Iterator[CephCluster]:
    """A Ceph cluster for all tests of a file, each of which has its own image."""
    with tempfile.TemporaryDirectory(prefix="sd-ceph-", dir="/var/tmp") as name:
        found = CephCluster(Path(os.path.realpath(name)))
        try:
            found.start()
            yield found
        finally:
            found.stop()
