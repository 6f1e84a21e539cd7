"""The doctor: what it makes of facts, how it finds them, and that it works without a daemon."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import storaged
from storaged import doctor
from storaged.__main__ import main
from storaged.host import probe
from storaged.model.diagnosis import (
    MODULES,
    RIVAL,
    DeviceNode,
    Directory,
    Facts,
    Finding,
    Library,
    Opener,
    Status,
    diagnose,
)
from storaged.model.layout import Layout
from storaged.model.modules import Loading, ModuleInfo, ModuleState
from storaged.qsd.version import QsdVersion
from tests.unit.fake_daemon import FakeDaemon


def module(name: str, state: ModuleState = ModuleState.LOADED, detail: str = "", hint: str = "") -> ModuleInfo:
    return ModuleInfo(name, state, detail, hint)


def modules_but(*changed: ModuleInfo) -> dict[str, ModuleInfo]:
    """All modules loaded, but for these; the rival is absent unless it is among them."""
    usual = {name: module(name) for name in MODULES} | {RIVAL: module(RIVAL, ModuleState.ABSENT)}
    return usual | {info.name: info for info in changed}


HEALTHY = Facts(
    root=True,
    python=(3, 11, 2),
    libraries=(Library("uvloop", "0.23.0"), Library("rich", "15.0.0")),
    nbd=Library("nbd", "1.14.2"),
    nbd_is_libnbd=True,
    config_file="/etc/storaged/storaged.toml",
    config_problem="",
    qsd_binary="qemu-storage-daemon",
    qsd_path="/usr/bin/qemu-storage-daemon",
    qsd_output="qemu-storage-daemon version 10.0.13",
    qsd=QsdVersion(10, 0, 13),
    kernel="6.12.48+deb13-amd64",
    fuse=DeviceNode("/dev/fuse", module("fuse")),
    loop=DeviceNode("/dev/loop-control", module("loop", ModuleState.BUILTIN)),
    free_loops=3,
    loops=8,
    modules=modules_but(),
    run_dir=Directory("/run/storaged", free=1 << 30),
    state_dir=Directory("/var/lib/storaged", free=10 << 30),
    daemon_version="0.1.0",
    own_version="0.1.0",
    openers=(Opener("qemu-storage-daemon", ("file", "nbd", "rbd"), QsdVersion(10, 0, 13)),),
    landlock=6,
)


def found(check: str, **changes: Any) -> Finding:
    """Return the finding of one check when the healthy host is changed."""
    (finding,) = (one for one in diagnose(dataclasses.replace(HEALTHY, **changes)) if one.check == check)
    return finding


def test_a_healthy_host_has_nothing_but_ok() -> None:
    findings = diagnose(HEALTHY)
    assert {finding.status for finding in findings} == {Status.OK}
    assert len({finding.check for finding in findings}) == len(findings)
    assert not any(finding.hint for finding in findings)
    assert doctor.exit_status(findings) == 0


def test_each_backend_is_said_to_be_opened_or_not_and_by_which_program() -> None:
    lacks = {"rbd": ("no module", "apt install it")}
    one = Opener("qsd", ("file", "rbd", "http"), QsdVersion(7, 2, 22), lacks=lacks, only_whole=frozenset({"http"}))
    other = Opener("/opt/qsd", ("vitastor",), problem="it is gone", hint="bring it back")
    findings = diagnose(dataclasses.replace(HEALTHY, openers=(one, other), curl=False))
    told = {finding.check: (finding.status, finding.detail, finding.hint) for finding in findings}
    assert told["backends of qsd"][:2] == (Status.OK, "qemu-storage-daemon 7.2.22 opens file, http")
    assert told["backend rbd"] == (Status.INFO, "no module", "apt install it")
    assert told["backend http"][0] is Status.INFO
    assert "fetch=whole" in told["backend http"][1]
    assert told["backend vitastor"] == (Status.WARN, "/opt/qsd: it is gone", "bring it back")
    assert told["backend tftp"][0] is Status.INFO


def test_a_warning_is_no_failure() -> None:
    findings = diagnose(dataclasses.replace(HEALTHY, root=False, daemon_problem="cannot be reached"))
    assert Status.WARN in {finding.status for finding in findings}
    assert doctor.exit_status(findings) == 0


NO_OTHER = {
    "modules": modules_but(*(module(name, ModuleState.ABSENT, "not built", "get it") for name in MODULES))
}


def node(name: str, state: ModuleState) -> DeviceNode:
    """A node that cannot be opened."""
    return DeviceNode(f"/dev/{name}", module(name, state), "it failed")


@pytest.mark.parametrize(
    ("check", "changes", "status", "hint"),
    [
        ("root", {"root": False}, Status.WARN, "sudo"),
        ("python", {"python": (3, 9, 2)}, Status.FAIL, "3.11"),
        ("rbd", {"rbd": False}, Status.INFO, "apt install ceph-common"),
        ("python uvloop", {"libraries": (Library("uvloop", problem="no"),)}, Status.FAIL, "pip install"),
        ("python nbd", {"nbd": Library("nbd", problem="no")}, Status.WARN, "apt install python3-libnbd"),
        ("python nbd", {"nbd_is_libnbd": False}, Status.WARN, "pip uninstall nbd"),
        ("configuration", {"config_problem": "bad key"}, Status.FAIL, "correct"),
        ("qsd", {"qsd_path": None}, Status.FAIL, "apt install qemu-system-common"),
        ("qsd", {"qsd_path": None, "qsd_binary": "/opt/qsd"}, Status.FAIL, "storaged.toml"),
        ("qsd", {"qsd": None, "qsd_output": "Killed"}, Status.FAIL, "--reinstall"),
        ("qsd direct I/O", {"qsd": QsdVersion(7, 2, 22)}, Status.WARN, "10.0.10"),
        ("qsd direct I/O", {"qsd": QsdVersion(10, 0, 2)}, Status.WARN, "10.0.10"),
        ("kernel", {"kernel": "5.4.0-generic"}, Status.FAIL, "linux-image"),
        ("kernel", {"kernel": "strange"}, Status.FAIL, "linux-image"),
        ("fuse", NO_OTHER | {"fuse": node("fuse", ModuleState.LOADED)}, Status.FAIL, "/dev/fuse"),
        ("fuse", NO_OTHER | {"fuse": node("fuse", ModuleState.ABSENT)}, Status.FAIL, "kernel"),
        ("loop", NO_OTHER | {"loop": node("loop", ModuleState.UNKNOWN)}, Status.FAIL, "kernel"),
        ("fuse", {"fuse": node("fuse", ModuleState.ABSENT)}, Status.WARN, "kernel"),
        (
            "transport vduse",
            {"modules": modules_but(module("vduse", ModuleState.BLACKLISTED, "x.conf line 2", "remove it"))},
            Status.INFO,
            "remove it",
        ),
        ("transport vduse", {"kernel": "5.10.0-30-amd64"}, Status.INFO, "newer kernel"),
        ("transport vduse", {"qsd": QsdVersion(7, 0, 0)}, Status.INFO, "newer QEMU"),
        ("transport nbd", {"nbd_is_libnbd": False}, Status.INFO, "python3-libnbd"),
        ("transport nbd", NO_OTHER, Status.INFO, "get it"),
        (f"module {RIVAL}", {"modules": modules_but(module(RIVAL))}, Status.INFO, "modprobe -r"),
        ("run directory", {"run_dir": Directory("/run/x", "read-only")}, Status.FAIL, "--root"),
        (
            "state directory",
            {"state_dir": Directory("/x", "no permission"), "root": False},
            Status.WARN,
            "--root",
        ),
        ("free space", {"state_dir": Directory("/x", free=500 << 20)}, Status.WARN, "snapshot_dir"),
        ("free space", {"state_dir": Directory("/x", free=1 << 20)}, Status.FAIL, "snapshot_dir"),
        ("daemon", {"daemon_problem": "away", "daemon_hint": "start it"}, Status.WARN, "start it"),
        ("daemon", {"daemon_version": "0.0.9"}, Status.WARN, "restart"),
    ],
)
def test_what_is_wrong_is_found_and_has_a_hint(
    check: str, changes: dict[str, Any], status: Status, hint: str
) -> None:
    finding = found(check, **changes)
    assert finding.status is status
    assert hint in finding.hint


def test_a_module_that_loads_when_needed_is_fine() -> None:
    assert found("fuse", fuse=node("fuse", ModuleState.LOADABLE)).status is Status.OK
    finding = found("transport nbd", modules=modules_but(module("nbd", ModuleState.LOADABLE, "kernel/x/nbd.ko")))
    assert finding.status is Status.OK
    assert "an attach loads nbd" in finding.detail


def test_modules_that_lack_for_one_reason_are_told_together() -> None:
    finding = found("transport vduse", **NO_OTHER)
    assert finding.detail == "modules vdpa, vduse, virtio_vdpa, virtio_blk are absent"
    assert finding.hint == "get it"


@pytest.mark.parametrize(
    ("path", "loading", "status"),
    [
        ("updates/dkms/vduse.ko", Loading(lockdown="integrity"), Status.WARN),
        ("updates/dkms/vduse.ko", Loading(signatures=True), Status.WARN),
        ("updates/dkms/vduse.ko", Loading(), Status.OK),
        ("kernel/drivers/vdpa/vduse.ko", Loading(lockdown="integrity"), Status.OK),
    ],
)
def test_a_module_of_ones_own_may_be_refused_where_signatures_count(
    path: str, loading: Loading, status: Status
) -> None:
    modules = modules_but(module("vduse", ModuleState.LOADABLE, path))
    finding = found("transport vduse", modules=modules, loading=loading)
    assert finding.status is status
    assert ("sign" in finding.hint) == (status is Status.WARN)


def test_no_free_loop_device_is_fine_since_the_kernel_makes_more() -> None:
    finding = found("loop devices", free_loops=0)
    assert finding.status is Status.OK
    assert "makes another" in finding.detail


@given(st.text())
def test_any_kernel_release_is_judged(release: str) -> None:
    assert found("kernel", kernel=release).status in (Status.OK, Status.FAIL)


# How the facts are found, on a root directory made for the purpose.


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A host with both drivers, one of them loaded."""
    (tmp_path / "sys/module/loop").mkdir(parents=True)
    (tmp_path / "sys/module/loop/initstate").write_text("live\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/misc").write_text("237 loop-control\n229 fuse\n")
    return tmp_path


