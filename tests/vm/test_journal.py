"""journalctl finds what happened to a volume by its name, and explains it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from storaged.observe.journald import MESSAGE_IDS
from tests.harness import Daemon, eventually, image, run

CATALOG = Path(__file__).parents[2] / "systemd" / "storaged.catalog"
#: Standard error is the journal's, and it says so, as systemd does for a service.
AS_A_SERVICE = ["systemd-cat", "sh", "-c", 'JOURNAL_STREAM=$(stat -Lc %d:%i /proc/$$/fd/2) exec "$@"', "sh"]


def entries(*matches: str) -> list[dict[str, Any]]:
    run("journalctl", "--sync")
    lines = run("journalctl", "-q", "-o", "json", "SYSLOG_IDENTIFIER=storaged", *matches).stdout.splitlines()
    return [json.loads(line) for line in lines]


def test_the_journal_has_fields_and_explanations(stopped: Daemon, place: Path) -> None:
    stopped.start(command=AS_A_SERVICE)
    name = "journal-test"
    stopped.attach(name, image(place / "a.raw", "raw"), transport="nbd")
    (Path(stopped.layout.volume_dir(name)) / "qsd.log").open("a").write("it complains\n")
    former = stopped.kill_qsd(name)
    eventually(lambda: stopped.replaced(name, former), "replaced")
    eventually(lambda: entries(f"STORAGED_VOLUME={name}", f"MESSAGE_ID={MESSAGE_IDS['recovered']}"), "it is told")
    (death,) = entries(f"STORAGED_VOLUME={name}", f"MESSAGE_ID={MESSAGE_IDS['death']}")
    assert death["PRIORITY"] == "4"
    assert death["STORAGED_CODE"] == "qsd-died"
    eventually(lambda: entries(f"STORAGED_VOLUME={name}", f"MESSAGE_ID={MESSAGE_IDS['qsd']}"), "QSD's words", 60)
    stopped.detach(name)
    changes = entries(f"STORAGED_VOLUME={name}", f"MESSAGE_ID={MESSAGE_IDS['state']}")
    states = [change["STORAGED_STATE"] for change in changes]
    assert (states[0], states[-1]) == ("starting", "absent")
    assert "online" in states
    installed = Path("/usr/lib/systemd/catalog") / CATALOG.name
    shutil.copy(CATALOG, installed)
    try:
        run("journalctl", "--update-catalog")
        explained = run("journalctl", "-x", "-q", f"STORAGED_VOLUME={name}").stdout
    finally:
        installed.unlink()
        run("journalctl", "--update-catalog")
    assert f"Subject: The qemu-storage-daemon of volume {name} died" in explained
    assert "A successor is started at once" in explained
    assert stopped.stop() == 0
