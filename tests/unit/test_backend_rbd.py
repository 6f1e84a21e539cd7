"""rbd sources: every spelling means what QEMU reads in it, nothing else gets through, and no key is ever shown."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import Secret
from storaged.backends.rbd import BACKEND, CEPHX_KEY, PASSPHRASE
from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import VolumeSpec
from storaged.qsd.refusals import explain

#: What can be in a name: all that can be printed.
NAMES = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Cf", "Co", "Cn", "Zl", "Zp", "Zs"]) | st.sampled_from(" :@=/\\"),
    min_size=1, max_size=20,
)
KEY = "QVFEbm90YWtleQ=="


def escaped(text: str) -> str:
    """As QEMU's documentation tells: a backslash before what has a meaning."""
    return re.sub(r"[\\:@=/]", r"\\\g<0>", text)


def read_as_qemu_does(filename: str) -> dict[str, str]:
    """qemu_rbd_parse_filename of QEMU 7.2, step by step."""

    def find(text: str, delimiter: str) -> int:
        at = 0
        while at < len(text):
            if text[at] == delimiter:
                return at
            at += 2 if text[at] == "\\" and at + 1 < len(text) else 1
        return -1

    def token(text: str, delimiter: str) -> tuple[str, str | None]:
        at = find(text, delimiter)
        return (text, None) if at < 0 else (text[:at], text[at + 1:])

    def plain(text: str) -> str:
        return re.sub(r"\\(.)", r"\1", text, flags=re.DOTALL)

    found: dict[str, str] = {}
    part, rest = token(filename.removeprefix("rbd:"), "/")
    assert rest is not None
    found["pool"] = plain(part)
    if find(rest, "@") >= 0:
        image, rest = token(rest, "@")
        assert rest is not None
        part, rest = token(rest, ":")
        found["snapshot"] = plain(part)
    else:
        image, rest = token(rest, ":")
    if find(image, "/") >= 0:
        part, after = token(image, "/")
        assert after is not None
        found["namespace"], image = plain(part), after
    found["image"] = plain(image)
    while rest is not None:
        name, rest = token(rest, "=")
        assert rest is not None
        value, rest = token(rest, ":")
        found[{"id": "user"}.get(plain(name), plain(name))] = plain(value)
    return found


def node(source: str, read_only: bool = True, **options: str) -> dict[str, Any]:
    said = {key.replace("_", "-"): value for key, value in options.items()}
    return BACKEND.node(BACKEND.parse(source, said), read_only=read_only, options=said)


def arguments(source: str, **options: str) -> list[str]:
    """What of Ceph's options QSD gets by its environment."""
    said = {key.replace("_", "-"): value for key, value in options.items()}
    needed = BACKEND.requirements(BACKEND.parse(source, said), said)
    return needed.environment["CEPH_ARGS"].split(" ")


def refused(source: str, **options: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, {key.replace("_", "-"): value for key, value in options.items()})
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("rbd:p/i", {"pool": "p", "image": "i"}),
        ("rbd:p/n/i@s", {"pool": "p", "namespace": "n", "image": "i", "snapshot": "s"}),
        (r"rbd:p\/q/i\@j\:k@s\:t", {"pool": "p/q", "image": "i@j:k", "snapshot": "s:t"}),
        ("rbd:p/a=b c ä", {"pool": "p", "image": "a=b c ä"}),
        ("rbd:p/i:id=bob:conf=/c/x.conf", {"pool": "p", "image": "i", "user": "bob", "conf": "/c/x.conf"}),
        (r"rbd:p/i:id=a\:b\@c=d", {"pool": "p", "image": "i", "user": "a:b@c=d"}),
        ("rbd:p/i:id=admin", {"pool": "p", "image": "i"}),
        ("rbd:p/i\\", {"pool": "p", "image": "i\\"}),
        (
            r"rbd:p/i:auth_supported=cephx\;none:mon_host=B.example\:6321\;[2001\:DB8\:\:1]\:3300",
            {
                "pool": "p", "image": "i", "auth-client-required": ["cephx", "none"],
                "server": [{"host": "2001:db8::1", "port": "3300"}, {"host": "b.example", "port": "6321"}],
            },
        ),
    ],
)
def test_a_spelling_is_an_image_and_a_way_to_its_cluster(source: str, expected: dict[str, Any]) -> None:
    assert find_backend(source) is BACKENDS["rbd"]
    found = node(source)
    rest = {"driver": "rbd", "read-only": True, "discard": "unmap", "cache": {"direct": False, "no-flush": False}}
    assert found == {**expected, **rest}


