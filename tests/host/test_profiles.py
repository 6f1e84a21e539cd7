"""Volumes with a profile, and devices whose queues were set up, on this kernel."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from storaged.errors import ErrorCode
from storaged.host import disk
from tests.harness import Daemon, error_of, eventually, image, refuses

FAST = 'transport = "fuse"\n[options]\ncache = "none"\nread-ahead-kb = 2048\nmax-sectors-kb = 64\nnr-requests = 64\n'


def profile(daemon: Daemon, text: str, name: str = "fast") -> None:
    """Write a profile."""
    directory = Path(daemon.layout.profiles)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.toml").write_text(text)


def queue(device: str) -> dict[str, str | None]:
    """What a device's queue has."""
    names = ("read_ahead_kb", "max_sectors_kb", "nr_requests")
    return {name: disk.attribute(device, f"queue/{name}") for name in names}


def queue_before(daemon: Daemon, name: str) -> dict[str, str]:
    """What the queue of a volume's device had, of what was set."""
    record = json.loads(Path(daemon.layout.volume_dir(name), "record.json").read_text())
    return {attribute.removeprefix("queue/"): value for attribute, value in record["queue"].items()}


def test_a_volume_is_attached_with_a_profile_and_keeps_what_it_said(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    profile(daemon, FAST)
    done = daemon.cli("attach", "a", str(source), "--profile", "fast", "-o", "read-ahead-kb=256")
    device = done.stdout.strip()
    assert queue(device) == {"read_ahead_kb": "256", "max_sectors_kb": "64", "nr_requests": "64"}
    shown = daemon.show("a")
    assert shown["profile"] == "fast"
    assert shown["options"] == {"cache": "none", "read-ahead-kb": "256", "max-sectors-kb": "64", "nr-requests": "64"}
    assert "profile:" in daemon.cli("show", "a").stdout
    # The profile is another one by now: neither the next daemon nor another device of the volume knows of it.
    profile(daemon, FAST.replace("64", "128"))
    daemon.stop()
    daemon.start()
    eventually(lambda: daemon.online("a"), "it is adopted")
    os.kill(daemon.show("a")["qsd_pid"], signal.SIGKILL)
    eventually(lambda: daemon.show("a")["deaths"] == 1 and daemon.online("a"), "it has another device")
    again = str(daemon.show("a")["device"])
    assert queue(again) == {"read_ahead_kb": "256", "max_sectors_kb": "64", "nr_requests": "64"}
    former = queue_before(daemon, "a")
    assert "read_ahead_kb" in former
    daemon.detach("a")
    assert queue(again).items() >= former.items()


@pytest.mark.parametrize("qsd_is_dead", [False, True])
def test_a_loop_device_is_given_back_as_it_was_also_by_force(
    daemon: Daemon, place: Path, qsd_is_dead: bool
) -> None:
    profile(daemon, FAST)
    volume = daemon.attach("a", image(place / "a.raw", "raw"), profile="fast", options={"read-ahead-kb": "300"})
    former, device = queue_before(daemon, "a"), str(volume["device"])
    assert queue(device) == {"read_ahead_kb": "300", "max_sectors_kb": "64", "nr_requests": "64"}
    if qsd_is_dead:
        daemon.kill()
        os.kill(volume["qsd_pid"], signal.SIGKILL)
        daemon.start()
    daemon.detach("a", force=True)
    assert "read_ahead_kb" in former
    # Where it came into the recovery, which has begun to do so, it does not wait for that.
    eventually(lambda: queue(device).items() >= former.items(), "the queue is as it was")


def test_a_profile_that_is_missing_wrong_or_does_not_fit_is_refused_with_nothing_left(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    profile(daemon, FAST)
    assert "'fast'" in refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, profile="fats").hint
    profile(daemon, "[options]\ncach = 'none'\n", "typo")
    assert "'cache'" in refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, profile="typo").hint
    profile(daemon, "[options]\nconnections = 4\n", "nbd")
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, profile="nbd", transport="fuse")
    assert "'nbd'" in error.message
    assert "'connections'" in error.message
    assert error.volume == "a"
    profile(daemon, "[options]\ncache = 'nothing'\n", "value")
    assert "'value'" in refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, profile="value").message