def test_a_node_whose_driver_is_not_there_is_never_opened(
    host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(*_: object) -> int:
        raise AssertionError("opening it would load the module")

    (host / "proc/misc").write_text("237 loop-control\n")
    monkeypatch.setattr(os, "open", forbidden)
    assert probe.device_node("/dev/fuse", "fuse", "fuse", root=str(host)).problem


def test_a_node_of_a_driver_is_opened(host: Path) -> None:
    assert probe.device_node(str(host / "none"), "fuse", "fuse", root=str(host)).problem
    (host / "node").touch()
    assert not probe.device_node(str(host / "node"), "fuse", "fuse", root=str(host)).problem


def test_a_driver_whose_files_are_hidden_is_there_all_the_same(host: Path) -> None:
    (host / "node").touch()
    found = probe.device_node(str(host / "node"), "nbd", "fuse", root=str(host))
    assert found.module.state is ModuleState.BUILTIN
    found = probe.device_node(str(host / "node"), "loop", "loop-control", root=str(host))
    assert found.module.state is ModuleState.LOADED


def test_loop_devices_with_a_backing_file_are_not_free(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"sys/block/loop{number}").mkdir(parents=True)
    (tmp_path / "sys/block/loop1/loop").mkdir()
    (tmp_path / "sys/block/loop1/loop/backing_file").touch()
    assert probe.loop_devices(root=str(tmp_path)) == (2, 3)


def test_a_directory_that_can_be_made_is_fine_and_is_not_made(tmp_path: Path) -> None:
    found = probe.directory(f"{tmp_path}/a/b/c")
    assert found.problem == ""
    assert found.free is not None
    assert list(tmp_path.iterdir()) == []


def test_a_directory_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "no directory" in probe.directory(f"{tmp_path}/file/x").problem


def test_a_read_only_filesystem_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.statvfs(tmp_path)
    fields = [getattr(real, name) for name in (*real.__match_args__, "f_fsid")]
    fields[8] |= os.ST_RDONLY
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(fields))
    assert "read-only" in probe.directory(f"{tmp_path}/x").problem