@pytest.mark.parametrize(
    ("text", "servers"),
    [
        ("h:1", ["h:1"]), ("h", ["h:3300", "h:6789"]), ("b:2,a:1", ["a:1", "b:2"]), ("a:1; b:2", ["a:1", "b:2"]),
        ("v1:10.0.0.1", ["10.0.0.1:6789"]), ("v2:10.0.0.1", ["10.0.0.1:3300"]),
        ("[v2:10.0.0.1:3300/0,v1:10.0.0.1:6789/0]", ["10.0.0.1:3300", "10.0.0.1:6789"]),
        ("[v2:[::1]:3300/0,v1:[::1]:6789/0],h:7", ["::1:3300", "::1:6789", "h:7"]),
        ("[v2:10.0.0.1:1,v1:10.0.0.1:2];[v2:10.0.0.2:1,v1:10.0.0.2:2]",
         ["10.0.0.1:1", "10.0.0.1:2", "10.0.0.2:1", "10.0.0.2:2"]),
    ],
)
def test_monitors_are_written_as_ceph_does(text: str, servers: list[str]) -> None:
    found = [f"{server['host']}:{server['port']}" for server in node("rbd:p/i", mon_host=text)["server"]]
    assert found == servers
    assert BACKEND.parse(f"rbd:p/i:mon_host={escaped(text)}", {}) == BACKEND.parse("rbd:p/i", {"mon-host": text})


@pytest.mark.parametrize("text", ["h:0", "h:x", ":1", ",", "u@h", "127.1", "[::1", "v3:1.2.3.4", "[v2:h:1", "h:1/5"])
def test_what_is_no_monitor_is_refused(text: str) -> None:
    assert refused("rbd:p/i", mon_host=text).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(
    "source",
    [
        "rbd:", "rbd:i", "rbd:/i", "rbd:p/", "rbd:p//i", "rbd:p/n/", "rbd:p/a/b/c", "rbd:p/i@", "rbd:p/i@s@t",
        "rbd:p/i@a/b",
        "rbd:p:q/i", "rbd:p@q/i", "rbd:p/i:", "rbd:p/i:id", "rbd:p/i:id=", "rbd:p/i:=x", "rbd:p/i:id=a@b",
        "rbd:p/i:x:id=a",
        "rbd:p/i:id=a:id=b", "rbd:p/i:id=client.bob", "rbd:p/i:conf=ceph.conf", "rbd:p/i:conf=/a b",
        r"rbd:p/i:conf=/a\=b", "rbd:p/i:conf=/a,b", "rbd:p/i:conf=/$cluster", "rbd:p/i:no_such=1",
        "rbd:p/i:fsid=0", "rbd:p/i:name=client.x", "rbd:p/i:rbd_cache=maybe", "rbd:p/i:rbd_cache_size=1M",
        "rbd:p/i:keyring=/a b", "rbd:p/i:keyring=/a --conf", "rbd:p/i:rbd_cache_policy=none",
        "rbd:p/i:auth_supported=basic",
        "rbd:p/i:rbd_cache_size=1:rbd-cache-size=2", "rbd:p/a\nb", "rbd:p/a\0b", "rbd:p/\udcff", "rbd://p/i",
        f"rbd:p/i:key={KEY}", rf"rbd:p/i:\key={KEY}", f"rbd:p/i@s:id=b:KEY={KEY}", f"rbd:key={KEY}",
    ],
)
def test_what_is_no_image_is_refused(source: str) -> None:
    error = refused(source)
    assert error.code is ErrorCode.INVALID_SOURCE
    assert KEY not in f"{error} {error.hint}"


@given(NAMES, NAMES | st.just(""), NAMES, NAMES | st.just(""), NAMES)
@example("p\\", "n\\", "i\\", "s\\", "u\\")
def test_every_name_can_be_said_and_qemu_reads_the_same(
    pool: str, namespace: str, image: str, snapshot: str, user: str
) -> None:
    assume(not user.startswith("client.") and user != "admin")
    source = f"rbd:{'/'.join(escaped(part) for part in (pool, namespace, image) if part)}"
    source += f"@{escaped(snapshot)}" if snapshot else ""
    source += f":id={escaped(user)}"
    location = BACKEND.parse(source, {})
    assert BACKEND.parse(location, {}) == location
    expected = {"pool": pool, "namespace": namespace, "image": image, "snapshot": snapshot, "user": user}
    for spelling in (source, location):
        assert read_as_qemu_does(spelling) == {key: value for key, value in expected.items() if value}
    found = node(location)
    assert {key: found.get(key, "") for key in expected} == expected
    options = {("rbd-snapshot" if key == "snapshot" else key): text for key, text in expected.items() if text}
    assert BACKEND.parse("rbd:", options) == location
    assert BACKEND.parse(location, options) == location


