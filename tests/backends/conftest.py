"""Which of these tests this host's qemu-storage-daemon can be asked for."""

from __future__ import annotations

import shutil
import subprocess

from storaged.qsd.version import curl_loses_requests, parse_version

_QSD = shutil.which("qemu-storage-daemon")
_VERSION = parse_version(subprocess.run([_QSD, "--version"], capture_output=True, text=True).stdout) if _QSD else None

# Debian 12's hangs, and with it whoever looks at its loop device. That it is refused is in test_http.py.
collect_ignore = ["test_http_parts.py"] if _VERSION is None or curl_loses_requests(_VERSION) else []
