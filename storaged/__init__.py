"""storaged: network disks and disk images as ordinary block devices of the host."""

__version__ = "0.1.0"