def test_what_the_kernel_does_not_take_fails_the_attach_with_its_error(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, transport="fuse", options={"scheduler": "nosuch"})
    assert error.cause == "Invalid argument"
    assert "none" in error.hint
    assert "scheduler=nosuch" in error.message


def test_qsd_polls_for_as_long_as_a_profile_says_and_a_socket_has_no_queue(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    profile(daemon, 'transport = "vhost-user"\n[options]\npoll-max-ns = 0\n')
    volume = daemon.attach("a", source, profile="fast")
    assert volume["transport"] == "vhost-user"
    assert '"poll-max-ns": 0' in Path(f"/proc/{volume['qsd_pid']}/cmdline").read_text()
    profile(daemon, FAST, "device")
    error = refuses(daemon, ErrorCode.INVALID_ARGUMENT, source, name="b", profile="device", transport="vhost-user")
    assert "vhost-user" in error.cause


def test_a_volume_of_a_file_has_the_profile_of_each_boot(daemon: Daemon, place: Path) -> None:
    source = image(place / "a.raw", "raw")
    profile(daemon, FAST)
    files = Path(daemon.layout.volume_files)
    files.mkdir(parents=True)
    (files / "a.toml").write_text(f"source = '{source}'\nprofile = 'fast'\noptions = {{ nr-requests = 32 }}\n")
    assert daemon.cli("daemon", "--reload").stdout == "attaching: a\n"
    eventually(lambda: daemon.online("a"), "it is attached")
    assert queue(daemon.show("a")["device"])["nr_requests"] == "32"
    profile(daemon, FAST.replace("2048", "4096"))
    done = daemon.cli("daemon", "--reload")
    assert "detach, and reload again): a" in done.stderr
    assert daemon.show("a")["options"]["read-ahead-kb"] == "2048"


def test_what_a_volume_says_against_its_profile_holds_however_often_it_is_attached(
    daemon: Daemon, place: Path
) -> None:
    source = image(place / "a.raw", "raw")
    profile(daemon, "[options]\ncache = 'unsafe'\ndiscard = 'ignore'\n")
    files = Path(daemon.layout.volume_files)
    files.mkdir(parents=True)
    (files / "b.toml").write_text(f"source = '{source}'\nprofile = 'fast'\noptions = {{ cache = 'writeback' }}\n")
    wanted = {"cache": "writeback", "discard": "ignore"}
    assert daemon.cli("daemon", "--reload").stdout == "attaching: b\n"
    eventually(lambda: daemon.online("b"), "it is attached")
    assert daemon.show("b")["options"] == wanted
    daemon.detach("b")
    daemon.cli("persist", "b", "on")
    assert daemon.show("b")["options"] == wanted
    daemon.detach("b")
    # A client that attaches what it was shown.
    shown = daemon.attach("c", source, profile="fast", options={"cache": "writeback"})
    again = {key: shown[key] for key in ("transport", "read_only", "options", "profile")}
    assert daemon.attach("c", source, **again)["options"] == wanted
    daemon.detach("c")
    assert daemon.attach("c", source, **again)["options"] == wanted


def test_a_queue_is_set_again_where_a_detach_is_refused_in_the_last_moment(daemon: Daemon, place: Path) -> None:
    device = daemon.device(
        "a", image(place / "a.raw", "raw"), transport="fuse", options={"nr-requests": "37", "max-sectors-kb": "68"}
    )
    wanted = queue(device)
    assert (wanted["nr_requests"], wanted["max_sectors_kb"]) == ("37", "68")
    with open(device, "rb"):  # without O_EXCL: it is found out by taking the device away
        assert error_of(lambda: daemon.detach("a")).code is ErrorCode.DEVICE_IN_USE
        eventually(lambda: queue(device) == wanted, "it is as it was said")
        assert daemon.online("a")
    daemon.detach("a")
