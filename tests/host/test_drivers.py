"""A qemu-storage-daemon without some of its modules: what the doctor says of it, and what an attach says."""

from __future__ import annotations

import stat
from pathlib import Path

from storaged.errors import ErrorCode
from tests.harness import Daemon, as_json, refuses, with_config


def bare_program(place: Path) -> Path:
    """This host's QSD, with an empty directory over that of its modules."""
    path = place / "bare"
    path.write_text("""#!/bin/sh
[ -n "$BARE" ] || BARE=1 exec unshare -m "$0" "$@"
mount -t tmpfs none "$(dirname "$(echo /usr/lib/*/qemu/block-rbd.so)")" || exit
exec qemu-storage-daemon "$@"
""")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_doctor_and_an_attach_name_the_package_of_a_missing_module(stopped: Daemon, place: Path) -> None:
    # The program hides files from itself by a mount, which no QSD may make.
    bare = f'"{bare_program(place)}"'
    with_config(stopped, f"[qsd]\nsandbox = false\nbinaries = {{ rbd = {bare}, file = {bare} }}\n")
    findings = {
        finding["check"]: finding for finding in as_json(stopped.cli("doctor", "--json", check=False).stdout)
    }
    lack = findings["backend rbd"]
    assert "qemu-block-extra" in lack["hint"]
    assert "iscsi" in findings["backends of qemu-storage-daemon"]["detail"]
    assert "file" in findings[f"backends of {place}/bare"]["detail"]
    stopped.start()
    error = refuses(stopped, ErrorCode.UNSUPPORTED, "rbd:pool/image")
    assert (error.message, error.hint) == (lack["detail"], lack["hint"])
