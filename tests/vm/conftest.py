"""These tests change the machine that they run in: they run in one that is thrown away."""

from __future__ import annotations

import os

import pytest

if not os.environ.get("STORAGED_VM"):
    raise pytest.UsageError("tests/vm run in the test machine only: make test-vm, or scripts/vm test tests/vm/…")
