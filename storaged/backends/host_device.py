"""QEMU's ``host_device`` driver: a block device of this host."""

from __future__ import annotations

from storaged.backends.local import LocalBackend

BACKEND = LocalBackend("host_device")
