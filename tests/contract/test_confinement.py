"""What somebody who has taken over a qemu-storage-daemon can do to the host: as little as docs/security.md says."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import landlock, locks
from storaged.model.powers import FIRST_USER, USERS
from tests.contract.conftest import IN_MACHINE
from tests.harness import Daemon, error_of, eventually, image, reads, run, with_config, writes
from tests.prisoner import QSD, Prisoner

PATTERN = bytes(range(256)) * 16
SYS_ADMIN, DAC_READ_SEARCH, DAC_OVERRIDE = 1 << 21, 1 << 2, 1 << 1
#: Each where it can be had: vhost-user needs nothing of the kernel.
TRANSPORTS = ("vduse", "nbd") if IN_MACHINE else ("fuse", "vhost-user")
UNPRIVILEGED = ("nbd", "vhost-user")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="it takes root to give something up")


@pytest.fixture(params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """Each that there is here."""
    return str(request.param)


def status(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


def capabilities(found: dict[str, str]) -> int:
    """The same in all sets that could give it one."""
    (mask,) = {int(found[key], 16) for key in ("CapPrm", "CapEff", "CapBnd")}
    assert int(found["CapAmb"], 16) == (0 if found["Uid"].startswith("0\t") else mask)
    return mask


def assert_confined(found: dict[str, str], transport: str, expected: int) -> None:
    assert capabilities(found) == expected | (SYS_ADMIN if transport == "fuse" else 0)
    assert found["NoNewPrivs"] == "1"
    assert found["Seccomp"] == "2"
    users = {int(number) for key in ("Uid", "Gid") for number in found[key].split("\t")}
    assert len(users) == 1
    if transport in UNPRIVILEGED:
        assert FIRST_USER <= min(users) < FIRST_USER + USERS
    else:
        assert users == {0}
    assert found["Groups"].strip() == ""


def test_qsd_has_only_what_its_transport_and_its_image_need(daemon: Daemon, place: Path, transport: str) -> None:
    everybodys, roots, strangers = (image(place / name, "raw") for name in ("all.raw", "root.raw", "user.raw"))
    everybodys.chmod(0o666)
    roots.chmod(0o600)
    os.chown(strangers, 65534, 65534)
    strangers.chmod(0o600)
    unprivileged = transport in UNPRIVILEGED
    expected = {
        everybodys: (False, 0), roots: (False, DAC_OVERRIDE if unprivileged else 0), strangers: (False, DAC_OVERRIDE),
    }
    for number, (source, (read_only, mask)) in enumerate(expected.items()):
        name = f"v{number}"
        daemon.attach(name, source, transport=transport, read_only=read_only)
        found = status(daemon.qsd(name))
        assert_confined(found, transport, mask)
        told = daemon.show(name)["qsd_confinement"]
        assert ("user 20" in told) == unprivileged, told
        assert ("Landlock forbids" in told) == (transport == "fuse"), told
        assert told in daemon.cli("show", name).stdout
    users = [status(daemon.qsd(name))["Uid"] for name in ("v0", "v1", "v2")]
    assert len(set(users)) == (3 if unprivileged else 1)
    for name in ("v0", "v1", "v2"):
        daemon.detach(name)


def test_who_only_reads_an_image_of_others_may_only_read(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    os.chown(source, 65534, 65534)
    source.chmod(0o600)
    daemon.attach("a", source, transport=transport, read_only=True)
    assert_confined(status(daemon.qsd("a")), transport, DAC_READ_SEARCH)
    daemon.detach("a")


def test_a_successor_is_kept_as_its_predecessor_was(daemon: Daemon, place: Path, transport: str) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"), transport=transport)
    former, kept = daemon.qsd("a"), status(daemon.qsd("a"))
    daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "there is a successor")
    now = status(daemon.qsd("a"))
    for key in ("Uid", "Gid", "CapEff", "CapBnd", "NoNewPrivs", "Seccomp"):
        assert now[key] == kept[key], key
    daemon.detach("a")


def test_images_with_backing_files_and_snapshots_work_from_within(
    daemon: Daemon, place: Path, transport: str
) -> None:
    base = image(place / "base.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", place / "top.qcow2")
    options = {"backing": f"allow:{place}"}
    daemon.attach("top", place / "top.qcow2", format="qcow2", transport=transport, options=options)
    daemon.attach("scratch", base, format="qcow2", transport=transport, snapshot=True)
    if transport != "vhost-user":
        for name in ("top", "scratch"):
            device = daemon.show(name)["device"]
            writes(device, 1 << 20, PATTERN)
            assert reads(device, 1 << 20, len(PATTERN)) == PATTERN
    former = daemon.qsd("scratch")
    daemon.kill_qsd("scratch")
    eventually(lambda: daemon.replaced("scratch", former), "the overlay is opened again")
    for name in ("top", "scratch"):
        daemon.detach(name)


def test_what_has_taken_over_a_qsd_reaches_neither_the_host_nor_other_volumes(
    stopped: Daemon, place: Path, transport: str
) -> None:
    prisoner = Prisoner(stopped, place)
    source, other = image(place / "a.raw", "raw"), image(place / "b.raw", "raw")
    source.chmod(0o600)
    stopped.start()
    assert stopped.process is not None
    stopped.attach("other", other, transport=transport)
    directory = stopped.layout.volume_dir("other")
    secret = place / "secret"
    secret.write_text("geheim")
    secret.chmod(0o600)
    lock = locks.lock_path("/run/storaged/locks", "none")
    prisoner.aim(
        read=["/etc/shadow", "/root", str(secret), str(other), f"{directory}/record.json", str(source)],
        write=[
            "/etc/passwd", "/usr/bin/env", "/proc/sys/kernel/core_pattern", str(other), f"{directory}/record.json",
            f"{stopped.layout.volume_dir('a')}/record.json", lock,
        ],
        make=["/etc", "/usr/bin", "/var/tmp", directory, stopped.layout.volume_dir("a"), stopped.layout.run_dir],
        connect=[stopped.layout.socket, f"{directory}/qmp.sock"],
        processes=[1, stopped.process.pid, stopped.qsd("other")],
    )
    stopped.attach("a", source, transport=transport)
    done, found = prisoner.report("a")
    assert_confined(found, transport, DAC_OVERRIDE if transport in UNPRIVILEGED else 0)
    # The program that tried it is found in its place: so it was run, and not the real one beside it.
    assert "own directory" in done
    done -= {"own directory", f"read {source}"}
    if transport == "fuse":
        # Root with CAP_SYS_ADMIN, because it mounts: docs/security.md says so.
        assert not {one for one in done if one.startswith(("trace", "connect"))}
        assert not {"unshare", "chroot", "packets", "device", "io_uring"} & done
    else:
        signals = {one for one in done if one.startswith("signal")} if landlock.abi() < 6 else set()
        assert done - signals == set()
    for name in ("a", "other"):
        stopped.detach(name)


def test_a_qsd_without_a_sandbox_is_told_and_works(stopped: Daemon, place: Path, transport: str) -> None:
    with_config(stopped, "[qsd]\nsandbox = false\n")
    stopped.start()
    source = image(place / "a.raw", "raw")
    stopped.attach("a", source, transport=transport)
    assert stopped.show("a")["qsd_confinement"].startswith("none")
    assert status(stopped.qsd("a"))["CapEff"] == status(os.getpid())["CapEff"]
    # With the next QSD the sandbox is there, and the volume goes on.
    with_config(stopped, "")
    stopped.cli("daemon", "--reload")
    former = stopped.qsd("a")
    stopped.kill_qsd("a")
    eventually(lambda: stopped.replaced("a", former), "there is a successor")
    assert_confined(status(stopped.qsd("a")), transport, DAC_OVERRIDE if transport in UNPRIVILEGED else 0)
    stopped.detach("a")


def test_a_sources_servers_see_a_qsd_without_any_rights(daemon: Daemon, place: Path, transport: str) -> None:
    source = image(place / "a.raw", "raw")
    port = 20000 + os.getpid() % 20000
    with subprocess.Popen(["qemu-nbd", "-f", "raw", "-t", "-b", "127.0.0.1", "-p", str(port), str(source)]) as server:
        try:
            eventually(lambda: f":{port:04X} " in Path("/proc/net/tcp").read_text(), "the server listens")
            daemon.attach("a", f"nbd://127.0.0.1:{port}/", transport=transport)
            assert_confined(status(daemon.qsd("a")), transport, 0)
            daemon.detach("a")
        finally:
            server.kill()


def test_a_qsd_of_an_older_daemon_is_adopted_and_its_successor_kept_short(
    stopped: Daemon, place: Path, transport: str
) -> None:
    with_config(stopped, "[qsd]\nsandbox = false\n")
    stopped.start()
    stopped.attach("a", image(place / "a.raw", "raw"), transport=transport)
    pid = stopped.qsd("a")
    stopped.kill()
    # So it was before there were sandboxes.
    directory = Path(stopped.layout.volume_dir("a"))
    record = json.loads((directory / "record.json").read_text())
    for member in ("confinement", "sockets"):
        del record[member]
    (directory / "record.json").write_text(json.dumps(record))
    if (directory / "tmp/nbd.sock").exists():
        (directory / "tmp/nbd.sock").rename(directory / "nbd.sock")
    with_config(stopped, "")
    stopped.start()
    eventually(lambda: stopped.online("a"), "it is adopted")
    assert stopped.qsd("a") == pid
    assert stopped.show("a")["qsd_confinement"].startswith("none")
    stopped.kill_qsd("a")
    eventually(lambda: stopped.replaced("a", pid), "there is a successor")
    assert_confined(status(stopped.qsd("a")), transport, DAC_OVERRIDE if transport in UNPRIVILEGED else 0)
    if transport != "vhost-user":
        writes(stopped.show("a")["device"], 0, PATTERN)
    stopped.detach("a")


def test_an_image_that_is_replaced_after_the_look_is_not_opened(stopped: Daemon, place: Path, transport: str) -> None:
    program = place / "waits"
    program.write_text(
        '#!/bin/sh\n[ "$1" != --chardev ] || { : >tmp/waits; while [ ! -e tmp/go ]; do sleep 0.05; done; }\n'
        f'exec {QSD} "$@"\n'
    )
    program.chmod(0o755)
    with_config(stopped, f"[qsd]\nbinary = '{program}'\n")
    stopped.start()
    source, other = image(place / "a.raw", "raw"), image(place / "b.raw", "raw")
    directory = Path(stopped.layout.volume_dir("a"))
    with ThreadPoolExecutor() as threads:
        failure = threads.submit(error_of, lambda: stopped.attach("a", source, transport=transport))
        eventually((directory / "tmp/waits").exists, "QSD is about to start")
        other.rename(source)
        (directory / "tmp/go").touch()
        assert failure.result(60).code is ErrorCode.SOURCE_CHANGED
