"""storaged show --qemu-args: what it prints starts a virtual machine's QEMU, which then has the same disk."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.guest import Emulator, GuestError, emulator
from tests.harness import Daemon, as_json, error_of, image, luks_image, run, writes

PATTERN = b"\xa5" * 65536
FORMS = ("with -blockdev", "with -drive")


def printed(daemon: Daemon, form: str, name: str = "a") -> list[str]:
    """The words of a form as a shell reads them from what the command prints."""
    text = daemon.cli("show", name, "--qemu-args").stdout
    heading, found, rest = text.partition(f"{form}\n")
    assert found, f"{heading} has no form {form}"
    done = run("bash", "-c", f"printf '%s\\n' {rest.partition('#')[0]}")
    return done.stdout.splitlines()


def disk_of(qemu: Emulator) -> dict[str, object]:
    """The one disk of a QEMU, as query-block shows it."""
    (disk,) = qemu.qmp.execute("query-block")
    assert "virtio-backend" in disk["qdev"]
    found: dict[str, object] = disk["inserted"]
    return found


def reads_pattern(qemu: Emulator, name: str) -> None:
    """The disk begins with PATTERN."""
    qemu.qmp.execute("human-monitor-command", command_line=f'qemu-io {name} "read -P 0xa5 0 {len(PATTERN)}"')
    assert f"read {len(PATTERN)}/{len(PATTERN)} bytes" in qemu.says()
    assert "failed" not in qemu.says()


def source_of(kind: str, place: Path) -> dict[str, object]:
    """An image of a kind, and the wishes with which it is attached."""
    (place / "key,1").write_bytes(b"a secret")
    if kind == "raw":
        return {"source": image(place / "a, b.raw", "raw"), "options": {"logical-block-size": "4096"}}
    if kind == "luks":
        (place / "key").write_bytes(b"a secret")
        return {
            "source": luks_image(place / "a.luks", place / "key"), "format": "luks",
            "options": {"key-file": str(place / "key,1"), "cache": "writethrough"},
        }
    lowest = image(place / "lowest.qcow2")
    base = image(place / "base,.qcow2", "qcow2", "64M", "-b", str(lowest), "-F", "qcow2")
    return {
        "source": image(place / "a.qcow2", "qcow2", "64M", "-b", str(base), "-F", "qcow2"), "format": "qcow2",
        "options": {"backing": f"allow:{place}"},
    }


@pytest.mark.parametrize("kind", ["raw", "qcow2", "luks"])
def test_qemu_has_the_same_disk_after_the_detach(daemon: Daemon, place: Path, kind: str) -> None:
    wishes = source_of(kind, place)
    source = wishes.pop("source")
    writes(daemon.device("a", source, **wishes), 0, PATTERN)
    forms = {form: printed(daemon, form) for form in FORMS}
    # Both together are one lock too many: storaged has the source.
    with pytest.raises(GuestError, match="lock"):
        Emulator(place / "refused", ["-S", *forms["with -drive"]])
    daemon.detach("a")
    for form, words in forms.items():
        with emulator(place / "qemu", words) as qemu:
            disk = disk_of(qemu)
            assert disk["drv"] == kind
            assert disk["ro"] is False
            assert (disk["node-name"] == "sd-a") is ("blockdev" in form)
            assert disk["backing_file_depth"] == (2 if kind == "qcow2" else 0)
            reads_pattern(qemu, "sd-a")


@pytest.mark.parametrize("form", FORMS)
def test_qemu_shares_what_is_only_read(daemon: Daemon, place: Path, form: str) -> None:
    source = image(place / "a.raw", "raw")
    writes(str(source), 0, PATTERN)
    daemon.attach("a", source, read_only=True)
    with emulator(place / "qemu", printed(daemon, form)) as qemu:
        assert disk_of(qemu)["ro"] is True
        reads_pattern(qemu, "sd-a")


def test_qemu_makes_a_snapshot_of_its_own(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    writes(str(source), 0, PATTERN)
    before = source.read_bytes()
    writes(daemon.device("a", source, snapshot=True), 0, b"x" * 4096)
    with emulator(place / "qemu", printed(daemon, "with -drive")) as qemu:
        assert disk_of(qemu)["ro"] is False
        reads_pattern(qemu, "sd-a")
        qemu.qmp.execute("human-monitor-command", command_line='qemu-io sd-a "write -P 1 0 4096"')
        assert "wrote 4096/4096 bytes" in qemu.says()
    with emulator(place / "qemu", printed(daemon, "with -blockdev")) as qemu:
        assert disk_of(qemu)["ro"] is True
    assert source.read_bytes() == before


def test_two_volumes_fit_into_one_machine(daemon: Daemon, place: Path) -> None:
    words = []
    for name, form in (("a", FORMS[0]), ("1" * 60, FORMS[1])):
        daemon.attach(name, image(place / name, "raw"), read_only=True)
        words += printed(daemon, form, name)
    with emulator(place / "qemu", words) as qemu:
        assert len(qemu.qmp.execute("query-block")) == 2


def test_json_has_the_lists(daemon: Daemon, place: Path) -> None:
    daemon.attach("a", image(place / "a.raw", "raw"))
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    assert found["vhost_user"] is None
    assert found["blockdev"] == printed(daemon, FORMS[0])
    assert found["drive"] == printed(daemon, FORMS[1])
    assert any("storaged detach a" in note for note in found["notes"])


def test_the_socket_of_a_vhost_user_volume_is_printed_and_works(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.qcow2")
    path = daemon.cli(
        "attach", "a", str(source), "--format", "qcow2", "--transport", "vhost-user", "-o", "queues=2"
    ).stdout.strip()
    assert path == daemon.show("a")["socket"]
    assert daemon.show("a")["device"] is None
    assert re.search(rf"^socket: +{re.escape(path)}$", daemon.cli("show", "a").stdout, re.MULTILINE)
    assert path in daemon.cli("list").stdout
    with emulator(place / "qemu", printed(daemon, "through the volume's socket")) as qemu:
        assert qemu.qmp.execute("query-status")["status"] in ("prelaunch", "paused")
        assert qemu.says() == ""


def test_what_cannot_be_looked_at_is_said(daemon: Daemon, place: Path) -> None:
    assert error_of(lambda: daemon.call("QemuArguments", name="none")).code is ErrorCode.NO_SUCH_VOLUME
    source = image(place / "a.raw", "raw")
    daemon.attach("a", source)
    source.rename(place / "elsewhere")
    failed = daemon.cli("show", "a", "--qemu-args", check=False)
    assert failed.returncode == 1
    assert "[source-missing]" in failed.stderr
    assert daemon.online("a")
