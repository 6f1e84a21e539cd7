"""Where storaged keeps its files: one place that knows every directory. Pure, nothing is looked at here."""

from __future__ import annotations

import os.path
from dataclasses import dataclass

#: The locks of sources. Host-wide whatever the root is: two daemons on one host must not share a source.
LOCK_DIR = "/run/storaged/locks"


@dataclass(frozen=True, slots=True)
class Layout:
    """The directories of one daemon, and the files in them that others need to know."""

    run_dir: str
    state_dir: str
    config_dir: str
    dev_dir: str
    systemd_dir: str

    @classmethod
    def below(cls, root: str | None) -> Layout:
        """Return the directories of the real system, or those below ``root`` when one is given."""
        base = os.path.abspath(root) if root else "/"
        return cls(
            run_dir=os.path.join(base, "run/storaged"),
            state_dir=os.path.join(base, "var/lib/storaged"),
            config_dir=os.path.join(base, "etc/storaged"),
            dev_dir=os.path.join(base, "dev/storaged"),
            systemd_dir=os.path.join(base, "run/systemd"),
        )

    @property
    def socket(self) -> str:
        """The Varlink socket. May be longer than the 107 bytes that bind() and connect() take."""
        return f"{self.run_dir}/io.storaged"

    @property
    def provider_socket(self) -> str:
        """The socket on which systemd's programs are served."""
        return f"{self.run_dir}/io.systemd.StorageProvider"

    @property
    def provider_hook(self) -> str:
        """Where they look for it. Its name is the provider's: ``storaged:NAME`` (storagectl(1))."""
        return f"{self.systemd_dir}/io.systemd.StorageProvider/storaged"

    @property
    def volumes_dir(self) -> str:
        """The private directories of the attached volumes; gone after a reboot."""
        return f"{self.run_dir}/volumes"

    def volume_dir(self, name: str) -> str:
        """The private directory of one volume (its name was checked before)."""
        return f"{self.volumes_dir}/{name}"

    def link(self, name: str) -> str:
        """The stable name of a volume's device."""
        return f"{self.dev_dir}/{name}"

    @property
    def vm_sockets_dir(self) -> str:
        """The sockets of volumes that virtual machines use: their users may go through it, but not look."""
        return f"{self.run_dir}/vhost-user"

    @property
    def desired_persistent(self) -> str:
        """The wishes that outlive a reboot."""
        return f"{self.state_dir}/volumes"

    @property
    def desired_volatile(self) -> str:
        """The wishes that last until reboot."""
        return f"{self.run_dir}/desired"

    @property
    def volume_files(self) -> str:
        """The wishes of the administrator, as files."""
        return f"{self.config_dir}/volumes"

    @property
    def profiles(self) -> str:
        """Options under a name, which volumes may be attached with."""
        return f"{self.config_dir}/profiles"

    @property
    def detached_marks(self) -> str:
        """Which volumes of such files were detached since the boot."""
        return f"{self.run_dir}/detached"

    @property
    def snapshots_dir(self) -> str:
        """The overlays of --snapshot, where nothing else was said."""
        return f"{self.state_dir}/snapshots"

    @property
    def config_file(self) -> str:
        """The daemon's configuration."""
        return f"{self.config_dir}/storaged.toml"
