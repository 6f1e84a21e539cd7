"""The page and the picture of a benchmark in a real browser: Debian's Chromium, without a screen."""

from __future__ import annotations

import html
import json
import re
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from storaged.bench.jobs import SETS
from storaged.bench.page import page, picture
from storaged.bench.pixels import png
from storaged.bench.report import JobFacts, Report
from tests.unit.bench_reports import report, run

BROWSER = "chromium-headless-shell"
WAYS = {"direct": 115000.0, "nbd": 60000.0, "vduse": 90000.0, "fuse": 52000.0}
#: Tells of each text in a plot where it is, and of each bar its colour; and what the page is to the window.
LOOK = """
<script>
const plots = [...document.querySelectorAll("svg")].map(svg => {
  const frame = svg.getBoundingClientRect();
  return {
    frame: [frame.left, frame.top, frame.right, frame.bottom],
    texts: [...svg.querySelectorAll("text")].map(text => {
      const box = text.getBoundingClientRect();
      const fill = getComputedStyle(text).fill;
      return {text: text.textContent, box: [box.left, box.top, box.right, box.bottom], fill};
    }),
    bars: [...svg.querySelectorAll("rect")].map(bar => ({
      width: bar.getBoundingClientRect().width, fill: getComputedStyle(bar).fill, says: bar.textContent,
    })),
  };
});
const seen = {
  plots, window: innerWidth, page: document.documentElement.scrollWidth,
  loaded: performance.getEntriesByType("resource").map(entry => entry.name),
  heading: document.querySelector("h1")?.innerText,
};
document.body.insertAdjacentHTML("beforeend", "<pre id=seen></pre>");
document.getElementById("seen").textContent = JSON.stringify(seen);
</script>
"""


def full() -> Report:
    """All jobs of ``full`` by all ways, with figures of all lengths."""
    jobs = [
        JobFacts(name=job.name, options=dict(job.options), writes=job.writes, unit="MB/s" if job.is_linear else "IOPS")
        for job in SETS["full"].jobs
    ]
    runs = [
        run(way, job, number, figure * 1.1**number / (1 if job.unit == "IOPS" else 50))
        for job in jobs for way, figure in WAYS.items() for number in range(4)
    ]
    base = report()
    return report(jobs=jobs, runs=runs, ways=[replace(base.ways[0], name=way, what=f"by {way}") for way in WAYS])


def seen(text: str, place: Path, width: int) -> dict[str, Any]:
    """Open a page in a window of that width, with no network, and return what is seen."""
    # Its own policy forbids scripts; this one looks at it.
    body, end = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", text)
    assert end == 1
    (place / "page.html").write_text(body.replace("</body>", f"{LOOK}</body>"))
    done = subprocess.run(
        [
            BROWSER, "--no-sandbox", "--disable-gpu", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={place}/profile", f"--window-size={width},900", "--dump-dom", f"file://{place}/page.html",
        ],
        capture_output=True, text=True, timeout=60, check=True,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found is not None, done.stderr
    result: dict[str, Any] = json.loads(html.unescape(found[1]))
    return result


def overlap(one: list[float], other: list[float]) -> bool:
    """Whether two boxes have more than a pixel in common."""
    return min(one[2], other[2]) - max(one[0], other[0]) > 1 and min(one[3], other[3]) - max(one[1], other[1]) > 1


@pytest.mark.parametrize("width", [1280, 500])
def test_every_plot_can_be_read(place: Path, width: int) -> None:
    found = seen(page(full()), place, width)
    assert found["heading"] == "rbd:rbd/web1"
    assert found["loaded"] == []
    assert found["page"] <= found["window"], "the page must not be wider than the window"
    assert len(found["plots"]) == 4
    for plot in found["plots"]:
        left, top, right, bottom = plot["frame"]
        for text in plot["texts"]:
            box = text["box"]
            assert box[2] > box[0], text
            assert left - 1 <= box[0], text
            assert box[2] <= right + 1, text
            assert top - 1 <= box[1], text
            assert box[3] <= bottom + 1, text
            assert text["fill"] != "rgb(0, 0, 0)", "a colour that is not there is black"
        for number, text in enumerate(plot["texts"]):
            for other in plot["texts"][number + 1:]:
                assert not overlap(text["box"], other["box"]), (text, other)
        assert all(bar["fill"] not in ("rgb(0, 0, 0)", "none") for bar in plot["bars"])


def test_bars_are_as_long_as_their_figures(place: Path) -> None:
    requests = seen(page(full()), place, 1280)["plots"][0]
    length = {bar["says"].partition(":")[0]: bar["width"] for bar in requests["bars"]}
    for way, figure in WAYS.items():
        assert length[way] / length["direct"] == pytest.approx(figure / WAYS["direct"], abs=0.01)


def test_the_picture_is_drawn_by_a_browser(place: Path) -> None:
    for name, text in (("a", picture(full())), ("empty", '<svg xmlns="http://www.w3.org/2000/svg"/>')):
        (place / f"{name}.svg").write_text(text)
        subprocess.run(
            [
                BROWSER, "--no-sandbox", "--disable-gpu", f"--user-data-dir={place}/profile", "--window-size=1000,900",
                f"--screenshot={place}/{name}.png", f"file://{place}/{name}.svg",
            ],
            capture_output=True, timeout=60, check=True,
        )
    # What cannot be drawn is a white page, or a short message.
    assert (place / "a.png").stat().st_size > 5 * (place / "empty.png").stat().st_size


def test_the_picture_becomes_a_png_in_its_colours() -> None:
    drawn = picture(full())
    size = re.search(r'width="(\d+)" height="(\d+)"', drawn)
    assert size is not None
    made = png(drawn)
    assert made.startswith(b"\x89PNG\r\n\x1a\n")
    assert struct.unpack("!II", made[16:24]) == (2 * int(size[1]), 2 * int(size[2]))
    # What the program does not understand it draws in black.
    assert png(drawn.replace('fill="#', 'fill="#000000" data-was="#')) != made
