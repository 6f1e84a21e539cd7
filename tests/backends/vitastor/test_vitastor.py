"""The vitastor backend against a real cluster and Vitastor's build of QSD. The device is made by fuse."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from storaged.backends.vitastor import filename
from storaged.errors import ErrorCode
from tests.backends.servers import Load
from tests.backends.vitastor.cluster import ETCD, OSDS, QEMU_IMG, QSD, Cluster, environment
from tests.harness import (
    Daemon,
    as_json,
    error_of,
    eventually,
    image_command,
    leftovers,
    mounted,
    reads,
    refuses,
    run,
    size_of,
    with_config,
    writes,
)

MIB = 1 << 20
PATTERN = bytes(range(256)) * 256
pytestmark = pytest.mark.timeout(200)
#: These stop and kill servers.
accident = pytest.mark.skipif(bool(environment(ETCD)), reason=f"the cluster of {ETCD} is not ours to break")


def fuse(daemon: Daemon, name: str, source: object, **wishes: Any) -> str:
    return daemon.device(name, source, transport="fuse", **wishes)


def test_a_filesystem_is_in_the_image_when_it_is_read_by_vitastors_own_client(
    cluster: Cluster, daemon: Daemon, place: Path
) -> None:
    image = cluster.image()
    device = fuse(daemon, "a", cluster.source(image))
    run("mkfs.ext4", "-q", device)
    with mounted(device, place / "mnt") as directory:
        (directory / "file").write_bytes(PATTERN)
    daemon.detach("a")
    assert daemon.names() == []
    copy = place / "disk.raw"
    copy.write_bytes(cluster.content(image, place))
    with mounted(str(copy), place / "mnt", "-o", "loop,ro") as directory:
        assert (directory / "file").read_bytes() == PATTERN


def test_what_is_written_in_a_random_order_is_all_there(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    image = cluster.image()
    load = Load(fuse(daemon, "a", cluster.source(image)), place, seconds=2)
    load.succeeded()
    daemon.detach("a")
    copy = place / "disk.raw"
    copy.write_bytes(cluster.content(image, place))
    load.is_in(copy)


def test_what_is_smaller_than_a_block_of_vitastor_leaves_its_neighbours_alone(
    cluster: Cluster, daemon: Daemon, place: Path
) -> None:
    image = cluster.image()
    device = fuse(daemon, "a", cluster.source(image))
    writes(device, 0, PATTERN)
    run("fio", "--name=x", f"--filename={device}", "--rw=write", "--bs=512", "--offset=1536", "--size=512",
        "--direct=1", "--buffer_pattern=0x5a")
    daemon.detach("a")
    assert cluster.content(image, place)[:8192] == PATTERN[:1536] + b"\x5a" * 512 + PATTERN[2048:8192]


def test_options_say_what_the_source_leaves_out(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    image = cluster.image()
    file = place / "vitastor.conf"
    file.write_text(json.dumps({"etcd_address": [f"http://{cluster.etcd}/v3"]}))
    writes(fuse(daemon, "a", "vitastor:", options={"image": image, "config-path": str(file)}), 0, PATTERN)
    daemon.detach("a")
    pool, inode = cluster.number_of(image)
    device = fuse(daemon, "a", f"vitastor:pool={pool}:inode={inode}:size=64M", options={"etcd-host": cluster.etcd})
    assert reads(device, 0, len(PATTERN)) == PATTERN
    assert size_of(device) == 64 * MIB


def test_what_qemu_args_prints_opens_it(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    image = cluster.image()
    device = fuse(daemon, "a", cluster.source(image))
    writes(device, 0, PATTERN)
    found = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    daemon.detach("a")
    drive = found["drive"][found["drive"].index("-drive") + 1]
    options = drive.removeprefix("if=none,id=sd-a,")
    assert options != drive
    copy = place / "copy"
    run(environment(QEMU_IMG), "convert", "-O", "raw", "--image-opts", options, copy)
    assert copy.read_bytes()[:len(PATTERN)] == PATTERN


def test_a_layer_without_its_parents_is_for_qemu_img(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    image = cluster.image()
    writes(fuse(daemon, "a", cluster.source(image)), 0, PATTERN)
    daemon.detach("a")
    cluster.cli("snap-create", f"{image}@one")
    writes(fuse(daemon, "a", cluster.source(image)), MIB, PATTERN)
    daemon.detach("a")
    layer = cluster.source(image, ":skip-parents=1")
    refuses(daemon, ErrorCode.UNSUPPORTED, layer, transport="fuse")
    qemu_img = environment(QEMU_IMG)
    base, exported, copy = place / "base", place / "layer.qcow2", place / "layer"
    run(qemu_img, "create", "-f", "raw", base, "64M")
    # The layer is what qemu-img takes for allocated; it reads through to the parents all the same.
    run(qemu_img, "convert", "-f", "raw", "-O", "qcow2", "-o", "cluster_size=4k", "-B", base, "-F", "raw",
        filename(layer), exported)
    run(qemu_img, "convert", "-O", "raw", exported, copy)
    content = copy.read_bytes()
    assert content[:len(PATTERN)] == bytes(len(PATTERN))
    assert content[MIB:MIB + len(PATTERN)] == PATTERN


def test_storaged_image_fills_an_image_and_exports_one_layer(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    (place / "bin").mkdir()
    for name, program in (("qemu-storage-daemon", QSD), ("qemu-img", QEMU_IMG)):
        (place / "bin" / name).symlink_to(environment(program))
    with_config(daemon, f'[qsd.binaries]\nvitastor = "{place}/bin/qemu-storage-daemon"\n')
    image = cluster.image()
    source, local = cluster.source(image), place / "debian.qcow2"
    run("qemu-img", "create", "-q", "-f", "qcow2", local, "64M")
    run("qemu-io", "-f", "qcow2", "-c", "write -q -P 5 0 1M", local)
    image_command(daemon, "convert", local, source)
    image_command(daemon, "compare", local, source)
    cluster.cli("snap-create", f"{image}@0")
    writes(fuse(daemon, "a", source), MIB, PATTERN)
    assert image_command(daemon, "convert", source, place / "x", check=False).stderr.count("[source-in-use]") == 1
    daemon.detach("a")
    base, layer = place / "testimg_0.qcow2", place / "testimg.qcow2"
    image_command(daemon, "convert", cluster.source(f"{image}@0"), base)
    image_command(
        daemon, "convert", cluster.source(image, ":skip_parents=1"), "-B", base, "-o", "cluster_size=4k", layer
    )
    image_command(daemon, "compare", "-o", f"backing=allow:{base}", layer, source)
    image_command(daemon, "rebase", "-u", "-b", "", layer)
    mapped = as_json(image_command(daemon, "map", "--json", layer).stdout)
    assert [(part["start"], part["length"]) for part in mapped if part["data"]] == [(MIB, len(PATTERN))]


# What is refused


def test_an_image_has_one_writer_whatever_its_spelling(cluster: Cluster, daemon: Daemon) -> None:
    image = cluster.image()
    fuse(daemon, "a", cluster.source(image))
    options = {"image": image, "etcd-host": f"http://{cluster.etcd}/v3"}
    refuses(daemon, ErrorCode.SOURCE_IN_USE, "vitastor:", "b", options=options, transport="fuse")
    refuses(
        daemon, ErrorCode.SOURCE_IN_USE, f"vitastor://?etcd_address={cluster.etcd}&image={image}", "b", read_only=True,
        transport="fuse",
    )
    # A snapshot gives the image another inode, and leaves it its name.
    cluster.cli("snap-create", f"{image}@one")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, cluster.source(image), "b", transport="fuse")


def test_a_snapshot_is_read_while_its_image_is_written(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    image = cluster.image()
    device = fuse(daemon, "a", cluster.source(image))
    writes(device, 0, PATTERN)
    cluster.cli("snap-create", f"{image}@one")
    time.sleep(2)  # QSD hears of it from etcd: what it writes until then is in the snapshot
    writes(device, 0, bytes(len(PATTERN)))
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, cluster.source(f"{image}@one"), "b", transport="fuse")
    assert "--read-only" in error.hint
    old = fuse(daemon, "b", cluster.source(f"{image}@one"), read_only=True)
    assert reads(old, 0, len(PATTERN)) == PATTERN
    daemon.detach("b")
    assert reads(device, 0, len(PATTERN)) == bytes(len(PATTERN))
    writable = fuse(daemon, "b", cluster.source(f"{image}@one"), snapshot=True)
    writes(writable, MIB, PATTERN)
    assert reads(writable, 0, len(PATTERN)) == PATTERN
    daemon.detach("b")
    assert cluster.content(f"{image}@one", place)[MIB:MIB + len(PATTERN)] == bytes(len(PATTERN))


def test_a_name_that_the_cluster_does_not_have(cluster: Cluster, daemon: Daemon) -> None:
    error = refuses(daemon, ErrorCode.SOURCE_MISSING, cluster.source("nosuch"), transport="fuse")
    assert "vitastor-cli ls" in error.hint
    refuses(
        daemon, ErrorCode.SOURCE_MISSING, cluster.source(cluster.image()), options={"etcd-prefix": "/elsewhere"},
        transport="fuse",
    )


def test_an_etcd_that_is_not_there_is_named(daemon: Daemon) -> None:
    error = refuses(daemon, ErrorCode.QSD_DIED, r"vitastor:image=x:etcd_host=127.0.0.1\:1", transport="fuse")
    assert "etcd" in error.cause
    refuses(daemon, ErrorCode.QSD_DIED, "vitastor:image=x", options={"config-path": "/nosuch"}, transport="fuse")


def test_another_build_of_qsd_is_told_what_it_lacks(cluster: Cluster, stopped: Daemon) -> None:
    stopped.start()
    error = refuses(stopped, ErrorCode.UNSUPPORTED, cluster.source("x"), transport="fuse")
    assert "[qsd.binaries]" in error.hint


# Accidents


@accident
def test_an_osd_is_killed_under_load_and_the_others_serve_on(
    cluster: Cluster, daemon: Daemon, place: Path
) -> None:
    load = Load(fuse(daemon, "a", cluster.source(image := cluster.image())), place, seconds=4)
    time.sleep(1)
    cluster.kill("osd1")
    try:
        load.succeeded(60)
    finally:
        cluster.repair()
    daemon.detach("a")
    copy = place / "disk.raw"
    copy.write_bytes(cluster.content(image, place))
    load.is_in(copy)


@accident
@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_all_osds_are_away_under_load_and_come_back(
    cluster: Cluster, daemon: Daemon, place: Path, how: str
) -> None:
    osds = [f"osd{number}" for number in OSDS]
    load = Load(fuse(daemon, "a", cluster.source(image := cluster.image())), place, seconds=4)
    time.sleep(1)
    if how == "stopped":
        cluster.signal(signal.SIGSTOP, *osds)
    else:
        cluster.kill(*osds)
    time.sleep(4)
    assert load.runs
    if how == "stopped":
        cluster.signal(signal.SIGCONT, *osds)
    else:
        cluster.repair()
    load.succeeded(90)
    daemon.detach("a")
    copy = place / "disk.raw"
    copy.write_bytes(cluster.content(image, place))
    load.is_in(copy)


@accident
def test_a_detach_by_force_ends_while_the_osds_are_stopped(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    osds = [f"osd{number}" for number in OSDS]
    load = Load(fuse(daemon, "a", cluster.source(cluster.image())), place, seconds=4)
    time.sleep(1)
    cluster.signal(signal.SIGSTOP, *osds)
    try:
        time.sleep(1)
        daemon.detach("a", force=True, timeout=30)
        assert leftovers(daemon.root) == []
    finally:
        cluster.signal(signal.SIGCONT, *osds)
    load.kill()


@accident
def test_etcd_is_away_and_nothing_stops_until_qsd_must_be_replaced(
    cluster: Cluster, daemon: Daemon, place: Path
) -> None:
    image = cluster.image()
    device = fuse(daemon, "a", cluster.source(image))
    cluster.kill("etcd")
    try:
        writes(device, 0, PATTERN)
        error = error_of(lambda: fuse(daemon, "b", cluster.source("x")))
        assert (error.code, "etcd" in error.cause) == (ErrorCode.QSD_DIED, True)
        pid = daemon.kill_qsd("a")
        eventually(lambda: daemon.show("a")["failure"] is not None, "the volume says that it failed")
    finally:
        cluster.repair()
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 60)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_qsd_is_killed_and_its_successor_has_all_that_was_flushed(cluster: Cluster, daemon: Daemon) -> None:
    writes(fuse(daemon, "a", cluster.source(cluster.image())), 0, PATTERN)
    pid = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", pid), "a successor serves it", 40)
    assert reads(str(daemon.show("a")["device"]), 0, len(PATTERN)) == PATTERN


def test_another_daemon_adopts_it(cluster: Cluster, daemon: Daemon, place: Path) -> None:
    source = cluster.source(cluster.image())
    before = daemon.attach("a", source, transport="fuse")
    load = Load(before["device"], place, seconds=2)
    daemon.kill()
    daemon.start()
    assert daemon.attach("a", source, transport="fuse")["qsd_pid"] == before["qsd_pid"]
    load.succeeded()
    daemon.detach("a")
