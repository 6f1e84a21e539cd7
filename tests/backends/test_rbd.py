"""The rbd backend against a Ceph cluster. The device is made by fuse, which works on every kernel."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from tests.backends.ceph_cluster import NAMESPACE, POOL, READER, USER, CephCluster
from tests.backends.secrecy import secret_is_nowhere
from tests.backends.servers import Load
from tests.backends.within import opened_within
from tests.benching import WRITES, bench, report_of, short
from tests.harness import Daemon, as_json, error_of, eventually, mounted, reads, refuses, run, size_of, writes

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(100)


@pytest.fixture
def disk(cluster: CephCluster, request: pytest.FixtureRequest) -> str:
    """A new image, POOL/IMAGE."""
    return f"{POOL}/{cluster.image(request.node.name.replace('[', '-').rstrip(']'))}"


@pytest.fixture
def source(cluster: CephCluster, disk: str) -> str:
    return f"rbd:{disk}:conf={cluster.conf}"


@pytest.fixture
def key(cluster: CephCluster, place: Path) -> Path:
    """The file with the key of USER."""
    path = place / "bob.key"
    path.write_text(cluster.key(USER) + "\n")
    path.chmod(0o600)
    return path


def has_pattern(cluster: CephCluster, disk: str, place: Path, offset: int = 0) -> bool:
    """Whether the cluster has it, as its own program sees it."""
    data = cluster.exported(disk, place / "exported").read_bytes()
    return data[offset:offset + len(PATTERN)] == PATTERN


def without_settings(cluster: CephCluster, key: Path) -> tuple[str, dict[str, str]]:
    """How the cluster is reached with no configuration file and no keyring."""
    return f":conf=/dev/null:id={USER}", {"mon-host": cluster.monitor, "cephx-key-file": str(key)}


def test_a_filesystem(cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path) -> None:
    device = daemon.device("a", source)
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    with mounted(str(cluster.exported(disk, place / "copy")), place / "mnt", "-o", "loop,ro") as directory:
        assert (directory / "file").read_bytes() == PATTERN


def test_a_benchmark_reaches_it_by_the_engine_of_fio_too(daemon: Daemon, source: str, place: Path) -> None:
    done = bench(daemon, source, "--transports", "direct,fuse", *short(place, WRITES), "--destructive")
    assert done.status == 0, done
    assert "direct: fio's engine rbd" in done.stdout
    assert {(run.way, run.job) for run in report_of(place).runs if run.is_good} == {
        (way, job) for way in ("direct", "fuse") for job in ("reads", "writes")
    }


def test_all_is_said_by_options_with_an_image_of_a_namespace(
    cluster: CephCluster, daemon: Daemon, key: Path, place: Path
) -> None:
    name = "a:b=c ä"
    cluster.rbd("create", "--pool", POOL, "--namespace", NAMESPACE, "--image", name, "--size", "16M")
    options = {
        "pool": POOL, "namespace": NAMESPACE, "image": name, "user": USER, "conf": "/dev/null",
        "mon-host": cluster.monitor, "cephx-key-file": str(key),
    }
    writes(daemon.device("a", "rbd:", options=options), 0, PATTERN)
    daemon.detach("a")
    assert has_pattern(cluster, f"{POOL}/{NAMESPACE}/{name}", place)


def test_a_tree_of_nodes_names_the_same_disk_as_its_source(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    pool, _, name = disk.partition("/")
    tree = {"driver": "raw", "file.driver": "rbd", "file": {"pool": pool, "image": name, "conf": str(cluster.conf)}}
    writes(daemon.device("a", "json:" + json.dumps(tree)), 0, PATTERN)
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b")
    daemon.detach("a")
    assert has_pattern(cluster, disk, place)


def test_an_image_of_this_host_on_one_of_the_cluster(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    writes(daemon.device("a", source), 0, PATTERN)
    daemon.detach("a")
    top = place / "top.qcow2"
    run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", source, "-F", "raw", top, "16M")
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, top, format="qcow2", options={"backing-sources": f"rbd:{POOL}/"})
    device = daemon.device("a", top, format="qcow2", options={"backing-sources": source})
    assert reads(device, 0, len(PATTERN)) == PATTERN
    writes(device, 0, bytes(len(PATTERN)))
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b")
    daemon.detach("a")
    assert has_pattern(cluster, disk, place)


def test_a_key_in_the_source_works_and_is_shown_nowhere(
    cluster: CephCluster, daemon: Daemon, source: str, place: Path
) -> None:
    secret = cluster.key(USER)
    writes(daemon.device("a", f"{source}:id={USER}:key={secret}"), 0, PATTERN)
    secret_is_nowhere(daemon, secret)
    # A successor has it again.
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it")


def test_a_snapshot_is_read_only_and_stays_as_it_was(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str
) -> None:
    device = daemon.device("a", source)
    writes(device, 0, PATTERN)
    cluster.rbd("snap", "create", "--no-progress", f"{disk}@before")
    writes(device, 0, bytes(len(PATTERN)))
    snapshot = source.replace(disk, f"{disk}@before")
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, snapshot, "b")
    assert "--read-only" in error.hint
    assert reads(daemon.device("b", snapshot, read_only=True), 0, len(PATTERN)) == PATTERN
    with pytest.raises(OSError, match=r"not permitted|Read-only"):
        writes(str(daemon.show("b")["device"]), 0, b"x" * 512)
    assert reads(device, 0, len(PATTERN)) == bytes(len(PATTERN))


def test_an_image_that_rbd_encrypted(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    passphrase = place / "passphrase"
    passphrase.write_text("geheim\n")
    cluster.rbd("encryption", "format", disk, "luks2", passphrase)
    options = {"rbd-encrypt": "luks2", "rbd-key-file": str(passphrase)}
    device = daemon.device("a", source, options=options)
    writes(device, 0, PATTERN)
    assert reads(device, 0, len(PATTERN)) == PATTERN
    # The header takes its room.
    assert daemon.show("a")["size"] < 64 * MIB
    daemon.detach("a")
    raw = cluster.exported(disk, place / "exported").read_bytes()
    assert raw.startswith(b"LUKS")
    assert PATTERN[:4096] not in raw
    wrong = refuses(daemon, ErrorCode.WRONG_FORMAT, source, options={**options, "rbd-encrypt": "luks"})
    assert "rbd-encrypt" in wrong.hint
    # (A wrong passphrase takes librbd seconds to find out; what it says then is in the unit tests.)


@pytest.mark.parametrize(
    ("mode", "cached", "policy"),
    [
        ("", "false", ""), ("writeback", "true", ""), ("writethrough", "true", "writethrough"), ("none", "false", ""),
        ("directsync", "false", ""), ("unsafe", "false", ""),
    ],
)
def test_the_cache_of_librbd_is_that_of_the_cache_mode(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path, mode: str, cached: str, policy: str
) -> None:
    said = {"cache": mode} if mode else {}
    device = daemon.device("a", source, options={**said, "open-timeout": "17", "request-timeout": "600"})
    pid = daemon.qsd("a")
    assert cluster.setting(pid, "rbd_cache") == cached
    assert not policy or cluster.setting(pid, "rbd_cache_policy") == policy
    assert cluster.setting(pid, "client_mount_timeout") == "17"
    assert cluster.setting(pid, "rados_osd_op_timeout") == "600"
    writes(device, 0, PATTERN)
    # What was flushed is in the cluster at once.
    assert has_pattern(cluster, disk, place)


def test_an_option_of_ceph_in_the_source_counts(cluster: CephCluster, daemon: Daemon, source: str) -> None:
    settings = ":rbd_cache=true:rbd_cache_size=1048576:rbd_cache_policy=writeback"
    daemon.attach("a", f"{source}{settings}", options={"cache": "writeback"})
    pid = daemon.qsd("a")
    assert cluster.setting(pid, "rbd_cache_size") == "1048576"
    assert cluster.setting(pid, "rbd_cache_policy") == "writeback"


def test_what_qemu_args_prints_opens_it(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    device = daemon.device("a", source)
    writes(device, 0, PATTERN)
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    daemon.detach("a")
    drive = found["drive"][found["drive"].index("-drive") + 1]
    options = drive.removeprefix("if=none,id=sd-a,")
    assert options != drive
    copy = cluster.exported(disk, place / "copy")
    run("qemu-img", "compare", "--image-opts", options, f"driver=raw,file.filename={copy}")


# What is refused


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("rbd/nothing", ErrorCode.SOURCE_MISSING, "no such image"),
        ("rbd/nothing@here", ErrorCode.SOURCE_MISSING, "no such snapshot"),
        ("nothing/disk", ErrorCode.SOURCE_MISSING, "no such pool"),
        ("rbd/nothing/disk", ErrorCode.SOURCE_MISSING, "no such namespace"),
        ("rbd/disk:id=nobody", ErrorCode.OPEN_FAILED, "does not let this user in"),
        ("rbd/disk:conf=/nothing", ErrorCode.OPEN_FAILED, "no such configuration file"),
    ],
)
def test_a_wrong_name(cluster: CephCluster, daemon: Daemon, name: str, code: ErrorCode, message: str) -> None:
    source = f"rbd:{name}" if "conf=" in name else f"rbd:{name}:conf={cluster.conf}"
    assert message in refuses(daemon, code, source, read_only="@" in name).message


def test_an_empty_image_is_refused(cluster: CephCluster, daemon: Daemon) -> None:
    name = cluster.image("empty", size="0")
    refuses(daemon, ErrorCode.INVALID_SIZE, f"rbd:{POOL}/{name}:conf={cluster.conf}")


def test_a_configuration_file_that_is_none(daemon: Daemon, place: Path) -> None:
    (place / "bad.conf").write_text("nonsense\n")
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"rbd:rbd/x:conf={place}/bad.conf")
    assert "does not understand" in error.message


@pytest.mark.parametrize(
    ("of", "message"), [("admin", "does not let this user in"), ("", "cannot use the key")], ids=["wrong", "no key"]
)
def test_a_wrong_key(
    cluster: CephCluster, daemon: Daemon, source: str, place: Path, of: str, message: str
) -> None:
    path = place / "key"
    secret = cluster.key(of) if of else "bm8ga2V5"
    path.write_text(secret)
    error = refuses(
        daemon, ErrorCode.OPEN_FAILED, source, options={"user": USER, "cephx-key-file": str(path), "open-timeout": "5"}
    )
    assert message in error.message
    assert secret not in f"{error} {error.hint} {daemon.log.read_text()}"


def test_no_key_at_all(cluster: CephCluster, daemon: Daemon, place: Path) -> None:
    lines = cluster.conf.read_text().splitlines(keepends=True)
    (place / "ceph.conf").write_text("".join(line for line in lines if not line.startswith("keyring")))
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"rbd:rbd/x:conf={place}/ceph.conf:id=nobody")
    assert "no key for the Ceph user" in error.message


def test_a_user_who_may_only_read_cannot_even_do_that(
    cluster: CephCluster, daemon: Daemon, source: str
) -> None:
    error = refuses(daemon, ErrorCode.OPEN_FAILED, f"{source}:id={READER}", read_only=True)
    assert "profile rbd" in error.hint


@pytest.mark.parametrize("silent", [True, False], ids=["silent", "closed"])
def test_a_monitor_that_does_not_answer_is_given_up_at_the_deadline(
    daemon: Daemon, key: Path, silent: bool
) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        if silent:
            nobody.listen()
        begin = time.monotonic()
        error = refuses(
            daemon, ErrorCode.OPEN_FAILED, "rbd:rbd/x:conf=/dev/null",
            options={
                "mon-host": f"127.0.0.1:{nobody.getsockname()[1]}", "cephx-key-file": str(key), "open-timeout": "2",
            },
        )
        assert 2 <= time.monotonic() - begin < 10
    assert "no monitor" in error.message


def test_what_is_not_safe_is_refused(daemon: Daemon, source: str) -> None:
    for mode in ("none", "unsafe"):
        error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{source}:rbd_cache=true", options={"cache": mode})
        assert "contradict" in error.message
    # The default is none: what librbd's cache has acknowledged would be gone with QSD.
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{source}:rbd_cache=true")
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, f"{source}:rbd_cache=false", options={"cache": "writeback"})
    refuses(daemon, ErrorCode.INVALID_SOURCE, f"{source}:no_such_option=1")
    refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, options={"rbd-encrypt": "luks2"})


def test_nobody_writes_twice(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, key: Path, place: Path
) -> None:
    first = daemon.attach("a", source)
    same = f"rbd:{disk.replace('_', chr(92) + '_')}:conf={cluster.conf}:id=admin"
    assert daemon.attach("a", same) == first
    how, options = without_settings(cluster, key)
    refuses(daemon, ErrorCode.SOURCE_IN_USE, f"rbd:{disk}{how}", "b", options=options)
    pool, _, image = disk.partition("/")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, "rbd:", "b", options={"pool": pool, "image": image})
    refuses(daemon, ErrorCode.SOURCE_IN_USE, source, "b", read_only=True)
    # Another file may be of another cluster, but nothing says so.
    shutil.copy(cluster.conf, place / "copy.conf")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, f"rbd:{disk}:conf={place}/copy.conf", "b")


def test_readers_share(daemon: Daemon, source: str) -> None:
    daemon.attach("a", source, read_only=True)
    daemon.attach("b", source, read_only=True)


# Accidents


def test_the_osd_is_killed_under_load_and_started_again(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    load = Load(daemon.device("a", source, options={"cache": "writeback"}), place, seconds=2)
    time.sleep(0.5)
    cluster.kill_osd()
    time.sleep(2)
    assert load.runs
    cluster.start_osd()
    load.succeeded(60)
    daemon.detach("a")
    load.is_in(cluster.exported(disk, place / "exported"))


@pytest.mark.parametrize("cache", ["writeback", "none"])
def test_the_osd_is_stopped_under_load_and_goes_on(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path, cache: str
) -> None:
    load = Load(daemon.device("a", source, options={"cache": cache}), place, seconds=2)
    time.sleep(0.5)
    cluster.signal_osd(signal.SIGSTOP)
    try:
        time.sleep(2)
        assert load.runs
    finally:
        cluster.signal_osd(signal.SIGCONT)
    load.succeeded(60)
    daemon.detach("a")
    load.is_in(cluster.exported(disk, place / "exported"))


def test_the_monitor_stops_and_nobody_notices(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    load = Load(daemon.device("a", source), place, seconds=1)
    cluster.signal_monitor(signal.SIGSTOP)
    try:
        load.succeeded()
    finally:
        cluster.signal_monitor(signal.SIGCONT)
    daemon.detach("a")
    load.is_in(cluster.exported(disk, place / "exported"))


def test_requests_fail_after_the_time_that_was_said_and_the_device_goes_on_afterwards(
    cluster: CephCluster, daemon: Daemon, source: str
) -> None:
    device = daemon.device("a", source, options={"request-timeout": "2", "cache": "none"})
    writes(device, 0, PATTERN)
    cluster.signal_osd(signal.SIGSTOP)
    try:
        begin = time.monotonic()
        with pytest.raises(OSError, match=f"{os.strerror(errno.EIO)}|{os.strerror(errno.ETIMEDOUT)}"):
            writes(device, 0, PATTERN)
        assert time.monotonic() - begin < 15
    finally:
        cluster.signal_osd(signal.SIGCONT)
    writes(device, 0, PATTERN)


def test_a_detach_by_force_ends_while_the_osd_is_away(
    cluster: CephCluster, daemon: Daemon, source: str, place: Path
) -> None:
    load = Load(daemon.device("a", source), place, seconds=3)
    time.sleep(1)
    cluster.signal_osd(signal.SIGSTOP)
    try:
        time.sleep(0.5)
        daemon.detach("a", force=True, timeout=30)
        assert daemon.names() == []
    finally:
        cluster.signal_osd(signal.SIGCONT)
    load.kill()


def test_osds_that_are_away_at_the_opening_are_given_up(cluster: CephCluster, daemon: Daemon, source: str) -> None:
    cluster.signal_osd(signal.SIGSTOP)
    try:
        error = refuses(daemon, ErrorCode.OPEN_FAILED, source, options={"request-timeout": "2"})
        assert "OSDs" in error.message
        late = error_of(lambda: daemon.attach("a", source, timeout=2))
        assert late.code in (ErrorCode.TIMEOUT, ErrorCode.QSD_SILENT)
    finally:
        cluster.signal_osd(signal.SIGCONT)
    eventually(lambda: daemon.names() == [], "nothing is left of it")


def test_a_successor_serves_at_once_and_writes_when_its_predecessor_is_known_to_be_dead(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    """That takes osd_client_watch_timeout (here 5 seconds): until then librbd asks the dead client to let go."""
    writes(daemon.device("a", source), 0, PATTERN)
    pid = daemon.kill_qsd("a")
    begin = time.monotonic()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    device = str(daemon.show("a")["device"])
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert time.monotonic() - begin < 4
    writes(device, MIB, PATTERN)
    daemon.detach("a")
    assert has_pattern(cluster, disk, place)
    assert has_pattern(cluster, disk, place, MIB)


# Another size, another image


def test_an_image_that_has_grown_is_served_at_its_old_size_until_a_resize(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, place: Path
) -> None:
    writes(daemon.device("a", source), 0, PATTERN)
    cluster.rbd("resize", "--no-progress", disk, "--size", "128M")
    device = daemon.replace_qsd("a")
    assert size_of(device) == 64 * MIB
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert daemon.show("a")["source_size"] == 128 * MIB
    daemon.cli("resize", "a")
    assert size_of(device) == 128 * MIB
    cluster.rbd("resize", "--no-progress", disk, "--size", "192M")
    assert error_of(lambda: daemon.call("Resize", name="a", size=160 * MIB)).code is ErrorCode.INVALID_SIZE
    daemon.cli("resize", "a")  # QSD had not noticed
    assert size_of(device) == 192 * MIB
    writes(device, 192 * MIB - len(PATTERN), PATTERN)
    daemon.detach("a")
    assert has_pattern(cluster, disk, place, 192 * MIB - len(PATTERN))


def made_anew(cluster: CephCluster, disk: str) -> None:
    """The image is removed, and another one gets its name and size. (A dead client is still there for a while.)"""
    eventually(lambda: "watcher=" not in cluster.rbd("status", disk), "nobody has it open", 30)
    cluster.rbd("rm", "--no-progress", disk)
    cluster.image(disk.partition("/")[2])


def refused(daemon: Daemon, code: ErrorCode) -> bool:
    return (daemon.show("a")["failure"] or {}).get("code") == code


def test_another_image_of_the_same_name_is_refused(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str, key: Path
) -> None:
    how, options = without_settings(cluster, key)
    device = daemon.device("a", f"rbd:{disk}{how}", options=options)
    writes(device, 0, PATTERN)
    pool, _, name = disk.partition("/")
    # A rename does not mind that the image is in use.
    cluster.rbd("mv", disk, f"{pool}/{name}-old")
    cluster.image(name)
    assert error_of(lambda: daemon.call("Upgrade", name="a")).code is ErrorCode.SOURCE_CHANGED
    assert daemon.online("a")
    pid = daemon.kill_qsd("a")
    eventually(lambda: refused(daemon, ErrorCode.SOURCE_CHANGED), "it is refused", 40)
    assert "another disk" in daemon.show("a")["failure"]["message"]
    cluster.rbd("mv", disk, f"{disk}-new")
    cluster.rbd("mv", f"{disk}-old", disk)
    eventually(lambda: daemon.replaced("a", pid), "the old one is served", 60)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_another_image_is_refused_after_a_rescue_and_by_a_daemon_that_starts(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str
) -> None:
    daemon.attach("a", source)
    daemon.call("Rescue", name="a")
    made_anew(cluster, disk)
    assert error_of(lambda: daemon.call("Resume", name="a")).code is ErrorCode.SOURCE_CHANGED
    daemon.kill()
    daemon.start()
    assert error_of(lambda: daemon.call("Resume", name="a")).code is ErrorCode.SOURCE_CHANGED
    daemon.detach("a")
    daemon.attach("a", source)


def test_another_snapshot_of_the_same_name_is_refused(
    cluster: CephCluster, daemon: Daemon, source: str, disk: str
) -> None:
    cluster.rbd("snap", "create", "--no-progress", f"{disk}@s")
    daemon.attach("a", source.replace(disk, f"{disk}@s"), read_only=True)
    daemon.call("Rescue", name="a")
    cluster.rbd("snap", "rm", "--no-progress", f"{disk}@s")
    cluster.rbd("snap", "create", "--no-progress", f"{disk}@s")
    assert error_of(lambda: daemon.call("Resume", name="a")).code is ErrorCode.SOURCE_CHANGED


def test_without_the_program_rbd_it_is_said_once_that_only_the_size_tells(
    stopped: Daemon, source: str, place: Path
) -> None:
    empty = place / "bin"
    empty.mkdir()
    (empty / "qemu-storage-daemon").symlink_to(run("which", "qemu-storage-daemon").stdout.strip())
    stopped.start(command=["env", f"PATH={empty}"])
    stopped.attach("a", source)
    assert "ceph-common" in stopped.log.read_text() + stopped.cli("doctor", check=False).stdout
    assert "rbd is not installed" in stopped.log.read_text()
    pid = stopped.kill_qsd("a")
    eventually(lambda: stopped.replaced("a", pid), "a successor serves it", 40)


def test_it_needs_no_root(
    cluster: CephCluster, daemon: Daemon, disk: str, source: str, key: Path
) -> None:
    more, options = without_settings(cluster, key)
    opened_within(daemon, f"rbd:{disk}{more}", options=options)
    # The keyring is root's, or Ceph's.
    opened_within(daemon, source, "DAC_READ_SEARCH")
