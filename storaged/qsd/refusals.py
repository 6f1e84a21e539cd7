"""What QSD's error texts mean to a user. Pure."""

from __future__ import annotations

import re

from storaged.errors import ErrorCode, StoragedError

#: (pattern in QEMU's text, code, message, hint); the first that matches counts.
_KNOWN: list[tuple[str, ErrorCode, str, str]] = [
    (
        r'Failed to get (shared )?"(write|resize|consistent read)" lock',
        ErrorCode.SOURCE_IN_USE, "another process has the image open",
        "end that process (a virtual machine? qemu-img? lsof names it), or attach with --read-only",
    ),
    (
        r"Image (is )?not in \S+ format|not a valid|Invalid (footer|signature)|invalid (VMDK|VPC) image"
        r"|invalid magic|bad signature",
        ErrorCode.WRONG_FORMAT, "the image has another format", "say the right one with --format",
    ),
    (r"No such file or directory", ErrorCode.SOURCE_MISSING, "the source is not there", "check the path"),
    (
        r"Unknown driver",
        ErrorCode.UNSUPPORTED, "this qemu-storage-daemon lacks the block driver",
        "install qemu-block-extra",
    ),
    (
        r"does not accept value|Invalid parameter '(qcow|qed|vmdk|vdi|vhdx|vpc|parallels|luks)'",
        ErrorCode.UNSUPPORTED, "this qemu-storage-daemon does not know this driver or value",
        "storaged doctor shows its version; convert the image with qemu-img convert, or use another build",
    ),
    (
        r"Invalid password|cannot unlock any key",
        ErrorCode.OPEN_FAILED, "the passphrase does not open the image",
        "check the file given with -o key-file; every byte of it counts, a newline at its end too",
    ),
    (
        r"export not available|unknown export|export .* not (present|found)",
        ErrorCode.OPEN_FAILED, "the server has no export of that name", "nbdinfo --list URI shows those that it has",
    ),
    (
        r"Connection attempt cancelled by timeout|Connection timed out",
        ErrorCode.OPEN_FAILED, "the server does not answer",
        "it hangs, or a firewall swallows the packets; -o open-timeout=SECONDS waits longer",
    ),
    (
        r"Connection refused",
        ErrorCode.OPEN_FAILED, "nobody listens on that port or socket", "start the server; check host and port",
    ),
    (
        r"address resolution failed",
        ErrorCode.OPEN_FAILED, "the host's name is not known", "check the name, and this host's DNS and /etc/hosts",
    ),
    (
        r"No route to host|Network is unreachable|Host is (down|unreachable)",
        ErrorCode.OPEN_FAILED, "the server's host cannot be reached", "check the network and its routes",
    ),
    (r"No space left", ErrorCode.NO_SPACE, "there is no room", "make room on that filesystem"),
    (
        r"does not support resiz|Cannot (grow|resize|shrink)|not resizable|Operation not supported",
        ErrorCode.UNSUPPORTED, "this cannot be done with an image of this format", "",
    ),
    (
        r"Permission denied|Operation not permitted|Read-only file system",
        ErrorCode.OPEN_FAILED, "the source may not be opened this way",
        "check its permissions, or attach with --read-only",
    ),
]


def explain(command: str, text: str) -> StoragedError:
    """Return the failure that QSD's refusal of a QMP command amounts to; its own words become the cause."""
    for pattern, code, message, hint in _KNOWN:
        if re.search(pattern, text, re.IGNORECASE):
            return StoragedError(code, message, cause=text, hint=hint)
    code = ErrorCode.OPEN_FAILED if command == "blockdev-add" else ErrorCode.QSD_REFUSED
    return StoragedError(
        code, "cannot open the image" if code is ErrorCode.OPEN_FAILED else f"QSD refused {command}", cause=text,
        hint="the words are QEMU's; for an image, qemu-img info and qemu-img check may tell more",
    )
