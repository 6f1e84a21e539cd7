"""What transports need of a kernel's configuration: the table, the fragments, the checker."""

from __future__ import annotations

import dataclasses
import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from storaged.errors import ErrorCode, StoragedError
from storaged.model.kernelconfig import (
    BY_TRANSPORT,
    MAX_CONFIG,
    NEEDS,
    KernelConfig,
    Needs,
    check,
    decode_config,
    fragment,
    parse_config,
    works,
)

ROOT = Path(__file__).parents[2]
DIRECTORY = ROOT / "kernel-config"
CHECK = DIRECTORY / "check"
HEADER = "#\n# Automatically generated file; DO NOT EDIT.\n# Linux/x86 {} Kernel Configuration\n#\n"

TRANSPORTS = pytest.mark.parametrize("needs", NEEDS, ids=lambda needs: needs.transport)


def everything(version: str = "6.12.48") -> str:
    return HEADER.format(version) + "".join(fragment(needs) for needs in NEEDS)


@TRANSPORTS
def test_the_fragments_are_what_the_table_says(needs: Needs) -> None:
    text = (DIRECTORY / f"{needs.transport}.config").read_text()
    assert text == fragment(needs), f"kernel-config/check --fragment {needs.transport} prints the new one"


def test_there_is_a_fragment_for_each_transport_and_no_other() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.config")} == BY_TRANSPORT.keys()


def test_the_user_mode_linux_of_the_benchmarks_is_told_to_have_all_transports_built_in() -> None:
    # Its build takes minutes; that it would lack a transport is seen here.
    told = subprocess.run([DIRECTORY / "uml", "--options"], check=True, capture_output=True, text=True).stdout
    for verdict in check(parse_config(told)):
        assert verdict.possible, verdict
        assert not verdict.modules
    assert "CONFIG_HOSTFS=y\n" in told


@TRANSPORTS
def test_merge_config_of_old_kernels_takes_no_comment_for_an_option(needs: Needs) -> None:
    # Its expression up to 4.19: s/^\(# \)\{0,1\}\(CONFIG_[a-zA-Z0-9_]*\)[= ].*/\2/p
    found = re.findall(r"^(?:# )?(CONFIG_\w*)[= ]", fragment(needs), re.MULTILINE)
    assert found == [f"CONFIG_{option.symbol}" for option in needs.options]


@TRANSPORTS
def test_a_fragment_alone_makes_its_transport_possible(needs: Needs) -> None:
    verdicts = check(parse_config(fragment(needs)), needs.transport)
    assert [verdict.transport for verdict in verdicts] == [needs.transport]
    assert verdicts[0].possible
    assert verdicts[0].modules == needs.modules
    assert works(verdicts, needs.transport)
    assert works(verdicts) == needs.device


@TRANSPORTS
def test_each_option_that_is_missing_is_named_and_explained(needs: Needs) -> None:
    for option in needs.options:
        text = re.sub(rf"^CONFIG_{option.symbol}=.*\n", "", fragment(needs), flags=re.MULTILINE)
        (verdict,) = check(parse_config(text), needs.transport)
        if option.lets:  # what it makes possible is there
            assert verdict.possible
            continue
        assert not verdict.possible
        assert f"CONFIG_{option.symbol}" in {lack.symbol for lack in verdict.missing}
        assert all(lack.why for lack in verdict.missing)
        assert f"CONFIG_{option.symbol}" in verdict.detail
        assert f"kernel-config/{needs.transport}.config" in verdict.hint


def test_what_only_lets_another_be_chosen_is_named_when_that_is_missing_too() -> None:
    text = re.sub(r"^CONFIG_(XEN|VDPA_USER)=.*\n", "", fragment(BY_TRANSPORT["vduse"]), flags=re.MULTILINE)
    (verdict,) = check(parse_config(text), "vduse")
    assert [lack.symbol for lack in verdict.missing] == ["CONFIG_XEN", "CONFIG_VDPA_USER"]


def test_what_is_built_in_needs_no_module() -> None:
    (verdict,) = check(parse_config(fragment(BY_TRANSPORT["fuse"]).replace("=m", "=y")), "fuse")
    assert verdict.possible
    assert verdict.modules == ()


def test_a_kernel_that_is_too_old_is_told_so() -> None:
    verdicts = {verdict.transport: verdict for verdict in check(parse_config(everything("5.10.0-30")))}
    assert verdicts["fuse"].possible
    assert "5.15 is needed" in verdicts["vduse"].detail
    assert "5.14 is needed" in verdicts["nbd"].detail
    assert all(verdict.possible for verdict in check(parse_config(everything("5.15.0"))))


