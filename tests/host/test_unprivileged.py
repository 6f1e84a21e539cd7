"""From a user without rights, and from those who may look, towards the host: nothing opens.

What an image can do is in test_chain.py (backing files, data files, extents, links) and test_sources.py; here is the
race between who looks at an image and who opens it.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from storaged.errors import ErrorCode
from storaged.model.layout import LOCK_DIR
from tests.harness import (
    STORAGED,
    Daemon,
    error_of,
    image,
    image_command,
    leftovers,
    luks_image,
    with_config,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to be somebody else")

NOBODY = 65534
AS_NOBODY = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
#: Tries all that can be done with each path that it is given, and prints what could be done.
TRIES = r"""
import json, os, signal, socket, sys

def attempt(what, path, call):
    try:
        call()
    except OSError:
        return
    done.append([what, path])

def connect(path):
    # Also where the path is too long for an address.
    directory = os.open(os.path.dirname(path), os.O_PATH)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(5)
        sock.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")

done = []
for path in json.load(sys.stdin)["paths"]:
    attempt("list", path, lambda: os.listdir(path))
    attempt("connect", path, lambda: connect(path))
    attempt("make", path, lambda: os.close(os.open(path + "/new", os.O_CREAT | os.O_WRONLY)))
    attempt("rename", path, lambda: os.rename(path, path + "~"))
    attempt("unlink", path, lambda: os.unlink(path))
    attempt("chmod", path, lambda: os.chmod(path, 0o777))
    if not os.path.isdir(path):
        attempt("read", path, lambda: os.close(os.open(path, os.O_RDONLY | os.O_NONBLOCK)))
        attempt("write", path, lambda: os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK)))
for pid in map(int, sys.argv[1:]):
    attempt("signal", str(pid), lambda: os.kill(pid, 0))
    for name in ("environ", "mem", "maps", "cwd", "root", "fd"):
        path = f"/proc/{pid}/{name}"
        look = os.listdir if name in ("cwd", "root", "fd") else lambda path: open(path, "rb").read(1)
        attempt("look into", path, lambda: look(path))
