"""Kernel modules: where they are, what keeps them out, and why modprobe failed. On trees made for the purpose."""

from __future__ import annotations

import gzip
import os
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.host import modules as host
from storaged.model import modules
from storaged.model.modules import Loading, ModuleInfo, ModuleState

RELEASE = "6.12.48+deb13-amd64"
VDUSE = "kernel/drivers/vdpa/vdpa_user/vduse.ko.xz"
NAMES = st.from_regex(r"[a-z][a-z0-9_]{0,8}", fullmatch=True)


class Tree:
    """A host below a directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def write(self, path: str, content: str | bytes) -> Path:
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return file

    def loaded(self, name: str, initstate: str = "live") -> None:
        self.write(f"sys/module/{name}/initstate", f"{initstate}\n")

    def state(self, name: str) -> ModuleInfo:
        return host.state(name, root=str(self.root), release=RELEASE)

    def modprobe(self, script: str) -> str:
        """A modprobe that is this shell script; $SYS is where it can make a module appear."""
        path = self.write("bin/modprobe", f"#!/bin/sh\nSYS={self.root}/sys/module\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def load(self, name: str, script: str = "", *, timeout: float = 10.0, **parameters: str) -> None:
        host.load(
            name, parameters=parameters, timeout=timeout, root=str(self.root), release=RELEASE,
            modprobe=self.modprobe(script),
        )


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """A host with Debian's modules, none of them loaded."""
    tree = Tree(tmp_path)
    directory = f"lib/modules/{RELEASE}"
    tree.write(f"{directory}/modules.builtin", "kernel/fs/fuse/fuse.ko\nkernel/drivers/md/md-mod.ko\n")
    tree.write(
        f"{directory}/modules.dep",
        f"{VDUSE}: kernel/drivers/vdpa/vdpa.ko.xz kernel/drivers/vhost/vhost-iotlb.ko.xz\n"
        "kernel/drivers/vdpa/vdpa.ko.xz:\n"
        "kernel/drivers/block/nbd.ko:\n"
        "kernel/drivers/virtio/virtio-vdpa.ko.zst: kernel/drivers/vdpa/vdpa.ko.xz kernel/x/notkey.ko\n"
        "kernel/drivers/net/xnbd2.ko: kernel/y/fuse2.ko\n",
    )
    return tree


# Where a module is.


@pytest.mark.parametrize(
    ("name", "state"),
    [
        ("fuse", ModuleState.BUILTIN),
        ("md_mod", ModuleState.BUILTIN),
        ("vduse", ModuleState.LOADABLE),
        ("nbd", ModuleState.LOADABLE),
        ("virtio_vdpa", ModuleState.LOADABLE),
        ("virtio-vdpa", ModuleState.LOADABLE),
        ("notkey", ModuleState.ABSENT),
        ("nbd2", ModuleState.ABSENT),
        ("mod", ModuleState.ABSENT),
        ("loop", ModuleState.ABSENT),
    ],
)
def test_the_files_of_the_kernel_tell_where_a_module_is(tree: Tree, name: str, state: ModuleState) -> None:
    assert tree.state(name).state is state


def test_names_are_the_kernels(tree: Tree) -> None:
    assert tree.state("virtio-vdpa").name == "virtio_vdpa"


def test_a_module_that_can_be_loaded_tells_its_file(tree: Tree) -> None:
    info = tree.state("vduse")
    assert info.detail == VDUSE
    assert info.usable
    assert not info.present


def test_loaded_and_built_in_modules_are_told_apart_in_sys(tree: Tree) -> None:
    tree.loaded("vduse")
    (tree.root / "sys/module/loop/parameters").mkdir(parents=True)
    assert tree.state("vduse") == ModuleInfo("vduse", ModuleState.LOADED)
    assert tree.state("loop") == ModuleInfo("loop", ModuleState.BUILTIN)


@pytest.mark.parametrize("initstate", ["coming", "going"])
def test_a_module_that_comes_or_goes_is_not_there(tree: Tree, initstate: str) -> None:
    tree.loaded("nbd", initstate)
    assert tree.state("nbd").state is ModuleState.LOADABLE


