"""Where a secret must not be."""

from __future__ import annotations

from pathlib import Path

from tests.harness import Daemon

_COMMANDS = (("list", "--json"), ("show", "NAME"), ("show", "NAME", "--json"), ("show", "NAME", "--qemu-args"))


def secret_is_nowhere(daemon: Daemon, secret: str | bytes, name: str = "a") -> None:
    """Assert that nobody but root can see a secret of a volume that is attached.

    Not on a command line, in an environment, in what the daemon tells, in a log, in a stored file or one that others
    may read; and no core will have it.
    """
    data = secret.encode() if isinstance(secret, str) else secret
    told = daemon.log.read_bytes()
    for words in _COMMANDS:
        told += daemon.cli(*[name if word == "NAME" else word for word in words]).stdout.encode()
    for process in Path("/proc").glob("[0-9]*"):
        for file in ("cmdline", "environ"):
            try:
                told += (process / file).read_bytes()
            except OSError:
                continue
    assert data not in told
    for path in daemon.root.rglob("*"):
        if path.is_file() and not path.is_symlink() and data in path.read_bytes():
            assert path.stat().st_mode & 0o077 == 0
            inside = [parent for parent in path.parents if Path(daemon.layout.run_dir) in parent.parents]
            assert any(parent.stat().st_mode & 0o077 == 0 for parent in inside)
    limits = Path(f"/proc/{daemon.qsd(name)}/limits").read_text().splitlines()
    assert next(line.split()[4:6] for line in limits if line.startswith("Max core file size")) == ["1", "1"]