print(json.dumps(done))
"""


def what_nobody_can_do(paths: list[str], processes: list[int]) -> list[tuple[str, str]]:
    """(What, path) of all that a user without rights could do."""
    done = subprocess.run(
        [*AS_NOBODY, "/usr/bin/python3", "-c", TRIES, *map(str, processes)],
        input=json.dumps({"paths": paths}), capture_output=True, text=True, timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return [(what, path) for what, path in json.loads(done.stdout)]


def everything(daemon: Daemon) -> list[str]:
    """All that there is of a daemon and its volumes: it is no protection that nobody knows a name."""
    found = [LOCK_DIR, *(f"{LOCK_DIR}/{name}" for name in os.listdir(LOCK_DIR))]
    for top in (daemon.layout.run_dir, daemon.layout.state_dir, daemon.layout.dev_dir):
        found.append(top)
        for directory, directories, files in os.walk(top):
            found += [os.path.join(directory, name) for name in directories + files]
    return found


def test_a_user_without_rights_gets_no_further_than_the_names_of_volumes(stopped: Daemon, place: Path) -> None:
    key = place / "key"
    key.write_text("geheim")
    stopped.start()
    stopped.attach("plain", image(place / "a.raw", "raw"), persist=True)
    stopped.attach("snapshot", image(place / "b.qcow2"), format="qcow2", snapshot=True)
    stopped.attach("machine", image(place / "c.raw", "raw"), transport="vhost-user")
    stopped.attach("luks", luks_image(place / "d.luks", key), format="luks", options={"key-file": str(key)})
    image_command(stopped, "info", place / "a.raw", check=False)
    names = ["plain", "snapshot", "luks"]
    devices = [stopped.show(name)["device"] for name in names]
    assert stopped.process is not None
    processes = [stopped.process.pid, *(stopped.qsd(name) for name in [*names, "machine"])]
    paths = [*everything(stopped), *devices]
    kinds = ("qmp.sock", "record.json", "plain.json", "snapshot.json", "machine.sock", "io.storaged", "daemon.lock")
    for kind in kinds:
        assert any(path.endswith(kind) for path in paths), kind
    assert any("/disk-" in path for path in paths)

    done = what_nobody_can_do(paths, processes)
    # The links in /dev/storaged are the names of the volumes; /run/storaged has the socket, to which it cannot connect.
    assert {path for what, path in done if what == "list"} == {stopped.layout.run_dir, stopped.layout.dev_dir}
    assert [one for one in done if one[0] != "list"] == []
    for name in names:
        assert stopped.online(name)


def test_nothing_of_the_daemons_is_for_all_to_write(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.qcow2"), format="qcow2", snapshot=True, persist=True)
    for path in everything(daemon):
        # What is in the FUSE mount is QSD's, and only root gets there.
        mode = os.lstat(path).st_mode
        assert stat.S_ISLNK(mode) or not mode & stat.S_IWOTH, path


# Who may look


def as_user(daemon: Daemon, *words: str, groups: str = "--clear-groups") -> subprocess.CompletedProcess[str]:
    """The command line, by a user without rights."""
    prefix = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", groups, "--no-new-privs"]
    return subprocess.run(
        [*prefix, *STORAGED, "--root", str(daemon.root), *words], capture_output=True, text=True, timeout=60
    )


def test_where_everybody_may_look_they_see_no_secret_and_change_nothing(stopped: Daemon, place: Path) -> None:
    key = place / "key"
    key.write_text("geheim-und-lang")
    with_config(stopped, '[access]\nread_only = "everybody"\n')
    stopped.start()
    assert stat.S_IMODE(os.stat(stopped.layout.socket).st_mode) == 0o666
    source = luks_image(place / "a.luks", key)
    stopped.attach("a", source, format="luks", options={"key-file": str(key)})
    assert "a" in as_user(stopped, "list").stdout
    shown = as_user(stopped, "show", "--json", "a")
    assert json.loads(shown.stdout)["source"] == str(source)
    assert "geheim" not in shown.stdout
    before = stopped.show("a")
    for words in (
        ["detach", "a"], ["detach", "--force", "a"], ["rescue", "a"], ["resume", "a"], ["resize", "a", "1G"],
        ["upgrade", "a"], ["persist", "a", "on"], ["attach", "b", str(source)], ["daemon", "--reload"],
        ["show", "--qemu-args", "a"],
    ):
        done = as_user(stopped, *words)
        assert done.returncode == 1, words
        assert "permission-denied" in done.stderr, (words, done.stderr)
        assert "look" in done.stderr
    assert stopped.show("a") == before
    assert stopped.names() == ["a"]
    # The way that a volume's QSD, and all else, is reached stays closed.
    paths = [path for path in everything(stopped) if path != stopped.layout.socket]
    assert {what for what, _ in what_nobody_can_do(paths, [stopped.qsd("a")])} == {"list"}


def test_where_a_group_may_look_others_may_not_and_take_nobodys_place(stopped: Daemon, place: Path) -> None:
    with_config(stopped, '[access]\nread_only = ["games"]\n')
    stopped.start()
    assert as_user(stopped, "list", groups="--groups=60").returncode == 0  # games, in every Debian
    for words in (["list"], ["show", "a"], ["attach", "a", str(place / "x")]):
        done = as_user(stopped, *words)
        assert done.returncode == 1
        assert "permission-denied" in done.stderr
    flood = subprocess.Popen(
        [*AS_NOBODY, "/usr/bin/python3", "-c", _HOLDS, stopped.layout.socket], stdout=subprocess.PIPE, text=True,
    )
    try:
        assert flood.stdout is not None
        assert int(flood.stdout.readline()) < 100
        assert stopped.names() == []
    finally:
        flood.kill()
        flood.wait()


#: Opens as many connections as it gets, and holds them.
_HOLDS = r"""
import os, socket, sys, time
directory = os.open(os.path.dirname(sys.argv[1]), os.O_PATH)
path = f"/proc/self/fd/{directory}/{os.path.basename(sys.argv[1])}"
held = 0
kept = []
for _ in range(100):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(10)
    sock.connect(path)
    try:
        sock.sendall(b'{"method":"org.varlink.service.GetInfo"}\0')
        held += bool(sock.recv(1))
    except OSError:
        pass
    kept.append(sock)
