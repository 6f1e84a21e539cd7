"""The transports that give a device of the host, as far as they can be had here."""

from __future__ import annotations

import os

import pytest

from storaged.transports import HOST_TRANSPORTS

#: The test machine has all modules; what else this runs on has FUSE and loop at least. Each is tried in one place: in
#: the machine time is dear.
IN_MACHINE = bool(os.environ.get("STORAGED_VM"))
HERE = tuple(name for name in HOST_TRANSPORTS if (name != "fuse") == IN_MACHINE)


@pytest.fixture(params=HERE)
def transport(request: pytest.FixtureRequest) -> str:
    """Each of them."""
    return str(request.param)
