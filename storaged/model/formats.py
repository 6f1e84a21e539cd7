"""The image formats and what each can do. The format is what the user says, never what the content looks like."""

from __future__ import annotations

from enum import StrEnum


class Format(StrEnum):
    """Image formats by the names that QEMU gives their drivers (except vhdx/vpc, which are the same)."""

    RAW = "raw"
    QCOW2 = "qcow2"
    QED = "qed"
    VMDK = "vmdk"
    VDI = "vdi"
    VHDX = "vhdx"
    VPC = "vpc"
    PARALLELS = "parallels"
    LUKS = "luks"
    QCOW = "qcow"


#: Formats whose header can name another image to read from (QEMU: BlockdevOptionsGenericCOWFormat).
COPY_ON_WRITE = frozenset({Format.QCOW2, Format.QCOW, Format.QED, Format.VMDK})
