"""A json: tree of block nodes is read into the source that it names, or refused; and never says a secret again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import NetworkBackend
from storaged.backends.jsondrivers import DRIVERS
from storaged.backends.jsontree import Tree, read_tree
from storaged.cli.paths import absolute_source
from storaged.errors import ErrorCode, StoragedError
from storaged.model.formats import Format
from storaged.model.spec import VolumeSpec
from storaged.model.treespec import spelled_out

NAMES = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_categories=("C", "Z")), min_size=1)
PLAIN = st.text("abcXYZ019-_", min_size=1, max_size=12).filter(lambda text: text[0] not in "-_")
HOSTS = st.one_of(
    st.from_regex(r"[a-z][a-z0-9]{0,8}(\.[a-z]{1,5})?", fullmatch=True), st.just("192.0.2.1"),
    st.just("[2001:db8::1]"), st.just("[fe80::1%25eth0]"),
)
PORTS = st.integers(1, 65535).map(str)
PATHS = st.lists(NAMES.map(lambda name: name.replace("/", "+")), min_size=1, max_size=3).map(
    lambda names: "/" + "/".join(f"x{name}" for name in names)
)
CACHES = st.sampled_from(["none", "writeback", "unsafe"])


def quoted(text: str) -> str:
    """As URIs have it."""
    from urllib.parse import quote

    return quote(text)


def in_rbd(text: str) -> str:
    """As QEMU's rbd: and vitastor: have it."""
    return "".join(f"\\{char}" if char in r"\:@=/" else char for char in text)


def maybe(options: Mapping[str, st.SearchStrategy[str]]) -> st.SearchStrategy[dict[str, str]]:
    """Some of the options, and always a cache mode."""
    return st.fixed_dictionaries({"cache": CACHES}, optional=dict(options))


def numbers(least: int, most: int) -> st.SearchStrategy[str]:
    """As options have them."""
    return st.integers(least, most).map(str)


#: Of each backend: sources, options that a node tells, and options that stay beside the tree.
SOURCES: dict[str, st.SearchStrategy[str]] = {
    "file": PATHS.map(lambda path: path),
    "host_device": PATHS.map(lambda path: f"host_device:{path}"),
    "nbd": st.one_of(
        st.tuples(HOSTS, PORTS, NAMES).map(lambda t: f"nbd://{t[0]}:{t[1]}/{quoted(t[2])}"),
        st.tuples(NAMES, st.just("/run/a b,c.sock")).map(lambda t: f"nbd+unix:///{quoted(t[0])}?socket={quoted(t[1])}"),
    ),
    "iscsi": st.tuples(st.sampled_from(["iscsi", "iser"]), HOSTS, PORTS, PLAIN, numbers(0, 255)).map(
        lambda t: f"{t[0]}://{t[1]}:{t[2]}/iqn.2026-01.test:{t[3].replace('_', '-')}/{t[4]}"
    ),
    "nfs": st.tuples(HOSTS, PATHS).map(lambda t: f"nfs://{t[0]}{quoted(t[1])}"),
    "ssh": st.tuples(NAMES, HOSTS, PORTS, PATHS).map(lambda t: f"ssh://{quoted(t[0]).replace('/', '%2F')}@{t[1]}:{t[2]}"
                                                      f"{quoted(t[3])}"),
    "rbd": st.tuples(NAMES, NAMES, st.booleans(), st.booleans(), NAMES, HOSTS, PORTS).map(
        lambda t: f"rbd:{in_rbd(t[0])}/" + (f"{in_rbd(t[1])}/" if t[2] else "") + in_rbd(t[4])
        + (f"@{in_rbd(t[1])}" if t[3] else "")
        + (f":id={in_rbd(t[0])}:mon_host={in_rbd(t[5].replace('%25', '%'))}\\:{t[6]}" if t[2] else "")
    ).filter(lambda source: "client." not in source and "fe80" not in source),
    "gluster": st.tuples(HOSTS, PORTS, PLAIN, PATHS).map(lambda t: f"gluster://{t[0]}:{t[1]}/{t[2]}{quoted(t[3])}"),
    "vitastor": st.one_of(
        NAMES.map(lambda name: f"vitastor:image={in_rbd(name.replace('@', '+'))}:etcd_host=192.0.2.1\\:2379"),
        st.tuples(numbers(1, 9), numbers(1, 99)).map(lambda t: f"vitastor:pool={t[0]}:inode={t[1]}:size=4M"),
    ),
    **{
        scheme: st.tuples(HOSTS, PORTS, PATHS, st.booleans()).map(
            lambda t, scheme=scheme: f"{scheme}://{'us%20er@' if t[3] else ''}{t[0]}:{t[1]}{quoted(t[2])}"  # type: ignore[misc]  # mypy knows no defaults of lambdas
        ) for scheme in ("http", "https", "ftp", "ftps")
    },
}
CURL = {"request-timeout": numbers(1, 100), "read-ahead": st.integers(0, 9).map(lambda count: str(count * 512))}
OPTIONS: dict[str, Mapping[str, st.SearchStrategy[str]]] = {
    "file": {"aio": st.sampled_from(["threads", "io_uring"])},
    "nbd": {"reconnect-delay": numbers(0, 99), "open-timeout": numbers(1, 60)},
    "iscsi": {"initiator-name": st.just("iqn.2026-01.test:me"), "header-digest": st.sampled_from(["crc32c", "none"]),
              "request-timeout": numbers(0, 99)},
    "nfs": {"uid": numbers(0, 99), "gid": numbers(0, 99), "tcp-syn-count": numbers(3, 9), "debug": numbers(0, 2)},
    "ssh": {"host-key": st.sampled_from(["none", "known-hosts", "SHA256:" + "0f" * 32])},
    "gluster": {"servers": st.just("other:1,192.0.2.9")},
    "http": CURL, "ftp": CURL,
    "https": {**CURL, "tls-verify": st.sampled_from(["on", "off"])}, "ftps": {**CURL, "tls-verify": st.just("off")},
}


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """The leaves of a tree by their dotted paths."""
    if isinstance(value, list):
        value = {str(number): entry for number, entry in enumerate(value)}
    if not isinstance(value, dict):
        return {path: value}
    return {
        key: leaf for name, entry in value.items() for key, leaf in flat(entry, f"{path}.{name}".lstrip(".")).items()
    }


