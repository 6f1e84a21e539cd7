"""The page and the picture: whole, loading nothing, and nothing in them is taken for markup."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from msgspec.structs import replace

from storaged.bench.page import page, picture
from storaged.bench.report import Report, Run
from tests.unit.bench_reports import LINEAR, RANDOM, report, run

HOSTILE = "<script>alert('x')</script>&\"\x1b[31m\x00 \udc80"


class Elements(HTMLParser):
    """Collects the elements of a page and their attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def elements(html: str) -> Elements:
    """Parse a page."""
    parser = Elements()
    parser.feed(html)
    return parser


def hostile() -> Report:
    """A report each text of which was made by somebody who means harm."""
    way = replace(report().ways[0], name="direct", what=HOSTILE, missing="")
    jobs = [replace(LINEAR, name=HOSTILE)]
    runs: list[Run] = [replace(run("direct", LINEAR, n, 100), job=HOSTILE) for n in range(2)]
    runs.append(replace(runs[0], round=2, error=HOSTILE))
    return report(
        source=HOSTILE, partial=HOSTILE, notes=[HOSTILE], machine={HOSTILE: HOSTILE}, options={HOSTILE: HOSTILE},
        jobs=jobs, ways=[way], runs=runs, job_set=HOSTILE,
    )


def test_the_page_loads_nothing_and_runs_nothing() -> None:
    found = elements(page(report()))
    for tag, attributes in found.found:
        assert tag not in ("script", "link", "img", "iframe", "object", "embed", "base", "form")
        assert not {"src", "href", "xlink:href", "action", "data"} & attributes.keys()
        assert not [name for name in attributes if name.startswith("on")]
    assert "url(" not in page(report())
    assert "@import" not in page(report())


def test_the_page_has_a_plot_for_each_kind_of_figure_and_all_figures_as_a_table() -> None:
    found = elements(page(report()))
    labels = [attributes["aria-label"] for tag, attributes in found.found if tag == "svg"]
    assert labels == ["Requests a second", "Megabytes a second", "Latency", "Processor time for a request"]
    assert [tag for tag, _ in found.found].count("tr") == 1 + 2 * 3
    assert "0.78 (0.77 to 0.79)" in page(report())


def test_plots_without_figures_are_left_out() -> None:
    runs = [replace(run("fuse", RANDOM, n, 100), latency={}, cpu={}) for n in range(2)]
    html = page(report(runs=runs))
    assert html.count("<svg") == 1
    assert page(report(runs=[])).count("<svg") == 0


@pytest.mark.parametrize("make", [page, picture])
def test_no_text_of_a_report_is_taken_for_markup(make: object) -> None:
    assert callable(make)
    html = make(hostile())
    assert "<script" not in html
    assert "\x1b" not in html
    html.encode()
    assert "&lt;script&gt;" in html


def test_the_picture_needs_no_variables_of_css_which_only_browsers_know() -> None:
    assert "var(--direct)" in page(report())
    assert "var(--" not in picture(report())
    assert 'fill="#' in picture(report())
    # What a report says stays as it is.
    assert "var(--none)" in picture(report(source="var(--none)"))


def test_the_picture_is_an_svg_that_any_program_reads() -> None:
    for one in (report(), hostile(), report(runs=[])):
        root = ElementTree.fromstring(picture(one))
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert float(root.attrib["height"]) > 0
    assert not re.search(r"(href|url\(|<image|<script)", picture(report()))


def test_wild_figures_have_plots_too() -> None:
    """One round, or two that are a factor of a million apart."""
    for figures in ({"direct": [5.0]}, {"direct": [1.0, 1e6], "fuse": [1e6, 1.0]}, {"direct": [1e-3, 1e-3]}):
        text = picture(report(figures))
        assert "nan" not in text
        assert "inf" not in text
        ElementTree.fromstring(text)
