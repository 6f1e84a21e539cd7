"""QEMU's ``file`` driver: a regular file of this host."""

from __future__ import annotations

from storaged.backends.local import LocalBackend

BACKEND = LocalBackend("file")
