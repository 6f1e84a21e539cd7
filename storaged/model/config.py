"""The daemon's configuration file, storaged.toml."""

from __future__ import annotations

from ipaddress import ip_address

import msgspec

from storaged.errors import ErrorCode, StoragedError


class QsdConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[qsd]: which program serves the volumes."""

    binary: str = "qemu-storage-daemon"
    binaries: dict[str, str] = {}
    """Backend → program, where it is another one."""

    def binary_for(self, backend: str) -> str:
        """The program that serves a backend's volumes."""
        return self.binaries.get(backend, self.binary)


class MetricsConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """[metrics]: where Prometheus gets its metrics."""

    listen: str | None = None
    """ADDRESS:PORT, an IPv6 address in brackets; None: nowhere."""
    web_config: str | None = None
    """The file that protects the address (observe/webconfig.py)."""

    @property
    def address(self) -> tuple[str, int]:
        """Host and port of ``listen``. Raises ValueError."""
        host, colon, port = (self.listen or "").rpartition(":")
        if not colon or not port.isascii() or not port.isdigit() or not 0 < int(port) < 65536:
            raise ValueError("it must be ADDRESS:PORT")
        bracketed = host.startswith("[") and host.endswith("]")
        found = ip_address(host[1:-1] if bracketed else host)
        if bracketed != (found.version == 6):
            raise ValueError("an IPv6 address, and no other, stands in brackets")
        return str(found), int(port)


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """storaged.toml. Times in seconds."""

    qsd: QsdConfig = QsdConfig()
    metrics: MetricsConfig = MetricsConfig()
    attach_timeout: float = 30.0
    detach_timeout: float = 30.0
    snapshot_dir: str | None = None
    socket_group: str | None = None
    log_level: str = "info"


def parse_config(text: bytes, path: str) -> Config:
    """Parse storaged.toml. Raises INVALID_ARGUMENT that says where it is wrong."""
    try:
        config = msgspec.toml.decode(text, type=Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT,
            f"the configuration {path} cannot be read",
            cause=str(error),
            hint="correct the file; storaged.toml's keys are listed in README.md",
        ) from error
    for key in ("attach_timeout", "detach_timeout"):
        if not 0 < getattr(config, key) <= 86400:
            raise StoragedError(
                ErrorCode.INVALID_ARGUMENT, f"{path}: {key} must be above 0 and at most 86400 seconds"
            )
    if config.snapshot_dir is not None and not config.snapshot_dir.startswith("/"):
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, f"{path}: snapshot_dir must be an absolute path")
    if config.log_level not in ("debug", "info", "warning", "error"):
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path}: log_level must be debug, info, warning or error"
        )
    if config.metrics.listen is not None:
        _check_metrics(config.metrics, path)
    return config


def _check_metrics(metrics: MetricsConfig, path: str) -> None:
    """Refuse what cannot be listened on, and what all could read without anybody having said so."""
    try:
        host, _ = metrics.address
    except ValueError as error:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path}: listen in [metrics] is {metrics.listen!r}", cause=str(error),
            hint="give an address and a port, as 127.0.0.1:9929 or [::1]:9929",
        ) from error
    if metrics.web_config is not None and not metrics.web_config.startswith("/"):
        raise StoragedError(ErrorCode.INVALID_ARGUMENT, f"{path}: web_config must be an absolute path")
    if metrics.web_config is None and not ip_address(host).is_loopback:
        raise StoragedError(
            ErrorCode.INVALID_ARGUMENT, f"{path}: listen in [metrics] is {metrics.listen!r}, and web_config is missing",
            cause="whoever reaches that address could read the metrics",
            hint="name a file with passwords and certificates; an empty one says that everybody may",
        )
