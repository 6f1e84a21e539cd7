"""storaged.toml(5), from the keys in storaged/model/config.py."""

from __future__ import annotations

import json
from typing import Any

from storaged.manual.roff import Page
from storaged.model.config import Key, keys, tables
from storaged.model.profile import Profile
from storaged.model.volumefile import VolumeFile

_VOLUME = {
    "source": "where the data is, see storaged-sources(7)",
    "format": "the image's format, raw where nothing is said",
    "transport": "the way onto the host, auto where nothing is said",
    "read_only": "true: the device refuses writes",
    "snapshot": "true: writable, and the changes are thrown away at detach",
    "snapshot_dir": "where a snapshot keeps the changes",
    "profile": "the profile whose options count where nothing is said here",
    "options": "a table of what `-o` takes (storaged-sources(7)); a value is a text, a number, or true (on) or false "
    "(off)",
}


def page(date: str) -> Page:
    """Return the page."""
    page = Page("storaged.toml", 5, "configuration of the storaged daemon", date)
    page.heading("synopsis")
    page.paragraph("`/etc/storaged/storaged.toml`, `/etc/storaged/storaged.toml.d/*.toml`")
    page.heading("description")
    page.paragraph(
        "The configuration of storaged(8), in TOML. All files and all keys may be left out. With `storaged daemon "
        "--config FILE` it is FILE, and the drop-ins in FILE.d."
    )
    page.paragraph(
        "The file itself is read first, then the drop-ins in the order of their names: those that end with .toml and "
        "do not begin with a dot. A key that is said again has the last value; tables, also those that are values, "
        "are merged key by key."
    )
    page.paragraph(
        "A key that is unknown, or a value that cannot be, is an error, also where a later file says something else: "
        "the daemon does not start with it, and a reload changes nothing. `storaged config check` says all that is "
        "wrong at once. `storaged config schema` prints a JSON schema."
    )
    for table, struct in tables().items():
        page.heading(f"[{'.'.join(table)}]" if table else "keys")
        if table:
            page.paragraph(struct.__doc__ or "")
        for key in keys():
            if key.table == table:
                _describe(page, key)
    page.heading("volumes")
    page.paragraph(
        "A file /etc/storaged/volumes/NAME.toml is a volume that is attached at each boot. Its keys are what `storaged "
        "attach` takes; `source` alone must be there."
    )
    for key in keys(VolumeFile):
        page.term(key.name, _VOLUME[key.name] + (f" ({key.choices})" if key.choices else ""))
    page.example("""
        source = "nbd://server/export"
        format = "raw"
        options = { cache = "none", open-timeout = 20 }
    """)
    page.heading("profiles")
    page.paragraph(
        "A file /etc/storaged/profiles/NAME.toml has options under a name, for `storaged attach --profile` and the key "
        "profile of a volume's file. What the volume says itself wins. The values are copied when the volume is "
        "attached: a profile that is changed later changes no volume that is attached. A profile says how a volume is "
        "served; options that say where the data is, or who is trusted, are the volume's own."
    )
    for key in keys(Profile):
        page.term(key.name, key.description + (f" ({key.choices})" if key.choices else ""))
    page.example("""
        [options]
        cache = "none"
        read-ahead-kb = 4096
    """)
    page.heading("reload")
    page.paragraph(
        "`storaged daemon --reload`, or SIGHUP, has the daemon read the files again. The command and the log say which "
        "keys are in force now and which need a restart. A restart of the daemon leaves all volumes attached."
    )
    page.heading("see also")
    page.paragraph("storaged(1), storaged-sources(7), storaged(8)")
    return page


def _describe(page: Page, key: Key) -> None:
    page.term(key.name, key.description)
    change = f"A reload is enough: it counts {key.at_once}." if key.at_once else "A change needs a restart."
    default = "" if key.default in (None, {}, []) else f"Default: `{_toml(key.default)}`. "
    page.also(default + change)


def _toml(value: Any) -> str:
    return json.dumps(value)  # of texts, numbers, booleans and lists, TOML's spelling
