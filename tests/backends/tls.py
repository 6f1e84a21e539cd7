"""Certificates and keys for TLS, laid out as QEMU, libvirt and nbdkit look for them. Made with GnuTLS's certtool."""

from __future__ import annotations

import secrets
import shutil
from pathlib import Path

from tests.harness import run

_EXPIRED = 'activation_date = "2020-01-01 00:00:00 UTC"\nexpiration_date = "2020-02-01 00:00:00 UTC"\n'


class Authority:
    """Who signs certificates. ``trust`` is the directory of a client that believes it and has none of its own."""

    def __init__(self, place: Path) -> None:
        self.trust = place
        place.mkdir()
        self._key = place.with_name(f"{place.name}-key.pem")
        _private_key(self._key)
        template = _template(place, "ca\ncert_signing_key\n")
        run(
            "certtool", "--generate-self-signed", "--load-privkey", self._key, "--template", template,
            "--outfile", place / "ca-cert.pem",
        )

    def issue(self, place: Path, role: str, *names: str, expired: bool = False) -> Path:
        """Make the directory of a ``server`` or ``client``; ``names``: lines such as ``dns_name = x``."""
        place.mkdir()
        shutil.copy(self.trust / "ca-cert.pem", place)
        key = place / f"{role}-key.pem"
        _private_key(key)
        lines = ["signing_key", "encryption_key", f"tls_www_{role}", *names]
        template = _template(place, "\n".join(lines) + "\n" + (_EXPIRED if expired else "expiration_days = 2\n"))
        run(
            "certtool", "--generate-certificate", "--load-privkey", key, "--load-ca-privkey", self._key,
            "--load-ca-certificate", self.trust / "ca-cert.pem", "--template", template,
            "--outfile", place / f"{role}-cert.pem",
        )
        return place


def _private_key(path: Path) -> None:
    run("certtool", "--generate-privkey", "--key-type", "ecdsa", "--outfile", path)


def _template(place: Path, text: str) -> Path:
    path = place.with_name(f"{place.name}.template")
    path.write_text(f'cn = "{place.name}"\n{text}')
    return path


def key_file(path: Path, *users: str) -> Path:
    """Make a file with a pre-shared key for each user."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{user}:{secrets.token_hex(32)}\n" for user in users))
    path.chmod(0o600)
    return path


def with_certificates(directory: Path, *, ask: bool = False) -> tuple[str, ...]:
    """The options of a qemu-nbd that has a certificate, and may ask its clients for theirs."""
    verify = "yes" if ask else "no"
    return "--tls-creds", "t", "--object", f"tls-creds-x509,id=t,dir={directory},endpoint=server,verify-peer={verify}"


def with_keys(directory: Path) -> tuple[str, ...]:
    """The options of a qemu-nbd that shares the keys in ``directory``/keys.psk with its clients."""
    return "--tls-creds", "t", "--object", f"tls-creds-psk,id=t,dir={directory},endpoint=server"
