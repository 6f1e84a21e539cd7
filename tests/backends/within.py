"""Sources that are opened from within the sandbox of a transport that needs nothing of the host."""

from __future__ import annotations

from storaged.model.powers import FIRST_USER, USERS
from tests.harness import Daemon


def opened_within(
    daemon: Daemon, source: object, *capabilities: str, root: bool = False, all_files: bool = False, **wishes: object
) -> None:
    """It opens for a QSD that has no more than these capabilities."""
    volume = daemon.attach("within", source, transport="vhost-user", **wishes)
    told = str(volume["qsd_confinement"])
    user = told.partition(",")[0]
    assert (user == "root") == root, told
    assert root or FIRST_USER <= int(user.removeprefix("user ")) < FIRST_USER + USERS
    named = " and ".join(f"CAP_{name}" for name in capabilities) or "no capabilities"
    assert told.split(", ")[1] == named, told
    assert told.split(", ")[2].startswith("all files" if all_files else "its own files (Landlock"), told
    daemon.detach("within")