def as_text(value: Any) -> Any:
    """Each leaf as text, as QEMU takes it, too."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(value)


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_node_of_a_backend_is_read_back_to_the_same_disk(name: str, data: st.DataObject) -> None:
    backend = BACKENDS[name]
    source = data.draw(SOURCES[name])
    options = data.draw(maybe(OPTIONS.get(name, {})))
    location = backend.parse(source, options)
    node = backend.node(location, read_only=True, options=options)
    tree: dict[str, Any] = node
    format = data.draw(st.sampled_from([None, "raw", "qcow2"]))
    if format is not None:
        tree = {"driver": format, "read-only": True, "node-name": "top", "file": node}
    if data.draw(st.booleans(), "flat"):
        tree = flat(tree)
        if data.draw(st.booleans(), "text"):
            tree = {key: as_text(value) for key, value in tree.items()}
    read = read_tree("json:" + json.dumps(tree), {})
    assert find_backend(read.source) is backend
    assert read.format == format
    assert read.read_only is True
    found = backend.parse(read.source, read.options)
    assert found == location
    assert backend.node(found, read_only=True, options=read.options) == node
    if isinstance(backend, NetworkBackend):
        assert backend.identity(found, str) == backend.identity(location, str)


def test_every_driver_that_qemu_has_for_a_backend_is_read() -> None:
    assert DRIVERS.keys() | {"tftp"} == BACKENDS.keys()
    assert DRIVERS.keys() == SOURCES.keys()


def tree_of(text: object, **options: str) -> Tree:
    """Read one; ``_`` in the name of an option is a dash."""
    said = {key.replace("_", "-"): value for key, value in options.items()}
    return read_tree(text if isinstance(text, str) else "json:" + json.dumps(text), said)


def refusal(text: object, **options: str) -> StoragedError:
    """Why it is refused."""
    with pytest.raises(StoragedError) as caught:
        tree_of(text, **options)
    assert caught.value.hint
    return caught.value


FILE = {"driver": "file", "filename": "/a"}


@pytest.mark.parametrize("tree", [
    {"driver": "qcow2", "file": {"filename": "/a"}},
    {"driver": "qcow2", "file.filename": "/a"},
    {"driver": "qcow2", "file.driver": "file", "file": {"filename": "/a"}},
    {"file": FILE, "driver": "qcow2", "backing": None, "node-name": "x"},
], ids=str)
def test_a_local_image_in_each_way_that_qemu_takes(tree: object) -> None:
    assert tree_of(tree) == Tree("/a", Format.QCOW2)


@pytest.mark.parametrize(("tree", "source"), [
    ({"driver": "nbd", "host": "Server", "port": 1, "export": "x"}, "nbd://Server:1/x"),
    ({"driver": "nbd", "host": "server"}, "nbd://server:10809/"),
    ({"driver": "nbd", "path": "/s"}, "nbd+unix:///?socket=/s"),
    ({"driver": "ssh", "host": "h", "path": "/a"}, "ssh://h:22/a"),
    ({"driver": "gluster", "volume": "v", "path": "a", "server.0": {"type": "tcp", "host": "h", "port": "1"}},
     "gluster://h:1/v/a"),
], ids=str)
def test_members_of_older_qemus(tree: object, source: str) -> None:
    assert tree_of(tree).source == source


def test_a_tree_without_a_format_leaves_it_to_the_option() -> None:
    assert tree_of({"driver": "nbd", "host": "h"}).format is None
    spec = VolumeSpec(name="a", source='json:{"driver":"nbd","host":"h"}', format=Format.QCOW2)
    assert spelled_out(spec, Format.QCOW2).format is Format.QCOW2


@pytest.mark.parametrize("text", [
    "json:", "json:{", "json:{'driver':'file'}", "json:[]", "json:1", "json:null", 'json:"x"', "json:{}",
    'json:{"driver":"file","driver":"raw"}', 'json:{"driver":1}', 'json:{"driver":"raw"}', "json:" + "[" * 100_000,
    'json:{"driver":"raw","file":{"driver":"file"}}', 'json:{"driver":"file","filename":"relative"}',
    'json:{"driver":"file","filename":NaN}', 'json:{"driver":"raw","file":' + '{"a":' * 20 + "1" + "}" * 21,
    'json:{"driver":"raw",".file":1}', 'json:{"driver":"raw","file..driver":"file"}', 'json:{"filename":"/a"}',
    'json:{"driver":"raw","file":{"driver":"file","filename":"/a"},"file.filename":"/b"}',
    'json:{"driver":"raw","driver.x":"y"}', "json:1" + "0" * 5000,
    'json:{"driver":"iscsi","portal":"h","target":"iqn.2026-01.test:t"}', 'json:{"driver":"http","url":"ftp://h/a"}',
    'json:{"driver":"nbd","server":{"type":"inet","host":"h","port":-1}}',
    'json:{"driver":"nbd","server":{"type":"inet","host":"h/x","port":"1"}}',
    'json:{"driver":"file","filename":"/a","read-only":"perhaps"}',
    'json:{"driver":"nbd","host":"h","export":"\\ud800"}', 'json:{"driver":"file","filename":"/a\\u0000"}',
], ids=lambda text: text[:60])
def test_what_is_no_tree_of_a_disk_is_refused(text: str) -> None:
    assert refusal(text).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(("tree", "said"), [
    ({"driver": "throttle", "throttle-group": "g", "file": FILE}, "throttle"),
    ({"driver": "raw", "file": {"driver": "copy-on-read", "file": FILE}}, "copy-on-read"),
    ({"driver": "quorum", "children": [FILE], "vote-threshold": 1}, "quorum"),
    ({"driver": "vvfat", "dir": "/etc"}, "vvfat"),
    ({"driver": "nosuch"}, "nosuch"),
    ({"driver": "sheepdog", "vdi": "x"}, "sheepdog"),
    ({"driver": "qcow2", "file": {"driver": "raw", "file": FILE}}, "raw"),
    ({"driver": "raw", "offset": 512, "file": FILE}, "offset"),
    ({"driver": "raw", "file": "node7"}, "file"),
    ({"driver": "qcow2", "file": FILE, "backing": {"driver": "raw", "file": FILE}}, "backing"),
    ({"driver": "qcow2", "file": FILE, "backing": "node7"}, "backing"),
    ({"driver": "qcow2", "file": FILE, "data-file": FILE}, "data-file"),
    ({"driver": "qcow2", "file": FILE, "lazy-refcounts": True}, "lazy-refcounts"),
    ({"driver": "file", "filename": "/a", "locking": "off"}, "locking"),
    ({"driver": "file", "filename": "/a", "force-share": True}, "force-share"),
    ({"driver": "file", "filename": "/a", "auto-read-only": True}, "auto-read-only"),
    ({"driver": "file", "filename": "/a", "cache": {"direct": True, "no-flush": True}}, "cache"),
    ({"driver": "raw", "file": {**FILE, "cache.direct": True}, "cache.direct": False}, "cache.direct"),
    ({"driver": "raw", "file": {**FILE, "read-only": True}, "read-only": False}, "read-only"),
    ({"driver": "raw", "file": {**FILE, "discard": "ignore"}, "discard": "unmap"}, "discard"),
    ({"driver": "nbd", "server": {"type": "vsock", "cid": "1", "port": "1"}}, "type"),
    ({"driver": "rbd", "pool": "p", "image": "i", "=keyvalue-pairs": "x"}, "keyvalue-pairs"),
], ids=str)
def test_what_a_volume_cannot_be_is_refused_by_name(tree: object, said: str) -> None:
    error = refusal(tree)
    assert error.code is ErrorCode.UNSUPPORTED
    assert said in f"{error.message} {error.cause}"


SECRET = "hunter2-of-the-tree"


@pytest.mark.parametrize(("tree", "option"), [
    ({"driver": "rbd", "pool": "p", "image": "i", "key-secret": SECRET}, "cephx-key-file"),
    ({"driver": "rbd", "pool": "p", "image": "i", "encrypt": {"format": "luks", "key-secret": SECRET}}, "rbd-key-file"),
    ({"driver": "iscsi", "portal": "h", "target": "iqn.x", "lun": 1, "password": SECRET}, "password-file"),
    ({"driver": "iscsi", "portal": "h", "target": "iqn.x", "lun": 1, "password-secret": SECRET}, "password-file"),
    ({"driver": "https", "url": "https://h/a", "password-secret": SECRET}, "password-file"),
    ({"driver": "https", "url": "https://h/a", "cookie": SECRET}, "cookie-file"),
    ({"driver": "https", "url": "https://h/a", "proxy-password-secret": SECRET}, "proxy-password-file"),
    ({"driver": "https", "url": f"https://u:{SECRET}@h/a"}, "password-file"),
    ({"driver": "https", "url": f"https://u:{SECRET}@h/a", "cache.direct": True}, "password-file"),
    ({"driver": "nbd", "host": "h", "tls-creds": SECRET}, "tls-psk-file"),
    ({"driver": "ssh", "host": "h", "path": "/a", "password": SECRET}, "ssh-key"),
    ({"driver": "luks", "file": FILE, "key-secret": SECRET}, "key-file"),
    ({"driver": "qcow2", "file": FILE, "encrypt.format": "luks", "encrypt.key-secret": SECRET}, "key-file"),
    ({"driver": "raw", "file": {**FILE, "password": SECRET}}, "-file"),
    ({"driver": "nfs", "server.host": "h", "path": "/a", "secret": {"a": SECRET}}, "-file"),
    ({"driver": "file", "filename": "/a", SECRET: SECRET}, ""),
    ({"driver": SECRET * 3}, ""),
    ({"driver": "nbd", "host": f"u:{SECRET}@h", "port": "1"}, ""),
    ({"driver": "file", "filename": SECRET}, ""),
    ({"driver": "file", "filename": "/a", "discard": SECRET}, ""),
    ({"driver": "iscsi", "portal": f"u%{SECRET}@h", "target": "iqn.x", "lun": 1}, ""),
    (f'json:{{"driver":"iscsi","password":"{SECRET}"', ""),
], ids=str)
def test_a_secret_is_refused_with_the_option_for_it_and_never_said_again(tree: object, option: str) -> None:
    error = refusal(tree)
    assert option in error.hint
    if not (isinstance(tree, dict) and SECRET in tree):  # the name of a member is said
        assert SECRET not in f"{error} {error.hint} {error.cause}"


@pytest.mark.parametrize(("tree", "options"), [
    ({"driver": "nbd", "host": "h", "reconnect-delay": 9}, {"reconnect-delay": "8"}),
    ({"driver": "nbd", "host": "h", "discard": "ignore"}, {"discard": "unmap"}),
    ({"driver": "nbd", "host": "h", "cache.direct": True}, {"cache": "writeback"}),
    ({"driver": "nbd", "host": "h", "cache.direct": False}, {"cache": "directsync"}),
    ({"driver": "qcow2", "file": FILE, "backing": None}, {"backing": "allow:/srv"}),
], ids=str)
def test_tree_and_options_must_not_contradict(tree: object, options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        read_tree("json:" + json.dumps(tree), options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "contradict" in caught.value.message


def test_what_both_say_alike_is_no_contradiction() -> None:
    tree = {"driver": "nbd", "host": "h", "reconnect-delay": 9, "cache.direct": False}
    said = {"reconnect-delay": "9", "cache": "writethrough"}
    assert {**tree_of(tree, **said).options, **said} == said


@pytest.mark.parametrize(("direct", "no_flush", "mode"), [(True, False, "none"), (False, True, "unsafe")])
def test_the_flags_of_the_cache_are_a_cache_mode(direct: bool, no_flush: bool, mode: str) -> None:
    tree = {"driver": "raw", "file": FILE, "cache": {"direct": direct, "no-flush": no_flush}}
    assert tree_of(tree).options == {"cache": mode}


def test_flags_without_a_cache_that_flushes_mean_to_rbd_what_its_backend_says() -> None:
    tree = {"driver": "rbd", "pool": "p", "image": "i"}
    assert tree_of({**tree, "cache.direct": False}).options == {"cache": "writeback"}
    assert refusal({**tree, "cache": {"direct": False, "no-flush": True}}).code is ErrorCode.UNSUPPORTED


def test_tls_of_nbd_is_said_beside_the_tree() -> None:
    tree = {"driver": "nbd", "host": "h", "tls-hostname": "n"}
    assert tree_of(tree, tls_certificates="/pki").source == "nbds://h:10809/"


def spec(tree: object, **wishes: Any) -> VolumeSpec:
    """A volume of a tree."""
    return VolumeSpec(name="a", source="json:" + json.dumps(tree), **wishes)


def test_a_volume_is_stored_with_the_source_that_its_tree_names() -> None:
    tree = {"driver": "qcow2", "read-only": True, "file": {"driver": "nbd", "host": "h", "reconnect-delay": 9}}
    assert spelled_out(spec(tree, options={"open-timeout": "9"}), None) == VolumeSpec(
        name="a", source="nbd://h:10809/", format=Format.QCOW2, read_only=True,
        options={"open-timeout": "9", "reconnect-delay": "9"},
    )
    assert not spelled_out(spec(tree, snapshot=True), None).read_only


def test_another_format_or_read_only_beside_the_tree_is_refused() -> None:
    tree = {"driver": "qcow2", "read-only": False, "file": FILE}
    assert spelled_out(spec(tree), Format.QCOW2).format is Format.QCOW2
    for wanted, said in ((spec(tree), Format.RAW), (spec(tree, read_only=True), None)):
        with pytest.raises(StoragedError) as caught:
            spelled_out(wanted, said)
        assert caught.value.code is ErrorCode.INVALID_ARGUMENT
        assert caught.value.volume == "a"


def test_the_command_line_makes_names_of_files_absolute() -> None:
    found = absolute_source('json:{"driver":"qcow2","file.filename":"a b","file.driver":"file"}', cwd="/srv")
    assert json.loads(found.removeprefix("json:"))["file.filename"] == "/srv/a b"
    for text in ("json:{", 'json:{"a":1,"a":2}', 'json:{"driver": "nbd", "host": "filename"}'):
        assert absolute_source(text, cwd="/srv") == text


LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**25), st.floats(), st.just(SECRET), st.just(f"/{SECRET}"), st.just(""),
    st.sampled_from([*DRIVERS, "raw", "qcow2", "luks", "inet", "unix", "on", "\0", "\ud800", "[", "%"]),
)
#: Members of nodes and of what is in them, in no order and with no sense.
MEMBERS = (
    "filename", "export", "url", "username", "pool", "namespace", "image", "snapshot", "portal", "target", "lun",
    "user", "volume", "path", "host", "port", "read-only", "cache.direct", "cache", "timeout", "readahead", "discard",
    "conf", "inode",
    "size", "etcd-host", "aio", "server", "server.host", "server.port", "server.type", "server.path", "server.0.host",
    "server.0.type", "server.0.port", "host-key-check.mode", "host-key-check.hash", "encrypt.format", "x",
    "reconnect-delay", "initiator-name", "transport", "sslverify", "password-secret",
)


@settings(max_examples=300, deadline=None)
@given(
    st.sampled_from([*DRIVERS, "raw", SECRET]),
    st.lists(st.tuples(st.sampled_from(MEMBERS), LEAVES), max_size=8, unique_by=lambda pair: pair[0]), st.booleans(),
)
def test_whatever_is_in_a_tree_is_read_or_refused(driver: str, members: list[tuple[str, object]], below: bool) -> None:
    node = {"driver": driver, **dict(members)}
    try:
        read = read_tree("json:" + json.dumps({"driver": "qcow2", "file": node} if below else node), {})
        find_backend(read.source).parse(read.source, read.options)
    except StoragedError as failure:
        found = failure
    else:
        return
    assert found.code in (ErrorCode.INVALID_SOURCE, ErrorCode.INVALID_ARGUMENT, ErrorCode.UNSUPPORTED)
    assert found.hint
