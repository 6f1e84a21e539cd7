"""The backends, and which one a source belongs to. A new backend is one file and one line here."""

from __future__ import annotations

from storaged.backends import curl, file, gluster, host_device, iscsi, nbd, nfs, rbd, sheepdog, ssh, tftp, vitastor
from storaged.backends.base import Backend
from storaged.errors import ErrorCode, StoragedError

BACKENDS: dict[str, Backend] = {
    backend.name: backend for backend in (
        file.BACKEND, gluster.BACKEND,
        host_device.BACKEND, iscsi.BACKEND, nbd.BACKEND, nfs.BACKEND, rbd.BACKEND, ssh.BACKEND,
        *curl.BACKENDS, tftp.BACKEND,
        vitastor.BACKEND,
    )
}
_BY_SCHEME = {scheme: backend for backend in BACKENDS.values() for scheme in backend.schemes}


def find_backend(source: str) -> Backend:
    """Return the backend of a source as the user writes it. A plain path is ``file``.

    Raises INVALID_SOURCE; UNSUPPORTED for one that QEMU has no driver for any more.
    """
    scheme, colon, _ = source.partition(":")
    if colon and scheme in _BY_SCHEME:
        return _BY_SCHEME[scheme]
    if colon and scheme in sheepdog.SCHEMES:
        raise sheepdog.refusal()
    if source.startswith("/"):
        return BACKENDS["file"]
    small = scheme.lower()
    if colon and (small in _BY_SCHEME or small in sheepdog.SCHEMES):
        raise StoragedError(
            ErrorCode.INVALID_SOURCE, f"nothing here knows the source {_without_rest(source)!r}",
            cause="QEMU compares the names of its protocols letter by letter", hint=f"write {small}:",
        )
    raise StoragedError(
        ErrorCode.INVALID_SOURCE,
        f"nothing here knows the source {_without_rest(source)!r}" if source else "the source is empty",
        hint=f"give an absolute path, or one of {', '.join(backend.example for backend in BACKENDS.values())}",
    )


def _without_rest(source: str) -> str:
    """What stands behind a scheme that nothing here knows may hold a password."""
    scheme, colon, _ = source.partition(":")
    return f"{scheme}:…" if colon else source
