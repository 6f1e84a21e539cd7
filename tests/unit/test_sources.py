"""Which backend a source belongs to, and what the backends of this host make of it."""

from __future__ import annotations

import pytest

from storaged.backends import BACKENDS, find_backend
from storaged.backends.base import NetworkBackend
from storaged.backends.cache import CACHE_FLAGS
from storaged.backends.local import LocalBackend
from storaged.errors import ErrorCode, StoragedError
from storaged.model.spec import CACHE_MODES


@pytest.mark.parametrize(
    ("source", "backend", "path"),
    [
        ("/a", "file", "/a"),
        ("file:/a", "file", "/a"),
        ("host_device:/dev/sda", "host_device", "/dev/sda"),
        ("/with:colon", "file", "/with:colon"),
        ("file:/with:colon", "file", "/with:colon"),
        ("/file:/a", "file", "/file:/a"),
        ("file:/file:/a", "file", "/file:/a"),
        ("/with space,and=comma\n", "file", "/with space,and=comma\n"),
        ("//a/../b", "file", "//a/../b"),
    ],
)
def test_a_source_is_a_backend_and_a_path(source: str, backend: str, path: str) -> None:
    found = find_backend(source)
    assert found.name == backend
    assert found.parse(source, {}) == path


@pytest.mark.parametrize(
    "source", ["", " ", "a", "./a", "a:/b", "nosuch:pool/image", " /a", ":/a", "json:{}", "file", "file =/a"]
)
def test_an_unknown_source_is_refused_with_those_that_are_known(source: str) -> None:
    with pytest.raises(StoragedError) as caught:
        find_backend(source)
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    for backend in BACKENDS.values():
        assert backend.example in caught.value.hint


@pytest.mark.parametrize(
    ("source", "hint"), [
        ("FILE:/a", "file:"), ("NBD://h/x", "nbd:"), ("Nbd+Unix:///x?socket=/s", "nbd+unix:"), ("RBD:rbd/x", "rbd:"),
        ("iSCSI://h/iqn.2026-01.test:t/1", "iscsi:"), ("HTTPS://u:geheim@h/x", "https:"), ("Sheepdog:x", "sheepdog:"),
    ],
)
def test_schemes_are_in_small_letters_as_for_qemu_and_the_refusal_says_so(source: str, hint: str) -> None:
    """"Unknown protocol 'NBD'", says QEMU (bdrv_find_protocol in block.c)."""
    with pytest.raises(StoragedError) as caught:
        find_backend(source)
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    assert caught.value.hint == f"write {hint}"
    assert "geheim" not in f"{caught.value} {caught.value.hint}"


@pytest.mark.parametrize("source", ["nbd://{}/x", "ssh://{}/x", "nfs://{}/x"])
def test_a_dot_at_the_end_of_a_name_is_used_and_makes_no_other_server(source: str) -> None:
    backend = find_backend(source)
    assert isinstance(backend, NetworkBackend)
    plain, dotted = (backend.parse(source.format(host), {}) for host in ("a.example", "A.example."))
    assert backend.identity(plain, str) == backend.identity(dotted, str)
    # It is what the name means to a resolver with a search list.
    assert "a.example." in str(backend.node(dotted, read_only=False, options={}))
    assert "a.example." not in str(backend.node(plain, read_only=False, options={}))


LOCAL = LocalBackend("file")


@pytest.mark.parametrize("cache", CACHE_MODES)
def test_every_cache_mode_has_its_flags(cache: str) -> None:
    node = LOCAL.node("/a", read_only=False, options={"cache": cache})
    direct, no_flush = CACHE_FLAGS[cache]
    assert node["cache"] == {"direct": direct, "no-flush": no_flush}
    assert direct == (cache in ("none", "directsync"))
    assert no_flush == (cache == "unsafe")


def test_nothing_that_was_not_asked_for_is_unsafe() -> None:
    node = LOCAL.node("/a", read_only=True, options={})
    assert node == {
        "driver": "file", "filename": "/a", "aio": "threads", "read-only": True, "discard": "unmap",
        "cache": {"direct": False, "no-flush": False},
    }
    assert "locking" not in node, "QEMU's own image locks hold as well"


@pytest.mark.parametrize(
    "options",
    [{}, {"aio": "threads"}, {"aio": "io_uring"}, {"aio": "native", "cache": "none"},
     {"aio": "native", "cache": "directsync"}, {"cache": "none"}],
    ids=str,
)
def test_aio_modes_that_qemu_has_are_accepted(options: dict[str, str]) -> None:
    LOCAL.check_options(options)


@pytest.mark.parametrize(
    "options",
    [{"aio": "posix"}, {"aio": ""}, {"aio": "Native", "cache": "none"}, {"aio": "native"},
     *({"aio": "native", "cache": cache} for cache in ("writeback", "writethrough", "unsafe"))],
    ids=str,
)
def test_aio_modes_that_cannot_work_are_refused(options: dict[str, str]) -> None:
    with pytest.raises(StoragedError) as caught:
        LOCAL.check_options(options)
    assert caught.value.code is ErrorCode.INVALID_ARGUMENT
    assert caught.value.hint
