"""A short run over each target in every run of the tests; ``make fuzz`` looks longer, and elsewhere each time."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.targets import TARGETS

HERE = Path(__file__).parents[2]
#: Inputs of one run. The same ones each time: a new fault is found by who looks for it, not by who lands something.
RUNS = 2_000
#: Fails where the input has the four bytes that a header begins with: that takes watching the program's comparisons.
PLANTED = """
import contextlib, sys
from tests.fuzz import __main__ as fuzz, targets

def check(data):
    try:
        targets.read_header(targets.Format.QCOW2, lambda offset, length: data[offset:offset + length], len(data))
    except targets.StoragedError as error:
        if error.code is not targets.ErrorCode.WRONG_FORMAT:
            raise ValueError("found")

fuzz.TARGETS["header"] = targets.Target([b"x" * 600], lambda: contextlib.nullcontext(check))
fuzz.main(["header", "-runs=1000000", "-seed=1"] + sys.argv[1:])
"""


def fuzz(*words: str, place: Path) -> subprocess.CompletedProcess[str]:
    """Run the fuzzer; what it finds is left in ``place``."""
    return subprocess.run(
        [sys.executable, *words, f"-artifact_prefix={place}/"], cwd=HERE, capture_output=True, text=True,
        errors="replace", timeout=100,
    )


@pytest.mark.parametrize("target", TARGETS)
def test_nothing_that_is_read_ends_in_a_bug(target: str, tmp_path: Path) -> None:
    done = fuzz("-m", "tests.fuzz", target, f"-runs={RUNS}", "-seed=1", place=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    found = re.search(r"Done (\d+) runs", done.stderr)
    assert found is not None, done.stderr[-4000:]
    assert int(found[1]) >= RUNS
    assert re.search(r"cov: [1-9]", done.stderr), "nothing of the program was watched"


def test_what_is_planted_is_found(tmp_path: Path) -> None:
    done = fuzz("-c", PLANTED, place=tmp_path)
    assert done.returncode == 77
    assert "ValueError: found" in done.stdout + done.stderr


def test_a_target_that_there_is_not_is_refused(tmp_path: Path) -> None:
    done = fuzz("-m", "tests.fuzz", "nothing", place=tmp_path)
    assert done.returncode == 2
    assert "usage:" in done.stderr
