"""/etc/storaged/profiles/NAME.toml: understood, or refused with the key; and what a volume says itself wins."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from storaged.__main__ import main
from storaged.backends import BACKENDS
from storaged.errors import ErrorCode
from storaged.host import disk, loop, queue, worker
from storaged.host import nbd as host_nbd
from storaged.host.blocking import BlockingCalls
from storaged.model.layout import Layout
from storaged.model.profile import applied, known_options, parse_profile, profile_text
from storaged.model.record import Record
from storaged.model.spec import COMMON_OPTIONS, VolumeSpec
from storaged.store.profiles import profile_path, with_profile
from storaged.transports import TRANSPORTS, check_transport, fuse, nbd
from storaged.transports import queue as queue_options
from storaged.transports.base import Site, iothread
from tests.harness import error_of

OF_TRANSPORTS = {key for transport in TRANSPORTS.values() for key in transport.options}
PATH = "/etc/storaged/profiles/fast.toml"


def volume(profile: str | None = "fast", transport: str = "auto", source: str = "/a.raw", **options: str) -> VolumeSpec:
    """A volume with these options; _ stands for -."""
    return VolumeSpec(
        name="web1", source=source, profile=profile, transport=transport,
        options={key.replace("_", "-"): value for key, value in options.items()},
    )


@pytest.fixture
def profiles(tmp_path: Path) -> Path:
    """A directory of profiles."""
    path = tmp_path / "etc/storaged/profiles"
    path.mkdir(parents=True)
    return path


def test_what_the_volume_says_wins_and_the_profile_says_the_rest() -> None:
    found = applied(volume(cache="none"), "nbd", {"cache": "writeback", "connections": "4"})
    assert (found.options, found.transport) == ({"cache": "none", "connections": "4"}, "nbd")
    assert applied(volume(transport="fuse"), "nbd", {}).transport == "fuse"


def test_a_profile_is_read_once_and_without_one_nothing_is(profiles: Path) -> None:
    (profiles / "fast.toml").write_text('transport = "fuse"\n[options]\naio = "io_uring"\nread-ahead-kb = 512\n')
    found = with_profile(volume(aio="threads"), str(profiles))
    assert found.options == {"aio": "threads", "read-ahead-kb": "512"}
    assert (found.transport, found.profile) == ("fuse", "fast")
    assert with_profile(volume(profile=None), "/nowhere") == volume(profile=None)


def test_what_is_too_long_is_refused_in_a_file_and_together_with_the_volume(profiles: Path) -> None:
    path = profiles / "fast.toml"
    path.write_text(f"# {'x' * (64 << 10)}")
    error = error_of(lambda: with_profile(volume(), str(profiles)))
    assert (error.code, "64 KiB" in error.cause) == (ErrorCode.INVALID_ARGUMENT, True)
    assert str(path) in error.message
    path.write_text(f"options = {{ aio = '{'x' * 20000}' }}")
    assert with_profile(volume(), str(profiles)).options["aio"]
    error = error_of(lambda: with_profile(volume(backing="allow:/" + 20000 * "x"), str(profiles)))
    assert (error.code, error.message) == (ErrorCode.INVALID_ARGUMENT, "source and options are too long")


def test_an_unknown_profile_is_refused_and_the_nearest_one_is_named(profiles: Path) -> None:
    (profiles / "fast.toml").write_text("")
    error = error_of(lambda: with_profile(volume("fats"), str(profiles)))
    assert (error.code, error.volume) == (ErrorCode.INVALID_ARGUMENT, "web1")
    assert "'fats'" in error.message
    assert "'fast'" in error.hint
    assert "make one" in error_of(lambda: with_profile(volume(), str(profiles / "none"))).hint


@pytest.mark.parametrize("name", ["../volumes/a", ".fast", "", "a/b", "x" * 64])
def test_a_profile_never_leads_out_of_its_directory(profiles: Path, name: str) -> None:
    error = error_of(lambda: with_profile(volume(name), str(profiles)))
    assert error.code is ErrorCode.INVALID_NAME
    assert "name of a profile" in error.message


@pytest.mark.parametrize(("option", "transport", "source"), [
    ("connections", "fuse", "/a.raw"), ("scheduler", "vhost-user", "/a.raw"), ("aio", "auto", "nbd://h/x"),
    ("reconnect-delay", "auto", "/a.raw"),
])
def test_an_option_that_does_not_fit_is_refused_with_the_option_the_profile_and_the_volume(
    profiles: Path, option: str, transport: str, source: str
) -> None:
    (profiles / "fast.toml").write_text(f'options = {{ {option} = "4" }}\n')
    error = error_of(lambda: with_profile(volume(transport=transport, source=source), str(profiles)))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert f"'{option}'" in error.message
    assert "'fast'" in error.message
    assert error.volume == "web1"
    assert transport in error.cause


@pytest.mark.parametrize(("text", "what", "hint"), [
    (b"trnsport = 'nbd'", "'trnsport'", "'transport'"),
    (b"options = { conections = 4 }", "'conections'", "'connections'"),
    (b"options = { read_ahead_kb = 4 }", "'read_ahead_kb'", "'read-ahead-kb'"),
    (b"options = { backing = 'allow:/' }", "the volume's own", "known here"),
    (b"options = { password-file = '/x' }", "the volume's own", ""),
    (b"transport = 'usb'", "usb", PATH), (b"options = { cache = [] }", "options", PATH),
    (b"a = = b", "line 1", PATH), (b"\xff", "decode", PATH),
])
def test_a_file_that_is_wrong_is_refused_with_the_place_and_the_nearest_key(text: bytes, what: str, hint: str) -> None:
    error = error_of(lambda: parse_profile(text, PATH, OF_TRANSPORTS))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert what in f"{error.message} {error.cause}"
    assert hint in error.hint
    assert PATH in f"{error.message} {error.hint}"


def test_no_secret_place_or_owner_can_be_in_a_profile() -> None:
    known = known_options(OF_TRANSPORTS)
    secrets = {key for each in BACKENDS.values() for key in getattr(each, "secret_options", ())}
    assert not known & (secrets | {"key-file", "backing", "backing-sources", "socket-owner", "pool", "image", "user"})
    everything = COMMON_OPTIONS.keys() | OF_TRANSPORTS | {key for each in BACKENDS.values() for key in each.options}
    assert known <= everything


@given(
    st.dictionaries(
        st.sampled_from(sorted(known_options(OF_TRANSPORTS))),
        st.from_regex(r"[a-z0-9:_-]+", fullmatch=True) | st.text("a0٣²\x7f\0\"\\\n#é"),
    ),
    st.sampled_from(["auto", "nbd", "fuse"]),
)
@settings(deadline=None)
def test_what_is_written_is_read_again(options: dict[str, str], transport: str) -> None:
    text = profile_text(transport, options, ["found by a test", "", 'with "quotes" = 1'])
    assert tomllib.loads(text)["options"].keys() == options.keys()
    found = parse_profile(text.encode(), PATH, OF_TRANSPORTS)
    assert found == (transport, options)


def test_config_check_looks_at_profiles_and_at_what_volumes_make_of_them(
    profiles: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layout = Layout.below(str(tmp_path))
    Path(layout.volume_files).mkdir()
    (profiles / "bad.toml").write_text("optons = {}\n[options]\ncach = 'none'\n")
    (profiles / "fast.toml").write_text("[options]\nconnections = 4\n")
    (profiles / "typo.toml").write_text("[options]\ncach = 'none'\n")
    for name, profile in (("a", "fast"), ("b", "none")):
        Path(f"{layout.volume_files}/{name}.toml").write_text(
            f"source = '/x'\ntransport = 'fuse'\nprofile = '{profile}'\n"
        )
    assert main(["--root", str(tmp_path), "config", "check"]) == 1
    said = capsys.readouterr().out
    assert f"{profiles}/bad.toml:1: unknown key 'optons' (did you mean options?)" in said
    assert "did you mean 'cache'?" in said
    assert "/volumes/a.toml: the profile 'fast' does not fit: option 'connections'" in said
    assert "/volumes/b.toml: there is no profile 'none'" in said
    assert main(["--root", str(tmp_path), "config", "check", f"{profiles}/fast.toml"]) == 0
    assert main(["--root", str(tmp_path), "config", "check", f"{profiles}/typo.toml"]) == 1


@pytest.mark.parametrize(("file", "key"), [("profile", "Profile"), ("volume", "VolumeFile"), ("storaged", "Config")])
def test_a_schema_is_printed_of_each_kind_of_file(file: str, key: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema", file]) == 0
    schema = msgspec.json.decode(capsys.readouterr().out)
    assert schema["$ref"] == f"#/$defs/{key}"
    assert schema["$defs"][key]["additionalProperties"] is False


def test_a_profile_has_the_name_of_its_file() -> None:
    assert profile_path("/etc/storaged/profiles", "fast") == PATH


# The options that came with profiles -----------------------------------------------------------------------------


def test_a_queue_is_set_up_with_the_scheduler_first() -> None:
    said = volume(nr_requests="64", scheduler="none", max_sectors_kb="512", read_ahead_kb="0")
    assert list(queue_options.attributes(said).items()) == [
        ("queue/scheduler", "none"), ("queue/max_sectors_kb", "512"), ("queue/nr_requests", "64"),
        ("queue/read_ahead_kb", "0"),
    ]


@pytest.mark.parametrize(("key", "value"), [
    ("scheduler", "../x"), ("scheduler", ""), ("scheduler", "a b"), ("nr_requests", "0"), ("nr_requests", "many"),
    ("read_ahead_kb", "-1"), ("max_sectors_kb", "1M"), ("poll_max_ns", "1s"),
])
def test_what_cannot_be_an_attribute_is_refused_before_anything_is_done(key: str, value: str) -> None:
    error = error_of(lambda: check_transport(volume(profile=None, **{key: value})))
    assert error.code is ErrorCode.INVALID_ARGUMENT
    assert key.replace("_", "-") in error.message


def test_the_io_thread_polls_for_as_long_as_was_said() -> None:
    plain = Record(spec=volume(), transport="nbd", transport_reason="", binary="/q")
    assert iothread(plain) == {"qom-type": "iothread", "id": "io"}
    said = msgspec.structs.replace(plain, settings={"poll-max-ns": 0})
    assert iothread(said) == {"qom-type": "iothread", "id": "io", "poll-max-ns": 0}


class Kernel:
    """Attributes of a device, of which some cannot be what is asked for, and some change along with others."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.values = {"queue/scheduler": "[none] bfq", "queue/nr_requests": "100", "queue/max_hw_sectors_kb": "1280",
                       "queue/max_sectors_kb": "1280", "queue/read_ahead_kb": "4096"}
        self.written: list[str] = []
        self.fails: dict[str, OSError] = {}
        monkeypatch.setattr(disk, "attribute", lambda path, name: self.values.get(name))
        monkeypatch.setattr(worker, "write", self.write)

    def write(self, path: str, text: str) -> None:
        name = path.removeprefix("/sys/block/loop9/")
        self.written.append(f"{name}={text}")
        if name in self.fails:
            raise self.fails[name]
        if name == "queue/scheduler":
            if text not in ("none", "bfq"):
                raise OSError(errno.EINVAL, "Invalid argument")
            self.values["queue/nr_requests"] = "128" if text == "none" else "256"
            text = "[none] bfq" if text == "none" else "none [bfq]"
        if name == "queue/max_sectors_kb":
            text = str(min(int(text), 1280))
            self.values["queue/read_ahead_kb"] = "128"
        self.values[name] = text


