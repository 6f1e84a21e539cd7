"""Each case becomes a line of the results; after each the machine is looked at."""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from tests.harness import Daemon
from tests.vm.faults import table
from tests.vm.faults.cases import Case
from tests.vm.faults.load import Kernel, nothing_is_stuck

#: scripts/vm brings it out as .cache/vm/last/faults.log.
RESULTS = Path(os.environ.get("STORAGED_RESULTS", "/run/storaged-vm/faults.log"))


def pytest_configure(config: pytest.Config) -> None:
    """Two markers of these tests."""
    config.addinivalue_line("markers", "fault(title, expected): a row of the table of faults")
    config.addinivalue_line("markers", "matrix: a case that CI leaves out; -m 'matrix or not matrix' runs all")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without -m that names it, what is in the whole matrix only is left out."""
    whole = "matrix" in config.option.markexpr
    left_out = [] if whole else [item for item in items if item.get_closest_marker("matrix")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    for item in items:
        case = getattr(getattr(item, "callspec", None), "params", {}).get("case")
        if isinstance(case, Case):
            case.whole = whole


@pytest.fixture(autouse=True)
def sound_machine() -> Iterator[None]:
    """After each test: nobody is stuck, and the kernel has not complained."""
    kernel = Kernel()
    yield
    nothing_is_stuck()
    complaints = kernel.complaints()
    kernel.close()
    assert complaints == []


@functools.cache
def versions() -> dict[str, str]:
    """What of the machine matters for a result."""
    said = subprocess.run(["qemu-storage-daemon", "--version"], capture_output=True, text=True, check=True).stdout
    return {"kernel": os.uname().release, "qsd": said.split()[2]}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Write the line of a case when all of it is over."""
    report = yield
    marker = item.get_closest_marker("fault")
    case = item.funcargs.get("case") if isinstance(item, pytest.Function) else None
    if not isinstance(item, pytest.Function) or marker is None or not isinstance(case, Case):
        return report
    daemon = next((value for value in item.funcargs.values() if isinstance(value, Daemon)), None)
    if report.failed and daemon is not None and daemon.log.exists():
        report.sections.append(("storaged's log", "\n".join(daemon.log.read_text().splitlines()[-40:])))
    case.notes.setdefault("phases", {})[report.when] = [report.passed, round(report.duration, 1)]
    if report.when == "teardown":
        phases = case.notes.pop("phases").values()
        result = {
            "fault": marker.args[0], "expected": marker.args[1], "transport": case.transport, "use": case.use,
            "depth": case.depth, "step": case.step, "passed": all(passed for passed, _ in phases),
            "outcome": case.outcome, "pause": case.pause, "seconds": round(sum(took for _, took in phases), 1),
            **versions(), **case.notes,
        }
        RESULTS.parent.mkdir(parents=True, exist_ok=True)
        with open(RESULTS, "a") as file:
            file.write(json.dumps(result) + "\n")
    return report


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table."""
    if RESULTS.exists():
        terminalreporter.section("faults and transports")
        terminalreporter.write(table.markdown(table.load([RESULTS])))