@given(st.lists(st.sampled_from([*"pi/@:=\\ ä", ":id=", ":conf=/", "/i"]), max_size=16).map("".join))
def test_any_text_is_an_image_as_qemu_reads_it_or_refused(rest: str) -> None:
    try:
        location = BACKEND.parse(f"rbd:{rest}", {})
    except StoragedError:
        assert refused(f"rbd:{rest}").code is ErrorCode.INVALID_SOURCE
        return
    assert BACKEND.parse(location, {}) == location
    assert location.isprintable()
    known = {"pool", "namespace", "image", "snapshot", "user", "conf"}
    found = {key: value for key, value in node(location).items() if key in known}
    assert found == read_as_qemu_does(f"rbd:{rest}") == read_as_qemu_does(location)


@pytest.mark.parametrize(
    ("option", "value", "source"),
    [
        ("pool", "q", "rbd:p/i"), ("namespace", "m", "rbd:p/n/i"), ("image", "j", "rbd:p/i"),
        ("user", "b", "rbd:p/i:id=a"),
        ("rbd_snapshot", "t", "rbd:p/i@s"), ("conf", "/b", "rbd:p/i:conf=/a"), ("mon_host", "b", "rbd:p/i:mon_host=a"),
        ("open_timeout", "7", "rbd:p/i:client_mount_timeout=8"), ("pool", "", "rbd:p/i"),
        ("request_timeout", "7", "rbd:p/i:rados_osd_op_timeout=8"),
    ],
)
def test_an_option_that_contradicts_the_source_is_refused(option: str, value: str, source: str) -> None:
    assert refused(source, **{option: value}).code is ErrorCode.INVALID_ARGUMENT


def test_an_image_is_compared_by_its_names_whatever_the_way_to_it() -> None:
    def identity(source: str, **options: str) -> str:
        return BACKEND.identity(BACKEND.parse(source, options), str)

    assert identity(r"rbd:p/\i:id=bob:conf=/a") == identity("rbd:", pool="p", image="i", user="eve") == "rbd:p/i"
    different = ["rbd:p/i", "rbd:p/i@s", "rbd:p/n/i", r"rbd:p/n\/i", r"rbd:p\/n/i", r"rbd:p/i\@s"]
    assert len({identity(source) for source in different}) == len(different)


def test_a_snapshot_is_only_read() -> None:
    assert node("rbd:p/i@s")["read-only"]
    with pytest.raises(StoragedError) as caught:
        node("rbd:p/i@s", read_only=False)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert "--read-only" in caught.value.hint


# Secrets


@pytest.mark.parametrize(
    ("source", "clean"),
    [
        (f"rbd:p/i:key={KEY}", "rbd:p/i"),
        (rf"rbd:p/i@s:id=bob:key={KEY.replace('=', chr(92) + '=')}:conf=/c", "rbd:p/i@s:id=bob:conf=/c"),
        (rf"rbd:p/i:\key={KEY}:rbd_cache=true", "rbd:p/i:rbd_cache=true"),
        (f"rbd:p/i:key=other:key={KEY}", "rbd:p/i"),
        (f"rbd:p:key={KEY}", "rbd:p"),
        (f"rbd:p/i: Key={KEY}", "rbd:p/i"),
    ],
)
def test_a_key_is_taken_out_of_the_source(source: str, clean: str) -> None:
    assert BACKEND.without_secrets(source) == (clean, {"cephx-key-file": KEY})
    assert BACKEND.without_secrets(clean) == (clean, {})


@pytest.mark.parametrize("source", [r"rbd:p/i\:key=x", "rbd:p/key=x", "rbd:p/i:keyring=/a", r"rbd:p/i:id=a\:key=b"])
def test_what_is_no_key_stays(source: str) -> None:
    assert BACKEND.without_secrets(source) == (source, {})


@given(st.text())
def test_no_text_has_a_key_that_is_not_found(rest: str) -> None:
    source, found = BACKEND.without_secrets(f"rbd:{rest}:key={KEY}")
    # After a backslash the colon is a part of what is before it, as for QEMU.
    if (len(rest) - len(rest.rstrip("\\"))) % 2 == 0:
        assert found["cephx-key-file"] == KEY
        assert not source.endswith(KEY)


