"""What a qemu-storage-daemon needs of the host beyond its own directory, as its transport and its backend say. Pure."""

from __future__ import annotations

from dataclasses import dataclass

#: Users that neither Debian, systemd (UIDS-GIDS.md), subuid(5) nor SSSD's mapping of foreign domains give to anybody.
FIRST_USER, USERS = 2_040_000_000, 1 << 20
LAST_USER = FIRST_USER + USERS - 1


@dataclass(frozen=True)
class Powers:
    """All else is taken from it, where the kernel can do that."""

    capabilities: frozenset[str] = frozenset()
    """By their names without CAP_."""
    root: str = ""
    """Why it has to be root, as the end of a sentence; empty where any user will do."""
    mounts: bool = False
    """It mounts a filesystem."""
    all_files: str = ""
    """Why Landlock cannot keep it to its own files; empty where it can."""
    reads: tuple[str, ...] = ()
    """Files, and directories with all below, that it may read."""
    keyrings_of: tuple[str, ...] = ()
    """Ceph's configuration files: they name further files that it may read."""
    uses: tuple[str, ...] = ()
    """Files, and directories with all below, that it may read and write: devices."""
    sockets: tuple[str, ...] = ()
    """Directories in which it makes unix sockets."""
    files: tuple[tuple[str, bool], ...] = ()
    """What it could not do without: path, and whether it is written to (or connected to)."""
    connects_unix: bool = False
    """To unix sockets of others."""

    def and_of(self, other: Powers) -> Powers:
        """Return what both need together."""
        return Powers(
            capabilities=self.capabilities | other.capabilities, root=self.root or other.root,
            mounts=self.mounts or other.mounts,
            all_files=self.all_files or other.all_files, reads=self.reads + other.reads,
            keyrings_of=self.keyrings_of + other.keyrings_of, uses=self.uses + other.uses,
            sockets=self.sockets + other.sockets, files=self.files + other.files,
            connects_unix=self.connects_unix or other.connects_unix,
        )


NO_POWERS = Powers()