def test_a_queue_gets_what_differs_and_is_noted_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    wanted = {"queue/scheduler": "bfq", "queue/max_sectors_kb": "1280", "queue/nr_requests": "64"}
    assert queue.former("/dev/loop9", wanted) == {
        "queue/scheduler": "none", "queue/max_sectors_kb": "1280", "queue/nr_requests": "100",
        "queue/read_ahead_kb": "4096",
    }
    assert queue.set_up("/dev/loop9", wanted) == []
    assert kernel.written == ["queue/scheduler=bfq", "queue/nr_requests=64"]
    # Once more, as after a daemon's death: nothing is left to do.
    assert queue.set_up("/dev/loop9", wanted) == []
    assert len(kernel.written) == 2


@pytest.mark.parametrize("wanted", [
    {"queue/scheduler": "bfq"}, {"queue/max_sectors_kb": "64"},
    {"queue/scheduler": "bfq", "queue/max_sectors_kb": "64", "queue/nr_requests": "64", "queue/read_ahead_kb": "512"},
    {"queue/nr_requests": "64"}, {"queue/max_sectors_kb": "64", "queue/read_ahead_kb": "4096"},
])
@pytest.mark.parametrize("cut_short", [0, 1, 9])
def test_a_queue_is_given_back_with_what_the_kernel_changed_along_also_if_half_of_it_was_set(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], cut_short: int
) -> None:
    kernel = Kernel(monkeypatch)
    before = dict(kernel.values)
    former = queue.former("/dev/loop9", wanted)
    queue.set_up("/dev/loop9", dict(list(wanted.items())[:cut_short]))
    assert queue.is_given_back("/dev/loop9", former, wanted) == any(
        former[name] != value for name, value in list(wanted.items())[cut_short:]
    )
    queue.give_back("/dev/loop9", former, wanted)
    assert kernel.values == before
    assert queue.is_given_back("/dev/loop9", former, wanted)


