"""The daemon's configuration file, storaged.toml."""

from __future__ import annotations

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


class Config(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """storaged.toml. Times in seconds."""

    qsd: QsdConfig = QsdConfig()
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
    return config