def test_secrets_are_named_in_the_node_and_asked_for() -> None:
    options = {"cephx-key-file": "/k", "rbd-encrypt": "luks2", "rbd-key-file": "-"}
    location = BACKEND.parse("rbd:p/i", options)
    found = BACKEND.node(location, read_only=False, options=options)
    assert found["key-secret"] == CEPHX_KEY
    assert found["encrypt"] == {"format": "luks2", "key-secret": PASSPHRASE}
    assert BACKEND.requirements(location, options).secrets == (
        Secret(CEPHX_KEY, "cephx-key-file", encoded=True), Secret(PASSPHRASE, "rbd-key-file"),
    )
    assert {"cephx-key-file", "rbd-key-file"} == set(BACKEND.secret_options)
    assert BACKEND.requirements(location, {}).secrets == ()
    assert "key-secret" not in node("rbd:p/i")


# Ceph's options


@pytest.mark.parametrize(
    ("mode", "direct", "no_flush"),
    [
        ("writeback", False, False), ("writethrough", False, False), ("none", True, False), ("directsync", True, False),
        ("unsafe", True, True),
    ],
)
def test_librbd_caches_only_where_flushes_reach_it(mode: str, direct: bool, no_flush: bool) -> None:
    assert node("rbd:p/i", cache=mode)["cache"] == {"direct": direct, "no-flush": no_flush}
    right, wrong = ("false", "true") if direct else ("true", "false")
    assert node(f"rbd:p/i:rbd_cache={right}", cache=mode) == node("rbd:p/i", cache=mode)
    assert refused(f"rbd:p/i:rbd_cache={wrong}", cache=mode).code is ErrorCode.INVALID_ARGUMENT


def test_what_librbd_caches_is_lost_with_qsd() -> None:
    modes = {"writeback": True, "unsafe": True, "none": False, "writethrough": False, "directsync": False}
    for mode, holds in modes.items():
        spec = VolumeSpec(name="a", source="rbd:p/i", options={"cache": mode})
        assert spec.keeps_writes_in_memory is holds


def test_writethrough_is_a_policy_of_librbd() -> None:
    assert "--rbd_cache_policy=writethrough" in arguments("rbd:p/i", cache="writethrough")
    assert not [word for word in arguments("rbd:p/i") if "policy" in word]
    assert "--rbd_cache_policy=writeback" in arguments("rbd:p/i:rbd_cache_policy=writeback")
    assert refused("rbd:p/i:rbd_cache_policy=writeback", cache="writethrough").code is ErrorCode.INVALID_ARGUMENT


def test_times_are_bounded_by_options_or_by_the_source() -> None:
    assert arguments("rbd:p/i") == ["--client_mount_timeout=10", "--rados_osd_op_timeout=0"]
    found = arguments("rbd:p/i", open_timeout="7", request_timeout="30")
    assert found == ["--client_mount_timeout=7", "--rados_osd_op_timeout=30"]
    assert arguments("rbd:p/i:client mount-timeout=007:rados_osd_op_timeout=30") == found
    assert arguments("rbd:p/i:client_mount_timeout=7:rados_osd_op_timeout=30", open_timeout="7") == found
    assert refused("rbd:p/i:client_mount_timeout=61").code is ErrorCode.INVALID_ARGUMENT


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("open-timeout", "0"), ("open-timeout", "61"), ("request-timeout", "-1"), ("request-timeout", "1.5"),
        ("rbd-encrypt", "luks1"), ("rbd-encrypt", "luks2"), ("rbd-key-file", "/k"),
    ],
)
def test_a_bad_option_is_refused(key: str, value: str) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options({key: value})
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "code", "message"),
    [
        ("error reading header from x: No such file or directory", ErrorCode.SOURCE_MISSING, "no such image"),
        ("error opening pool x: No such file or directory", ErrorCode.SOURCE_MISSING, "no such pool"),
        ("namespace 'x' does not exist", ErrorCode.SOURCE_MISSING, "no such namespace"),
        ("error reading conf file /x: No such file or directory", ErrorCode.OPEN_FAILED, "no such configuration"),
        ("error connecting: Permission denied", ErrorCode.OPEN_FAILED, "does not let this user in"),
        ("error connecting: Connection timed out", ErrorCode.OPEN_FAILED, "no monitor"),
        ("error connecting: No such file or directory", ErrorCode.OPEN_FAILED, "no key for the Ceph user"),
        ("error connecting: Invalid argument", ErrorCode.OPEN_FAILED, "cannot use the key"),
        ("encryption load fail: Operation not permitted", ErrorCode.OPEN_FAILED, "passphrase"),
        ("encryption load fail: Invalid argument", ErrorCode.WRONG_FORMAT, "not encrypted this way"),
    ],
)
def test_what_librbd_says_is_explained(text: str, code: ErrorCode, message: str) -> None:
    """The words are those of QSD 7.2 with librbd 16.2."""
    error = explain("blockdev-add", text)
    assert error.code is code
    assert message in error.message
    assert error.hint
