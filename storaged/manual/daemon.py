"""storaged(8): the daemon's files, signals, exit status and environment."""

from __future__ import annotations

from storaged.manual.roff import Page
from storaged.model.layout import LOCK_DIR, Layout

_LAYOUT = Layout.below(None)
FILES = {
    _LAYOUT.config_file: "The configuration, storaged.toml(5), and its drop-ins in storaged.toml.d beside it.",
    f"{_LAYOUT.volume_files}/NAME.toml": "A volume that is attached at each boot, see storaged.toml(5).",
    f"{_LAYOUT.profiles}/NAME.toml": "Options under a name, see storaged.toml(5).",
    f"{_LAYOUT.dev_dir}/NAME": "A link to the device of a volume; NAME-partN to its partitions.",
    _LAYOUT.socket: "The socket of the Varlink interface io.storaged, mode 0660.",
    _LAYOUT.provider_hook: "The socket of io.systemd.StorageProvider, for storagectl(1) and others; root only.",
    f"{_LAYOUT.volumes_dir}/NAME/": "Of a volume that is attached: the sockets, the log and the record of its "
    "qemu-storage-daemon. Gone after a reboot.",
    f"{_LAYOUT.vm_sockets_dir}/NAME.sock": "The socket of a volume for a virtual machine.",
    f"{_LAYOUT.desired_volatile}/": "The wishes of volumes without `--persist`. Gone after a reboot.",
    f"{_LAYOUT.detached_marks}/": "Which volumes with such a file were detached since the boot.",
    f"{LOCK_DIR}/": "One lock for each source in use, whatever `--root` says.",
    f"{_LAYOUT.desired_persistent}/": "The wishes of volumes with `--persist`.",
    f"{_LAYOUT.snapshots_dir}/": "The overlays of `--snapshot`, where nothing else was said.",
}
SIGNALS = {
    "SIGTERM, SIGINT": "It ends, with status 0. All volumes stay attached and go on working.",
    "SIGHUP": "It reads its configuration again, and the files of volumes. The log tells what is in force now, what "
    "needs a restart, and what is wrong: with a wrong configuration nothing changes, and with the wrong file of a "
    "volume all others count. `storaged daemon --reload` does the same, prints it, and fails if anything is wrong.",
    "SIGKILL": "Loses nothing: volumes go on, and the next daemon takes them over.",
}
STATUS = {
    "0": "It was ended by a signal, in good order.",
    "1": "It could not start: why, and what to do, is on standard error, with one of the codes of storaged(1).",
    "2": "Wrong usage.",
}
ENVIRONMENT = {
    "STORAGED_ROOT": "The default of `--root`.",
    "CREDENTIALS_DIRECTORY": "Where `credential:NAME` is looked for; systemd sets it for LoadCredential=.",
    "NOTIFY_SOCKET, WATCHDOG_USEC, LISTEN_FDS": "As systemd sets them (sd_notify(3), sd_listen_fds(3)).",
    "PATH": "Where qemu-storage-daemon is looked for.",
}


def page(date: str) -> Page:
    """Return the page."""
    page = Page("storaged", 8, "the daemon that keeps volumes attached", date)
    page.heading("synopsis")
    page.paragraph("`storaged` [`--root` DIR] `daemon` [`--config` FILE]")
    page.paragraph("`storaged` [`--root` DIR] `daemon --reload`")
    page.heading("description")
    page.paragraph(
        "The daemon attaches disk images and network disks as block devices, by one qemu-storage-daemon for each "
        "volume, watches over them, starts a successor for one that has died, and takes volumes away again. It runs in "
        "the foreground as root, and logs to standard error."
    )
    page.paragraph(
        "Volumes do not depend on it: they stay attached and go on working when it ends, is killed, restarted "
        "or upgraded, and the next one takes them over. So its unit, storaged.service, says `KillMode=process`. "
        "One daemon runs for each `--root`."
    )
    for heading, entries in (
        ("files", FILES), ("signals", SIGNALS), ("exit status", STATUS), ("environment", ENVIRONMENT)
    ):
        page.heading(heading)
        if heading == "files":
            page.paragraph("With `--root DIR` all of these but the locks are below DIR.")
        for tag, text in entries.items():
            page.term(tag, text)
    page.heading("see also")
    page.paragraph("storaged(1), storaged.toml(5), storaged-sources(7), qemu-storage-daemon(1), systemd.exec(5)")
    return page
