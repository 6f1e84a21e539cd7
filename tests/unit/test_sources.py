"""Which backend a source belongs to, and what the backends of this host make of it."""

from __future__ import annotations

import pytest

from storaged.backends import BACKENDS, find_backend
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
    "source", ["", " ", "a", "./a", "a:/b", "nosuch:pool/image", "FILE:/a", " /a", ":/a", "json:{}", "file", "file =/a"]
)
def test_an_unknown_source_is_refused_with_those_that_are_known(source: str) -> None:
    with pytest.raises(StoragedError) as caught:
        find_backend(source)
    assert caught.value.code is ErrorCode.INVALID_SOURCE
    for backend in BACKENDS.values():
        assert backend.example in caught.value.hint


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
