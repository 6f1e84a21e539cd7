"""Images behind a server that stand on others, of this host and behind servers (nbd: the chain knows no difference)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from storaged.errors import ErrorCode
from tests.backends.servers import NbdServer
from tests.harness import Daemon, as_json, eventually, image, reads, refuses, run, writes

MIB = 1 << 20
OF_BASE, OF_MIDDLE, OF_TOP = b"b" * 4096, b"m" * 4096, b"t" * 4096
pytestmark = pytest.mark.timeout(100)


def of(place: Path, export: str) -> str:
    return f"nbd+unix:///{export}?socket={quote(str(place / export))}.sock"


class Chain:
    """top, behind a server, stands on middle, behind another, and that on base, a raw file of this host."""

    def __init__(self, place: Path) -> None:
        self.base, self.middle, self.top = place / "base", place / "middle", place / "top"
        self.source, self.below = of(place, "top"), of(place, "middle")
        self.allowed = {"backing": f"allow:{self.base}", "backing-sources": self.below}
        self.base.write_bytes(OF_BASE + bytes(16 * MIB - len(OF_BASE)))
        self.stand(self.middle, str(self.base), "raw")
        run("qemu-io", "-f", "qcow2", "-c", f"write -P {OF_MIDDLE[0]} 1M 4k", self.middle)
        self.servers = [NbdServer(self.middle, socket_path=place / "middle.sock", export="middle")]
        self.stand(self.top, self.below, "qcow2")
        self.servers.append(NbdServer(self.top, socket_path=place / "top.sock", export="top"))

    def stand(self, path: Path, on: str, format: str) -> None:
        """Make an image that stands on another. An export has the size of its file: there is room to grow."""
        run("qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", on, "-F", format, path, "16M")
        os.truncate(path, 32 * MIB)

    def start(self) -> None:
        for server in self.servers:
            server.start()

    def kill(self) -> None:
        for server in self.servers:
            server.kill()


@pytest.fixture
def chain(place: Path) -> Iterator[Chain]:
    found = Chain(place)
    found.start()
    yield found
    found.kill()


def test_each_image_of_a_chain_is_opened_where_it_is_allowed(daemon: Daemon, chain: Chain) -> None:
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, chain.source, format="qcow2")
    error = refuses(
        daemon, ErrorCode.BACKING_NOT_ALLOWED, chain.source, format="qcow2", options={"backing": f"allow:{chain.base}"}
    )
    assert f"-o backing-sources={chain.below}" in error.hint
    error = refuses(
        daemon, ErrorCode.BACKING_NOT_ALLOWED, chain.source, format="qcow2", options={"backing-sources": chain.below}
    )
    assert "-o backing=allow:" in error.hint
    device = daemon.device("a", chain.source, format="qcow2", options=chain.allowed)
    assert (reads(device, 0, 4096), reads(device, MIB, 4096)) == (OF_BASE, OF_MIDDLE)
    before = chain.middle.read_bytes()
    writes(device, 2 * MIB, OF_TOP)
    daemon.detach("a")
    assert chain.middle.read_bytes() == before
    assert chain.base.read_bytes().rstrip(b"\0") == OF_BASE
    device = daemon.device("a", chain.source, format="qcow2", options=chain.allowed, read_only=True)
    assert (reads(device, 0, 4096), reads(device, 2 * MIB, 4096)) == (OF_BASE, OF_TOP)


def test_show_tells_each_image_and_virtual_machines_are_told_that_there_are_more(daemon: Daemon, chain: Chain) -> None:
    daemon.attach("a", chain.source, format="qcow2", options=chain.allowed)
    layers = as_json(daemon.cli("show", "a", "--json").stdout)["layers"]
    told = [(layer["source"], layer["format"], layer["virtual_size"], layer["backing"]) for layer in layers]
    assert told == [
        (chain.source, "qcow2", 16 * MIB, chain.below), (chain.below, "qcow2", 16 * MIB, str(chain.base)),
        (str(chain.base), "raw", 16 * MIB, None),
    ]
    assert str(chain.base) in daemon.cli("show", "a").stdout.partition("images:")[2]
    arguments = as_json(daemon.cli("show", "a", "--qemu-args", "--json").stdout)
    assert arguments["blockdev"] == arguments["drive"] == []
    assert any("stands on others" in note for note in arguments["notes"])
    daemon.detach("a")


def test_nobody_writes_to_an_image_below_also_without_the_daemon(daemon: Daemon, chain: Chain, place: Path) -> None:
    daemon.attach("a", chain.source, format="qcow2", options=chain.allowed)
    refuses(daemon, ErrorCode.SOURCE_IN_USE, chain.below, "b")
    refuses(daemon, ErrorCode.SOURCE_IN_USE, chain.base, "b")
    daemon.attach("b", chain.base, read_only=True)
    daemon.detach("b")
    daemon.stop()
    other = Daemon(place / "other")
    other.root.mkdir()
    other.start()
    try:
        for source in (chain.below, str(chain.base)):
            error = refuses(other, ErrorCode.SOURCE_IN_USE, source, "b")
            assert "volume a" in error.cause
        daemon.start()
        eventually(lambda: daemon.online("a"), "adopted")
        former = daemon.kill_qsd("a")
        eventually(lambda: daemon.replaced("a", former), "replaced")
        refuses(other, ErrorCode.SOURCE_IN_USE, chain.below, "b")
        daemon.detach("a")
        other.attach("b", chain.below)
    finally:
        other.end()


def test_a_successor_finds_the_same_images_or_refuses(daemon: Daemon, chain: Chain) -> None:
    options = {**chain.allowed, "backing-sources": f"{chain.below} {chain.source}"}
    device = daemon.device("a", chain.source, format="qcow2", options=options)
    assert reads(device, MIB, 4096) == OF_MIDDLE
    chain.kill()
    other = chain.base.with_name("other")
    image(other, "raw", "16M")
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", other, "-F", "raw", chain.middle)
    chain.start()
    daemon.kill_qsd("a")
    eventually(lambda: daemon.show("a")["state"] == "failed", "it is refused")
    assert daemon.show("a")["failure"]["code"] == ErrorCode.BACKING_NOT_ALLOWED
    chain.kill()
    run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", "", chain.middle)
    chain.start()
    eventually(lambda: daemon.show("a")["failure"]["code"] == ErrorCode.SOURCE_CHANGED, "a shorter chain is another")
    daemon.detach("a", force=True)


def test_an_image_that_has_grown_is_served_at_its_old_size_on_the_same_images(daemon: Daemon, chain: Chain) -> None:
    daemon.attach("a", chain.source, format="qcow2", options=chain.allowed)
    chain.servers[1].kill()
    run("qemu-img", "resize", "-q", "-f", "qcow2", chain.top, "24M")
    os.truncate(chain.top, 32 * MIB)
    chain.servers[1].start()
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    shown = daemon.show("a")
    assert (shown["size"], shown["layers"][0]["virtual_size"]) == (16 * MIB, 24 * MIB)
    assert reads(shown["device"], MIB, 4096) == OF_MIDDLE
    daemon.cli("resize", "a", "24M")
    assert daemon.show("a")["layers"][0]["virtual_size"] == 24 * MIB
    daemon.detach("a")


def test_an_image_of_this_host_on_one_behind_a_server(daemon: Daemon, chain: Chain, place: Path) -> None:
    top = place / "local.qcow2"
    chain.stand(top, chain.below, "qcow2")
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, top, format="qcow2", options={"backing": f"allow:{chain.base}"})
    device = daemon.device("a", top, format="qcow2", options=chain.allowed, snapshot=True)
    writes(device, 0, OF_TOP)
    assert reads(device, MIB, 4096) == OF_MIDDLE
    assert [layer["format"] for layer in daemon.show("a")["layers"]] == ["qcow2", "qcow2", "qcow2", "raw"]
    former = daemon.kill_qsd("a")
    eventually(lambda: daemon.replaced("a", former), "replaced")
    device = str(daemon.show("a")["device"])
    assert (reads(device, 0, 4096), reads(device, MIB, 4096)) == (OF_TOP, OF_MIDDLE)
    daemon.detach("a")


@pytest.mark.parametrize("remote", [False, True], ids=["of this host", "behind a server"])
def test_the_data_of_an_image_behind_a_server_where_it_is_allowed(
    daemon: Daemon, chain: Chain, place: Path, remote: bool
) -> None:
    data, below = place / "data", of(place, "data")
    chain.kill()
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={data},data_file_raw=on", chain.top, "16M")
    if remote:
        run("qemu-img", "amend", "-f", "qcow2", "-o", f"data_file={below}", chain.top)
        chain.servers.append(NbdServer(data, socket_path=place / "data.sock", export="data"))
    os.truncate(chain.top, 32 * MIB)
    chain.start()
    refuses(daemon, ErrorCode.BACKING_NOT_ALLOWED, chain.source, format="qcow2")
    options = {"backing-sources": below} if remote else {"backing": f"allow:{data}"}
    writes(daemon.device("a", chain.source, format="qcow2", options=options), MIB, OF_TOP)
    assert daemon.show("a")["layers"][0]["data_file"] == (below if remote else str(data))
    refuses(daemon, ErrorCode.SOURCE_IN_USE, below if remote else data, "b", read_only=True)
    daemon.detach("a")
    assert data.read_bytes()[MIB:MIB + 4096] == OF_TOP
    device = daemon.device("a", chain.source, format="qcow2", options=options, snapshot=True)
    writes(device, MIB, OF_BASE)
    assert data.read_bytes()[MIB:MIB + 4096] == OF_TOP
    daemon.detach("a")


def test_names_that_lead_nowhere(daemon: Daemon, chain: Chain) -> None:
    allowed = {**chain.allowed, "backing-sources": f"{chain.below} {chain.source}"}
    for name, format, code in (
        (chain.source, "qcow2", ErrorCode.WRONG_FORMAT), ("base", "raw", ErrorCode.BACKING_NOT_ALLOWED),
        (chain.below, "vdi", ErrorCode.WRONG_FORMAT), (f"{chain.base}x", "raw", ErrorCode.BACKING_NOT_ALLOWED),
        ("nbd://localhost:1/x", "raw", ErrorCode.BACKING_NOT_ALLOWED),
    ):
        chain.kill()
        run("qemu-img", "rebase", "-u", "-f", "qcow2", "-b", name, "-F", format, chain.top)
        chain.start()
        refuses(daemon, code, chain.source, format="qcow2", options=allowed)