def site() -> Site:
    """Of the volume."""
    return Site("web1", "/nowhere", BlockingCalls("web1"), "/nowhere")


def of_nbd(**options: str) -> Record:
    """A volume by NBD, of whose queue the number of requests was set."""
    return Record(
        spec=volume(nr_requests="64", **options), transport="nbd", transport_reason="", binary="/q",
        settings={"timeout": 1}, queue={"queue/nr_requests": "128"},
    )


def test_an_nbd_device_gets_larger_requests_unless_their_size_was_said(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    kernel.values["queue/max_sectors_kb"] = "128"
    nbd._tune("/dev/loop9", of_nbd(max_sectors_kb="128"))
    assert kernel.written == []
    nbd._tune("/dev/loop9", of_nbd())
    assert kernel.written == ["queue/max_sectors_kb=1024"]


def test_an_nbd_device_is_given_back_when_nobody_has_it_any_more(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    kernel.values |= {"queue/nr_requests": "64", "pid": "17"}
    nbd._give_back("/dev/loop9", of_nbd())
    assert kernel.written == []
    del kernel.values["pid"]
    nbd._give_back("/dev/loop9", of_nbd())
    assert kernel.written == ["queue/nr_requests=128"]


def test_what_somebody_else_has_set_since_is_not_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    wanted = {"queue/max_sectors_kb": "64", "queue/nr_requests": "64"}
    former = queue.former("/dev/loop9", wanted)
    queue.set_up("/dev/loop9", wanted)
    kernel.values["queue/nr_requests"] = "32"
    queue.give_back("/dev/loop9", former, wanted)
    assert kernel.values["queue/nr_requests"] == "32"
    assert kernel.values["queue/max_sectors_kb"] == "1280"
    # Whoever changed the scheduler has what the kernel made of the rest.
    kernel.values |= {"queue/scheduler": "none [bfq]", "queue/nr_requests": "256"}
    queue.give_back("/dev/loop9", {"queue/scheduler": "bfq", "queue/nr_requests": "9"}, {"queue/scheduler": "none"})
    assert kernel.values["queue/nr_requests"] == "256"


@pytest.mark.parametrize(("wanted", "cause", "hint"), [
    ({"queue/scheduler": "foo", "queue/nr_requests": "64"}, "Invalid argument", "none, bfq"),
    ({"queue/max_sectors_kb": "9000", "queue/nr_requests": "64"}, "it made 1280 of it", "at most 1280"),
])
def test_what_the_kernel_does_not_take_is_told_with_its_error_and_the_rest_is_set(
    monkeypatch: pytest.MonkeyPatch, wanted: dict[str, str], cause: str, hint: str
) -> None:
    kernel = Kernel(monkeypatch)
    kernel.values["queue/max_sectors_kb"] = "512"
    before = dict(kernel.values)
    former = queue.former("/dev/loop9", wanted)
    (error,) = queue.set_up("/dev/loop9", wanted)
    assert (error.code, error.cause) == (ErrorCode.INVALID_ARGUMENT, cause)
    assert hint in error.hint
    assert "/dev/loop9" in error.message
    assert kernel.values["queue/max_sectors_kb"] == "512"
    assert kernel.values["queue/nr_requests"] == "64"
    queue.give_back("/dev/loop9", former, wanted)
    assert kernel.values["queue/nr_requests"] == before["queue/nr_requests"]


def test_a_write_whose_outcome_is_not_known_is_no_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = Kernel(monkeypatch)
    kernel.fails["queue/nr_requests"] = OSError(errno.EOWNERDEAD, "the process that asked the kernel was killed")
    error = error_of(lambda: queue.set_up("/dev/loop9", {"queue/nr_requests": "64"}))
    assert (error.code, "was killed" in error.cause) == (ErrorCode.DEVICE_FAILED, True)


def test_a_loop_device_is_given_back_flushed_and_before_anybody_can_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(loop, "is_bound", lambda device: "clear" not in done)
    monkeypatch.setattr(disk, "open_alone", lambda *_, **__: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(disk, "flush", lambda fd, path: done.append("flush"))
    monkeypatch.setattr(queue, "give_back", lambda path, former, made: done.append((former, made)))
    monkeypatch.setattr(fcntl, "ioctl", lambda fd, request, *_: done.append("clear"))
    record = msgspec.structs.replace(of_nbd(), transport="fuse", device="/dev/loop9")
    asyncio.run(fuse.TRANSPORT.disconnect(site(), record, 5))
    assert done == ["flush", ({"queue/nr_requests": "128"}, {"queue/nr_requests": "64"}), "clear"]


def test_an_nbd_device_is_given_back_flushed_and_before_it_is_disconnected(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[object] = []
    monkeypatch.setattr(disk, "open_alone", lambda *_, **__: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(disk, "device_users", lambda path: [])
    monkeypatch.setattr(disk, "flush", lambda fd, path: done.append("flush"))
    monkeypatch.setattr(queue, "give_back", lambda path, former, made: done.append((former, made)))
    monkeypatch.setattr(host_nbd, "disconnect", lambda path, name: done.append("disconnect"))
    record = msgspec.structs.replace(of_nbd(), device="/dev/nbd9")
    asyncio.run(nbd.TRANSPORT.disconnect(site(), record, 5))
    assert done == ["flush", ({"queue/nr_requests": "128"}, {"queue/nr_requests": "64"}), "disconnect"]