print(held, flush=True)
time.sleep(60)
"""


def test_a_configuration_without_readers_closes_the_socket_again(stopped: Daemon) -> None:
    with_config(stopped, '[access]\nread_only = "everybody"\n')
    stopped.start()
    stopped.stop()
    with_config(stopped, "")
    stopped.start()
    assert stat.S_IMODE(os.stat(stopped.layout.socket).st_mode) == 0o660
    assert "permission-denied" in as_user(stopped, "list").stderr


# Fuzzing of the whole: what a member of the group may say (tests/unit/test_fuzz_api.py has much more of it)

PATHS = [
    "/", "/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/proc/kmsg", "/proc/self/mem", "/proc/1/root", "/dev/fuse",
    "/proc/sys/kernel/core_pattern", "/sys/kernel/uevent_helper", "/etc/shadow\0", "/dev/loop-control", "/x" * 3000,
    "/\n", "//", "file:///etc/shadow", "host_device:/dev/null", "fd:3", "/dev/fd/3", "json:{}",
]


def test_paths_that_are_no_disks_are_refused_and_leave_nothing(daemon: Daemon, place: Path) -> None:
    daemon.attach("good", image(place / "a.raw", "raw"))
    before = sorted(leftovers(daemon.root))
    for source in PATHS:
        for format in ("raw", "qcow2"):
            error = error_of(lambda s=source, f=format: daemon.attach("a", s, format=f, timeout=2))  # type: ignore[misc]  # its defaults
            assert error.code is not ErrorCode.INTERNAL, (source, error)
    for method, parameters in BAD:
        error = error_of(lambda m=method, p=parameters: daemon.call(m, **p))  # type: ignore[misc]  # its defaults
        assert error.code is not ErrorCode.INTERNAL or "InvalidParameter" in error.cause, (method, parameters, error)
    assert sorted(leftovers(daemon.root)) == before
    assert daemon.online("good")
    assert "Traceback" not in daemon.log.read_text()


BAD: list[tuple[str, dict[str, Any]]] = [
    ("Resize", {"name": "good", "size": -1}), ("Resize", {"name": "good", "size": 2**64}),
    ("Resize", {"name": "good", "size": 1}), ("Resize", {"name": "good", "size": 10**300}),
    ("Detach", {"name": "../good"}), ("Detach", {"name": "good", "timeout": 1e308}),
    ("Rescue", {"name": "good\0"}), ("Persist", {"name": "", "on": True}), ("Show", {"name": "good/../good"}),
    ("QemuArguments", {"name": "*"}), ("Resume", {"name": "good", "timeout": -0.0}),
]


# A hostile image, or whoever owns the directory that it is in


@pytest.mark.parametrize("format", ["raw", "qcow2"])
def test_a_link_that_takes_the_place_of_an_image_after_the_look_is_never_served(
    stopped: Daemon, place: Path, format: str
) -> None:
    """The wrapper does what its directory's owner could: after storaged has looked, and before QSD opens."""
    real = shutil.which("qemu-storage-daemon")
    source = image(place / "a.img", format)
    secret = image(place / "secret", format)
    program = place / "qsd"
    program.write_text(
        f'#!/bin/sh\ncase "$*" in *--pidfile*) ln -sfn {secret} {source};; esac\nexec {real} "$@"\n'
    )
    program.chmod(0o755)
    with_config(stopped, f'[qsd]\nbinary = "{program}"\n')
    stopped.start()
    error = error_of(lambda: stopped.attach("a", source, format=format))
    assert source.is_symlink()
    assert error.code is ErrorCode.SOURCE_CHANGED, error
    assert leftovers(stopped.root) == []


def test_what_lies_where_an_overlay_would_be_is_not_written_to(daemon: Daemon, place: Path) -> None:
    """A snapshot directory of somebody else's: a link there leads nowhere."""
    source, victim, overlays = image(place / "a.qcow2"), place / "victim", place / "overlays"
    overlays.mkdir()
    os.chown(overlays, NOBODY, NOBODY)
    daemon.attach("a", source, format="qcow2", snapshot=True, snapshot_dir=str(overlays))
    (overlay,) = overlays.iterdir()
    assert stat.S_IMODE(overlay.stat().st_mode) == 0o600
    daemon.detach("a")
    victim.write_bytes(b"untouched")
    overlay.symlink_to(victim)
    error = error_of(
        lambda: daemon.attach("a", source, format="qcow2", snapshot=True, snapshot_dir=str(overlays))
    )
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert victim.read_bytes() == b"untouched"
    overlay.unlink()
