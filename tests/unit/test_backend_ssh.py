"""SSH sources: one file has one location, and the host key is checked unless somebody says that it is not."""

from __future__ import annotations

import base64
import hashlib
from typing import Any
from urllib.parse import quote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import Requirements
from storaged.backends.ssh import BACKEND
from storaged.errors import ErrorCode, StoragedError
from storaged.qsd.refusals import explain

DIGEST = hashlib.sha256(b"a host key").digest()
BASE64 = base64.b64encode(DIGEST).decode().rstrip("=")
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=40)
#: Names in a path.
PARTS = st.lists(
    TEXT.map(lambda text: text.replace("/", "")).filter(lambda text: text not in ("", ".", "..") and text[0] != "~"),
    min_size=1, max_size=4,
)
USERS = st.text(st.characters(categories=["L", "N", "P", "S"]), min_size=1, max_size=20)


def node(source: str, **options: str) -> dict[str, Any]:
    said = {key.replace("_", "-"): value for key, value in options.items()}
    BACKEND.check_options(said)
    return BACKEND.node(BACKEND.parse(source, said), read_only=False, options=said)


def refused(source: str, **options: str) -> StoragedError:
    with pytest.raises(StoragedError) as caught:
        BACKEND.parse(source, options)
    assert caught.value.hint
    assert str(caught.value).encode()
    return caught.value


@pytest.mark.parametrize(
    ("source", "user", "host", "port", "path"),
    [
        ("ssh://host/a", "root", "host", "22", "/a"),
        ("ssh://bob@HOST.Example:022/A", "bob", "host.example", "22", "/A"),
        ("ssh://bob%40corp@192.0.2.1:2222/a/b", "bob@corp", "192.0.2.1", "2222", "/a/b"),
        ("ssh://[2001:DB8::0:1]:3/a", "root", "2001:db8::1", "3", "/a"),
        ("ssh://[fe80::1%25eth0]/a", "root", "fe80::1%eth0", "22", "/a"),
        ("ssh://host//a/./b///c", "root", "host", "22", "/a/b/c"),
        ("ssh://host/%2Fa%2F%2Fb", "root", "host", "22", "/a/b"),
        ("ssh://host/%C3%A4%20%3F%23%25:@~", "root", "host", "22", "/ä ?#%:@~"),
        ("ssh://host:22/a@b", "root", "host", "22", "/a@b"),
        ("ssh://[::1]/a@b", "root", "::1", "22", "/a@b"),
    ],
)
def test_a_spelling_is_a_file_of_a_server(source: str, user: str, host: str, port: str, path: str) -> None:
    assert find_backend(source) is BACKENDS["ssh"]
    found = node(source)
    assert (found["user"], found["path"]) == (user, path)
    assert found["server"] == {"host": host, "port": port, "keep-alive": True}


@pytest.mark.parametrize(
    "source",
    [
        "ssh:", "ssh:host:/a", "ssh:/a", "ssh:///a", "ssh://", "ssh://host", "ssh://host/", "ssh://host//", "ssh://host/.",
        "ssh://host/a/", "ssh://host/a/.", "ssh://host/a/../b", "ssh://host/..", "ssh://host/%2E%2E/b", "ssh://host/~/a",
        "ssh://host/~bob/a", "ssh://@host/a", "ssh://host:/a", "ssh://host:0/a", "ssh://host:65536/a", "ssh://host:ssh/a",
        "ssh://ho st/a", "ssh://127.1/a", "ssh://::1/a", "ssh://host/a?host_key_check=no", "ssh://host/a#b",
        "ssh://host/a%00", "ssh://host/%ff", "ssh://host/%4", "ssh://host/\udcff", "ssh://a%0Ab@host/a", "ssh://a\nb@host/a",
    ],
)
def test_what_is_no_file_of_a_server_is_refused(source: str) -> None:
    assert refused(source).code is ErrorCode.INVALID_SOURCE


@pytest.mark.parametrize(
    "source",
    ["ssh://bob:s3cret@host/a", "ssh://bob:s3cret@host:1/a", "ssh://bob:s3cret/x@host/a", "ssh:bob:s3cret@host"],
)
def test_a_password_is_refused_and_not_said_again(source: str) -> None:
    error = refused(source)
    assert error.code is ErrorCode.INVALID_SOURCE
    assert "s3cret" not in f"{error} {error.cause} {error.hint}"


@given(USERS, PARTS)
def test_every_user_and_path_can_be_said(user: str, parts: list[str]) -> None:
    path = "/" + "/".join(parts)
    location = BACKEND.parse(f"ssh://{quote(user, safe='')}@host{quote(path)}", {})
    assert BACKEND.parse(location, {}) == location
    assert (node(location)["user"], node(location)["path"]) == (user, path)


@given(st.text())
def test_any_text_is_a_source_or_refused(rest: str) -> None:
    try:
        location = BACKEND.parse(f"ssh:{rest}", {})
    except StoragedError:
        assert refused(f"ssh:{rest}").code is ErrorCode.INVALID_SOURCE
    else:
        assert BACKEND.parse(location, {}) == location
        assert location.isascii()
        assert location.isprintable()