def test_a_directory_without_permission_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    assert str(tmp_path) in probe.directory(f"{tmp_path}/x").problem


def script(path: Path, text: str) -> str:
    """Write an executable and return its path."""
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_qsd_tells_its_version(tmp_path: Path) -> None:
    binary = script(tmp_path / "qsd", 'echo "qemu-storage-daemon version 10.0.13 (Debian)"; echo Copyright')
    path, output, version = probe.qsd(binary)
    assert (path, version) == (binary, QsdVersion(10, 0, 13))
    assert output == "qemu-storage-daemon version 10.0.13 (Debian)"


@pytest.mark.parametrize(
    ("text", "output"), [("echo broken >&2; exit 1", "broken"), ("exec sleep 60", "timed out")]
)
def test_a_qsd_that_is_broken_or_hangs_has_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, output: str
) -> None:
    monkeypatch.setattr(probe, "_QSD_DEADLINE", 1)
    path, said, version = probe.qsd(script(tmp_path / "qsd", text))
    assert path is not None
    assert version is None
    assert output in said


def test_a_qsd_that_is_not_there_has_no_path() -> None:
    assert probe.qsd("no-such-qsd") == (None, "", None)


def test_libraries_are_imported_to_prove_that_they_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "msgspec", None)
    libraries = {library.name: library for library in probe.libraries()}
    assert set(libraries) == {"uvloop", "qemu.qmp", "asyncvarlink", "msgspec", "rich"}
    assert libraries["uvloop"].version
    assert not libraries["msgspec"].version
    assert libraries["msgspec"].problem