def test_modules_may_be_below_usr(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write(f"usr/lib/modules/{RELEASE}/modules.dep", "kernel/drivers/block/nbd.ko.gz:\n")
    assert tree.state("nbd").state is ModuleState.LOADABLE


@pytest.mark.parametrize("place", [f"boot/config-{RELEASE}", f"lib/modules/{RELEASE}/config", "proc/config.gz"])
@pytest.mark.parametrize(
    ("config", "state", "detail", "hint"),
    [
        ("CONFIG_BLK_DEV_LOOP=y\n", ModuleState.BUILTIN, "", ""),
        ("CONFIG_BLK_DEV_LOOP=m\n", ModuleState.ABSENT, "not installed in /lib/modules", f"linux-image-{RELEASE}"),
        ("# CONFIG_BLK_DEV_LOOP is not set\n", ModuleState.ABSENT, "without CONFIG_BLK_DEV_LOOP", "fuse.config"),
    ],
)
def test_where_no_module_is_installed_the_kernels_configuration_tells(
    tmp_path: Path, place: str, config: str, state: ModuleState, detail: str, hint: str
) -> None:
    tree = Tree(tmp_path)
    tree.write(place, gzip.compress(config.encode()) if place.endswith(".gz") else config)
    info = tree.state("loop")
    assert info.state is state
    assert detail in info.detail
    assert hint in info.hint


def test_a_damaged_configuration_is_passed_over(tmp_path: Path) -> None:
    tree = Tree(tmp_path)
    tree.write(f"boot/config-{RELEASE}", "\x1f\x8bnonsense")
    tree.write("proc/config.gz", gzip.compress(b"CONFIG_BLK_DEV_NBD=y\n"))
    assert tree.state("nbd").state is ModuleState.BUILTIN


def test_where_nothing_tells_the_state_is_unknown(tmp_path: Path) -> None:
    info = Tree(tmp_path).state("nbd")
    assert info.state is ModuleState.UNKNOWN
    assert not info.usable
    assert "on the host" in info.hint


def test_looking_is_quick(tree: Tree) -> None:
    line = "kernel/drivers/net/virtio_{0}.ko.xz: kernel/drivers/net/y{0}.ko.xz kernel/net/tls/vdpa-{0}.ko.xz\n"
    listing = "".join(line.format(number) for number in range(8000))
    tree.write(f"lib/modules/{RELEASE}/modules.dep", listing + "kernel/virtio_vdpa.ko:\n")
    best = 1.0
    for _ in range(5):
        start = time.perf_counter()
        assert tree.state("virtio_vdpa").state is ModuleState.LOADABLE
        best = min(best, time.perf_counter() - start)
    assert best < 0.02  # it takes a millisecond; a busy machine may take longer


@given(st.dictionaries(NAMES, st.lists(NAMES, max_size=3), max_size=6), NAMES)
def test_any_listing_is_read(listing: dict[str, list[str]], other: str) -> None:
    text = "".join(
        f"kernel/{name.replace('_', '-')}.ko.xz:{''.join(f' kernel/{one}.ko' for one in needed)}\n"
        for name, needed in listing.items()
    ).encode()
    for name, needed in listing.items():
        assert modules.dependencies(name, text) == (f"kernel/{name.replace('_', '-')}.ko.xz", needed)
    if other not in listing:
        assert modules.dependencies(other, text) is None


# What the administrator keeps out.


@pytest.mark.parametrize(
    "line",
    [
        "blacklist nbd",
        "  blacklist\tnbd  # since last week",
        "install nbd /bin/false",
        "install nbd /usr/bin/true",
        "install n* /bin/false",
        "install nbd \\\n  /bin/false",
        "install nbd exit 1",
    ],
)
def test_who_keeps_a_module_out_is_obeyed_and_named(tree: Tree, line: str) -> None:
    path = tree.write("etc/modprobe.d/local.conf", f"# ours\n\n{line}\n")
    info = tree.state("nbd")
    assert info.state is ModuleState.BLACKLISTED
    assert not info.usable
    assert f"{path} line 3" in info.detail
    assert info.hint


@pytest.mark.parametrize(
    "line",
    [
        "# blacklist nbd", "#blacklist nbd", "blacklist nbd2", "blacklist n*", "options nbd nbds_max=0",
        "install nbd /sbin/modprobe --ignore-install nbd && /bin/true", "alias nbd off", "blacklist", "install nbd",
        "softdep nbd pre: fuse", "remove nbd /bin/false", "blacklist fuse", "# \\\nblacklist nbd",
    ],
)
def test_other_lines_keep_nothing_out(tree: Tree, line: str) -> None:
    tree.write("etc/modprobe.d/local.conf", f"{line}\n")
    assert tree.state("nbd").state is ModuleState.LOADABLE


def test_names_are_compared_as_the_kernel_has_them(tree: Tree) -> None:
    tree.write("etc/modprobe.d/a.conf", "blacklist virtio-vdpa\n")
    assert tree.state("virtio_vdpa").state is ModuleState.BLACKLISTED


@pytest.mark.parametrize("name", ["x", "x.conf.dpkg-old", ".x.conf", "x.txt", "x.conf/y.conf"])
def test_files_that_modprobe_does_not_read_count_for_nothing(tree: Tree, name: str) -> None:
    tree.write(f"etc/modprobe.d/{name}", "blacklist nbd\n")
    assert tree.state("nbd").state is ModuleState.LOADABLE


@pytest.mark.parametrize("directory", ["etc", "run", "usr/local/lib", "usr/lib", "lib"])
def test_all_directories_of_modprobe_are_read(tree: Tree, directory: str) -> None:
    tree.write(f"{directory}/modprobe.d/x.conf", "blacklist nbd\n")
    assert tree.state("nbd").state is ModuleState.BLACKLISTED


def test_a_file_masks_those_of_its_name_in_later_directories(tree: Tree) -> None:
    tree.write("lib/modprobe.d/x.conf", "blacklist nbd\n")
    tree.write("run/modprobe.d/x.conf", "blacklist vduse\n")
    (tree.root / "etc/modprobe.d").mkdir(parents=True)
    assert tree.state("nbd").state is ModuleState.LOADABLE
    assert tree.state("vduse").state is ModuleState.BLACKLISTED
    (tree.root / "etc/modprobe.d/x.conf").symlink_to("/dev/null")
    assert tree.state("vduse").state is ModuleState.LOADABLE


@pytest.mark.parametrize(
    ("line", "state"),
    [
        ("quiet modprobe.blacklist=floppy,nbd ro", ModuleState.BLACKLISTED),
        ('module_blacklist="nbd"', ModuleState.BLACKLISTED),
        ("module-blacklist=nbd", ModuleState.BLACKLISTED),
        ("nbd", ModuleState.LOADABLE),
        ("x.blacklist=nbd modprobe.blacklist=nbd2 modprobe.blacklist", ModuleState.LOADABLE),
    ],
)
def test_the_kernels_command_line_keeps_modules_out(tree: Tree, line: str, state: ModuleState) -> None:
    tree.write("proc/cmdline", f"BOOT_IMAGE=/vmlinuz {line}\n")
    info = tree.state("nbd")
    assert info.state is state
    assert ("command line" in info.detail) == (state is ModuleState.BLACKLISTED)


def test_what_a_module_needs_may_be_kept_out_unless_it_is_there(tree: Tree) -> None:
    tree.write("etc/modprobe.d/x.conf", "install vdpa /bin/false\n")
    info = tree.state("vduse")
    assert info.state is ModuleState.BLACKLISTED
    assert "needs vdpa" in info.detail
    tree.loaded("vdpa")
    assert tree.state("vduse").state is ModuleState.LOADABLE


def test_a_module_that_is_there_is_used_whatever_is_written(tree: Tree) -> None:
    tree.write("etc/modprobe.d/x.conf", "blacklist nbd\nblacklist fuse\n")
    tree.loaded("nbd")
    assert tree.state("nbd").state is ModuleState.LOADED
    assert tree.state("fuse").state is ModuleState.BUILTIN


def test_when_loading_is_switched_off_no_module_can_be_loaded(tree: Tree) -> None:
    tree.write("proc/sys/kernel/modules_disabled", "1\n")
    info = tree.state("nbd")
    assert not info.usable
    assert "modules_disabled" in info.detail
    tree.write("proc/sys/kernel/modules_disabled", "0\n")
    assert tree.state("nbd").usable


@given(st.text(), NAMES)
def test_any_configuration_is_read(text: str, name: str) -> None:
    refusals = [*modules.parse_modprobe_d(text, "x.conf"), *modules.parse_command_line(text)]
    modules.refusal_of(name, refusals)
    assert modules.refusal_of(name, [*modules.parse_modprobe_d(f"{text.rstrip(chr(92))}\nblacklist {name}", "x")])


@given(st.lists(NAMES, min_size=1))
def test_the_command_line_may_name_many(names: list[str]) -> None:
    refusals = list(modules.parse_command_line(f"a=b modprobe.blacklist={','.join(names)} c"))
    assert all(modules.refusal_of(name, refusals) for name in names)


# How choosy the kernel is.


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        ("[none] integrity confidentiality\n", ""), ("none [integrity] confidentiality\n", "integrity"),
        ("none integrity [confidentiality]\n", "confidentiality"), ("", ""),
    ],
)
def test_lockdown(tree: Tree, text: str, mode: str) -> None:
    tree.write("sys/kernel/security/lockdown", text)
    assert host.loading(root=str(tree.root)) == Loading(lockdown=mode)


