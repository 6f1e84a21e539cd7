"""Sheepdog: QEMU's driver for it is gone, and what is left to do is to say so.

Deprecated in QEMU 5.2, and dropped in May 2021, after the release of 6.0: docs/about/removed-features.rst in the QEMU
tree says 6.0 all the same.
"""

from __future__ import annotations

from storaged.errors import ErrorCode, StoragedError

SCHEMES = ("sheepdog", "sheepdog+tcp", "sheepdog+unix")


def refusal() -> StoragedError:
    """The failure of a source that names a disk of Sheepdog."""
    return StoragedError(
        ErrorCode.UNSUPPORTED, "QEMU has no sheepdog driver any more", cause="it was removed in QEMU 6.1",
        hint="let the cluster's side export the disk, by iSCSI (tgt with its backing store sheepdog) or by NBD "
        "(qemu-nbd of QEMU 6.0 or older), and attach iscsi://HOST/TARGET/LUN or nbd://HOST",
    )