@pytest.mark.parametrize(
    ("header", "version"),
    [
        ("# Linux/x86 6.1.170 Kernel Configuration\n", (6, 1)),
        ("# Linux/arm64 6.12.0-rc3 Kernel Configuration\n", (6, 12)),
        ("# Linux/x86_64 5.15.0-91-generic Kernel Configuration\n", (5, 15)),
        ("# Linux is nice\n", None),
    ],
)
def test_the_version_is_in_the_comment_at_the_top(header: str, version: tuple[int, int] | None) -> None:
    assert KernelConfig(f"#\n# Automatically generated file; DO NOT EDIT.\n{header}#\n").version == version


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("CONFIG_NBD=y\n", "y"),
        ("CONFIG_NBD=m", "m"),
        ("CONFIG_NBD=m\r\n", "m"),
        ("CONFIG_NBD=n\n", "n"),
        ("CONFIG_NBD=\n", "n"),
        ("# CONFIG_NBD is not set\n", "n"),
        ("", "n"),
        ("CONFIG_NBD_X=y\nXCONFIG_NBD=y\n CONFIG_NBD=y\n", "n"),
        ("#CONFIG_NBD=y\n# CONFIG_NBD=y\n", "n"),
        ("CONFIG_NBD=y\n# CONFIG_NBD is not set\n", "n"),
        ("# CONFIG_NBD is not set\nCONFIG_NBD=m\n", "m"),
    ],
)
def test_values(text: str, value: str) -> None:
    assert KernelConfig(text).value("NBD") == value


@given(st.dictionaries(st.from_regex(r"[A-Z][A-Z0-9_]{0,8}", fullmatch=True), st.sampled_from("ymn"), min_size=1))
def test_what_was_written_is_read(values: dict[str, str]) -> None:
    lines = [f"CONFIG_{key}={value}" if value != "n" else f"# CONFIG_{key} is not set" for key, value in values.items()]
    text = "\n".join(lines)
    for config in (parse_config(text), decode_config(text.encode()), decode_config(gzip.compress(text.encode()))):
        assert {key: config.value(key) for key in values} == values
        assert config.value("ZZZZZZZZZZ") == "n"


@given(st.binary() | st.binary().map(gzip.compress) | st.binary().map(lambda data: b"\x1f\x8b" + data))
def test_any_file_is_judged_or_refused(data: bytes) -> None:
    try:
        verdicts = check(decode_config(data))
    except StoragedError as error:
        code = error.code
    else:
        assert not works(verdicts)
        return
    assert code is ErrorCode.INVALID_ARGUMENT


def test_a_small_file_that_unpacks_to_very_much_is_cut() -> None:
    packed = gzip.compress(b"CONFIG_NBD=y\n" + b"#" * (4 * MAX_CONFIG))
    assert len(decode_config(packed).text) == MAX_CONFIG


# The program kernel-config/check, by a Python without any of storaged's dependencies.


def run_check(*arguments: str, data: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-I", "-S", str(CHECK), *arguments],
        input=data, capture_output=True, text=True, timeout=30, check=False,
    )


def test_the_program_reads_stdin_and_can_answer_in_json() -> None:
    done = run_check("--json", "-", data=everything())
    assert (done.returncode, done.stderr) == (0, "")
    verdicts = json.loads(done.stdout)
    assert [verdict["transport"] for verdict in verdicts] == list(BY_TRANSPORT)
    assert all(verdict["possible"] for verdict in verdicts)
    assert set(verdicts[0]) == {field.name for field in dataclasses.fields(check(parse_config(everything()))[0])}


def test_the_program_is_asked_about_one_transport(tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(fragment(BY_TRANSPORT["fuse"]))
    done = run_check(str(config))
    assert done.returncode == 0
    assert "ok    transport fuse: possible" in done.stdout
    assert "warn  transport vduse: not set:" in done.stdout
    done = run_check("--transport", "vduse", str(config))
    assert done.returncode == 1
    assert "fail  transport vduse: not set:" in done.stdout
    assert "fuse:" not in done.stdout


def test_the_program_prints_fragments() -> None:
    assert run_check("--fragment", "nbd").stdout == fragment(BY_TRANSPORT["nbd"])


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (["/no/such/file"], 1, "[invalid-argument]"),
        (["0.0.0-none"], 1, "no configuration of kernel 0.0.0-none is installed"),
        (["-"], 1, "no configuration of a kernel"),
        (["--transport", "pigeon"], 2, "usage:"),
    ],
)
def test_the_program_says_what_is_wrong(arguments: list[str], status: int, said: str) -> None:
    done = run_check(*arguments)
    assert done.returncode == status
    assert said in done.stderr
    assert "Traceback" not in done.stderr