def test_the_user_is_said_by_the_source_or_by_the_option_and_never_twice_differently() -> None:
    assert BACKEND.parse("ssh://host/a", {"user": "bob"}) == BACKEND.parse("ssh://bob@host/a", {})
    assert BACKEND.parse("ssh://bob@host/a", {"user": "bob"}) == "ssh://bob@host:22/a"
    assert refused("ssh://bob@host/a", user="eve").code is ErrorCode.INVALID_SOURCE
    assert node("ssh://host/a", user="bob")["user"] == "bob"


def test_a_file_is_the_same_whoever_opens_it() -> None:
    found = {
        BACKEND.identity(BACKEND.parse(source, {}), str)
        for source in ("ssh://HOST/a", "ssh://bob@host:22//a", "ssh://eve@host/./a")
    }
    assert found == {"ssh://host:22/a"}
    assert BACKEND.identity("ssh://root@host:23/a", str) not in found


# Keys


@pytest.mark.parametrize(
    "value",
    [
        f"sha256:{DIGEST.hex()}", f"SHA256:{DIGEST.hex().upper()}", f"sha256:{DIGEST.hex(':')}", f"SHA256:{BASE64}",
        f"sha256:{BASE64}=",
    ],
)
def test_a_fingerprint_is_one_however_it_is_written(value: str) -> None:
    assert node("ssh://h/a", host_key=value)["host-key-check"] == {
        "mode": "hash", "type": "sha256", "hash": DIGEST.hex()
    }


def test_the_key_is_looked_for_in_known_hosts_unless_something_else_is_said() -> None:
    assert node("ssh://h/a")["host-key-check"] == {"mode": "known_hosts"}
    assert node("ssh://h/a", host_key="known-hosts")["host-key-check"] == {"mode": "known_hosts"}
    assert node("ssh://h/a", host_key="none")["host-key-check"] == {"mode": "none"}


@pytest.mark.parametrize(
    "options",
    [
        {"host-key": value}
        for value in (
            "", "no", "yes", "known_hosts", "NONE", "sha256", "sha256:", "sha256:ab", f"sha256:{DIGEST.hex()}0",
            f"sha256:{BASE64[:-1]}", f"sha256:{BASE64}==", f"md5:{'0' * 32}", f"sha1:{'0' * 40}", DIGEST.hex(),
            f"sha256: {DIGEST.hex()}",
        )
    ] + [
        {"agent": "agent.sock"}, {"agent": ""}, {"agent": f"/{'x' * 107}"}, {"agent": "/a", "ssh-key": "/k"},
        {"user": ""}, {"user": "a\nb"},
    ],
    ids=str,
)
def test_options_that_say_nothing_useful_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        BACKEND.check_options(options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint


def test_the_private_key_is_the_agents_and_in_no_node() -> None:
    location = BACKEND.parse("ssh://h/a", {})
    assert BACKEND.requirements(location, {}) == Requirements()
    assert BACKEND.requirements(location, {"ssh-key": "/k"}) == Requirements(agent_key="ssh-key")
    assert BACKEND.requirements(location, {"agent": "/s"}) == Requirements(environment={"SSH_AUTH_SOCK": "/s"})
    assert node("ssh://h/a", ssh_key="/k") == node("ssh://h/a", agent="/s") == node("ssh://h/a")
    assert BACKEND.secret_options == ("ssh-key",)


def test_its_connection_does_not_come_back_by_itself() -> None:
    assert not BACKEND.recovers
    assert BACKENDS["nbd"].recovers  # type: ignore[attr-defined]  # of the network, it has it


# What QEMU says (measured with QSD 7.2.22 and libssh 0.10.6)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("remote host ssh-ed25519 key fingerprint 'sha256:35' does not match host_key_check 'sha256:00'",
         ErrorCode.SOURCE_CHANGED),
        ("host key (ssh-ed25519 key with fingerprint SHA256:NQ) does not match the one in known_hosts; this may be a "
         "possible attack", ErrorCode.SOURCE_CHANGED),
        ("no host key was found in known_hosts", ErrorCode.OPEN_FAILED),
        ("failed to authenticate using publickey authentication and the identities held by your ssh-agent",
         ErrorCode.OPEN_FAILED),
        ("failed to establish SSH session: Timeout connecting to 127.0.0.1 (libssh error code: 2)",
         ErrorCode.OPEN_FAILED),
        ("failed to open remote file '/x': SFTP server: No such file (libssh error code: 1, sftp error code: 2)",
         ErrorCode.SOURCE_MISSING),
        ("failed to open remote file '/x': SFTP server: Permission denied (libssh error code: 1, sftp error code: 3)",
         ErrorCode.OPEN_FAILED),
        ("failed to open remote file '/tmp': SFTP server: Failure (libssh error code: 1, sftp error code: 4)",
         ErrorCode.OPEN_FAILED),
    ],
)
def test_what_qemu_says_is_explained(text: str, code: ErrorCode) -> None:
    error = explain("blockdev-add", text)
    assert error.code is code
    assert error.cause == text
    assert error.hint
    assert "QEMU" not in error.hint, "explained by nothing but the words of QEMU"


def test_it_may_read_roots_own_keys_where_no_other_key_is_said() -> None:
    location = BACKEND.parse("ssh://h/x", {})
    assert BACKEND.powers(location, {}).reads == ("/root/.ssh",)
    for option in ("ssh-key", "agent"):
        assert "/root/.ssh" not in BACKEND.powers(location, {option: "/x"}).reads