def test_the_impostor_of_libnbd_is_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", types.ModuleType("nbd"))
    library, is_libnbd = probe.libnbd()
    assert library.version
    assert not is_libnbd


def test_a_missing_libnbd_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "nbd", None)
    library, is_libnbd = probe.libnbd()
    assert library.problem
    assert not is_libnbd


# The command.


def test_doctor_works_without_a_daemon_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status = main(["--root", str(tmp_path), "doctor", "--json"])
    findings = json.loads(capsys.readouterr().out)
    assert status == int(any(finding["status"] == "fail" for finding in findings))
    assert all(set(finding) == {"check", "status", "detail", "hint"} for finding in findings)
    (daemon,) = (finding for finding in findings if finding["check"] == "daemon")
    assert daemon["status"] == "warn"
    assert daemon["hint"] == f"start it with: storaged --root {tmp_path} daemon"
    assert list(tmp_path.iterdir()) == []


def test_doctor_finds_the_daemon(tmp_path: Path) -> None:
    layout = Layout.below(str(tmp_path))
    answer = {"parameters": {"version": storaged.__version__}}
    with FakeDaemon(Path(layout.socket)).answers("GetInfo", answer):
        facts = doctor.gather(layout)
    assert (facts.daemon_version, facts.daemon_problem) == (storaged.__version__, "")


def test_doctor_looks_at_the_qsd_that_the_configuration_names(tmp_path: Path) -> None:
    layout = Layout.below(str(tmp_path))
    config = Path(layout.config_file)
    config.parent.mkdir(parents=True)
    config.write_text('[qsd]\nbinary = "/opt/no-such-qsd"\n')
    facts = doctor.gather(layout)
    assert (facts.qsd_binary, facts.qsd_path, facts.config_problem) == ("/opt/no-such-qsd", None, "")


def test_doctor_fails_when_something_is_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = Path(Layout.below(str(tmp_path)).config_file)
    config.parent.mkdir(parents=True)
    config.write_text("[qsd")
    assert main(["--root", str(tmp_path), "doctor"]) == 1
    line = next(line for line in capsys.readouterr().out.splitlines() if "configuration" in line)
    assert line.startswith("fail")


def test_doctor_judges_a_kernels_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "config"
    config.write_text("CONFIG_BLOCK=y\nCONFIG_BLK_DEV=y\nCONFIG_FUSE_FS=m\nCONFIG_BLK_DEV_LOOP=y\n")
    assert main(["doctor", "--kernel-config", str(config), "--json"]) == 0
    verdicts = {verdict["transport"]: verdict for verdict in json.loads(capsys.readouterr().out)}
    assert verdicts["fuse"]["possible"]
    assert verdicts["fuse"]["modules"] == ["fuse"]
    assert {lack["symbol"] for lack in verdicts["nbd"]["missing"]} == {
        "CONFIG_NET", "CONFIG_UNIX", "CONFIG_BLK_DEV_NBD"
    }
    assert main(["doctor", "--kernel-config", str(config)]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^ok +transport fuse +possible; modules: fuse$", out, re.MULTILINE)
    assert re.search(r"^warn +transport nbd +not set: ", out, re.MULTILINE)


def test_doctor_fails_for_a_kernel_that_can_do_nothing(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text("# CONFIG_BLOCK is not set\nCONFIG_NET=y\nCONFIG_UNIX=y\nCONFIG_EVENTFD=y\n"
                      "CONFIG_SHMEM=y\nCONFIG_TMPFS=y\n")
    assert main(["doctor", "--kernel-config", str(config)]) == 1  # vhost-user alone makes no device


@pytest.mark.parametrize("what", ["/no/such/file", "0.0.0-no-such-kernel", "FILE"])
def test_what_is_no_configuration_is_an_error(
    what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "FILE").write_text("hello\n")
    if what == "FILE":
        what = str(tmp_path / what)
    assert main(["doctor", "--kernel-config", what]) == 1
    err = capsys.readouterr().err
    assert what in err
    assert "[invalid-argument]" in err


def test_what_keeps_a_qsd_less_short_than_it_could_be_is_said() -> None:
    assert "Landlock 6" in found("sandbox").detail
    for changes, said in (
        ({"sandbox": False}, "is root"), ({"landlock": 0}, "no Landlock"), ({"no_users": "no CAP_KILL"}, "CAP_KILL"),
    ):
        finding = found("sandbox", **changes)
        assert finding.status is Status.WARN
        assert said in finding.detail
        assert finding.hint