def test_signatures_and_the_switch(tree: Tree) -> None:
    tree.write("sys/module/module/parameters/sig_enforce", "Y\n")
    tree.write("proc/sys/kernel/modules_disabled", "1\n")
    assert host.loading(root=str(tree.root)) == Loading(signatures=True, disabled=True)


# Loading.

COMES = 'for word; do case $word in -*|*=*) ;; *) mkdir -p $SYS/$word; echo live >$SYS/$word/initstate;; esac; done'


def failure(tree: Tree, name: str, script: str = "exit 99", *, timeout: float = 10.0) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        tree.load(name, script, timeout=timeout)
    assert caught.value.hint
    return caught.value


def test_a_module_is_loaded_with_its_parameters(tree: Tree) -> None:
    tree.load("nbd", f'echo "$@" >{tree.root}/said; {COMES}', nbds_max="0")
    assert (tree.root / "said").read_text() == "-b -- nbd nbds_max=0\n"
    assert tree.state("nbd").state is ModuleState.LOADED


@pytest.mark.parametrize("name", ["fuse", "nbd"])
def test_what_is_there_is_not_loaded_again(tree: Tree, name: str) -> None:
    tree.loaded("nbd")
    tree.load(name, "exit 99")


def test_where_nothing_tells_modprobe_is_asked(tmp_path: Path) -> None:
    Tree(tmp_path).load("nbd", COMES)


def test_what_is_absent_or_kept_out_is_not_tried(tree: Tree) -> None:
    tree.write("etc/modprobe.d/x.conf", "blacklist nbd\n")
    script = f"touch {tree.root}/tried"
    for name, cause in (("nbd", "blacklist nbd"), ("loop", "no such module")):
        error = failure(tree, name, script)
        assert error.code is ErrorCode.TRANSPORT_UNAVAILABLE
        assert cause in error.cause
        assert name in error.message
    assert not (tree.root / "tried").exists()


def test_a_modprobe_that_only_says_that_it_worked_is_found_out(tree: Tree) -> None:
    # It does so for a module that is blacklisted: libkmod's KMOD_PROBE_APPLY_BLACKLIST is no error.
    error = failure(tree, "nbd", "exit 0")
    assert "not in the kernel" in error.cause
    assert "--showconfig" in error.hint


def test_a_host_without_modprobe(tree: Tree) -> None:
    with pytest.raises(StoragedError) as caught:
        host.load("nbd", root=str(tree.root), release=RELEASE, modprobe=str(tree.root / "none"))
    assert "not installed" in caught.value.cause
    assert caught.value.hint == "apt install kmod"


def test_a_modprobe_that_hangs_is_killed_with_all_that_it_started(tree: Tree) -> None:
    script = f"sleep 60 & echo $! >{tree.root}/child; wait"
    start = time.monotonic()
    error = failure(tree, "nbd", script, timeout=0.5)
    assert time.monotonic() - start < 5
    assert error.code is ErrorCode.TIMEOUT
    child = int((tree.root / "child").read_text())
    deadline = time.monotonic() + 5
    while os.path.exists(f"/proc/{child}") and not _zombie(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def test_the_environment_does_not_silence_modprobe(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODPROBE_OPTIONS", "-q")
    tree.load("nbd", f'[ -z "$MODPROBE_OPTIONS" ] && [ "$LC_ALL" = C ] || exit 1; {COMES}')


INSERT = "modprobe: ERROR: could not insert 'vduse': "
LOCKED = Loading(lockdown="integrity")


@pytest.mark.parametrize(
    ("said", "loading", "cause", "hint"),
    [
        # kmod's tools/modprobe.c, with strerror(3) in the C locale; busybox where it differs.
        (
            f"modprobe: FATAL: Module vduse not found in directory /lib/modules/{RELEASE}\n",
            Loading(), f"no module vduse for kernel {RELEASE}", "vduse.config",
        ),
        ("modprobe: module vduse not found in modules.dep\n", Loading(), "no module vduse", "vduse.config"),
        (f"{INSERT}Key was rejected by service\n", LOCKED, "lockdown: integrity", "mokutil"),
        (f"{INSERT}Key was rejected by service\n", Loading(signatures=True), "sig_enforce", "mokutil"),
        (f"{INSERT}Required key not available\n", Loading(), "signed", "mokutil"),
        (f"{INSERT}Operation not permitted\n", LOCKED, "lockdown", "mokutil"),
        (f"{INSERT}Operation not permitted\n", Loading(), "does not let this process", "CAP_SYS_MODULE"),
        (f"{INSERT}Operation not permitted\n", Loading(disabled=True), "modules_disabled", "modules-load.d"),
        (f"{INSERT}Exec format error\n", Loading(), "does not fit", "dpkg-reconfigure"),
        (
            f"{INSERT}Unknown symbol in module, or unknown parameter (see dmesg)\n",
            Loading(), "does not fit", "dmesg",
        ),
        (f"{INSERT}Function not implemented\n", Loading(), "CONFIG_MODULES", "vduse.config"),
        (
            "modprobe: ERROR: ../libkmod/libkmod-module.c:1047 command_do() Error running install command"
            f" '/opt/x' for module vduse: retcode 1\n{INSERT}Invalid argument\n",
            Loading(), "/opt/x", "--showconfig",
        ),
        (f"{INSERT}Cannot allocate memory\n", Loading(), "Cannot allocate memory", "dmesg"),
        ("", Loading(), "said nothing", "dmesg"),
    ],
)
def test_what_modprobe_says_is_explained(said: str, loading: Loading, cause: str, hint: str) -> None:
    why, remedy = modules.explain_failure("vduse", said, RELEASE, loading)
    assert cause in why
    assert hint in remedy


def test_a_refusal_by_the_kernel_is_told_with_the_reason(tree: Tree) -> None:
    tree.write("sys/kernel/security/lockdown", "none [integrity] confidentiality\n")
    error = failure(tree, "vduse", f'echo "{INSERT}Key was rejected by service" >&2; exit 1')
    assert error.code is ErrorCode.TRANSPORT_UNAVAILABLE
    assert "Secure Boot" in error.cause
    assert "Key was rejected" in error.cause


@given(st.text())
def test_whatever_modprobe_says_there_is_a_cause_and_a_hint(said: str) -> None:
    cause, hint = modules.explain_failure("nbd", said, RELEASE, Loading())
    assert cause
    assert hint


def test_the_hint_for_a_module_is_the_packages_where_the_kernel_was_built_with_it() -> None:
    hint = modules.how_to_get("nbd", RELEASE, configured="m")
    assert f"linux-image-{RELEASE}" in hint
    assert "reboot" in hint
    assert "storaged-vduse-dkms" in modules.how_to_get("vduse", "6.1.0-30-amd64", configured="n")
